"""Trained convolutional networks seen entry by entry: across the layers, by smoothness, and along an image's path."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import checkpoints, checks, cifar, cifar_results, paths
from lib.checkpoints import Checkpoint
from lib.cifar_training import CifarConfig
from lib.distances import von_neumann_ratios

Entry = tuple[int, int, int, int]  # out channel, in channel, row and column of the kernel
# How an entry can be chosen.
CHOICES = ("index", "random", "roughest", "smoothest")


def find(folder: Path | None = None) -> dict[Path, CifarConfig]:
    """The checkpoints of a folder (by default ``checkpoints/``), by name."""
    files = sorted((folder or paths.CHECKPOINTS).glob("*.safetensors"))
    return {path: checkpoints.read_header(path)[0] for path in files}


@dataclass(frozen=True)
class ImagePath:
    """The hidden states h_0, ..., h_L of one image, centred and projected to the plane of their two principal axes.

    ``points``: (L+1, 2); ``shares`` of their variance along the two axes; ``logits``: (10,).
    """

    points: np.ndarray
    shares: tuple[float, float]
    logits: np.ndarray


@dataclass(frozen=True)
class View:
    """What the explorer draws of one network: the ``curve`` (L,) of one ``entry`` of a convolution across the layers,
    the ``ratios`` of all its entries, and the path of an image where there is one."""

    config: CifarConfig
    convolution: str
    entry: Entry
    curve: np.ndarray
    ratios: np.ndarray
    path: ImagePath | None = None


@dataclass(frozen=True)
class Trained:
    """A trained network, with what the explorer asks of it worked out once."""

    checkpoint: Checkpoint
    _ratios: dict[str, np.ndarray] = field(default_factory=dict)
    _paths: dict[int, ImagePath] = field(default_factory=dict)

    @property
    def config(self) -> CifarConfig:
        return self.checkpoint.config

    def weights(self, convolution: str) -> Tensor:
        """The weights of "conv1" or "conv2" over all layers: (L, C, C, 3, 3)."""
        return self.checkpoint.network.residual_layers.stacked(f"{convolution}.weight").detach()

    def ratios(self, convolution: str) -> np.ndarray:
        """The von Neumann ratio of every entry: (C, C, 3, 3), nan where it does not vary."""
        if convolution not in self._ratios:
            self._ratios[convolution] = von_neumann_ratios(self.weights(convolution)).numpy()
        return self._ratios[convolution]

    def entry(self, convolution: str, how: str, index: Entry = (0, 0, 0, 0), seed: int = 0) -> Entry:
        """An entry by its ``index``, at "random" from ``seed`` (as Figure 3 draws it), the "roughest" or "smoothest".

        Raises ValueError where the index is not one of the convolution's, or where no entry varies with depth.
        """
        checks.choice("entry", how, CHOICES)
        ratios = self.ratios(convolution)
        if how == "index":
            if any(not 0 <= place < size for place, size in zip(index, ratios.shape, strict=True)):
                raise ValueError(f"The entry is {index}, expected indices below {ratios.shape}, the weight's shape.")
            return index
        if how == "random":
            return cifar_results.draw_entries(seed, channels=len(ratios))[convolution]
        if np.isnan(ratios).all():
            raise ValueError("No entry varies with depth, so that none is the roughest: all layers are equal.")
        extreme = np.nanargmax(ratios) if how == "roughest" else np.nanargmin(ratios)
        return tuple(int(place) for place in np.unravel_index(extreme, ratios.shape))

    @torch.no_grad()
    def path(self, images: cifar.Images, number: int) -> ImagePath:
        """The path of one of the images; they are always the test images, so that each is worked out once."""
        if number not in self._paths:
            network = self.checkpoint.network
            states = network.hidden_states(cifar.normalise(images.pixels[number : number + 1]))[:, 0]
            self._paths[number] = ImagePath(*principal_plane(states.flatten(1)), network.head(states[-1:])[0].numpy())
        return self._paths[number]

    def view(self, convolution: str, entry: Entry, path: ImagePath | None = None) -> View:
        """One entry, ready to be drawn."""
        curve = self.weights(convolution)[(slice(None), *entry)].numpy()
        return View(self.config, convolution, entry, curve, self.ratios(convolution), path)


@lru_cache(maxsize=4)
def load(path: Path) -> Trained:
    """A checkpoint, read once."""
    return Trained(checkpoints.load(path))


@lru_cache(maxsize=1)
def test_images() -> cifar.Images:
    """The test images, read once and never downloaded; raises `cifar.DataNotFoundError` with a sentence."""
    return cifar.load(train=False, download=False)


def principal_plane(states: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Points (k, p) projected to the two axes of largest variance: (k, 2), and the share of variance along each.

    Each axis points from the first towards the last point, so that equal paths look equal.
    """
    centred = states.double() - states.double().mean(dim=0)
    # Out of the k x k matrix of inner products, since k is far below p.
    squares, vectors = torch.linalg.eigh(centred @ centred.mT)
    squares, vectors = squares.clamp(min=0).flip(0), vectors.flip(1)
    points = vectors[:, :2] * squares[:2].sqrt()
    points = torch.where(points[-1] < points[0], -points, points)
    total = float(squares.sum())
    shares = [float(square) / total if total > 0 else 0.0 for square in squares[:2]]
    return points.numpy(), (shares[0], shares[1])


@dataclass
class Browsing:
    """One or two trained ``networks`` side by side, and the test images or a sentence that says why there are none."""

    networks: list[Trained]
    images: cifar.Images | None = None
    sentence: str = ""


def browse(files: Sequence[Path]) -> Iterator[Browsing | None]:
    """First the networks of these checkpoints; then, since reading takes a while, None until the images are there."""
    browsing = Browsing([load(path) for path in files], sentence="the images are being read")
    yield browsing
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(test_images)
        while not reading.done():
            time.sleep(0.01)
            yield None
    try:
        browsing.images, browsing.sentence = reading.result(), ""
    except cifar.DataNotFoundError as error:
        browsing.sentence = str(error)
    yield browsing
