"""Trains a small diffusion model as diffusers' train_unconditional.py does, with one changed import for the averages.

    torchrun --nproc-per-node 2 launch/train_diffusers.py                          # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/train_diffusers.py --output-dir runs/ddpm --resume
    python launch/train_diffusers.py                                               # one process

The data are generated: images of 8 x 8 pixels with one bright spot. Needs diffusers and accelerate: docs/diffusers.md.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ema_dist.diffusers import EMAModel
from recipe.script import OptionParser, UsageError, positive_int, run_script

SIZE = 8
UNET = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def make_images(count: int, seed: int) -> Tensor:
    """Images in [-1, 1], each with one bright spot at a random position."""
    generator = torch.Generator().manual_seed(seed)
    positions = 1 + (SIZE - 3) * torch.rand(count, 2, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    squared_distance = (row - positions[:, 0]) ** 2 + (column - positions[:, 1]) ** 2
    return (2 * torch.exp(-squared_distance / 2) - 1).unsqueeze(1)


def main() -> None:
    args = parse_arguments()
    # The order of the batches is a function of the seed and the epoch, so that a resumed run sees the same ones.
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.device == "cpu", dataloader_config=loading)
    set_seed(args.seed)
    unet = UNet2DModel(**UNET)
    scheduler = DDPMScheduler(num_train_timesteps=50)
    ema = EMAModel(unet, decay=0.99, use_ema_warmup=True, power=0.75, model_cls=UNet2DModel, model_config=unet.config)
    register_hooks(accelerator, ema)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    batches = DataLoader(TensorDataset(make_images(256, args.seed)), batch_size=16, shuffle=True)
    unet, optimizer, batches = accelerator.prepare(unet, optimizer, batches)

    first_epoch = 0
    if args.resume and (saved := find_checkpoints(args.output_dir)):
        accelerator.load_state(str(saved[-1]))
        first_epoch = int(saved[-1].name.removeprefix("checkpoint-"))
    accelerator.print(f"starting at epoch {first_epoch}, averages after {ema.optimization_step} steps")

    for epoch in range(first_epoch, args.epochs):
        batches.set_epoch(epoch)
        torch.manual_seed((args.seed + epoch) * accelerator.num_processes + accelerator.process_index)  # for the noise
        unet.train()
        for (images,) in batches:
            with accelerator.accumulate(unet):
                accelerator.backward(denoising_loss(unet, scheduler, images))
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
        if accelerator.is_main_process:
            live = evaluate(accelerator.unwrap_model(unet), scheduler, args.seed)
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            average = evaluate(accelerator.unwrap_model(unet), scheduler, args.seed)
            ema.restore(unet.parameters())
            print(
                f"epoch {epoch + 1}: live loss {live:.4f}, average loss {average:.4f}, decay {ema.cur_decay_value:.4f}"
            )
        if args.output_dir:
            accelerator.save_state(str(args.output_dir / f"checkpoint-{epoch + 1}"))

    if args.output_dir and accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        DDPMPipeline(unet=accelerator.unwrap_model(unet), scheduler=scheduler).save_pretrained(args.output_dir)
    accelerator.end_training()


def register_hooks(accelerator: Accelerator, ema: EMAModel) -> None:
    """Save the averages in each checkpoint as a folder, on the main process alone, and load them on every rank."""

    def save_averages(_models: list[nn.Module], _weights: list[dict[str, Tensor]], folder: str) -> None:
        if accelerator.is_main_process:
            ema.save_pretrained(Path(folder) / "unet_ema")

    def load_averages(_models: list[nn.Module], folder: str) -> None:
        ema.load_state_dict(EMAModel.from_pretrained(Path(folder) / "unet_ema", UNet2DModel).state_dict())

    accelerator.register_save_state_pre_hook(save_averages)
    accelerator.register_load_state_pre_hook(load_averages)


def denoising_loss(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor, seed: int | None = None) -> Tensor:
    """The mean squared error of the noise that the model predicts, at random time steps."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    times = times.to(images.device)
    return F.mse_loss(unet(scheduler.add_noise(images, noise, times), times).sample, noise)


@torch.no_grad()
def evaluate(unet: nn.Module, scheduler: DDPMScheduler, seed: int) -> float:
    """The loss on images that are not in the training data."""
    images = make_images(128, seed + 1).to(next(unet.parameters()).device)
    return denoising_loss(unet.eval(), scheduler, images, seed).item()


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    device = "gpu" if torch.cuda.is_available() else "cpu"
    option("--device", "the default is gpu if there is one", choices=["cpu", "gpu"], default=device)
    option("--epochs", "total epochs, including those before --resume", type=positive_int, default=10)
    option("--seed", "seed of the initial weights, the images and the noise", type=int, default=0)
    option("--output-dir", "folder for checkpoints, one after each epoch, and for the pipeline", type=Path)
    option("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    args = parser.parse_args()
    if args.resume and not args.output_dir:
        parser.error("--resume needs --output-dir")
    if args.output_dir and not args.resume and find_checkpoints(args.output_dir):
        raise UsageError(f"{args.output_dir} holds checkpoints: pass --resume to continue, or another --output-dir")
    return args


if __name__ == "__main__":
    run_script(main)
