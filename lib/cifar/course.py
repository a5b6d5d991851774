"""How smooth the layers of trained networks are, in training and along the depth: tables made from the records."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lib import tables
from lib.cifar import dataset, schedule
from lib.cifar.records import CONVOLUTIONS, SHARES, Run
from lib.measures import SMOOTH_BELOW, smooth_share

SCALES = ("stem_scale", "path_length", "relative_path_length")
RATIOS = tuple(f"von_neumann_{name}" for name in CONVOLUTIONS)


def describe_run(run: Run) -> dict[str, Any]:
    """The entries of a run in the first columns of every table here: run (its name), activation, initialisation, epochs
    (length of the schedule)."""
    config = run.config
    return {
        "run": config.name,
        "activation": config.activation,
        "initialisation": config.initialisation,
        "epochs": config.epochs,
    }


def make_columns(
    rows: list[dict[str, Any]], names: tuple[str, ...], measured: tuple[str, ...] = RATIOS
) -> dict[str, list]:
    """The table of these ``rows``, with the columns run, activation, initialisation, epochs (`describe_run`), then
    ``names``, then ``measured``. It has these columns without rows too."""
    return tables.from_rows(rows, ("run", "activation", "initialisation", "epochs", *names, *measured))


def measure_parts(
    runs: Iterable[Run], parts: int, measure: Callable[[Tensor, int], list[float]], names: tuple[str, ...]
) -> dict[str, list]:
    """A measure of the kernels in each of ``parts`` equal parts of the layers: one row for each run that has weights
    and each part.

    ``measure`` takes the kernels (L, C, C, 3, 3) of one convolution and the number of parts, and returns a number for
    each part, from the input to the output, such as `measures.ratios_along_depth`. The columns are those of
    `describe_run`, ``part`` (1, 2, ...), and ``names``, the measures of conv1 and of conv2.
    """
    rows = []
    for run in (run for run in runs if run.has_weights):
        found = [measure(kernel, parts) for kernel in run.load().network.kernels().values()]
        for part, values in enumerate(zip(*found, strict=True), start=1):
            rows.append(describe_run(run) | {"part": part} | dict(zip(names, values, strict=True)))
    return make_columns(rows, ("part",), names)


def smooth_shares(run: Run) -> dict[str, float]:
    """The `smooth_share` of a run's layers after training, by the names in `SHARES`, from its record or else from its
    weights. nan if neither is there."""
    found = {name: run.values.get(name, math.nan) for name in SHARES}
    if all(math.isnan(share) for share in found.values()) and run.has_weights:
        kernels = run.load().network.kernels().values()
        found = {name: smooth_share(kernel) for name, kernel in zip(SHARES, kernels, strict=True)}
    return found


def smoothness_in_training(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness.csv``, ``smoothness_depths.csv`` and ``stem_training.csv``: one row for each epoch of
    each run that has a record.

    Its columns are run, activation, initialisation, epochs (length of the schedule), depth, hold_stem, seed, epoch
    (1, 2, ...), time, train_accuracy (%), von_neumann_conv1, von_neumann_conv2, and the `SCALES` (nan if undefined or
    not in the log). ``time`` t is the sum of the learning rates of all steps so far; it makes schedules of different
    lengths comparable, unlike epochs. With momentum mu it counts as a time t / (1 - mu) of gradient descent, and as
    t / (L (1 - mu)) of the paper's flow, whose layers move by L times their gradients.
    """
    rows = []
    for run in runs:
        settings = describe_run(run) | {name: getattr(run.config, name) for name in ("depth", "hold_stem", "seed")}
        time, steps = 0.0, schedule.steps(run.config, run.config.train_images or dataset.TRAIN_IMAGES)
        for line in run.log():
            time += steps * line["learning_rate"]
            reached = {"epoch": line["epoch"] + 1, "time": time, "train_accuracy": line["train_accuracy"]}
            logged = (*RATIOS, *SCALES[:2])
            measured = {name: math.nan if line.get(name) is None else line[name] for name in logged}
            measured["relative_path_length"] = measured["path_length"] / measured["stem_scale"]
            rows.append(settings | reached | measured)
    names = ("depth", "hold_stem", "seed", "epoch", "time", "train_accuracy")
    return make_columns(rows, names, (*RATIOS, *SCALES))


# The growth is exponential between these ratios. Below, layers are nearly a straight line over the depth
# (`straight_line_ratio`, 0.0002 for 256 layers). Above, growth saturates: independent layers have 2.
GROWING = (1e-3, SMOOTH_BELOW)


@dataclass(frozen=True)
class Course:
    """The course of one run's von Neumann ratio.

    ``ratio`` and ``time`` are those at the end. ``lost_after`` is the epoch after which the ratio first was
    `SMOOTH_BELOW` or more (None: never). ``lost_at`` is the time at which it reached that value, if its logarithm is
    linear between epochs (nan: never). ``rate`` is that of the growth exp(rate * time) after its minimum, within
    `GROWING` (nan with fewer than three epochs there). A run without a record has nan, 0, None, nan, nan.
    """

    ratio: float
    time: float
    lost_after: int | None
    lost_at: float
    rate: float

    @property
    def lost(self) -> str:
        """When the smoothness was lost, in words."""
        if self.lost_after is None:
            return "smooth at every epoch"
        return f"above {SMOOTH_BELOW} after epoch {self.lost_after}"


def find_crossing_time(time: np.ndarray, values: np.ndarray, level: float) -> float:
    """The time at which the values first reach a level, if their logarithm is linear between times (nan: never)."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return math.nan
    around = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(math.log(level), np.log(values[around]), time[around]))


def measure_course(table: Mapping[str, list], run: str, convolution: str = "conv1") -> Course:
    """The `Course` of a run in the table of `smoothness_in_training`."""
    rows = tables.select(table, run=run)
    time, ratio = (np.asarray(rows[name], dtype=float) for name in ("time", f"von_neumann_{convolution}"))
    if len(time) == 0:
        return Course(math.nan, 0.0, None, math.nan, math.nan)
    least = np.nanargmin(ratio) if np.isfinite(ratio).any() else 0
    rough = np.flatnonzero(ratio >= SMOOTH_BELOW)
    lost_after = int(rows["epoch"][rough[0]]) if len(rough) else None
    lost_at = find_crossing_time(time, ratio, SMOOTH_BELOW)
    growing = (ratio >= GROWING[0]) & (ratio < GROWING[1]) & (time > time[least])
    rate = float(np.polyfit(time[growing], np.log(ratio[growing]), 1)[0]) if growing.sum() >= 3 else math.nan
    return Course(float(ratio[-1]), float(time[-1]), lost_after, lost_at, rate)
