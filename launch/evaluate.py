"""Loads averaged weights into a plain model and evaluates it: one process, no process group, no ema_dist.

python launch/evaluate.py runs/digits/model.safetensors
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data import Images, load_images
from model import VisionTransformer


class Scores(NamedTuple):
    """Mean cross-entropy in nats, and the share of images classified right."""

    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> Scores:
    """The scores of `model` on all `images`, the same on every rank."""
    model.eval()
    logits = model(images.pixels)
    hits = logits.argmax(dim=1) == images.labels
    return Scores(F.cross_entropy(logits, images.labels).item(), hits.double().mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate weights that train.py exported.")
    parser.add_argument("weights", type=Path, help="the model.safetensors of a run")
    weights = parser.parse_args().weights
    model = VisionTransformer()
    model.load_state_dict(load_file(weights), strict=True)
    _, test = load_images(torch.device("cpu"))
    print(f"{weights}: test {evaluate(model, test)}")


if __name__ == "__main__":
    main()
