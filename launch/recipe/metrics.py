"""Metrics of each epoch, and their reports: rows and a progress bar on the terminal, a CSV file and a figure."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .evaluation import Scores
from .folders import CURVES, METRICS
from .script import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

HEADING = " epoch   step | live loss  accuracy | average loss  accuracy  distance | update(), % of step time"
LIVE_COLOR, AVERAGE_COLOR = "#b0572c", "#1f5fa8"


@dataclass(frozen=True)
class EpochMetrics:
    """Test scores after an epoch, the average's distance from the live weights, and update()'s share of step time."""

    epoch: int
    step: int
    live_loss: float
    live_accuracy: float
    average_loss: float
    average_accuracy: float
    average_distance: float
    """The norm of the difference of average and live weights, over the norm of the live weights."""
    update_share_of_step_time: float

    def __str__(self) -> str:
        return (
            f"{self.epoch:6} {self.step:6} | {self.live_loss:9.4f} {self.live_accuracy:9.2%} "
            f"| {self.average_loss:12.4f} {self.average_accuracy:9.2%} "
            f"{self.average_distance:9.4f} | {self.update_share_of_step_time:23.1%}"
        )

    def scalars(self) -> dict[str, float]:
        """The scores by tags for TensorBoard."""
        return {
            "test/live loss": self.live_loss,
            "test/average loss": self.average_loss,
            "test/live accuracy": self.live_accuracy,
            "test/average accuracy": self.average_accuracy,
            "ema/distance": self.average_distance,
        }

    @property
    def average(self) -> Scores:
        return Scores(self.average_loss, self.average_accuracy)


def progress_bar(rank: int) -> Progress:
    """A progress bar for rank 0's terminal. Its console prints plain lines without a terminal, and only on rank 0."""
    is_terminal = sys.stdout.isatty()
    console = Console(force_terminal=is_terminal, quiet=rank != 0, highlight=False, soft_wrap=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=rank != 0 or not is_terminal)


class TensorBoard:
    """Scalars for TensorBoard in the first rank's `folder`; without a folder, nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra
        except ImportError as error:
            raise UsageError(
                f'--tensorboard needs tensorboard: pip install -c constraints.txt ".[tensorboard]" ({error})'
            ) from error
        if dist.get_rank() == 0:
            self._writer = SummaryWriter(str(folder))

    def add(self, row: EpochMetrics, others: Mapping[str, float]) -> None:
        """Write the metrics of an epoch, and `others` under their tags."""
        if self._writer is not None:
            for tag, value in {**row.scalars(), **others}.items():
                self._writer.add_scalar(tag, value, row.step)
            self._writer.flush()


def write_metrics(rows: list[EpochMetrics], folder: Path) -> None:
    """Write `rows` to the first rank's `folder`: as CSV and as curves."""
    if dist.get_rank() == 0:
        write_csv(EpochMetrics, rows, folder / METRICS)
        write_curves(rows, folder / CURVES)


def write_csv(row_type: type[T], rows: Sequence[T], path: Path) -> None:
    """Write instances of a dataclass as CSV; the header holds the names of the fields."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row_type)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_curves(rows: list[EpochMetrics], path: Path) -> None:
    """Plot loss and accuracy of live and averaged weights over the epochs."""
    epochs = [row.epoch for row in rows]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row.live_loss for row in rows], ".-", color=LIVE_COLOR, label="live weights")
    loss.plot(epochs, [row.average_loss for row in rows], ".-", color=AVERAGE_COLOR, label="averaged weights")
    loss.set(yscale="log", ylabel="test loss (cross-entropy, nats)")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.plot(epochs, [100 * row.live_accuracy for row in rows], ".-", color=LIVE_COLOR, label="live weights")
    accuracy.plot(
        epochs, [100 * row.average_accuracy for row in rows], ".-", color=AVERAGE_COLOR, label="averaged weights"
    )
    accuracy.set(ylabel="test accuracy (%)")
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
