"""CIFAR-10 as one uint8 tensor on the training device, with batched per-image augmentation.

The augmentation is the usual one, drawn for each image of each epoch on its own: a black border of 4
pixels, a random 32x32 crop of the 40x40 result, a horizontal flip with probability 1/2, and only then the
normalisation per channel (so the border is black, not the mean colour).
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks, paths

TRAIN_IMAGES = 50_000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
BORDER = 4
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


class DataNotFoundError(FileNotFoundError):
    """CIFAR-10 is neither on this machine nor downloadable."""


@dataclass(frozen=True)
class Images:
    """A split of the set: ``pixels`` (n, 3, 32, 32) uint8 and ``labels`` (n,) int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(train: bool, device: str | torch.device = "cpu", limit: int | None = None, download: bool = True) -> Images:
    """The training (50,000) or test (10,000) images; with ``limit``, the first ``limit`` of them.

    They are read from the folder that the environment variable CIFAR10_ROOT names (never written to), or
    else from ``.data``, where torchvision downloads them if ``download`` is True. Raises DataNotFoundError
    with one sentence that says where to put the files, and never makes up data.
    """
    if limit is not None:
        checks.positive_int("limit", limit)
    root = paths.cifar10_root()
    dataset = _open(root, train, download and root == paths.ROOT / ".data")
    pixels = torch.from_numpy(dataset.data[:limit]).permute(0, 3, 1, 2)  # (n, 32, 32, 3) on disk
    labels = torch.tensor(dataset.targets[:limit])
    return Images(pixels.contiguous().to(device), labels.to(device))


def available() -> bool:
    """Whether the whole set is found on this machine, without downloading anything."""
    try:
        _open(paths.cifar10_root(), train=False, download=False)
    except DataNotFoundError:
        return False
    return True


def _open(root: Path, train: bool, download: bool):
    from torchvision.datasets import CIFAR10  # a second to import, and only who reads images needs it

    try:
        return CIFAR10(root, train=train, download=False)
    except (RuntimeError, OSError):
        if not download:
            raise DataNotFoundError(_not_found(root)) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        return CIFAR10(root, train=train, download=True)
    except (RuntimeError, OSError) as error:  # no network, a refused download, a broken archive, a full disk
        raise DataNotFoundError(_not_found(root, f" and the download failed ({error})")) from error


def _not_found(root: Path, also: str = "") -> str:
    return (
        f"CIFAR-10 was not found whole in {root}{also}: put the folder cifar-10-batches-py (the set's python "
        f"version) there, or set CIFAR10_ROOT to the folder that contains it."
    )


# ------------------------------------------------------------------------------------------ one epoch


@dataclass(frozen=True)
class Epoch:
    """All random choices of one epoch: ``order`` (n,) of the images, ``shifts`` (n, 2) in 0..8 (row, column
    of the crop in the bordered image) and ``flips`` (n,) bool."""

    order: Tensor
    shifts: Tensor
    flips: Tensor


def draw_epoch(size: int, generator: torch.Generator, device: str | torch.device = "cpu") -> Epoch:
    """Draw an epoch over ``size`` images.

    The generator lives on the CPU whatever the device, so that a run sees the same images in the same order
    everywhere; drawing a whole epoch at once costs one transfer and no synchronisation per batch.
    """
    order = torch.randperm(size, generator=generator)
    shifts = torch.randint(2 * BORDER + 1, (size, 2), generator=generator)
    flips = torch.randint(2, (size,), generator=generator).bool()
    return Epoch(order.to(device), shifts.to(device), flips.to(device))


def augment(pixels: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop and flip each image by its own choice: (n, 3, 32, 32) uint8 -> the same shape and type."""
    bordered = F.pad(pixels, (BORDER,) * 4)  # (n, 3, 40, 40), black
    steps = torch.arange(SIDE, device=pixels.device)
    rows = shifts[:, :1] + steps  # (n, 32)
    columns = shifts[:, 1:] + torch.where(flips[:, None], SIDE - 1 - steps, steps)  # (n, 32)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Advanced indices around a slice: the result has the channels last, (n, 32, 32, 3).
    return bordered[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels 0..255 -> (pixel / 255 - mean) / std per channel, float32, shape kept."""
    scale, shift = _normalisation(pixels.device)
    return (pixels * scale - shift).contiguous()


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: on a GPU a new tensor waits for a copy, which a CUDA graph does not allow.
    scale = torch.tensor([1 / (255 * std) for std in STD], device=device).view(3, 1, 1)
    shift = torch.tensor([mean / std for mean, std in zip(MEAN, STD, strict=True)], device=device)
    return scale, shift.view(3, 1, 1)


def batch(images: Images, epoch: Epoch, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The augmented, normalised images ``start`` to ``start + size`` of an epoch: (b, 3, 32, 32), (b,)."""
    chosen = slice(start, start + size)
    index = epoch.order[chosen]
    pixels = augment(images.pixels[index], epoch.shifts[chosen], epoch.flips[chosen])
    return normalise(pixels), images.labels[index]


if __name__ == "__main__":
    argparse.ArgumentParser(description="Fetch CIFAR-10 where it is missing; say what is there.").parse_args()
    try:
        sizes = len(load(train=True)), len(load(train=False))
    except DataNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(f"CIFAR-10 in {paths.cifar10_root()}: {sizes[0]} training and {sizes[1]} test images.")
