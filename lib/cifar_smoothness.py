"""How smooth the layers of networks trained on CIFAR-10 are, beyond the paper's figures: in training, along the depth,
and what rounding, the initial weights and the size of the stem have to do with it."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lib import checks, cifar, cifar_training, records, tables
from lib.cifar_results import SMOOTH_BELOW
from lib.cifar_training import CifarConfig
from lib.convnet import ConvResNet
from lib.distances import PARTS, noise_along_depth, ratios_along_depth
from lib.records import CONVOLUTIONS, Run

# ------------------------------------------------------------------------------------- the size of the stem

SCALES = ("stem_scale", "path_length", "relative_path_length")


def relative_path_lengths(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``stem.csv``, a line for each run with batch norm whose weights or logged scales are here: run,
    activation, smooth_init, epochs, hold_stem, test_accuracy (%), von_neumann_conv1, von_neumann_conv2, stem_scale,
    path_length (`ConvResNet.scales`) and relative_path_length, the second of these by the first: how far the layers
    may carry the hidden state, in units of the stem's output before its ReLU (|h_0| is 0.6 to 1 times that)."""
    rows = []
    for run in (run for run in runs if run.config.batch_norm):
        if run.has_weights:
            scales = run.load().network.scales()
        elif (log := run.log()) and log[-1].get("stem_scale"):
            scales = {name: log[-1][name] for name in SCALES[:2]}
        else:
            continue
        relative = {"relative_path_length": scales["path_length"] / scales["stem_scale"]}
        results = {name: run.values[name] for name in ("test_accuracy", *RATIOS)}
        rows.append(_which(run) | {"hold_stem": run.config.hold_stem} | results | scales | relative)
    return _columns(rows, ("hold_stem", "test_accuracy"), (*RATIOS, *SCALES))


def loss_spike(every: int) -> dict[str, list]:
    """The table of ``stem_spike.csv`` out of ``checkpoints/loss_spike.csv``: some epochs of a run step by step, in
    means over ``every`` steps: epochs (complete so far, with a fraction), loss, relative_path_length."""
    checks.positive_int("every", every)
    watched = records.read_spike()
    steps = watched["step"].max() if len(watched["step"]) else 1
    epochs = watched["epoch"] - 1 + (watched["step"] - 0.5) / steps
    columns = {"epochs": epochs, "loss": watched["loss"]}
    columns["relative_path_length"] = watched["path_length"] / watched["stem_scale"]
    whole = len(epochs) // every * every
    return {name: column[:whole].reshape(-1, every).mean(axis=1).tolist() for name, column in columns.items()}


# ------------------------------------------------------------------------------------- smoothness in training

# Between these ratios growth is exponential: below, layers are hardly more than a straight line over the depth
# (`straight_line_ratio`, 0.0002 for 256 layers), above, growth saturates, since independent layers have 2.
GROWING = (1e-3, SMOOTH_BELOW)
RATIOS = tuple(f"von_neumann_{name}" for name in CONVOLUTIONS)
LEFT = tuple(f"{what}_{name}" for name in CONVOLUTIONS for what in ("left", "share", "chance"))


def smoothness_in_training(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness.csv``, ``smoothness_depths.csv`` and ``stem_training.csv``, a line an epoch of each run
    that has its record: run, activation, smooth_init, epochs (length of the schedule), depth, hold_stem, seed, epoch
    (1, 2, ...), time, train_accuracy (%), von_neumann_conv1, von_neumann_conv2, and the scales of
    `relative_path_lengths` (nan where undefined, or not in the log).

    ``time`` t is the sum of the learning rates of all steps so far. Schedules of different lengths are comparable in
    it, not in epochs. Momentum mu makes it a time t / (1 - mu) of gradient descent, which the paper's flow, whose
    layers move by L times their gradients, goes through in t / (L (1 - mu)).
    """
    rows = []
    for run in runs:
        settings = _which(run) | {name: getattr(run.config, name) for name in ("depth", "hold_stem", "seed")}
        time, steps = 0.0, cifar_training.steps(run.config, run.config.train_images or cifar.TRAIN_IMAGES)
        for line in run.log():
            time += steps * line["learning_rate"]
            reached = {"epoch": line["epoch"] + 1, "time": time, "train_accuracy": line["train_accuracy"]}
            logged = (*RATIOS, *SCALES[:2])
            measured = {name: math.nan if line.get(name) is None else line[name] for name in logged}
            measured["relative_path_length"] = measured["path_length"] / measured["stem_scale"]
            rows.append(settings | reached | measured)
    names = ("depth", "hold_stem", "seed", "epoch", "time", "train_accuracy")
    return _columns(rows, names, (*RATIOS, *SCALES))


def smoothness_along_depth(runs: Iterable[Run], parts: int = PARTS) -> dict[str, list]:
    """The table of ``smoothness_depth.csv``: the von Neumann ratio in each of ``parts`` equal parts of the layers, of
    the trained networks whose weights are here: run, activation, smooth_init, epochs, part (1 is next to the input),
    von_neumann_conv1, von_neumann_conv2."""
    return _of_parts(runs, parts, ratios_along_depth, RATIOS)


def _of_parts(
    runs: Iterable[Run], parts: int, measure: Callable[[Tensor, int], list[float]], names: tuple[str, ...]
) -> dict[str, list]:
    rows = []
    for run in (run for run in runs if run.has_weights):
        layers = run.load().network.residual_layers
        found = [measure(layers.stacked(f"{name}.weight").detach(), parts) for name in CONVOLUTIONS]
        for part, values in enumerate(zip(*found, strict=True), start=1):
            rows.append(_which(run) | {"part": part} | dict(zip(names, values, strict=True)))
    return _columns(rows, ("part",), names)


def left_of_initialisation(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness_initialisation.csv``: what the trained networks whose weights are here still have of
    the weights that they started from, which their seed draws again: run, activation, smooth_init, epochs, time (of
    training, in all), weight_decay_alone, left_conv1, share_conv1, chance_conv1, and the three of conv2.

    With Z(0) and Z(t) all entries of a convolution over the layers, ``left`` is the c that makes |Z(t) - c Z(0)|
    least, and ``share`` that of |c Z(0)|^2 in |Z(t)|^2; both are nan where Z(0) is zero. ``chance`` is the share to be
    expected of an initialisation that has nothing to do with Z(t): 1/(L D) for i.i.d. layers of D entries, and
    |sum_k Z_k(t)|^2 / (L D |Z(t)|^2) for weight-tied ones, 1/D where all Z_k(t) are the same. ``weight_decay_alone`` is
    what c would be without any gradient (`cifar_training.weight_decay_alone`).
    """
    rows = []
    for run in (run for run in runs if run.has_weights):
        time = cifar_training.training_time(run.config, run.config.train_images or cifar.TRAIN_IMAGES)
        row = _which(run) | {"time": time, "weight_decay_alone": cifar_training.weight_decay_alone(time)}
        started, trained = ConvResNet(run.config.network), run.load().network
        for name in CONVOLUTIONS:
            before, after = (
                network.residual_layers.stacked(f"{name}.weight").detach().double() for network in (started, trained)
            )
            square, product, size = (float((a * b).sum()) for a, b in ((before,) * 2, (before, after), (after,) * 2))
            row[f"left_{name}"] = product / square if square else math.nan
            row[f"share_{name}"] = product**2 / (square * size) if square else math.nan
            summed = float(after.sum(dim=0).square().sum()) if run.config.smooth_init else size
            row[f"chance_{name}"] = summed / (size * after.numel()) if square else math.nan
        rows.append(row)
    return _columns(rows, ("time", "weight_decay_alone"), LEFT)


# ------------------------------------------------------------------------------------------------ rounding

NOISES = tuple(f"noise_{name}" for name in CONVOLUTIONS)


def smoothness_by_precision() -> dict[str, list]:
    """The table of ``rounding.csv`` out of ``checkpoints/rounding.csv``, a line every so many steps of runs that differ
    in depth, precision and seed alone: depth, dtype, seed, time (as in `smoothness_in_training`), loss (mean since the
    line before), von_neumann_conv1, von_neumann_conv2, noise_conv1, noise_conv2 (`distances.noise_share`)."""
    watched = records.read_rounding()
    time = []
    for depth, batch_size, epoch, step in zip(
        *(watched[name].tolist() for name in ("depth", "batch_size", "epoch", "step")), strict=True
    ):
        config = CifarConfig(depth=depth, batch_size=batch_size)
        before = cifar_training.training_time(config, cifar.TRAIN_IMAGES, epoch - 1)
        time.append(before + step * cifar_training.learning_rate(config, epoch - 1))
    table = {name: watched[name].tolist() for name in ("depth", "dtype", "seed")} | {"time": time}
    return table | {name: watched[name].tolist() for name in ("loss", *RATIOS, *NOISES)}


def precisions_meet(table: Mapping[str, list], depth: int, convolution: str = "conv1", within: float = 2) -> float:
    """The training time from which on, in the table of `smoothness_by_precision`, the share of noise of the runs in
    float64 is between the least and the most of those in float32, both widened by a factor of ``within``; nan where it
    is not at the end."""
    column, meets = f"noise_{convolution}", math.nan
    rows = tables.select(table, depth=depth)
    for time in np.unique(rows["time"])[::-1]:
        of = {dtype: tables.select(rows, time=time, dtype=dtype)[column] for dtype in ("float32", "float64")}
        if not all(len(noise) for noise in of.values()):
            continue
        single, double = of["float32"], of["float64"]
        if double.min() < single.min() / within or double.max() > single.max() * within:
            break
        meets = float(time)
    return meets


def lost_in_precision(
    table: Mapping[str, list], depth: int, dtype: str, convolution: str = "conv1", above: float = SMOOTH_BELOW
) -> list[float]:
    """When the layers of these runs stop being smooth: for each seed the first training time in the table of
    `smoothness_by_precision` with a von Neumann ratio of ``above`` or more, without the runs that have none."""
    rows = tables.select(table, depth=depth, dtype=dtype)
    lost = []
    for seed in dict.fromkeys(rows["seed"].tolist()):
        run = tables.select(rows, seed=seed)
        rough = run["time"][run[f"von_neumann_{convolution}"] >= above]
        lost += [float(min(rough))] if len(rough) else []
    return lost


def noise_of_parts(runs: Iterable[Run], parts: int = PARTS) -> dict[str, list]:
    """The table of ``rounding_depth.csv``: the share of noise in each of ``parts`` equal parts of the layers
    (`distances.noise_along_depth`), of the trained networks whose weights are here: run, activation, smooth_init,
    epochs, part (1 is next to the input), noise_conv1, noise_conv2."""
    return _of_parts(runs, parts, noise_along_depth, NOISES)


def _which(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "run": config.name,
        "activation": config.activation,
        "smooth_init": config.smooth_init,
        "epochs": config.epochs,
    }


def _columns(rows: list[dict[str, Any]], names: tuple[str, ...], measured: tuple[str, ...] = RATIOS) -> dict[str, list]:
    # By name, so that the columns are there even where no run is.
    names = ("run", "activation", "smooth_init", "epochs", *names, *measured)
    return {name: [row[name] for row in rows] for name in names}


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


def course(table: Mapping[str, list], run: str, convolution: str = "conv1") -> Course:
    """The `Course` of a run in the table of `smoothness_in_training`."""
    rows = tables.select(table, run=run)
    time, ratio = (np.asarray(rows[name], dtype=float) for name in ("time", f"von_neumann_{convolution}"))
    if len(time) == 0:
        return Course(math.nan, 0.0, None, math.nan, math.nan)
    least = np.nanargmin(ratio) if np.isfinite(ratio).any() else 0
    rough = np.flatnonzero(ratio >= SMOOTH_BELOW)
    lost_after, lost_at = None, math.nan
    if len(rough):
        lost_after, around = int(rows["epoch"][rough[0]]), slice(max(rough[0] - 1, 0), rough[0] + 1)
        lost_at = float(np.interp(math.log(SMOOTH_BELOW), np.log(ratio[around]), time[around]))
    growing = (ratio >= GROWING[0]) & (ratio < GROWING[1]) & (time > time[least])
    rate = float(np.polyfit(time[growing], np.log(ratio[growing]), 1)[0]) if growing.sum() >= 3 else math.nan
    return Course(float(ratio[-1]), float(time[-1]), lost_after, lost_at, rate)


def lost_by_depth(table: Mapping[str, list], convolution: str = "conv1") -> dict[str, list]:
    """The table of ``smoothness_lost.csv``: of the runs in a table of `smoothness_in_training`, those whose layers stop
    being smooth in training, by depth: run, depth, lost_after and lost_at (`Course`)."""
    found = {run: course(table, run, convolution) for run in dict.fromkeys(table["run"])}
    depths = dict(zip(table["run"], table["depth"], strict=True))
    runs = sorted((run for run in found if found[run].lost_after), key=depths.__getitem__)
    columns = {name: [getattr(found[run], name) for run in runs] for name in ("lost_after", "lost_at")}
    return {"run": runs, "depth": [depths[run] for run in runs]} | columns
