"""Loads averaged weights into a plain model and evaluates it: one process, no process group, no ema_dist.

python launch/evaluate_weights.py runs/digits/model.safetensors
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from recipe.data import load_images
from recipe.evaluation import evaluate
from recipe.model import VisionTransformer
from recipe.script import OptionParser, run_script


def main() -> None:
    parser = OptionParser("Evaluate weights that train.py exported.")
    parser.option("weights", "the model.safetensors of a run", type=Path)
    weights = parser.parse_args().weights
    if not weights.is_file():
        parser.error(f"expected a safetensors file, and {weights} is not a file")
    model = VisionTransformer()
    model.load_state_dict(load_file(weights), strict=True)
    _, test = load_images(torch.device("cpu"))
    print(f"{weights}: test {evaluate(model, test)}")


if __name__ == "__main__":
    run_script(main)
