"""Networks of growing depth on CIFAR-10, trained along the same flow: how far depth L is from depth 2L.

`train` trains the networks of a `Family` side by side, an epoch of each in turn, and after every epoch measures what
``checkpoints/depth_limit.csv`` keeps. All start from the same weights (weight-tied initialisation: one draw for all
layers of all depths), see the same images in the same order, and with `CifarConfig.depth_scaling` follow the same flow
in time. States are kept as those of every run, so that an interrupted training goes on.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import checks, paths, tables
from lib.checks import Divergence
from lib.cifar import dataset, schedule, states
from lib.cifar import training as cifar_training
from lib.cifar.config import CifarConfig
from lib.cifar.network import CONVOLUTIONS, ConvResNet
from lib.cifar.progress import EpochRecord
from lib.cifar.records import read_table
from lib.measures import integral_distance

DEPTHS = (16, 32, 64, 128)
TABLE = "depth_limit.csv"
NORMALISATIONS = {"batch": (True, 0), "none": (False, 0), "group": (False, 4)}  # batch_norm, norm_groups
COMPARED_IMAGES = 100  # of the test set, for hidden states and logits
MEASURES = ("weights_conv1", "weights_conv2", "hidden_states", "logits")


@dataclass(frozen=True)
class Family:
    """Weight-tied networks that differ in nothing but their depth.

    ``normalisation``: "batch", "none" or "group" (4 groups); ``seed`` of weights, order of the images and augmentation;
    ``epochs`` of the schedule; ``depths``, each twice the one before. ``train_images`` and ``test_images`` (0: all) cut
    the sets for trials.
    """

    activation: str = "gelu"
    normalisation: str = "batch"
    seed: int = 0
    epochs: int = 15
    depths: tuple[int, ...] = DEPTHS
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        checks.choice("normalisation", self.normalisation, NORMALISATIONS)
        checks.positive_ints("depths", self.depths)
        if len(self.depths) < 2 or any(b != 2 * a for a, b in zip(self.depths, self.depths[1:], strict=False)):
            raise ValueError(f"depths is {list(self.depths)}, expected two or more, each twice the one before.")
        self.configs  # noqa: B018 (they check themselves)

    @property
    def configs(self) -> list[CifarConfig]:
        """One a depth."""
        batch_norm, norm_groups = NORMALISATIONS[self.normalisation]
        return [
            CifarConfig(
                activation=self.activation, batch_norm=batch_norm, norm_groups=norm_groups, depth=depth,
                epochs=self.epochs, depth_scaling=True, seed=self.seed,
                train_images=self.train_images, test_images=self.test_images,
            )
            for depth in self.depths
        ]  # fmt: skip

    @property
    def name(self) -> str:
        return f"{self.activation}_{self.normalisation}_epochs{self.epochs}_seed{self.seed}"

    @property
    def columns(self) -> dict[str, Any]:
        """What the table says of the family."""
        names = ("activation", "normalisation", "seed", "epochs")
        return {name: getattr(self, name) for name in names}


# What is to be trained, in this order: the three normalisations with GELU, ReLU with batch norm, then second seeds.
FAMILIES = tuple(
    Family(activation, normalisation, seed)
    for seed in (0, 1)
    for activation, normalisation in (("gelu", "batch"), ("gelu", "none"), ("gelu", "group"), ("relu", "batch"))
)


# --- What is measured -------------------------------------------------------------------------------------------------


def steepness(network: ConvResNet) -> float:
    """L max_k |Z_{k+1} - Z_k|_F, Z_k both kernels of a layer: bounded in L if weights have a Lipschitz limit."""
    squares = [kernel.double().diff(dim=0).square().flatten(1).sum(dim=1) for kernel in _kernels(network)]
    return network.config.depth * math.sqrt(float(sum(squares).max()))


def _kernels(network: ConvResNet) -> list[torch.Tensor]:
    return list(cifar_training.kernels(network).values())


@torch.no_grad()
def distances(shallow: ConvResNet, deep: ConvResNet, images: torch.Tensor) -> dict[str, float]:
    """Between networks of L and of 2L layers, relative to the deeper one's size.

    ``weights_conv1`` and ``_conv2``: (int_0^1 |Z^L(s) - Z^2L(s)|_F^2 ds)^(1/2); ``hidden_states``: the largest over
    s = k/L of the root mean square over images, channels and pixels, in evaluation mode; ``logits``: root mean square.
    ``images``: normalised, (n, 3, 32, 32).
    """
    found = {}
    for name, one, other in zip(CONVOLUTIONS, _kernels(shallow), _kernels(deep), strict=True):
        size = float(other.double().square().sum() / len(other)) ** 0.5
        found[f"weights_{name}"] = integral_distance(one.double(), other.double()) / size
    states = [network.hidden_states(images) for network in (shallow, deep)]
    one, other = states[0], states[1][:: deep.config.depth // shallow.config.depth]
    apart, size = ((one - other).square().flatten(1).mean(dim=1).sqrt(), other.square().flatten(1).mean(dim=1).sqrt())
    found["hidden_states"] = float((apart / size).max())
    logits, expected = shallow.head(one[-1]), deep.head(other[-1])
    found["logits"] = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    return found


def measured(family: Family, networks: Sequence[ConvResNet], records: Sequence[EpochRecord], images) -> list[dict]:
    """The table's rows after an epoch, one a depth: what is known of it (nan: distances of the deepest)."""
    rows = []
    for place, (config, network, record) in enumerate(zip(family.configs, networks, records, strict=True)):
        time = schedule.training_time(config, config.train_images or dataset.TRAIN_IMAGES, record.epoch + 1)
        rows.append(
            {
                **family.columns,
                "depth": config.depth,
                "epoch": record.epoch + 1,
                "flow_time": time / config.depth / (1 - schedule.MOMENTUM),
                "train_loss": record.train_loss,
                "test_accuracy": math.nan if record.test_accuracy is None else record.test_accuracy,
                "steepness": steepness(network),
                **(
                    distances(network, networks[place + 1], images)
                    if place + 1 < len(networks)
                    else dict.fromkeys(MEASURES, math.nan)
                ),
            }
        )
    return rows


def read() -> dict[str, np.ndarray]:
    """``checkpoints/depth_limit.csv``, a row a family, epoch and depth; no rows if there is no such file."""
    columns = (*Family().columns, "depth", "epoch", "flow_time", "train_loss", "test_accuracy", "steepness", *MEASURES)
    return read_table(TABLE, columns)


def _rows_with(old: Iterable[dict], new: Sequence[dict], family: Family) -> list[dict]:
    """The rows, those of the family and the epochs of ``new`` replaced."""
    epochs = {row["epoch"] for row in new}
    return [row for row in old if not (family.columns.items() <= row.items() and row["epoch"] in epochs)] + list(new)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(family: Family, *, threads: int = 0, folder: Path | None = None) -> Iterator[list[dict]]:
    """Train the networks, or go on; yields the rows of every epoch that all of them have reached.

    States are in ``folder`` (default: where `states.run_folder` has them). Raises as `cifar_training.train`
    does; a family that was interrupted goes on with those of its networks that are behind.
    """
    folders = [(folder / c.name) if folder else states.run_folder(c) for c in family.configs]
    trainings = [
        cifar_training.train(c, into, threads=threads) for c, into in zip(family.configs, folders, strict=True)
    ]
    test = dataset.load(False, "cpu", family.test_images or None)
    images = dataset.normalise(test.pixels[:COMPARED_IMAGES])
    done = [states.epochs_done(into) for into in folders]
    while True:
        if min(done) == max(done) > 0:  # the last epochs of an interrupted training may not be measured yet
            yield measured(family, *_after_last_epoch(family, folders), images)
        if min(done) == family.epochs:
            return
        target = max(done) + (min(done) == max(done))
        for place, training in enumerate(trainings):
            while done[place] < target:
                next(training)
                done[place] += 1


def _after_last_epoch(family: Family, folders: Sequence[Path]) -> tuple[list[ConvResNet], list[EpochRecord]]:
    networks, records = [], []
    for config, folder in zip(family.configs, folders, strict=True):
        state = states.read_state(folder)
        network = ConvResNet(config.network)
        network.load_state_dict(state["network"])
        networks.append(network)
        records.append(EpochRecord(**state["log"][-1]))
    return networks, records


def train_all(families: Iterable[Family], threads: int = 0) -> list[str]:
    """Train the families one after the other, and write the table after every epoch; one that diverges ends there, and
    the others go on. Returns the sentences of those that diverged."""
    diverged = []
    for family in families:
        try:
            for rows in train(family, threads=threads):
                together = _rows_with(tables.rows(read()), rows, family)
                tables.write_csv(paths.CHECKPOINTS / TABLE, tables.from_rows(together))
                losses = ", ".join(f"{row['train_loss']:.4f}" for row in rows)
                print(f"{family.name}: epoch {rows[0]['epoch']} of {family.epochs}, losses {losses}", flush=True)
        except Divergence as error:
            print(error, file=sys.stderr, flush=True)
            diverged.append(str(error))
    return diverged


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.cifar.depth_limit [NAME ...] [--threads N] [--list]``; returns 1 if a family diverged."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.cifar.depth_limit", description="Train networks of growing depth, or go on training them."
    )
    parser.add_argument("names", nargs="*", help="families (default: all of the list)")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch")
    parser.add_argument("--list", action="store_true", help="name the families")
    chosen = parser.parse_args(arguments)
    families = {family.name: family for family in FAMILIES}
    if chosen.list:
        print("\n".join(families))
        return 0

    def command() -> None:
        for name in chosen.names:
            checks.choice("a family", name, families)
        diverged = train_all([families[name] for name in chosen.names or families], chosen.threads)
        if diverged:
            raise Divergence(" ".join(diverged))

    return checks.exit_code(
        command,
        "Interrupted; the same command goes on after the last complete epochs.",
        failures=(Divergence, RuntimeError, dataset.DataNotFoundError, OSError),
        misuses=(ValueError, TypeError),
    )


if __name__ == "__main__":
    sys.exit(main())
