"""Entries of trained convolutional networks across the layers, their smoothness, and the path of an image."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import checks, paths, tables
from lib.cifar import checkpoints, dataset, resampling
from lib.cifar.checkpoints import Checkpoint
from lib.cifar.config import CifarConfig
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.cifar.records import CONVOLUTIONS
from lib.figures.figure_3 import draw_entries
from lib.measures import von_neumann_ratios
from lib.ode import layers as depth_layers

Entry = tuple[int, int, int, int]  # out channel, in channel, row and column of the kernel
HOW = ("random", "roughest", "smoothest", "index")
ACCURACY_IMAGES = 100  # two networks of 256 layers take half a second for them
NOTHING_TRAINED = "There is no trained network in checkpoints/ yet: make train trains one, and make help explains how."


@dataclass(frozen=True)
class Choice:
    """Which curve to show: a ``convolution`` ("conv1" or "conv2"), and ``how`` its entry is chosen:

    - "random": drawn with ``seed``, as Figure 3 does with its ``entry_seed``;
    - "roughest", "smoothest": by the von Neumann ratio in the first network;
    - "index": the entry at ``index``.

    ``image`` is the number of the test image whose path is shown. ``layers`` is the number of layers that are kept for
    it, the middle ones of as many equal parts (0, or more than the network has: all).
    """

    convolution: str = "conv1"
    how: str = "random"
    seed: int = 0
    image: int = 7
    index: Entry = (0, 0, 0, 0)
    layers: int = 0

    def __post_init__(self) -> None:
        checks.check_fields(self, seed=0, image=0, layers=0)
        checks.choice("convolution", self.convolution, CONVOLUTIONS)
        checks.choice("how", self.how, HOW)
        for place in self.index:
            checks.positive_int("an index of the entry", place, least=0)


def find_checkpoints(folder: Path | None = None) -> dict[Path, CifarConfig]:
    """The checkpoints of a folder (by default ``checkpoints/``), sorted by activation, with batch norm first, short
    schedules before long ones, and weight-tied before i.i.d."""
    files = sorted((folder or paths.CHECKPOINTS).glob("*.safetensors"))
    found = {path: checkpoints.read_header(path)[0] for path in files}

    def place(path: Path) -> tuple:
        config = found[path]
        initialisation = INITIALISATIONS.index(config.initialisation)
        stem = config.stem_activation != "relu", config.stem_activation
        return config.activation, not config.batch_norm, config.norm_groups, *stem, config.epochs, initialisation

    return {path: found[path] for path in sorted(found, key=place)}


@dataclass(frozen=True)
class ImagePath:
    """The hidden states h_0, ..., h_L of one image, centred and projected to the plane of their two principal axes:
    ``points`` (L+1, 2), the ``shares`` of their variance along the two axes, and the ``logits`` (10,).
    """

    points: np.ndarray
    shares: tuple[float, float]
    logits: np.ndarray


@dataclass(frozen=True)
class View:
    """The data that the explorer draws of one network: the ``curve`` (L,) of one ``entry`` of a convolution across the
    layers, the ``ratios`` of all its entries, the ``path`` of an image if there is one, and the numbers (from 0) of the
    layers that are ``kept`` for it, or None if all are."""

    config: CifarConfig
    convolution: str
    entry: Entry
    curve: np.ndarray
    ratios: np.ndarray
    path: ImagePath | None = None
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class Trained:
    """A trained network. Everything that the explorer asks of it is computed once."""

    checkpoint: Checkpoint
    _ratios: dict[str, np.ndarray] = field(default_factory=dict)
    _paths: dict[tuple[int, int], ImagePath] = field(default_factory=dict)
    _fewer: dict[int, ConvResNet] = field(default_factory=dict)
    _accuracies: dict[int, float] = field(default_factory=dict)

    @property
    def config(self) -> CifarConfig:
        return self.checkpoint.config

    def weights(self, convolution: str) -> Tensor:
        """The weights of "conv1" or "conv2" over all layers: (L, C, C, 3, 3)."""
        return self.checkpoint.network.kernels()[convolution]

    def ratios(self, convolution: str) -> np.ndarray:
        """The von Neumann ratio of every entry: (C, C, 3, 3), nan if it does not vary."""
        if convolution not in self._ratios:
            self._ratios[convolution] = von_neumann_ratios(self.weights(convolution)).numpy()
        return self._ratios[convolution]

    def entry(self, choice: Choice) -> Entry:
        """The chosen entry. Raises ValueError if the convolution has no such entry, or none that varies."""
        ratios = self.ratios(choice.convolution)
        if choice.how == "index":
            if any(place >= size for place, size in zip(choice.index, ratios.shape, strict=True)):
                raise ValueError(
                    f"The entry is {choice.index}, expected indices below the weight's shape {ratios.shape}."
                )
            return choice.index
        if choice.how == "random":
            return draw_entries(choice.seed, channels=len(ratios))[choice.convolution]
        if np.isnan(ratios).all():
            raise ValueError("All layers are equal, so no entry is the roughest: choose an entry by its index.")
        extreme = np.nanargmax(ratios) if choice.how == "roughest" else np.nanargmin(ratios)
        return tuple(int(place) for place in np.unravel_index(extreme, ratios.shape))

    def layers(self, asked: int) -> int:
        """The number of layers that are kept if ``asked`` are asked for: 0, or more than the network has, means all."""
        return min(asked or self.config.depth, self.config.depth)

    def network(self, layers: int) -> ConvResNet:
        """The network with that number of its layers. It is made once."""
        if layers == self.config.depth:
            return self.checkpoint.network
        if layers not in self._fewer:
            self._fewer[layers] = resampling.resample(self.checkpoint.network, layers)
        return self._fewer[layers]

    @torch.no_grad()
    def path(self, images: dataset.Images, number: int, layers: int) -> ImagePath:
        """The path of one of the test images through that number of layers. It is computed once."""
        if (number, layers) not in self._paths:
            network = self.network(layers)
            states = network.hidden_states(dataset.normalise(images.pixels[number : number + 1]))[:, 0]
            logits = network.head(states[-1:])[0].numpy()
            self._paths[number, layers] = ImagePath(*principal_plane(states.flatten(1)), logits)
        return self._paths[number, layers]

    def accuracy(self, images: dataset.Images, layers: int) -> float:
        """The test accuracy (%) with that number of layers, on the first `ACCURACY_IMAGES` test images."""
        if layers not in self._accuracies:
            part = dataset.Images(images.pixels[:ACCURACY_IMAGES], images.labels[:ACCURACY_IMAGES])
            found = resampling.logits(self.network(layers), part)
            self._accuracies[layers] = resampling.accuracy(found, part.labels)
        return self._accuracies[layers]


@lru_cache(maxsize=4)
def load(path: Path) -> Trained:
    """The network of a checkpoint. It is read once."""
    return Trained(checkpoints.load(path))


@lru_cache(maxsize=1)
def load_test_images() -> dataset.Images:
    """The test images. They are read once and never downloaded. Raises `dataset.DataNotFoundError`."""
    return dataset.load(train=False, download=False)


def principal_plane(states: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Points (k, p) projected to the two axes of largest variance: (k, 2), and the share of variance along each.

    Each axis points from the first point towards the last one, so equal paths look equal.
    """
    centred = states.double() - states.double().mean(dim=0)
    axes, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    points, squares = axes[:, :2] * sizes[:2], sizes.square()
    points = torch.where(points[-1] < points[0], -points, points)
    total = float(squares.sum())
    shares = [float(square) / total if total > 0 else 0.0 for square in squares[:2]]
    return points.numpy(), (shares[0], shares[1])


@dataclass
class Browsing:
    """One or two trained ``networks`` side by side, and the test images, or a message that says why there are none."""

    networks: list[Trained]
    images: dataset.Images | None = None
    sentence: str = "The images are being read."

    def views(self, choice: Choice) -> list[View]:
        """The same entry of every network, ready to be drawn."""
        entry, name = self.networks[0].entry(choice), choice.convolution
        views = []
        for network in self.networks:
            network.entry(replace(choice, how="index", index=entry))  # a smaller network may not have it
            layers, depth = network.layers(choice.layers), network.config.depth
            path = network.path(self.images, choice.image, layers) if self._has(choice) else None
            kept = depth_layers.kept_indices(depth, layers).numpy() if layers < depth else None
            curve = network.weights(name)[(slice(None), *entry)].numpy()
            views.append(View(network.config, name, entry, curve, network.ratios(name), path, kept))
        return views

    def accuracies(self, choice: Choice) -> list[str]:
        """The accuracy with the layers that are kept, one line for each network; empty without the images."""
        lines = []
        for network in self.networks if self.images is not None else ():
            layers, depth = network.layers(choice.layers), network.config.depth
            line = f"{network.accuracy(self.images, layers):.1f} % with {layers} of {depth} layers"
            if layers < depth:
                line += f", {network.accuracy(self.images, depth):.1f} % with all"
            lines.append(f"{line} (test images 0 to {min(ACCURACY_IMAGES, len(self.images)) - 1})")
        return lines

    def image(self, choice: Choice) -> tuple[np.ndarray | None, str]:
        """The image (32, 32, 3) and its caption, or None and a message."""
        if not self._has(choice):
            return None, self.sentence or f"There is no test image {choice.image}: they end at {len(self.images) - 1}."
        label = dataset.CLASSES[int(self.images.labels[choice.image])]
        pixels = self.images.pixels[choice.image].permute(1, 2, 0).numpy()
        return pixels, f"test image {choice.image}: {label}"

    def _has(self, choice: Choice) -> bool:
        return self.images is not None and choice.image < len(self.images)

    def table(self, choice: Choice) -> dict[str, list]:
        """The curves as a table: run, convolution, entry, ratio, layer, value."""
        rows = []
        for view in self.views(choice):
            entry = dict(zip(("out", "in", "row", "column"), view.entry, strict=True))
            ratio = float(view.ratios[view.entry])
            run = {"run": view.config.name, "convolution": view.convolution, **entry, "von_neumann": ratio}
            rows += [{**run, "layer": layer, "value": float(w)} for layer, w in enumerate(view.curve, start=1)]
        return tables.from_rows(rows)


def choose_pair(found: Mapping[Path, CifarConfig]) -> list[Path]:
    """The first two of these networks that differ only in the initialisation, the weight-tied one first. If there are
    none, the first weight-tied network and the first i.i.d. one, as far as they exist."""
    places = {config: path for path, config in found.items()}
    for path, config in found.items():
        other = places.get(replace(config, initialisation="iid"))
        if other and config.initialisation == "weight-tied":
            return [path, other]
    firsts: dict[str, Path] = {}
    for path, config in found.items():
        firsts.setdefault(config.initialisation, path)
    return [firsts[initialisation] for initialisation in INITIALISATIONS if initialisation in firsts]


def browse(files: Sequence[Path]) -> Iterator[Browsing | None]:
    """Yield the networks of these checkpoints, then None while the test images are read, then the networks with
    them. If the images were read before, yield the networks with them."""
    browsing = Browsing([load(path) for path in files])
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_test_images)
        if wait([reading], timeout=0.05).not_done:
            yield browsing
        while not reading.done():
            time.sleep(0.01)
            yield None
    try:
        browsing.images, browsing.sentence = reading.result(), ""
    except dataset.DataNotFoundError as error:
        browsing.sentence = str(error)
    yield browsing
