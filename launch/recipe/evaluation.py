"""Loss and accuracy of a model on images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .data import Images

BATCH_SIZE = 100


class Scores(NamedTuple):
    """Mean cross-entropy in nats, and the fraction of images classified correctly."""

    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, *, before_batch: Callable[[], object] = lambda: None) -> Scores:
    """The scores of `model` on all `images`, the same on every rank.

    Args:
        before_batch: called before each batch; an exception that it raises ends the evaluation.
    """
    model.eval()
    loss, hits = torch.zeros(2, dtype=torch.float64, device=images.pixels.device)
    for pixels, labels in zip(images.pixels.split(BATCH_SIZE), images.labels.split(BATCH_SIZE), strict=True):
        before_batch()
        logits = model(pixels)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        hits += (logits.argmax(dim=1) == labels).sum()
    return Scores(loss.item() / len(images), hits.item() / len(images))
