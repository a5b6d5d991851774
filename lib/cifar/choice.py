"""Which trained networks a figure shows: a choice of settings, and the runs that have them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from lib import checks, tables
from lib.cifar import records
from lib.cifar.config import CifarConfig
from lib.cifar.network import INITIALISATIONS, ConvNetConfig
from lib.cifar.records import CONVOLUTIONS, Run


@dataclass(frozen=True)
class NetworkChoice:
    """Which trained networks to look at. ``epochs`` 0 means schedules of any length."""

    activation: str = "gelu"
    batch_norm: bool = True
    depth: int = 256
    learning_rate: float = 0.04
    epochs: int = 0

    def __post_init__(self) -> None:
        checks.make_plain(self)
        network = ConvNetConfig(depth=self.depth, activation=self.activation, batch_norm=self.batch_norm)
        object.__setattr__(self, "activation", network.activation)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_int("epochs", self.epochs, least=0)

    @property
    def settings(self) -> dict[str, Any]:
        """What the choice says of a run's configuration; None if it says nothing."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"epochs": self.epochs or None}

    def select(self, runs: Iterable[Run], **conditions: Any) -> list[Run]:
        """The runs of this choice, in the paper's setting otherwise (16 channels, batches of 64, whole set, a stem that
        trains with the rest, no group norm), as far as the conditions say nothing else; one of None is left out. How
        often a run was evaluated is no part of its training: of runs that differ in nothing else, one counts."""
        paper = {
            "channels": 16,
            "batch_size": 64,
            "adaptive": False,
            "hold_stem": False,
            "depth_scaling": False,
            "norm_groups": 0,
        }
        found = records.select((run for run in runs if not run.config.trial), **paper | self.settings | conditions)
        return list({replace(run.config, test_every=1): run for run in reversed(found)}.values())[::-1]


@dataclass(frozen=True)
class ConvolutionChoice:
    """Which trained networks (``choice``, and the ``seed`` of those that have no repeats), and which ``convolution`` of
    their layers."""

    choice: NetworkChoice
    convolution: str = "conv1"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.choice("convolution", self.convolution, CONVOLUTIONS)
        checks.positive_int("seed", self.seed, least=0)


def run_name(words: str) -> str:
    """The name of the run of seed 0 in the paper's setting that is meant by its activation, initialisation and epochs
    in words, such as "gelu weight-tied 30". Raises ValueError."""
    if not isinstance(words, str) or not re.fullmatch(r"\w+ (weight-tied|iid) \d+", words):
        raise ValueError(f"The network is {words!r}, expected words such as 'gelu weight-tied 30' or 'relu iid 180'.")
    activation, initialisation, epochs = words.split()
    return CifarConfig(activation, initialisation, epochs=int(epochs)).name


def by_schedule(runs: Iterable[Run], choice: NetworkChoice, **conditions: Any) -> dict[int, dict[str, list[Run]]]:
    """The runs of one choice for each length of schedule, the shortest first (lengths are never mixed), and for each
    initialisation, "weight-tied" before "iid". An initialisation without any run is left out."""
    found: dict[int, dict[str, list[Run]]] = {}
    runs = choice.select(runs, **conditions)
    for run in sorted(runs, key=lambda run: (run.config.epochs, INITIALISATIONS.index(run.config.initialisation))):
        found.setdefault(run.config.epochs, {}).setdefault(run.config.initialisation, []).append(run)
    return found


def with_repeats(runs: Iterable[Run], choice: NetworkChoice, seed: int, **conditions: Any) -> list[Run]:
    """The runs of a choice and seed, and after them those of the other seeds with the longest schedule that there is,
    which tell how much of what is seen is the seed's."""
    found = choice.select(runs, **conditions)
    repeats = records.longest_schedule(found)
    return records.select(found, seed=seed) + [run for run in repeats if run.config.seed != seed]


def longest_by_depth(runs: Iterable[Run], choice: NetworkChoice, **conditions: Any) -> list[Run]:
    """The weight-tied runs of a choice in every depth there is, each depth's longest schedule, the shallowest first."""
    found = choice.select(runs, initialisation="weight-tied", depth=None, **conditions)
    depths = sorted({run.config.depth for run in found})
    return [run for depth in depths for run in records.longest_schedule(records.select(found, depth=depth))]


# The variables of `make train` for what a choice and its conditions name.
VARIABLES = {
    "activation": "ACTIVATION",
    "initialisation": "INITIALISATION",
    "batch_norm": "BATCH_NORM",
    "depth": "DEPTH",
    "learning_rate": "LR",
    "epochs": "EPOCHS",
    "seed": "SEED",
}


def nothing_trained(choice: NetworkChoice, **conditions: Any) -> str:
    """The sentence for a figure that has nothing to show; ``conditions`` as for `NetworkChoice.select`."""
    wanted = choice.settings | conditions
    known = {name: wanted[name] for name in VARIABLES if wanted.get(name) is not None}
    default = CifarConfig()
    settings = [f"{VARIABLES[name]}={value}" for name, value in known.items() if value != getattr(default, name)]
    words = ", ".join(f"{name} {tables.word(value)}" for name, value in known.items())
    command = " ".join(["make train", *settings])
    return f"checkpoints/ holds no such network ({words}), or not its weights: `{command}` trains one."


def length_in_words(epochs: int, runs: int) -> str:
    """How long networks were trained, and how many there are."""
    return f"{records.training_length(epochs)}, {runs} run{'' if runs == 1 else 's'}"
