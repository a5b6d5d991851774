"""Whether rounding errors make layers rough: the same training in float32 and in float64."""

import math
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from lib import tables
from lib.cifar import dataset, records, schedule
from lib.cifar.choice import ConvolutionChoice
from lib.cifar.config import CifarConfig
from lib.cifar.course import RATIOS, measure_parts
from lib.cifar.records import CONVOLUTIONS
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import (
    ORANGE,
    PURPLE,
    SKY,
    leave_room_for_legend,
    make_panels,
    style_tied_run,
    styled,
    write_across,
)
from lib.measures import PARTS, SMOOTH_BELOW, noise_along_depth

NOISES = tuple(f"noise_{name}" for name in CONVOLUTIONS)


class Config(ConvolutionChoice):
    """The ``convolution``, and weight-tied networks (``choice``, with every activation and one ``seed``)."""


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables: that of `read_smoothness_by_precision`, and ``rounding_depth.csv``, the share of noise in each eighth
    of the layers (`measures.noise_along_depth`) of the networks whose weights are here. The columns of the second are
    run, activation, initialisation, epochs, part (1 is next to the input), noise_conv1, noise_conv2."""
    runs = config.choice.select(records.read_runs(), activation=None, initialisation="weight-tied", seed=config.seed)
    depth = measure_parts(runs, PARTS, noise_along_depth, NOISES)
    return {"rounding": read_smoothness_by_precision(), "rounding_depth": depth}


def read_smoothness_by_precision() -> dict[str, list]:
    """The table of ``rounding.csv``, from ``checkpoints/rounding.csv``: runs that differ only in depth, precision and
    seed, recorded every few steps.

    The columns are depth, dtype, seed, time (as in `smoothness_in_training`), loss (the mean since the row before),
    von_neumann_conv1, von_neumann_conv2, noise_conv1, noise_conv2 (`measures.noise_share`).
    """
    watched = records.read_rounding()
    time = []
    for depth, batch_size, epoch, step in zip(
        *(watched[name].tolist() for name in ("depth", "batch_size", "epoch", "step")), strict=True
    ):
        config = CifarConfig(depth=depth, batch_size=batch_size)
        before = schedule.training_time(config, dataset.TRAIN_IMAGES, epoch - 1)
        time.append(before + step * schedule.learning_rate(config, epoch - 1))
    table = {name: watched[name].tolist() for name in ("depth", "dtype", "seed")} | {"time": time}
    return table | {name: watched[name].tolist() for name in ("loss", *RATIOS, *NOISES)}


def find_meeting_time(table: Mapping[str, list], depth: int, convolution: str = "conv1", within: float = 2) -> float:
    """The training time from which on the shares of noise in float64 are in the range of those in float32, if both ends
    of the range are widened by the factor ``within``. It is nan if they are not at the end. ``table`` is that of
    `read_smoothness_by_precision`."""
    column, meets = f"noise_{convolution}", math.nan
    rows = tables.select(table, depth=depth)
    for time in np.unique(rows["time"])[::-1]:
        noises = {dtype: tables.select(rows, time=time, dtype=dtype)[column] for dtype in ("float32", "float64")}
        if not all(len(noise) for noise in noises.values()):
            continue
        single, double = noises["float32"], noises["float64"]
        if double.min() < single.min() / within or double.max() > single.max() * within:
            break
        meets = float(time)
    return meets


def find_loss_times(
    table: Mapping[str, list], depth: int, dtype: str, convolution: str = "conv1", above: float = SMOOTH_BELOW
) -> list[float]:
    """When the layers of these runs stop being smooth: for each seed, the first training time with a von Neumann ratio
    of at least ``above``. Runs without such a time are left out. ``table`` is as in `find_meeting_time`."""
    lost = []
    for run in tables.group(tables.select(table, depth=depth, dtype=dtype), "seed").values():
        rough = run["time"][run[f"von_neumann_{convolution}"] >= above]
        lost += [float(min(rough))] if len(rough) else []
    return lost


@styled
def draw(data: Data, config: Config) -> Figure:
    """The share of noise of a convolution and its von Neumann ratio along training in two precisions, and the share of
    noise after training in eighths of the layers.

    Along training there is a colour for each depth and a line for each seed, solid for float32 and dashed for float64.
    Trained networks have the colour of their activation, solid for the longest schedule and dashed for shorter ones.
    """
    precision, depth, convolution = data["rounding"], data["rounding_depth"], config.convolution
    figure, (share, ratio, parts) = make_panels(3, width_ratios=[1.15, 1.15, 1], height=3.0)
    column = f"noise_{convolution}"
    for panel, name in ((share, column), (ratio, f"von_neumann_{convolution}")):
        for color, layers in zip(cycle((PURPLE, ORANGE, SKY)), dict.fromkeys(precision["depth"]), strict=False):
            for dtype, line in (("float32", "-"), ("float64", "--")):
                label = f"{layers} layers, {dtype}"
                for rows in tables.group(tables.select(precision, depth=layers, dtype=dtype), "seed").values():
                    panel.plot(rows["time"], rows[name], line, color=color, linewidth=1, label=label)
                    label = None  # one entry of the legend for all runs
        panel.set(yscale="log", xlabel="training time $t$")
    longest = max(depth["epochs"], default=0)
    for rows in tables.group(depth, "run").values():
        label, style = style_tied_run(rows, longest)
        parts.plot(rows["part"], rows[column], "o", markerfacecolor="white", label=label, **style)
    share.set_ylabel(f"share of noise in {convolution}")
    ratio.set_ylabel(f"von Neumann ratio of {convolution}")
    share.set_title("noise in two precisions")
    ratio.set_title("smoothness in two precisions")
    parts.set_title("noise at the end of training")
    parts.set(yscale="log", xlabel="eighth of the layers")
    leave_room_for_legend(parts, 0.4)
    parts.set_xticks(np.unique(depth["part"]) if len(depth["part"]) else [])
    for panel, rows in ((share, precision["depth"]), (ratio, precision["depth"]), (parts, depth["run"])):
        if not len(rows):
            write_across(panel, "none is here")
        elif panel is share:
            panel.legend(loc="lower right", handlelength=1.6)
        elif panel is parts:
            panel.legend(loc="lower left", fontsize=7, handlelength=1.6, labelspacing=0.2)
    return figure
