"""Trains a small language model with the Trainer of transformers: one line adds averages, under DDP and FSDP2.

    torchrun --nproc-per-node 2 launch/train_transformers.py                     # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/train_transformers.py --parallel fsdp2    # GPUs
    python launch/train_transformers.py                                          # one process
    torchrun --nproc-per-node 2 launch/train_transformers.py --resume

Needs transformers: docs/transformers.md. Nothing is downloaded: the model is random, and the data are generated.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ema_dist import HalfLife
from ema_dist.transformers import EMACallback
from recipe.parallelism import require_gpu
from recipe.script import OptionParser, UsageError, positive_int, print_rank_0, run_script

OUTPUT_DIR = Path("runs/transformers")
NUM_TOKENS, LENGTH, NUM_EVALUATED = 29, 12, 128
FSDP_CONFIG = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}
PARALLELISM: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": FSDP_CONFIG}}


class PrintScores(TrainerCallback):
    """Prints the loss of the averages after each evaluation."""

    def on_evaluate(self, *events: Any, metrics: dict[str, float], **_: object) -> None:  # noqa: ANN401
        _, state, _ = events
        if "eval_loss" in metrics:
            print_rank_0(f"step {state.global_step}: average loss {metrics['eval_loss']:.4f}")


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda":
        require_gpu()
    trainer = make_trainer(args)
    ema = EMACallback(decay=HalfLife(args.half_life, ramp=0.1)).bind(trainer)
    newest = get_last_checkpoint(str(args.output_dir)) if args.output_dir.is_dir() else None
    if newest and not args.resume:
        raise UsageError(f"{args.output_dir} has {Path(newest).name}: pass --resume, or another --output-dir")
    trainer.train(resume_from_checkpoint=newest)
    with ema.live_weights():
        live = trainer.evaluate(metric_key_prefix="live")["live_loss"]
    average = trainer.evaluate(metric_key_prefix="average")["average_loss"]
    ema.save_pretrained(args.output_dir / "averaged")
    print_rank_0(
        f"{trainer.state.global_step} steps: live loss {live:.4f}, average loss {average:.4f}; "
        f"the averaged model is in {args.output_dir / 'averaged'}"
    )


def make_trainer(args: argparse.Namespace) -> Trainer:
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUM_TOKENS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=args.save_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        use_cpu=args.device == "cpu",
        disable_tqdm=True,
        logging_strategy="no",
        ddp_find_unused_parameters=False,
        report_to=[],
        **PARALLELISM[args.parallel],
    )
    samples = make_samples()
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=samples[NUM_EVALUATED:],
        eval_dataset=samples[:NUM_EVALUATED],
        callbacks=[PrintScores()],
    )


def make_samples() -> list[dict[str, Tensor]]:
    """All sequences that count up by a constant stride, modulo the number of tokens, in random order."""
    pairs = torch.cartesian_prod(torch.arange(NUM_TOKENS), torch.arange(1, NUM_TOKENS))  # first token, stride
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    sequences = (pairs[:, :1] + pairs[:, 1:] * torch.arange(LENGTH)) % NUM_TOKENS
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    option("--parallel", "how the model is distributed on several ranks", choices=PARALLELISM, default="ddp")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", "the default is cuda if there is a GPU", choices=["cpu", "cuda"], default=device)
    option("--half-life", "half-life of the average, in steps", type=positive_int, default=20, metavar="STEPS")
    option("--steps", "total steps, including those before --resume", type=positive_int, default=400)
    option("--save-steps", "steps between evaluations and checkpoints", type=positive_int, default=100)
    option("--batch-size", "sequences in a batch of each rank", type=positive_int, default=16)
    option("--learning-rate", "learning rate of AdamW", type=float, default=1e-2)
    option("--seed", "seed of the initial weights and of the order of samples", type=int, default=0)
    option("--output-dir", "folder for checkpoints and the averaged model", type=Path, default=OUTPUT_DIR)
    option("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    args = parser.parse_args()
    if args.parallel == "fsdp2" and args.device == "cpu":
        parser.error("--parallel fsdp2 needs GPUs: accelerate does not shard on CPUs; leave it out")
    return args


if __name__ == "__main__":
    run_script(main)
