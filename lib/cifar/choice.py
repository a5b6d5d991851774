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

# The values of a config that the paper does not vary, and those of the options that it does not have.
PAPER = {
    name: getattr(CifarConfig(), name)
    for name in ("channels", "adaptive", "hold_stem", "depth_scaling", "norm_groups", "stem_activation")
}


@dataclass(frozen=True, order=True)
class Setting:
    """How a network was trained, apart from activation, initialisation and seed. Medians, differences and blocks of
    tables are over networks of one setting."""

    epochs: int
    batch_size: int
    learning_rate: float
    depth: int = 256
    channels: int = 16
    batch_norm: bool = True
    norm_groups: int = 0
    adaptive: bool = False
    hold_stem: bool = False
    depth_scaling: bool = False
    stem_activation: str = "relu"

    @classmethod
    def from_config(cls, config: CifarConfig) -> "Setting":
        """The setting of a run with that config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def of_any_length(self) -> "Setting":
        """The setting with 0 epochs, which stands for a schedule of any length."""
        return replace(self, epochs=0)

    @property
    def words(self) -> str:
        """Batch size, learning rate and options in words: "batch size 64, learning rate 0.04, hold stem"."""
        options = ("adaptive", "hold_stem", "depth_scaling")
        named = [name.replace("_", " ") for name in options if getattr(self, name)]
        named += [f"{tables.word(self.stem_activation)} stem"] if self.stem_activation != "relu" else []
        return ", ".join([f"batch size {self.batch_size}", f"learning rate {self.learning_rate:g}", *named])


@dataclass(frozen=True)
class NetworkChoice:
    """Which trained networks to show. 0 for ``epochs``, ``learning_rate`` or ``batch_size`` means any."""

    activation: str = "gelu"
    batch_norm: bool = True
    depth: int = 256
    learning_rate: float = 0.04
    epochs: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        checks.check_fields(self, learning_rate=0, epochs=0, batch_size=0)
        network = ConvNetConfig(depth=self.depth, activation=self.activation, batch_norm=self.batch_norm)
        object.__setattr__(self, "activation", network.activation)

    @property
    def settings(self) -> dict[str, Any]:
        """The values of a config that are chosen; None for any."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return named | {name: named[name] or None for name in ("epochs", "learning_rate", "batch_size")}

    def select(self, runs: Iterable[Run], **conditions: Any) -> list[Run]:
        """The runs of this choice.

        ``conditions`` on further values of the config replace those of the choice and of the paper (16 channels, all
        images, none of the options that the paper does not have); None means any. If runs differ only in how often
        they were evaluated, one of them is returned."""
        found = records.select((run for run in runs if not run.config.trial), **PAPER | self.settings | conditions)
        return list({replace(run.config, test_every=1): run for run in reversed(found)}.values())[::-1]


@dataclass(frozen=True)
class ConvolutionChoice:
    """Which trained networks to show (``choice``, and a ``seed``), and which ``convolution`` of their layers."""

    choice: NetworkChoice
    convolution: str = "conv1"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_fields(self, seed=0)
        checks.choice("convolution", self.convolution, CONVOLUTIONS)


def run_name(words: str) -> str:
    """The name of the run with seed 0 in the paper's setting, from its activation, initialisation and epochs in words,
    such as "gelu weight-tied 30". Raises ValueError for other words."""
    if not isinstance(words, str) or not re.fullmatch(r"\w+ (weight-tied|iid) \d+", words):
        raise ValueError(f"The network is {words!r}, expected words such as 'gelu weight-tied 30' or 'relu iid 180'.")
    activation, initialisation, epochs = words.split()
    return CifarConfig(activation, initialisation, epochs=int(epochs)).name


def released_setting(choice: NetworkChoice) -> Setting:
    """The setting of the choice, with a schedule of any length (0). Values that the choice leaves open are those of the
    released script."""
    released = CifarConfig(
        batch_norm=choice.batch_norm,
        depth=choice.depth,
        learning_rate=choice.learning_rate or CifarConfig.learning_rate,
        batch_size=choice.batch_size or CifarConfig.batch_size,
    )
    return Setting.from_config(released).of_any_length


RELEASED = released_setting(NetworkChoice()).words


def group_by_setting(
    runs: Iterable[Run], choice: NetworkChoice, **conditions: Any
) -> dict[Setting, dict[str, list[Run]]]:
    """The runs of a choice by setting, the shortest schedule first, and by initialisation, "weight-tied" before "iid".
    An initialisation without runs is left out."""
    found: dict[Setting, dict[str, list[Run]]] = {}

    def place(run: Run) -> tuple[Setting, int]:
        return Setting.from_config(run.config), INITIALISATIONS.index(run.config.initialisation)

    for run in sorted(choice.select(runs, **conditions), key=place):
        found.setdefault(Setting.from_config(run.config), {}).setdefault(run.config.initialisation, []).append(run)
    return found


def select_longest_schedule(runs: Iterable[Run]) -> list[Run]:
    """In each setting of any length, the runs with the most epochs."""
    runs = list(runs)
    settings = [Setting.from_config(run.config).of_any_length for run in runs]
    longest: dict[Setting, int] = {}
    for run, setting in zip(runs, settings, strict=True):
        longest[setting] = max(longest.get(setting, 0), run.config.epochs)
    return [run for run, setting in zip(runs, settings, strict=True) if run.config.epochs == longest[setting]]


def select_with_repeats(runs: Iterable[Run], choice: NetworkChoice, seed: int, **conditions: Any) -> list[Run]:
    """The runs of a choice with that seed, then those of other seeds with the longest schedule, which show how much
    depends on the seed."""
    found = choice.select(runs, **conditions)
    repeats = select_longest_schedule(found)
    return records.select(found, seed=seed) + [run for run in repeats if run.config.seed != seed]


def select_longest_by_depth(runs: Iterable[Run], choice: NetworkChoice, **conditions: Any) -> list[Run]:
    """The weight-tied runs of a choice with the longest schedule of each depth, the shallowest first."""
    found = choice.select(runs, initialisation="weight-tied", depth=None, **conditions)
    return sorted(select_longest_schedule(found), key=lambda run: run.config.depth)


# The variables of `make train` by the names in a choice and its conditions.
VARIABLES = {
    "activation": "ACTIVATION",
    "initialisation": "INITIALISATION",
    "batch_norm": "BATCH_NORM",
    "depth": "DEPTH",
    "learning_rate": "LR",
    "batch_size": "BATCH_SIZE",
    "epochs": "EPOCHS",
    "seed": "SEED",
}


def describe_missing(choice: NetworkChoice, **conditions: Any) -> str:
    """The message of a figure without networks to show; ``conditions`` as for `NetworkChoice.select`."""
    wanted = choice.settings | conditions
    known = {name: wanted[name] for name in VARIABLES if wanted.get(name) is not None}
    default = CifarConfig()
    settings = [f"{VARIABLES[name]}={value}" for name, value in known.items() if value != getattr(default, name)]
    words = ", ".join(f"{name} {tables.word(value)}" for name, value in known.items())
    command = " ".join(["make train", *settings])
    return f"checkpoints/ holds no such network ({words}), or not its weights: `{command}` trains one."


def describe_training(epochs: int, runs: int) -> str:
    """How long networks were trained and how many there are, in words."""
    return f"{records.describe_length(epochs)}, {runs} run{'' if runs == 1 else 's'}"
