"""Measures how much bfloat16 snapshots change the averages that are chosen from them after training.

python -m launch.cost.bfloat16_snapshots           # 24 epochs on the digits; prints the table of the docs
python -m launch.cost.bfloat16_snapshots --quick   # a quick check with two epochs

One process trains with the same averages twice: in float32, and in bfloat16 with stochastic rounding. After each epoch
it keeps a snapshot of both. The errors are norms, relative to that of the live weights.
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from ema_dist import InitialWeightsWarning, Power, ShardedEMA, Uniform, posthoc
from launch.recipe.data import Batches, Images, load_images
from launch.recipe.evaluation import evaluate
from launch.recipe.model import VisionTransformer

TRACKS = {"narrow": Power(sigma_rel=0.05), "wide": Power(sigma_rel=0.10), "mean": Uniform()}
WIDTHS = (0.02, 0.03, 0.07, 0.15, 0.25)
BATCH_SIZE = 48  # as launch/choose.py
COLUMNS = (
    *("target", "amplification", "error, averaged in bfloat16", "error, rounded once", "distance from live"),
    *("test loss, float32", "test loss, averaged in bfloat16"),
)


@dataclass(frozen=True)
class Snapshot:
    """The averages of one track at one time, each flattened to one float64 vector."""

    time: float
    track: str
    exact: Tensor
    """Averaged in float32."""
    bfloat16: Tensor
    """Averaged in bfloat16."""

    @property
    def rounded(self) -> Tensor:
        """Averaged in float32 and rounded to bfloat16."""
        return self.exact.bfloat16().double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    epochs = 2 if parser.parse_args().quick else 24
    # Snapshots of the first epochs consist mostly of the initial weights, which is expected here.
    warnings.simplefilter("ignore", InitialWeightsWarning)
    torch.manual_seed(0)
    training, test = load_images(torch.device("cpu"))
    model = VisionTransformer()
    snapshots = train(model, training, epochs)
    live = flat(model.state_dict())
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    powers = [snapshot for snapshot in snapshots if snapshot.track != "mean"]
    for width in WIDTHS:
        print_row(f"{width}", powers, Power(sigma_rel=width), live, test)
    means = [snapshot for snapshot in snapshots if snapshot.track == "mean"][-2:]
    window = posthoc.Window(means[1].time - means[0].time)
    print_row(f"window of 1/{epochs}, `Uniform()`", means, window, live, test)


def train(model: nn.Module, training: Images, epochs: int) -> list[Snapshot]:
    """Train as launch/choose.py does; returns the snapshots after each epoch."""
    batches = Batches(training, BATCH_SIZE, 0, 0, 1)
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    lr_scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=len(batches))
    exact, bfloat16 = ShardedEMA(model, decay=TRACKS), ShardedEMA(model, decay=TRACKS, dtype=torch.bfloat16)
    snapshots = []
    for epoch in range(1, epochs + 1):
        for pixels, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            lr_scheduler.step()
            exact.update()
            bfloat16.update()
        for track in TRACKS:
            both = [flat(ema.full_state_dict(track=track, dtype=torch.float64)) for ema in (exact, bfloat16)]
            snapshots.append(Snapshot(exact.time, track, *both))
    return snapshots


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in weights.values()])


def print_row(
    label: str, snapshots: Sequence[Snapshot], target: Power | posthoc.Window, live: Tensor, test: Images
) -> None:
    pairs = [(snapshot.time, TRACKS[snapshot.track]) for snapshot in snapshots]
    fit = posthoc.fit(pairs, target=target, at=snapshots[-1].time)

    def combine(vectors: Sequence[Tensor]) -> Tensor:
        return sum((c * vector for c, vector in zip(fit.coefficients, vectors, strict=True)), torch.zeros_like(live))

    exact = combine([snapshot.exact for snapshot in snapshots])
    bfloat16 = combine([snapshot.bfloat16 for snapshot in snapshots])
    rounded = combine([snapshot.rounded for snapshot in snapshots])
    relative = [f"{100 * (one - exact).norm() / live.norm():.2f} %" for one in (bfloat16, rounded, live)]
    losses = [f"{evaluate(model_of(vector), test).loss:.4f}" for vector in (exact, bfloat16)]
    print(f"| {' | '.join([label, f'{fit.amplification:.1f}', *relative, *losses])} |", flush=True)


def model_of(vector: Tensor) -> nn.Module:
    model = VisionTransformer()
    state = model.state_dict()
    parts = vector.float().split([tensor.numel() for tensor in state.values()])
    model.load_state_dict({name: part.view_as(state[name]) for name, part in zip(state, parts, strict=True)})
    return model


if __name__ == "__main__":
    main()
