"""The smoothness of the layers of trained networks: along training, along the depth, and in deeper networks."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
    GUIDE,
    ORANGE,
    activation_color,
    format_number,
    make_color_scale,
    make_panels,
    set_depth_axis,
    set_plain_ticks,
    style_tied_run,
    styled,
    write_across,
)
from lib.measures import PARTS, SMOOTH_BELOW, ratios_along_depth, straight_line_ratio
from lib.rates import NO_SLOPE, fit_slope

STEEP = 100.0
# The times until these levels are reached are compared over depths: levels of the ratio, and of L^2 times the ratio.
LEVELS = {"ratio": (0.03, SMOOTH_BELOW, 0.3), "L^2 ratio": (30.0, STEEP, 300.0)}
LEFT = tuple(f"{what}_{name}" for name in CONVOLUTIONS for what in ("left", "share", "chance"))


class Config(ConvolutionChoice):
    """Networks (``choice``, with every activation) and a ``convolution``. Of the longest schedule all seeds are shown,
    of others one ``seed``."""


def compute(config: Config, progress: Progress = silent) -> Data:
    """Six tables: the smoothness along training, along the depth, and along training in several depths; when it is
    lost; the slopes of that time in the depth; and what is left of the initial weights.

    The table ``smoothness_depth`` has the von Neumann ratio in each eighth of the layers, for weight-tied networks
    whose weights are here: run, activation, initialisation, epochs, part (1 is next to the input), von_neumann_conv1,
    von_neumann_conv2.
    """
    found = records.read_runs()
    runs = select_with_repeats(found, config.choice, config.seed, activation=None)
    tied = records.select(runs, initialisation="weight-tied")
    deeper = smoothness_in_training(select_longest_by_depth(found, config.choice))
    return {
        "smoothness": smoothness_in_training(runs),
        "smoothness_depth": measure_parts(tied, PARTS, ratios_along_depth, RATIOS),
        "smoothness_depths": deeper,
        "smoothness_lost": find_losses_by_depth(deeper, config.convolution),
        "smoothness_laws": fit_laws_in_depth(deeper, config.convolution),
        "smoothness_initialisation": measure_left_of_initialisation(runs),
    }


def measure_left_of_initialisation(runs: Iterable[Run]) -> dict[str, list]:
    """The table of ``smoothness_initialisation.csv``: what is left of the initial weights in the trained networks whose
    weights are here. The initial weights are drawn again by the seed.

    The columns are run, activation, initialisation, epochs, time (of the whole training), weight_decay_alone,
    left_conv1, share_conv1, chance_conv1, and the same three for conv2. Let Z(0) and Z(t) be all entries of a
    convolution over the layers.

    - ``left`` is the c that minimises |Z(t) - c Z(0)|, and ``share`` is |c Z(0)|^2 / |Z(t)|^2. Both are nan if Z(0) is
      zero.
    - ``chance`` is the expected share of an initialisation that is independent of Z(t). For i.i.d. layers of D entries
      it is 1/(L D). For weight-tied layers it is |sum_k Z_k(t)|^2 / (L D |Z(t)|^2), which is 1/D if all Z_k(t) are
      equal.
    - ``weight_decay_alone`` is what c would be without any gradient (`schedule.weight_decay_alone`).
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


def find_losses_by_depth(table: Mapping[str, list], convolution: str = "conv1") -> dict[str, list]:
    """The table of ``smoothness_lost.csv``: the runs in a table of `smoothness_in_training` whose layers stop being
    smooth, sorted by depth. The columns are run, depth, lost_after and lost_at (`Course`), and steep_at, the time at
    which L^2 times the ratio reaches `STEEP`."""
    found = {run: measure_course(table, run, convolution) for run in dict.fromkeys(table["run"])}
    depths = dict(zip(table["run"], table["depth"], strict=True))
    runs = sorted((run for run in found if found[run].lost_after), key=depths.__getitem__)
    columns = {name: [getattr(found[run], name) for run in runs] for name in ("lost_after", "lost_at")}
    columns["steep_at"] = [_find_level_time(table, run, convolution, "L^2 ratio", STEEP) for run in runs]
    return {"run": runs, "depth": [depths[run] for run in runs]} | columns


def _find_level_time(table: Mapping[str, list], run: str, convolution: str, held: str, level: float) -> float:
    # The time at which a run reaches a level of the quantity ``held`` (a key of `LEVELS`).
    rows = tables.select(table, run=run)
    ratio = np.asarray(rows[f"von_neumann_{convolution}"], dtype=float)
    factor = 1.0 if held == "ratio" else rows["depth"][0] ** 2
    return find_crossing_time(np.asarray(rows["time"], dtype=float), factor * ratio, level)


def fit_laws_in_depth(table: Mapping[str, list], convolution: str = "conv1") -> dict[str, list]:
    """The table of ``smoothness_laws.csv``, with a row for each level in `LEVELS`: held, level, runs (the number of
    runs in a table of `smoothness_in_training` that reach it), and slope, low, high of the time in the depth L
    (`fit_slope`; nan with fewer than two depths).

    A smooth curve over the depth whose Lipschitz constant is K times its spread has a ratio of order K^2/L^2. So at a
    level of the ratio, curves are steeper in deeper networks. At a level of L^2 times the ratio they are equally steep
    (a straight line has 12).
    """
    rows = []
    depths = dict(zip(table["run"], table["depth"], strict=True))
    for held, levels in LEVELS.items():
        for level in levels:
            times = {run: _find_level_time(table, run, convolution, held, level) for run in depths}
            reached = [run for run, time in times.items() if math.isfinite(time)]
            fit = NO_SLOPE
            if len({depths[run] for run in reached}) > 1:
                fit = fit_slope([depths[run] for run in reached], [times[run] for run in reached])
            row = {"held": held, "level": level, "runs": len(reached)}
            rows.append(row | {"slope": fit.slope, "low": fit.low, "high": fit.high})
    return tables.from_rows(rows)


@styled
def draw(data: Data, config: Config) -> Figure:
    """Above, the von Neumann ratio of a convolution along training, and after training in eighths of the layers. Below,
    the ratio along training in networks of several depths, and the training times at which each network stops being
    smooth and at which all are equally steep, with slopes in the depth over n networks.

    There is a line for each seed. Weight-tied runs have the colour of their activation, solid for the longest schedule
    and dashed for shorter ones. i.i.d. runs are grey. The dotted line is `SMOOTH_BELOW`, below which weights count as
    smooth. The dashed line is the ratio of a straight line over an eighth.
    """
    training, depth, deeper, lost = (data[f"smoothness{name}"] for name in ("", "_depth", "_depths", "_lost"))
    figure, ((course, parts), (depths, times)) = make_panels(2, rows=2, width_ratios=[1.4, 1], height=5.4)
    parts.sharey(course)
    parts.tick_params(labelleft=False)
    if len(training["run"]) == 0:
        write_across(course, "no such network is trained yet")
        for panel in (course, parts, depths, times):
            panel.set_axis_off()
        return figure
    _draw_course(course, training, config.convolution)
    _draw_parts(parts, training, depth, config)
    _draw_depths(depths, deeper, config.convolution)
    _draw_losses(times, lost)
    return figure


def _list_styled_runs(training: tables.Table) -> Iterator[tuple[tables.Table, dict[str, Any]]]:
    # The rows of each run and the style of its line. Shorter schedules come last, so that they are on top, and both are
    # visible if they agree.
    longest = max(training["epochs"])
    runs = tables.group(training, "run").values()
    for rows in sorted(runs, key=lambda rows: (rows["initialisation"][0] == "iid", -rows["epochs"][0])):
        tied = rows["initialisation"][0] == "weight-tied"
        yield rows, style_tied_run(rows, longest)[1] if tied else {"color": GREY, "linewidth": 0.8}


def _list_tied_activations(training: tables.Table) -> list[str]:
    return list(dict.fromkeys(tables.select(training, initialisation="weight-tied")["activation"].tolist()))


def _draw_course(axes: Axes, training: tables.Table, convolution: str) -> None:
    for rows, style in _list_styled_runs(training):
        axes.plot(rows["time"], rows[f"von_neumann_{convolution}"], **style)
    for activation in _list_tied_activations(training):
        axes.plot([], [], color=activation_color(activation), label=tables.word(activation))
    lengths = np.unique(training["epochs"])[::-1]
    for epochs in lengths:
        axes.plot([], [], "-" if epochs == lengths[0] else "--", color="black", label=f"{epochs} epochs")
    if "iid" in training["initialisation"]:
        axes.plot([], [], color=GREY, linewidth=0.8, label="i.i.d.")
    axes.axhline(SMOOTH_BELOW, linestyle=":", **GUIDE)
    axes.annotate("below: smooth", (1, SMOOTH_BELOW), (0, -3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    axes.set(yscale="log", xlabel=r"training time $t$: sum of the learning rates of all steps")
    axes.set(ylabel=f"von Neumann ratio of {convolution}", title="along training, all layers")
    # The legend is between the layers that lose their smoothness, above, and those that keep it, below.
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.4), ncols=2, columnspacing=0.8, handlelength=1.6)


def _draw_parts(axes: Axes, training: tables.Table, depth: tables.Table, config: Config) -> None:
    for rows, style in _list_styled_runs(training):
        ends = tables.select(depth, run=rows["run"][0])
        if len(ends["part"]):
            marker = _style_marker(ends["activation"][0])
            axes.plot(ends["part"], ends[f"von_neumann_{config.convolution}"], "o", **style, **marker)
    for activation in _list_tied_activations(training):
        color, label = activation_color(activation), tables.word(activation)
        axes.plot([], [], "o", color=color, label=label, **_style_marker(activation))
    axes.legend(loc="lower left", ncols=3, columnspacing=0.6, handletextpad=0.1,
                title="sizes keep markers apart that lie\non each other", title_fontsize=7)  # fmt: skip
    axes.axhline(SMOOTH_BELOW, linestyle=":", **GUIDE)
    straight = straight_line_ratio(config.choice.depth // PARTS)
    if straight > 0:
        axes.axhline(straight, linestyle="--", **GUIDE)
        axes.annotate(f"straight line: {straight:.2g}", (0.98, straight), (0, -5), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    axes.set(title="at the end, by eighths of the layers", xlabel="eighth of the layers, from input to output")
    axes.set_xticks(np.unique(depth["part"]) if len(depth["part"]) else [])
    if not len(depth["part"]):
        write_across(axes, "their weights are not here")


def _style_marker(activation: str) -> dict[str, Any]:
    # Hollow markers of different sizes are all visible on top of each other.
    return {"markerfacecolor": "white", "markersize": 5 + 2 * (activation == "identity")}


def _draw_depths(axes: Axes, deeper: tables.Table, convolution: str) -> None:
    if not len(deeper["run"]):
        write_across(axes, "none is here")
        return
    color, _ = make_color_scale(deeper["depth"], log=True)
    for layers in np.unique(deeper["depth"]):
        label = f"{layers} layers"
        for rows in tables.group(tables.select(deeper, depth=layers), "run").values():
            axes.plot(rows["time"], rows[f"von_neumann_{convolution}"], color=color(layers), label=label)
            label = None  # one entry of the legend for all runs
    axes.axhline(SMOOTH_BELOW, linestyle=":", **GUIDE)
    axes.legend(loc="lower right")
    axes.set(yscale="log", xlabel="training time $t$", ylabel=f"von Neumann ratio of {convolution}")
    axes.set_title(f"{tables.word(deeper['activation'][0])}, weight-tied, by depth")


def _draw_losses(axes: Axes, lost: tables.Table) -> None:
    if not len(lost["depth"]):
        write_across(axes, "none is here")
        return
    axes.set(yscale="log", ylabel="training time $t$", title="until a level is reached")
    reached = (("lost_at", "o", BLUE, f"ratio {SMOOTH_BELOW:g}"),
               ("steep_at", "s", ORANGE, rf"$L^2\times$ratio {STEEP:g}"))  # fmt: skip
    for column, marker, color, level in reached:
        time = np.asarray(lost[column], dtype=float)
        slope = ""
        if len(set(np.asarray(lost["depth"])[np.isfinite(time)])) > 1:
            fit = fit_slope(lost["depth"], time)
            ends = np.array([min(lost["depth"]), max(lost["depth"])], dtype=float)
            axes.plot(ends, fit.constant * ends**fit.slope, color=color, linewidth=1)
            slope = f": slope {format_number(fit.slope, 2)}, {int(np.isfinite(time).sum())} networks"
        axes.plot(lost["depth"], time, marker, color=color, label=level + slope)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.2)
    axes.legend(loc="upper left")
    set_depth_axis(axes, lost["depth"])
    set_plain_ticks(axes.yaxis)
