"""Networks of growing depth on CIFAR-10, trained along the same flow: how far depth L is from depth 2L.

`train` trains the networks of a `Family` in turn, one epoch of each, and measures them after every epoch, for
``checkpoints/depth_limit.csv``. All start from the same weights (weight-tied initialisation: one draw for all layers of
all depths), see the same images in the same order, and with `CifarConfig.depth_scaling` follow the same flow in time.
A copy of the shallowest network, with one weight changed in its last bit, is trained as well: distances between depths
mean nothing unless they are larger than its distance. States are kept as those of every run, so an interrupted
training can go on.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib import checks, commands, paths
from lib.checks import Divergence
from lib.cifar import dataset, depth_table, schedule, states
from lib.cifar import training as cifar_training
from lib.cifar.config import CifarConfig
from lib.cifar.depth_table import DOUBLE_DEPTH, KINDS, LAST_BIT, MEASURES
from lib.cifar.network import ConvResNet
from lib.cifar.progress import EpochRecord
from lib.measures import integral_distance
from lib.tables import select

DEPTHS = (16, 32, 64, 128)
NORMALISATIONS = {"batch": (True, 0), "none": (False, 0), "group": (False, 4)}  # batch_norm, norm_groups
COMPARED_IMAGES = 100  # of the test set, for hidden states and logits


@dataclass(frozen=True)
class Family:
    """Networks with weight-tied initialisation that differ only in their depth.

    ``normalisation`` is that of the layers: "batch", "none" or "group" (4 groups). The paper's ``stem_activation`` is
    "relu". ``seed`` is that of the weights, the order of the images and the augmentation. ``epochs`` is the length of
    the schedule. Each of the ``depths`` is twice the one before. ``train_images`` and ``test_images`` are for trials:
    the number of images used (0: all).
    """

    activation: str = "gelu"
    normalisation: str = "batch"
    stem_activation: str = "relu"
    seed: int = 0
    epochs: int = 15
    depths: tuple[int, ...] = DEPTHS
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        checks.choice("normalisation", self.normalisation, NORMALISATIONS)
        checks.positive_ints("depths", self.depths)
        object.__setattr__(self, "depths", tuple(checks.plain(depth) for depth in self.depths))
        if len(self.depths) < 2 or any(b != 2 * a for a, b in zip(self.depths, self.depths[1:], strict=False)):
            raise ValueError(f"depths is {list(self.depths)}, expected two or more, each twice the one before.")
        self.configs  # noqa: B018 (each config checks itself)

    @property
    def configs(self) -> list[CifarConfig]:
        """One for each depth."""
        batch_norm, norm_groups = NORMALISATIONS[self.normalisation]
        return [
            CifarConfig(
                activation=self.activation, batch_norm=batch_norm, norm_groups=norm_groups,
                stem_activation=self.stem_activation, depth=depth, depth_scaling=True,
                epochs=self.epochs, seed=self.seed,
                train_images=self.train_images, test_images=self.test_images,
            )
            for depth in self.depths
        ]  # fmt: skip

    @property
    def name(self) -> str:
        stem = f"{self.stem_activation}stem_" if self.stem_activation != "relu" else ""
        return f"{self.activation}_{self.normalisation}_{stem}epochs{self.epochs}_seed{self.seed}"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of the table that identify the family."""
        return {name: getattr(self, name) for name in depth_table.FAMILY}


FAMILIES = tuple(Family(*kind, seed) for seed in (0, 1) for kind in KINDS)  # to train, in this order


# --- What is measured -------------------------------------------------------------------------------------------------


def steepness(network: ConvResNet) -> float:
    """L max_k |Z_{k+1} - Z_k|_F, with Z_k both kernels of a layer. It is bounded if weights have a Lipschitz limit."""
    squares = [kernel.double().diff(dim=0).square().flatten(1).sum(dim=1) for kernel in network.kernels().values()]
    return network.config.depth * math.sqrt(float(sum(squares).max()))


@torch.no_grad()
def distances(shallow: ConvResNet, deep: ConvResNet, images: torch.Tensor) -> dict[str, float]:
    """Distances between networks of L and of 2L layers, relative to the size of the deeper one.

    ``weights_conv1`` and ``_conv2`` are (int_0^1 |Z^L(s) - Z^2L(s)|_F^2 ds)^(1/2). ``hidden_states`` is the maximum
    over s = k/L of the root mean square over images, channels and pixels, in evaluation mode. ``logits`` is the root
    mean square. ``images`` (n, 3, 32, 32) are normalised."""
    found = {}
    deep_kernels = deep.kernels()
    for name, one in shallow.kernels().items():
        other = deep_kernels[name]
        size = float(other.double().square().sum() / len(other)) ** 0.5
        found[f"weights_{name}"] = integral_distance(one.double(), other.double()) / size
    states = [network.hidden_states(images) for network in (shallow, deep)]
    one, other = states[0], states[1][:: deep.config.depth // shallow.config.depth]
    apart, size = ((one - other).square().flatten(1).mean(dim=1).sqrt(), other.square().flatten(1).mean(dim=1).sqrt())
    found["hidden_states"] = float((apart / size).max())
    logits, expected = shallow.head(one[-1]), deep.head(other[-1])
    found["logits"] = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    return found


def measure(
    family: Family,
    config: CifarConfig,
    network: ConvResNet,
    record: EpochRecord,
    compared_with: str,
    other: ConvResNet | None,
    images: torch.Tensor,
) -> dict[str, Any]:
    """The row of the table for a network of the family, whose distances are those from the ``other`` (nan if there is
    none). ``images`` (n, 3, 32, 32) are normalised."""
    time = schedule.training_time(config, config.train_images or dataset.TRAIN_IMAGES, record.epoch + 1)
    return {
        **family.columns,
        "depth": config.depth,
        "epoch": record.epoch + 1,
        "compared_with": compared_with,
        "flow_time": time / config.depth / (1 - schedule.MOMENTUM),
        "train_loss": record.train_loss,
        "test_accuracy": math.nan if record.test_accuracy is None else record.test_accuracy,
        "steepness": steepness(network),
        **(distances(network, other, images) if other else dict.fromkeys(MEASURES, math.nan)),
    }


# --- Training ---------------------------------------------------------------------------------------------------------


Report = Callable[[str, EpochRecord], None]


def ignore(network: str, record: EpochRecord) -> None:
    """Report nothing."""


def train(
    family: Family, *, threads: int = 0, folder: Path | None = None, report: Report = ignore
) -> Iterator[list[dict]]:
    """Train the networks, or go on training them; yield the rows of an epoch once all networks have reached it.

    States are in ``folder`` (default: `paths.BUILD`/training). After an interruption, training goes on with the
    networks that are behind. A row is measured while both of its networks are at its epoch, and never later. ``report``
    is called after every epoch of every network, with "copy" or "depth L". Raises what `cifar_training.train` raises.
    """
    checks.thread_count("threads", threads)
    first, *_ = family.configs
    folders = [(folder / c.name) if folder else states.run_folder(c) for c in family.configs]
    changed = folders[0].with_name(f"{first.name}_{LAST_BIT.replace(' ', '')}")
    if not (changed / states.STATE_FILE).exists():
        start_from_changed_bit(first, changed)
    members = [(first, changed), *zip(family.configs, folders, strict=True)]
    trainings = [cifar_training.train(config, into, threads=threads) for config, into in members]
    test = dataset.load(False, "cpu", family.test_images or None)
    images = dataset.normalise(test.pixels[:COMPARED_IMAGES])
    done = [states.epochs_done(into) for _, into in members]
    while True:
        if min(done) > 0:  # the last epochs of an interrupted training may not be measured yet
            rows = list(_measure_epoch(family, members, done, images))
            if rows:
                yield rows
        if min(done) == family.epochs:
            return
        target = min(done) + 1
        for place, training in enumerate(trainings):
            if done[place] < target:
                report(f"depth {members[place][0].depth}" if place else "copy", next(training))
                done[place] += 1


def start_from_changed_bit(config: CifarConfig, folder: Path) -> None:
    """Write the state of a run before its first epoch, with the stem's largest weight changed to the next larger
    float32 number.

    A change of a small weight may be lost in rounding at the first step. In the table, the copies of GELU networks with
    batch norm, seed 0, started from a change of the stem's first weight. It was not lost there."""
    run = cifar_training.Training(config, torch.device("cpu"))
    weights = run.network.conv1.weight.data.view(-1)
    largest = weights.abs().argmax()
    weights[largest] = torch.nextafter(weights[largest], weights.new_tensor(math.inf))
    with states.lock_folder(folder):
        run.save(folder)


def _measure_epoch(
    family: Family, members: Sequence[tuple[CifarConfig, Path]], done: Sequence[int], images: torch.Tensor
) -> Iterator[dict]:
    # The copy is compared with the first network, every other one with the next, the last one with none.
    read = [_read_network(*member) if at == min(done) else None for member, at in zip(members, done, strict=True)]
    compared = [LAST_BIT] + len(family.depths) * [DOUBLE_DEPTH]
    for place, ((config, _), words) in enumerate(zip(members, compared, strict=True)):
        pair = read[place : place + 2]
        if all(pair):
            (network, record), *others = pair
            yield measure(family, config, network, record, words, others[0][0] if others else None, images)


def _read_network(config: CifarConfig, folder: Path) -> tuple[ConvResNet, EpochRecord]:
    state = states.read_state(folder)
    network = ConvResNet(config.network)
    network.load_state_dict(state["network"])
    return network, EpochRecord(**state["log"][-1])


def is_finished(family: Family) -> bool:
    """Whether the table has all rows of the family after its last epoch."""
    rows = select(depth_table.read(), **family.columns, epoch=family.epochs)
    found = set(zip(rows["depth"].tolist(), rows["compared_with"].tolist(), strict=True))
    return {(family.depths[0], LAST_BIT), *((depth, DOUBLE_DEPTH) for depth in family.depths)} <= found


def train_all(families: Iterable[Family], threads: int = 0) -> list[str]:
    """Train those of the families that are not finished, one after the other, and write the table after every epoch.

    A family whose states are not here starts anew, and replaces its rows epoch by epoch. If a family diverges, the next
    one is trained. Returns the messages of those that diverged. Raises ValueError for a family that is not in
    `FAMILIES`: only those are results.
    """
    families, diverged = list(families), []
    if foreign := [family for family in families if family not in FAMILIES]:
        raise ValueError(f"{foreign[0]} is not in FAMILIES: train it with `train`, or add it there.")
    for family in families:
        if is_finished(family):
            print(f"{family.name} is finished.", flush=True)
            continue
        depths = ", ".join(map(str, family.depths))
        print(f"{family.name}: {family.epochs} epochs of {depths} layers and of a copy of the first", flush=True)
        try:
            for rows in train(family, threads=threads, report=_print_epoch):
                depth_table.add(rows)
        except Divergence as error:
            print(error, file=sys.stderr, flush=True)
            diverged.append(str(error))
    return diverged


def _print_epoch(network: str, record: EpochRecord) -> None:
    words = f"loss {record.train_loss:.4f}, {record.seconds:.0f} s"
    print(f"  {network}, epoch {record.epoch + 1}: {words}", flush=True)


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

    def command() -> None:
        if chosen.list:
            print("\n".join(families))
            return
        paths.check_writable(paths.CHECKPOINTS)
        for name in chosen.names:
            checks.choice("FAMILIES", name, families)
        diverged = train_all([families[name] for name in chosen.names or families], chosen.threads)
        if diverged:
            raise Divergence(" ".join(diverged))

    return commands.exit_code(
        command,
        "Interrupted; the same command goes on after the last complete epochs.",
        failures=(Divergence, RuntimeError, dataset.DataNotFoundError, OSError),
        misuses=(ValueError, TypeError),
    )


if __name__ == "__main__":
    sys.exit(main())
