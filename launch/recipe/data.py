"""scikit-learn's bundled handwritten digits, all on the device, in an order that depends only on seed and epoch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from .script import UsageError

TRAIN_IMAGES = 1297
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Images (count, 1, 8, 8) with pixels in [-1, 1], and their labels (count,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """The first digits of a digest of pixels and labels, for checkpoints."""
        data = (tensor.cpu().numpy().tobytes() for tensor in (self.pixels, self.labels))
        return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def load_images(device: torch.device) -> tuple[Images, Images]:
    """1297 training and 500 test images: the same split in every run."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float().view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return (
        Images(pixels[train].to(device), labels[train].to(device)),
        Images(pixels[test].to(device), labels[test].to(device)),
    )


@dataclass(frozen=True)
class Batches:
    """Shuffled and randomly shifted training batches; each data-parallel rank takes its part of every batch.

    All random numbers of an epoch come from one generator, seeded by `seed` and the epoch: a resumed run needs no
    generator state, and every layout and world size trains on the same batches.
    """

    images: Images
    batch_size: int
    seed: int
    data_rank: int
    data_world_size: int

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= len(self.images):
            raise UsageError(f"--batch-size: expected 1 to {len(self.images)} images, got {self.batch_size}")
        if self.batch_size % self.data_world_size:
            raise UsageError(
                f"--batch-size: expected a multiple of {self.data_world_size}, the number of data-parallel ranks, "
                f"got {self.batch_size}"
            )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this rank's (pixels, labels) for every step of one epoch; an incomplete last batch is dropped.

        Args:
            epoch: seeds the order and the shifts.
            first_step: the number of steps of this epoch that a resumed run has already taken.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        device = self.images.labels.device
        order = torch.randperm(len(self.images), generator=generator).to(device)
        shifts = torch.randint(3, (len(self.images), 2), generator=generator).to(device)
        for step in range(first_step, len(self)):
            start = step * self.batch_size + self.data_rank
            indices = order[start : (step + 1) * self.batch_size : self.data_world_size]
            yield shift_images(self.images.pixels[indices], shifts[indices]), self.images.labels[indices]


def shift_images(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Each image shifted by up to one pixel in each direction, padded with the background.

    Shape: pixels (count, 1, side, side), shifts (count, 2) of 0, 1 or 2.
    """
    side = pixels.shape[-1]
    windows = F.pad(pixels, (1, 1, 1, 1), value=-1.0).unfold(2, side, 1).unfold(3, side, 1)
    rows, columns = shifts.unbind(dim=1)
    return windows[torch.arange(len(pixels), device=pixels.device), :, rows, columns]
