"""What Figure 3, Table 1 and the appendix figure (figure_4) show, out of the trained networks in ``checkpoints/``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lib import checks, records, tables
from lib.cifar_training import CifarConfig
from lib.convnet import ConvNetConfig
from lib.records import CONVOLUTIONS, Run

# A smooth curve plus independent noise in each layer that makes up a share p of the variance across layers has a
# von Neumann ratio of about 2 p: below 0.1, at least 95 % of what varies along depth is smooth, in this model. (A
# random walk over the layers is neither, and has 6/L, which is 0.023 for 256: what lies well below that is a curve.)
SMOOTH_BELOW = 0.1
PAPER_RUNS = 5
PAPER_CLOSER = 10  # "about ten times": how much closer the paper's weight-tied layers are than its i.i.d. ones
NAMES = {True: "weight-tied", False: "i.i.d."}


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1 as published: medians and interquartile ranges over 5 runs, in %, and the judgement by eye."""

    activation: str
    smooth_init: bool
    train: float
    train_range: float
    test: float
    test_range: float
    smooth: bool


PAPER_TABLE = (
    PaperRow("identity", True, 56.5, 0.1, 59.8, 0.7, True),
    PaperRow("identity", False, 56.1, 0.3, 59.6, 0.7, False),
    PaperRow("gelu", True, 80.5, 0.7, 79.9, 0.2, True),
    PaperRow("gelu", False, 89.8, 0.5, 85.7, 0.1, False),
    PaperRow("relu", True, 97.4, 0.6, 88.1, 0.1, False),
    PaperRow("relu", False, 98.4, 0.1, 88.4, 0.5, False),
)


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

    def select(self, runs: Iterable[Run], **conditions: Any) -> list[Run]:
        """The runs of this choice, in the paper's setting otherwise (16 channels, batches of 64, whole set, a stem that
        trains with the rest, no group norm), as far as the conditions say nothing else; one of None is left out. How
        often a run was evaluated is no part of its training: of runs that differ in nothing else, one counts."""
        wanted = {name: getattr(self, name) for name in ("activation", "batch_norm", "depth", "learning_rate")}
        wanted |= {
            "epochs": self.epochs or None,
            "channels": 16,
            "batch_size": 64,
            "adaptive": False,
            "hold_stem": False,
            "depth_scaling": False,
            "norm_groups": 0,
        }
        found = records.select((run for run in runs if not run.config.trial), **wanted | conditions)
        return list({replace(run.config, test_every=1): run for run in reversed(found)}.values())[::-1]


def by_schedule(runs: Iterable[Run], choice: NetworkChoice, **conditions: Any) -> dict[int, dict[bool, list[Run]]]:
    """Weight-tied (True) and i.i.d. (False) runs of one choice for each length of schedule, the shortest first: lengths
    are never mixed. An initialisation without any run is left out."""
    found: dict[int, dict[bool, list[Run]]] = {}
    for run in sorted(
        choice.select(runs, **conditions), key=lambda run: (run.config.epochs, not run.config.smooth_init)
    ):
        found.setdefault(run.config.epochs, {}).setdefault(run.config.smooth_init, []).append(run)
    return found


def with_repeats(runs: Iterable[Run], choice: NetworkChoice, seed: int, **conditions: Any) -> list[Run]:
    """The runs of a choice and seed, and after them those of the other seeds with the longest schedule that there is,
    which tell how much of what is seen is the seed's."""
    found = choice.select(runs, **conditions)
    repeats = records.longest_schedule(found)
    return records.select(found, seed=seed) + [run for run in repeats if run.config.seed != seed]


def longest_by_depth(runs: Iterable[Run], choice: NetworkChoice, **conditions: Any) -> list[Run]:
    """The weight-tied runs of a choice in every depth there is, each depth's longest schedule, the shallowest first."""
    found = choice.select(runs, smooth_init=True, depth=None, **conditions)
    depths = sorted({run.config.depth for run in found})
    return [run for depth in depths for run in records.longest_schedule(records.select(found, depth=depth))]


# The variables of `make train` for what a choice and its conditions name.
VARIABLES = {
    "activation": "ACTIVATION",
    "smooth_init": "SMOOTH_INIT",
    "batch_norm": "BATCH_NORM",
    "depth": "DEPTH",
    "learning_rate": "LR",
    "epochs": "EPOCHS",
    "seed": "SEED",
}


def nothing_trained(choice: NetworkChoice, **conditions: Any) -> str:
    """The sentence for a figure that has nothing to show; ``conditions`` as for `NetworkChoice.select`."""
    wanted = {name: getattr(choice, name) for name in ("activation", "batch_norm", "depth", "learning_rate")}
    wanted |= {"epochs": choice.epochs or None} | conditions
    known = {name: wanted[name] for name in VARIABLES if wanted.get(name) is not None}
    default = CifarConfig()
    settings = [f"{VARIABLES[name]}={value}" for name, value in known.items() if value != getattr(default, name)]
    words = ", ".join(f"{name} {tables.word(value)}" for name, value in known.items())
    command = " ".join(["make train", *settings])
    return f"checkpoints/ holds no such network ({words}), or not its weights: `{command}` trains one."


# ------------------------------------------------------------------------------------------------- Figure 3


def draw_entries(seed: int, channels: int = 16) -> dict[str, tuple[int, int, int, int]]:
    """An entry (out, in, row, column) of "conv1" and one of "conv2", each drawn from all C x C x 3 x 3 by the seed."""
    checks.positive_int("entry_seed", seed, least=0)
    random = np.random.default_rng(seed)
    shape = (channels, channels, 3, 3)
    return {
        name: tuple(int(i) for i in np.unravel_index(random.integers(math.prod(shape)), shape)) for name in CONVOLUTIONS
    }


def networks_by_schedule(runs: Iterable[Run], choice: NetworkChoice, seed: int = 0) -> dict[tuple[int, bool], Run]:
    """The networks of one choice and seed whose weights are here, by (epochs, smooth_init): the shortest schedule
    first, and in each the weight-tied network first."""
    schedules = by_schedule((run for run in runs if run.has_weights), choice, seed=seed)
    return {(epochs, smooth): side[-1] for epochs, pair in schedules.items() for smooth, side in pair.items()}


def entries_across_layers(
    networks: Mapping[tuple[int, bool], Run], entries: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, list]:
    """The table of ``figure_3.csv``: epochs (of the schedule), smooth_init, convolution, layer (1..L), value."""
    columns: dict[str, list] = {"epochs": [], "smooth_init": [], "convolution": [], "layer": [], "value": []}
    for (epochs, smooth), run in networks.items():
        layers = run.load().network.residual_layers
        for name, entry in entries.items():
            values = layers.stacked(f"{name}.weight")[(slice(None), *entry)].tolist()
            columns["epochs"] += [epochs] * len(values)
            columns["smooth_init"] += [smooth] * len(values)
            columns["convolution"] += [name] * len(values)
            columns["layer"] += range(1, len(values) + 1)
            columns["value"] += values
    return columns


def panel_title(run: Run) -> str:
    """What a panel shows: activation, initialisation, test accuracy, schedule."""
    network = f"{tables.word(run.config.activation)}, {NAMES[run.config.smooth_init]}"
    return f"{network}: test {run.values['test_accuracy']:.2f} %\n{records.training_length(run.config.epochs)}"


# -------------------------------------------------------------------------------------------------- Table 1


def median_and_range(values: Iterable[float]) -> tuple[float, float]:
    """Median and interquartile range; both nan without values, the range nan with a single one."""
    values = np.asarray(list(values), dtype=float)
    if len(values) == 0:
        return math.nan, math.nan
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(high - low) if len(values) > 1 else math.nan


def table_1(runs: Iterable[Run], choice: NetworkChoice, accuracy: str = "last") -> dict[str, list]:
    """The table of ``table_1.csv``, a row for each of the paper's: its numbers and ours.

    ``resampling`` is the median of the `resampling_distances` of those of its runs that have one (nan of none).

    Without batch norm the columns paper_... are absent: the paper's networks have it. Each row takes the runs of
    its longest schedule. ``accuracy`` "last" takes that of the last epoch, "best" that of the best evaluated epoch (see
    ``test_every``), which is what the released checkpoints log.
    """
    checks.choice("accuracy", accuracy, ("last", "best"))
    suffix = "" if accuracy == "last" else "_best"
    runs, resampled = list(runs), resampling_distances()
    rows = []
    for paper in PAPER_TABLE:
        here = choice.select(runs, activation=paper.activation, smooth_init=paper.smooth_init)
        here = records.longest_schedule(here)
        train, train_range = median_and_range(run.values[f"train_accuracy{suffix}"] for run in here)
        test, test_range = median_and_range(run.values[f"test_accuracy{suffix}"] for run in here)
        ratios = [median_and_range(run.values[f"von_neumann_{name}"] for run in here)[0] for name in CONVOLUTIONS]
        published = {
            "paper_train": paper.train,
            "paper_train_range": paper.train_range,
            "paper_test": paper.test,
            "paper_test_range": paper.test_range,
            "paper_smooth": paper.smooth,
        }
        rows.append(
            {
                "activation": paper.activation,
                "initialisation": NAMES[paper.smooth_init],
                **(published if choice.batch_norm else {}),
                "train": train,
                "train_range": train_range,
                "test": test,
                "test_range": test_range,
                "von_neumann_conv1": ratios[0],
                "von_neumann_conv2": ratios[1],
                "smooth": all(ratio < SMOOTH_BELOW for ratio in ratios),
                "resampling": median_and_range(
                    resampled[run.config.name] for run in here if run.config.name in resampled
                )[0],
                "runs": len(here),
                "epochs": here[0].config.epochs if here else 0,
            }
        )
    return tables.from_rows(rows)


def resampling_distances() -> dict[str, float]:
    """How far the logits on the test images are off with half of the layers kept, relative to their size, by run: those
    in ``checkpoints/resampling.csv``, whose weights are here. Small, if layers are like their neighbours or their
    differences average out; 1 or more, if nothing of the network is left."""
    kept = tables.select(records.read_measured("resampling"), weights="kept", statistics="kept")
    return {
        str(run): float(of["distance"][of["layers"].argmax()])
        for run in dict.fromkeys(kept["run"])
        for of in [tables.select(kept, run=run)]
    }


def readable_table_1(table: Mapping[str, list]) -> dict[str, list[str]]:
    """`table_1` as it is read and printed: a row says itself where it has fewer epochs or runs than the paper."""

    def percent(middle: float, spread: float) -> str:
        return f"{middle:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")

    lines = []
    for row in tables.rows(table):
        line = {"activation": tables.word(row["activation"]), "initialisation": row["initialisation"]}
        if "paper_test" in row:
            line["paper train %"] = percent(row["paper_train"], row["paper_train_range"])
            line["paper test %"] = percent(row["paper_test"], row["paper_test_range"])
            line["paper smooth"] = "yes" if row["paper_smooth"] else "no"
        ours = ("train %", "test %", "von Neumann conv1", "von Neumann conv2", "smooth", "resampling distance")
        if row["runs"] == 0:
            line |= dict.fromkeys(ours, "-") | {"trained": "not yet"}
        else:
            texts = (
                percent(row["train"], row["train_range"]),
                percent(row["test"], row["test_range"]),
                f"{row['von_neumann_conv1']:.2g}",
                f"{row['von_neumann_conv2']:.2g}",
                "yes" if row["smooth"] else "no",
                "-" if math.isnan(row["resampling"]) else f"{row['resampling']:.2g}",
            )
            line |= dict(zip(ours, texts, strict=True)) | {"trained": _trained(row["epochs"], row["runs"])}
        lines.append(line)
    return tables.from_rows(lines)


def _trained(epochs: int, runs: int) -> str:
    count = f"{runs} runs" if runs >= PAPER_RUNS else f"{runs} of {PAPER_RUNS} runs"
    return f"{records.training_length(epochs)}, {count}"


# ------------------------------------------------------------------------------------------------- Figure 4


def successive_distance_tables(
    networks: Mapping[int, Mapping[bool, list[Run]]], distances: Mapping[str, np.ndarray]
) -> tuple[dict[str, list], dict[str, list]]:
    """The tables of figure 4 out of ``successive_distance.csv``: per layer, mean over runs (epochs, smooth_init,
    convolution, layer, distance), and averaged over layers (epochs, smooth_init, convolution, seed, average)."""
    layers: dict[str, list] = {"epochs": [], "smooth_init": [], "convolution": [], "layer": [], "distance": []}
    averages: dict[str, list] = {"epochs": [], "smooth_init": [], "convolution": [], "seed": [], "average": []}
    sides = [(epochs, smooth, runs) for epochs, pair in networks.items() for smooth, runs in pair.items()]
    for epochs, smooth, runs in sides:
        for name in CONVOLUTIONS:
            curves = []
            for run in runs:
                rows = (distances["run"] == run.config.name) & (distances["convolution"] == name)
                curves.append(distances["distance"][rows][np.argsort(distances["layer"][rows])])
                averages["epochs"].append(epochs)
                averages["smooth_init"].append(smooth)
                averages["convolution"].append(name)
                averages["seed"].append(run.config.seed)
                averages["average"].append(float(curves[-1].mean()))
            mean = np.mean(curves, axis=0)
            layers["epochs"] += [epochs] * len(mean)
            layers["smooth_init"] += [smooth] * len(mean)
            layers["convolution"] += [name] * len(mean)
            layers["layer"] += range(1, len(mean) + 1)
            layers["distance"] += mean.tolist()
    return layers, averages


def closer_by(averages: Mapping[str, list], epochs: int) -> dict[str, float]:
    """How many times closer successive layers are from weight-tied than from i.i.d. initialisation after a schedule of
    that length: for each convolution the ratio of the medians over runs of the averages (without an entry where one
    side is missing)."""
    chosen = tables.select(averages, epochs=epochs)
    factors = {}
    for name in CONVOLUTIONS:
        tied, iid = (tables.select(chosen, smooth_init=side, convolution=name)["average"] for side in (True, False))
        if len(tied) and len(iid):
            factors[name] = float(np.median(iid) / np.median(tied))
    return factors


def closer_along_depth(layers: Mapping[str, list], epochs: int, convolution: str, parts: int = 4) -> list[float]:
    """The same in each of ``parts`` equal parts of the layers, from the input to the output, out of the first table of
    `successive_distance_tables`: the ratio of the means over layers and runs (nothing where one side is missing)."""
    chosen = tables.select(layers, epochs=epochs, convolution=convolution)
    sides = (tables.select(chosen, smooth_init=side)["distance"] for side in (False, True))
    iid, tied = ([part.mean() for part in np.array_split(side, parts)] if len(side) else [] for side in sides)
    return [float(above / below) for above, below in zip(iid, tied, strict=False)]


def schedule_titles(networks: Mapping[int, Mapping[bool, list[Run]]]) -> dict[int, str]:
    """How long the networks of each schedule were trained and how many there are of a side, for the pictures."""
    titles = {}
    for epochs, pair in networks.items():
        counts = sorted({len(runs) for runs in pair.values()})
        runs = "1 run" if counts == [1] else f"{' and '.join(map(str, counts))} runs"
        (activation,) = {tables.word(run.config.activation) for side in pair.values() for run in side}
        titles[epochs] = f"{activation}, {records.training_length(epochs)}, {runs}"
    return titles
