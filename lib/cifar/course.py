"""How smooth the layers of trained networks are in training and along the depth: tables out of the records."""

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
    return tables.from_rows(rows, ("run", "activation", "initialisation", "epochs", *names, *measured))


def measure_parts(
    runs: Iterable[Run], parts: int, measure: Callable[[Tensor, int], list[float]], names: tuple[str, ...]
) -> dict[str, list]:
    rows = []
    for run in (run for run in runs if run.has_weights):
        layers = run.load().network.residual_layers
        found = [measure(layers.stacked(f"{name}.weight").detach(), parts) for name in CONVOLUTIONS]
        for part, values in enumerate(zip(*found, strict=True), start=1):
            rows.append(describe_run(run) | {"part": part} | dict(zip(names, values, strict=True)))
    return make_columns(rows, ("part",), names)


def smooth_shares(run: Run) -> dict[str, float]:
    """The `smooth_share` of a run's layers after training, by the names in `SHARES`: what its record says, or else what
    its weights do. nan if neither is here, since successive distances do not tell the variance of a part."""
    found = {name: run.values.get(name, math.nan) for name in SHARES}
    if all(math.isnan(share) for share in found.values()) and run.has_weights:
        layers = run.load().network.residual_layers
        weights = (layers.stacked(f"{name}.weight").detach() for name in CONVOLUTIONS)
        found = {name: smooth_share(of) for name, of in zip(SHARES, weights, strict=True)}
    return found


def smoothness_in_training(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness.csv``, ``smoothness_depths.csv`` and ``stem_training.csv``, a line an epoch of each run
    that has its record: run, activation, initialisation, epochs (length of the schedule), depth, hold_stem, seed,
    epoch (1, 2, ...), time, train_accuracy (%), von_neumann_conv1, von_neumann_conv2, and the scales of
    `relative_path_lengths` (nan if undefined, or not in the log).

    ``time`` t is the sum of the learning rates of all steps so far. Schedules of different lengths are comparable in
    it, not in epochs. Momentum mu makes it a time t / (1 - mu) of gradient descent, which the paper's flow, whose
    layers move by L times their gradients, goes through in t / (L (1 - mu)).
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


# Between these ratios growth is exponential: below, layers are hardly more than a straight line over the depth
# (`straight_line_ratio`, 0.0002 for 256 layers), above, growth saturates, since independent layers have 2.
GROWING = (1e-3, SMOOTH_BELOW)


@dataclass(frozen=True)
class Course:
    """How the smoothness of one run goes: the ``ratio`` at its end and the training ``time`` there; the epoch after
    which the ratio first was `SMOOTH_BELOW` or more (None: never), and the time ``lost_at`` at which it got there, if
    its logarithm is linear between epochs (nan: never); the ``rate`` of exp(rate * time), by which it grows from its
    minimum on in `GROWING` (nan with fewer than three epochs there). A run without a record has nan, 0, None, nan, nan.
    """

    ratio: float
    time: float
    lost_after: int | None
    lost_at: float
    rate: float

    @property
    def lost(self) -> str:
        """When its smoothness was lost, in words."""
        if self.lost_after is None:
            return "smooth at every epoch"
        return f"above {SMOOTH_BELOW} after epoch {self.lost_after}"


def reached_at(time: np.ndarray, values: np.ndarray, level: float) -> float:
    """The time at which the values first reach a level, if their logarithm is linear in between (nan: never)."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return math.nan
    around = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(math.log(level), np.log(values[around]), time[around]))


def course(table: Mapping[str, list], run: str, convolution: str = "conv1") -> Course:
    """The `Course` of a run in the table of `smoothness_in_training`."""
    rows = tables.select(table, run=run)
    time, ratio = (np.asarray(rows[name], dtype=float) for name in ("time", f"von_neumann_{convolution}"))
    if len(time) == 0:
        return Course(math.nan, 0.0, None, math.nan, math.nan)
    least = np.nanargmin(ratio) if np.isfinite(ratio).any() else 0
    rough = np.flatnonzero(ratio >= SMOOTH_BELOW)
    lost_after = int(rows["epoch"][rough[0]]) if len(rough) else None
    lost_at = reached_at(time, ratio, SMOOTH_BELOW)
    growing = (ratio >= GROWING[0]) & (ratio < GROWING[1]) & (time > time[least])
    rate = float(np.polyfit(time[growing], np.log(ratio[growing]), 1)[0]) if growing.sum() >= 3 else math.nan
    return Course(float(ratio[-1]), float(time[-1]), lost_after, lost_at, rate)
