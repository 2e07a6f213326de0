"""Loads averaged weights into a plain model and evaluates it: one process, no process group, no ema_dist.

python launch/evaluate_weights.py runs/digits/model.safetensors
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipe.data import load_images
from recipe.evaluation import evaluate
from recipe.model import VisionTransformer


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
