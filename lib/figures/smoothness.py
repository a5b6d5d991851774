"""How smooth the layers of trained networks are: along training, along the depth, in deeper networks."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import tables
from lib.cifar import dataset, records, schedule
from lib.cifar.choice import ConvolutionChoice, select_longest_by_depth, select_with_repeats
from lib.cifar.course import (
    RATIOS,
    describe_run,
    find_crossing_time,
    make_columns,
    measure_course,
    measure_parts,
    smoothness_in_training,
)
from lib.cifar.network import ConvResNet
from lib.cifar.records import CONVOLUTIONS, Run
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    activation_color,
    color_scale,
    depth_axis,
    minus,
    panels,
    plain_ticks,
    styled,
    tied_run_style,
    write_across,
)
from lib.measures import PARTS, SMOOTH_BELOW, Slope, fit_slope, ratios_along_depth, straight_line_ratio

STEEP = 100.0
# What is held fixed over depths when the time until it is reached is compared, and at which levels.
LEVELS = {"ratio": (0.03, SMOOTH_BELOW, 0.3), "L^2 ratio": (30.0, STEEP, 300.0)}
LEFT = tuple(f"{what}_{name}" for name in CONVOLUTIONS for what in ("left", "share", "chance"))


class Config(ConvolutionChoice):
    """Which networks (``choice``, of every activation; of the longest schedule all seeds, of others one ``seed``), and
    which ``convolution``."""


def compute(config: Config, progress: Progress = silent) -> Data:
    """Six tables: along training, along the depth, along training in several depths, when smoothness is lost, how that
    goes with the depth, and what is left of the initial weights."""
    found = records.read_runs()
    runs = select_with_repeats(found, config.choice, config.seed, activation=None)
    deeper = smoothness_in_training(select_longest_by_depth(found, config.choice))
    return {
        "smoothness": smoothness_in_training(runs),
        "smoothness_depth": smoothness_along_depth(run for run in runs if run.config.initialisation == "weight-tied"),
        "smoothness_depths": deeper,
        "smoothness_lost": lost_by_depth(deeper, config.convolution),
        "smoothness_laws": laws_in_depth(deeper, config.convolution),
        "smoothness_initialisation": left_of_initialisation(runs),
    }


def smoothness_along_depth(runs: Iterable[Run], parts: int = PARTS) -> dict[str, list]:
    """The table of ``smoothness_depth.csv``: the von Neumann ratio in each of ``parts`` equal parts of the layers, of
    the trained networks whose weights are here: run, activation, initialisation, epochs, part (1 is next to the
    input), von_neumann_conv1, von_neumann_conv2."""
    return measure_parts(runs, parts, ratios_along_depth, RATIOS)


def left_of_initialisation(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness_initialisation.csv``: what the trained networks whose weights are here still have of
    the weights that they started from, which their seed draws again: run, activation, initialisation, epochs, time
    (of training, in all), weight_decay_alone, left_conv1, share_conv1, chance_conv1, and the three of conv2.

    With Z(0) and Z(t) all entries of a convolution over the layers, ``left`` is the c that makes |Z(t) - c Z(0)|
    least, and ``share`` that of |c Z(0)|^2 in |Z(t)|^2; both are nan if Z(0) is zero. ``chance`` is the share to be
    expected of an initialisation that has nothing to do with Z(t): 1/(L D) for i.i.d. layers of D entries, and
    |sum_k Z_k(t)|^2 / (L D |Z(t)|^2) for weight-tied ones, 1/D if all Z_k(t) are the same. ``weight_decay_alone`` is
    what c would be without any gradient (`schedule.weight_decay_alone`).
    """
    rows = []
    for run in (run for run in runs if run.has_weights):
        time = schedule.training_time(run.config, run.config.train_images or dataset.TRAIN_IMAGES)
        row = describe_run(run) | {"time": time, "weight_decay_alone": schedule.weight_decay_alone(time)}
        started, trained = ConvResNet(run.config.network), run.load().network
        for name in CONVOLUTIONS:
            before, after = (
                network.residual_layers.stacked(f"{name}.weight").detach().double() for network in (started, trained)
            )
            square, product, size = (float((a * b).sum()) for a, b in ((before,) * 2, (before, after), (after,) * 2))
            row[f"left_{name}"] = product / square if square else math.nan
            row[f"share_{name}"] = product**2 / (square * size) if square else math.nan
            tied = run.config.initialisation == "weight-tied"
            summed = float(after.sum(dim=0).square().sum()) if tied else size
            row[f"chance_{name}"] = summed / (size * after.numel()) if square else math.nan
        rows.append(row)
    return make_columns(rows, ("time", "weight_decay_alone"), LEFT)


def lost_by_depth(table: Mapping[str, list], convolution: str = "conv1") -> dict[str, list]:
    """The table of ``smoothness_lost.csv``: of the runs in a table of `smoothness_in_training`, those whose layers stop
    being smooth in training, by depth: run, depth, lost_after and lost_at (`Course`), and steep_at, the time at which
    L^2 times the ratio reaches `STEEP`."""
    found = {run: measure_course(table, run, convolution) for run in dict.fromkeys(table["run"])}
    depths = dict(zip(table["run"], table["depth"], strict=True))
    runs = sorted((run for run in found if found[run].lost_after), key=depths.__getitem__)
    columns = {name: [getattr(found[run], name) for run in runs] for name in ("lost_after", "lost_at")}
    columns["steep_at"] = [_level_at(table, run, convolution, "L^2 ratio", STEEP) for run in runs]
    return {"run": runs, "depth": [depths[run] for run in runs]} | columns


def _level_at(table: Mapping[str, list], run: str, convolution: str, held: str, level: float) -> float:
    # The time at which a run reaches a level of what is held fixed over depths (a key of `LEVELS`).
    rows = tables.select(table, run=run)
    ratio = np.asarray(rows[f"von_neumann_{convolution}"], dtype=float)
    factor = 1.0 if held == "ratio" else rows["depth"][0] ** 2
    return find_crossing_time(np.asarray(rows["time"], dtype=float), factor * ratio, level)


def laws_in_depth(table: Mapping[str, list], convolution: str = "conv1") -> dict[str, list]:
    """The table of ``smoothness_laws.csv``, a line a level in `LEVELS`: held, level, runs (of those in a table of
    `smoothness_in_training`, the ones that reach it), and slope, low, high of the time at which they do in the depth L
    (`fit_slope`; nan with fewer than two depths).

    A smooth curve over the depth whose Lipschitz constant is K times its spread has a ratio of order K^2/L^2. So a
    level of the ratio asks for steeper curves in deeper networks, and one of L^2 times the ratio for equally steep ones
    (a straight line has 12).
    """
    rows = []
    depths = dict(zip(table["run"], table["depth"], strict=True))
    for held, levels in LEVELS.items():
        for level in levels:
            times = {run: _level_at(table, run, convolution, held, level) for run in depths}
            reached = [run for run, time in times.items() if math.isfinite(time)]
            fit = Slope(*[math.nan] * 4)
            if len({depths[run] for run in reached}) > 1:
                fit = fit_slope([depths[run] for run in reached], [times[run] for run in reached])
            rows.append((held, level, len(reached), fit.slope, fit.low, fit.high))
    names = ("held", "level", "runs", "slope", "low", "high")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


@styled
def draw(data: Data, config: Config) -> Figure:
    """The von Neumann ratio of a convolution along training, and at its end in equal parts of the layers; then along
    training in networks of several depths, and the training time at which each stops being smooth, and at which it is
    as steep as the others, with slopes in the depth over n networks.

    A line a seed: weight-tied runs in the colour of their activation, solid for the longest schedule and dashed for
    shorter ones, i.i.d. runs grey. Dotted: `SMOOTH_BELOW`, the ratio below which weights count as smooth. Dashed: that
    of a straight line over a part.
    """
    training, depth, deeper, lost = (data[f"smoothness{name}"] for name in ("", "_depth", "_depths", "_lost"))
    convolution, straight = config.convolution, straight_line_ratio(config.choice.depth // PARTS)
    figure, ((course, parts), (depths, times)) = panels(2, rows=2, width_ratios=[1.4, 1], height=5.4)
    parts.sharey(course)
    parts.tick_params(labelleft=False)
    if len(training["run"]) == 0:
        write_across(course, "no such network is trained yet")
        for panel in (course, parts, depths, times):
            panel.set_axis_off()
        return figure
    longest = max(training["epochs"])
    runs = [tables.select(training, run=run) for run in dict.fromkeys(training["run"])]
    # The shorter schedules on top: if both agree, one sees both.
    for rows in sorted(runs, key=lambda rows: (rows["initialisation"][0] == "iid", -rows["epochs"][0])):
        tied = rows["initialisation"][0] == "weight-tied"
        style = tied_run_style(rows, longest)[1] if tied else {"color": GREY, "linewidth": 0.8}
        course.plot(rows["time"], rows[f"von_neumann_{convolution}"], **style)
        ends = tables.select(depth, run=rows["run"][0])
        if len(ends["part"]):
            marker = _marker(ends["activation"][0])
            parts.plot(ends["part"], ends[f"von_neumann_{convolution}"], "o", **style, **marker)
    for activation in dict.fromkeys(tables.select(training, initialisation="weight-tied")["activation"].tolist()):
        color, label = activation_color(activation), tables.word(activation)
        course.plot([], [], color=color, label=label)
        parts.plot([], [], "o", color=color, label=label, **_marker(activation))
    parts.legend(loc="lower left", ncols=3, columnspacing=0.6, handletextpad=0.1,
                 title="sizes keep markers apart that lie\non each other", title_fontsize=7)  # fmt: skip
    for epochs in np.unique(training["epochs"])[::-1]:
        course.plot([], [], "-" if epochs == longest else "--", color="black", label=f"{epochs} epochs")
    if "iid" in training["initialisation"]:
        course.plot([], [], color=GREY, linewidth=0.8, label="i.i.d.")
    for panel in (course, parts):
        panel.axhline(SMOOTH_BELOW, color=GREY, linestyle=":", linewidth=1, zorder=0)
    course.annotate("below: smooth", (1, SMOOTH_BELOW), (0, -3), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    course.set_yscale("log")
    course.set_xlabel(r"training time $t$: sum of the learning rates of all steps")
    course.set_ylabel(f"von Neumann ratio of {convolution}")
    course.set_title("along training, all layers")
    # Between the layers that lose their smoothness, above, and those that keep it.
    course.legend(loc="center right", bbox_to_anchor=(1, 0.4), ncols=2, columnspacing=0.8, handlelength=1.6)
    if straight > 0:
        parts.axhline(straight, color=GREY, linestyle="--", linewidth=1, zorder=0)
        parts.annotate(f"straight line: {straight:.2g}", (0.98, straight), (0, -5), xycoords=("axes fraction", "data"),
                       textcoords="offset points", ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    parts.set_title("at the end, in parts of the layers")
    parts.set_xlabel("part of the layers, from input to output")
    parts.set_xticks(np.unique(depth["part"]) if len(depth["part"]) else [])
    if not len(depth["part"]):
        write_across(parts, "their weights are not here")
    _by_depth(depths, times, deeper, lost, convolution)
    return figure


def _marker(activation: str) -> dict[str, Any]:
    # Hollow and of different sizes, so that one sees all of those that lie on top of each other.
    return {"markerfacecolor": "white", "markersize": 5 + 2 * (activation == "identity")}


def _by_depth(depths: Axes, times: Axes, deeper: tables.Table, lost: tables.Table, convolution: str) -> None:
    # The lower panels of `smoothness`.
    for panel, rows in ((depths, deeper["run"]), (times, lost["depth"])):
        if not len(rows):
            write_across(panel, "none is here")
    if len(deeper["run"]):
        color, _ = color_scale(deeper["depth"], log=True)
        for layers in np.unique(deeper["depth"]):
            of_depth = tables.select(deeper, depth=layers)
            for number, run in enumerate(dict.fromkeys(of_depth["run"])):
                rows, label = tables.select(of_depth, run=run), None if number else f"{layers} layers"
                depths.plot(rows["time"], rows[f"von_neumann_{convolution}"], color=color(layers), label=label)
        depths.axhline(SMOOTH_BELOW, color=GREY, linestyle=":", linewidth=1, zorder=0)
        depths.legend(loc="lower right")
        depths.set(yscale="log", xlabel="training time $t$", ylabel=f"von Neumann ratio of {convolution}")
        depths.set_title(f"{tables.word(deeper['activation'][0])}, weight-tied, by depth")
    if len(lost["depth"]):
        times.set(yscale="log", ylabel="training time $t$", title="until a level is reached")
        reached = (("lost_at", "o", BLUE, f"ratio {SMOOTH_BELOW:g}"),
                   ("steep_at", "s", ORANGE, rf"$L^2\times$ratio {STEEP:g}"))  # fmt: skip
        for column, marker, color, level in reached:
            time = np.asarray(lost[column], dtype=float)
            slope = ""
            if len(set(np.asarray(lost["depth"])[np.isfinite(time)])) > 1:
                fit = fit_slope(lost["depth"], time)
                ends = np.array([min(lost["depth"]), max(lost["depth"])], dtype=float)
                times.plot(ends, fit.constant * ends**fit.slope, color=color, linewidth=1)
                slope = f": slope {minus(fit.slope, 2)}, n = {int(np.isfinite(time).sum())}"
            times.plot(lost["depth"], time, marker, color=color, label=level + slope)
        low, high = times.get_ylim()
        times.set_ylim(low, high * (high / low) ** 0.2)
        times.legend(loc="upper left")
        depth_axis(times, lost["depth"])
        plain_ticks(times.yaxis)
