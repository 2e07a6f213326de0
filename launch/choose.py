"""Chooses the width of the average after training: one run, 14 averages of its weights, and the test loss of each.

    python launch/choose.py                                             # one process, CPU or GPU
    torchrun --nproc-per-node 2 launch/choose.py --parallel fsdp2

Trains on handwritten digits with two power tracks, saves both every so many steps, and reconstructs averages of other
widths from these snapshots, as `ema-dist reconstruct` does. The widths, their scores and how close each profile comes
to the wanted one are in profiles.csv and profiles.png. Source: Karras et al. 2024 (EDM2), figures 5 and 6.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from ema_dist import Power, ShardedEMA, checkpoint, posthoc
from recipe.checkpoints import checkpoint_errors_as_script_errors
from recipe.data import Batches, Images, load_images
from recipe.evaluation import Scores, evaluate
from recipe.folders import claim_output_dir, new_run_id
from recipe.metrics import AVERAGE_COLOR, LIVE_COLOR, write_csv
from recipe.model import VisionTransformer
from recipe.parallelism import add_layout_options, data_rank_and_size, describe_run, process_group, wrap
from recipe.preemption import Preempted, PreemptionHandler
from recipe.script import OptionParser, UsageError, positive_int, print_rank_0, run_script

TRACKS = {"narrow": Power(sigma_rel=0.05), "wide": Power(sigma_rel=0.10)}
WIDTHS = (0.014, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.13, 0.17, 0.21, 0.25, 0.28)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SNAPSHOTS = "snapshots"
TOLERANCE = 0.05
"""Limit of the total variation. Averages above it are drawn hollow; `ema-dist reconstruct` refuses them by default."""


@dataclass(frozen=True)
class WidthResult:
    """An average of one width, and the scores of the model with it."""

    sigma_rel: float
    loss: float
    accuracy: float
    total_variation: float
    amplification: float


def main() -> None:
    args = parse_arguments()
    with checkpoint_errors_as_script_errors(), process_group(args.device) as device:
        claim_output_dir(args.output_dir, new_run_id(), option="--output-dir")
        if (args.output_dir / SNAPSHOTS).exists():  # old ones would be mistaken for this run's
            raise UsageError(f"{args.output_dir} holds {SNAPSHOTS} of another run; pass another --output-dir")
        test, live = train(args, device)
        choose(args.output_dir, test, live)


def train(args: argparse.Namespace, device: torch.device) -> tuple[Images, Scores]:
    """Train, and save snapshots of both tracks. Returns the test images, and the scores of the live weights."""
    preemption = PreemptionHandler()
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    batches = Batches(training, args.batch_size, args.seed, *data_rank_and_size(args.parallel))
    net = VisionTransformer()
    print_rank_0(describe_run(args.parallel, device.type, net, TRACKS), f"results in {args.output_dir}")
    model = wrap(net, args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    lr_scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=len(batches))
    ema = ShardedEMA(model, decay=TRACKS, dtype=DTYPES[args.dtype])
    steps = args.epochs * len(batches)
    snapshot_interval = args.snapshot_every or len(batches)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for pixels, labels in batches.epoch(epoch):
            if preemption.should_stop():
                print_rank_0(f"stopped by a signal at step {ema.steps}: this script does not resume")
                raise Preempted(1)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            lr_scheduler.step()
            ema.update()
            if ema.steps % snapshot_interval == 0 or ema.steps == steps:
                # keep=None: every snapshot is needed later, but neither the optimizer nor the live weights are.
                checkpoint.save({"ema": ema}, args.output_dir / SNAPSHOTS, step=ema.steps, keep=None)
    return test, evaluate(model, test)


def choose(folder: Path, test: Images, live: Scores) -> None:
    """Evaluate an average of each width; on the first rank, write a table and a figure, and print the best."""
    print_rank_0(f"live weights:    test {live}")
    profiles = [reconstruct_and_evaluate(folder, width, test) for width in WIDTHS]
    if dist.get_rank() > 0:
        return
    write_csv(WidthResult, profiles, folder / "profiles.csv")
    draw(profiles, live).savefig(folder / "profiles.png", dpi=130)
    best = min(profiles, key=lambda profile: profile.loss)
    print(f"best: sigma_rel {best.sigma_rel}; {folder / 'profiles.csv'}, {folder / 'profiles.png'}")


def reconstruct_and_evaluate(folder: Path, width: float, test: Images) -> WidthResult:
    """Collective: every rank writes a part of the average, then reads all of it into a plain model."""
    out = folder / f"sigma-rel-{width}"
    fit = checkpoint.reconstruct(
        folder / SNAPSHOTS, out, Power(sigma_rel=width), tolerance=math.inf, dtype=torch.float32
    )
    model = VisionTransformer()
    files = [load_file(path) for path in out.glob("*.safetensors")]
    model.load_state_dict({name: tensor for file in files for name, tensor in file.items()}, strict=True)
    scores = evaluate(model.to(test.pixels.device), test)
    print_rank_0(f"sigma_rel {width:5}: test {scores}; total variation {fit.total_variation:.3f}")
    return WidthResult(width, *scores, fit.total_variation, fit.amplification)


def draw(profiles: list[WidthResult], live: Scores) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    draw_scores(loss, profiles, [profile.loss for profile in profiles], live.loss)
    draw_scores(accuracy, profiles, [100 * profile.accuracy for profile in profiles], 100 * live.accuracy)
    loss.set(ylabel="test loss (cross-entropy, nats)")
    accuracy.set(ylabel="test accuracy (%)")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def draw_scores(axes: Axes, profiles: list[WidthResult], scores: list[float], live: float) -> None:
    widths = [profile.sigma_rel for profile in profiles]
    axes.plot(widths, scores, "o-", color=AVERAGE_COLOR, label="averages chosen after training")
    beyond = [index for index, profile in enumerate(profiles) if profile.total_variation > TOLERANCE]
    if beyond:
        points = [widths[index] for index in beyond], [scores[index] for index in beyond]
        label = f"total variation above {TOLERANCE}"
        axes.plot(*points, "o", color=AVERAGE_COLOR, markerfacecolor="white", label=label)
    axes.axhline(live, color=LIVE_COLOR, linestyle="--", label="live weights")
    for law in TRACKS.values():
        label = "stored tracks" if law is TRACKS["narrow"] else None
        axes.axvline(posthoc.sigma_rel(gamma=law.exponent), color="gray", linestyle=":", label=label)
    axes.set(xlabel="sigma_rel, the width of the average as a fraction of the run", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator([0.014, 0.02, 0.03, 0.05, 0.1, 0.2, 0.28]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(alpha=0.3)


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    add_layout_options(parser)
    option("--epochs", "total epochs", type=positive_int, default=24)
    option("--batch-size", "images in a step, over all ranks together", type=positive_int, default=48)
    option("--learning-rate", "peak learning rate of AdamW, reached after one epoch", type=float, default=2e-3)
    option("--seed", "seed of the initial weights and of the order of images", type=int, default=0)
    option("--snapshot-every", "steps between snapshots (default: one epoch)", type=positive_int, metavar="STEPS")
    option("--dtype", "in which the snapshots are kept", choices=DTYPES, default="float32")
    option("--output-dir", "folder for snapshots, averages, table and figure", type=Path, default=Path("runs/choose"))
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
