"""Watch networks of growing depth while they train: `explore_depth` and its drawing."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from ipywidgets import Layout
from matplotlib.figure import Figure

from lib import tables
from lib.dense.network import NetworkConfig
from lib.explore.controls import CONTROLS
from lib.explore.depth_training import (
    Comparison,
    DepthsConfig,
    DepthsState,
    advance_in_turns,
    depths_steps,
    list_depths,
)
from lib.explore.explorer import Explorer, Values, arrange_in_row
from lib.explore.frames import (
    DOTTED,
    HUE_COLORS,
    LIVE_STYLE,
    adjust_limits,
    draw_distances,
    draw_line,
    prepare_axes,
    shades,
)
from lib.explore.live import Run
from lib.figures.experiment import read_entries
from lib.figures.style import MARKERS
from lib.tables import word

# What each story compares: initialisation, activation and convention of the first and of the second network, and the
# learning rate of both.
STORIES = {
    "weight-tied or i.i.d. layers": ("weight-tied gelu released", "iid gelu released", 0.01),
    "weight-tied or Gaussian process": ("weight-tied gelu released", "gaussian-process gelu released", 0.01),
    "GELU or ReLU": ("weight-tied gelu released", "weight-tied relu released", 0.01),
    "released or eq. (3) scaling": ("weight-tied gelu released", "weight-tied gelu eq3", 0.01),
    "a step that i.i.d. layers do not survive": ("weight-tied gelu released", "iid gelu released", 0.3),
}
KIND = ("initialisation", "activation", "convention")


def explore_depth(config: DepthsConfig, second: NetworkConfig | None = None, row: int = 0, column: int = 0) -> Explorer:
    """Train networks of several depths live, one kind of network or two side by side.

    The sliders start at the values of ``config``, with its largest depth. ``second`` gives the activation,
    initialisation and convention of the second network (None: no second network at first).
    """
    network, names = config.network, ("width", "dimension", "samples", "seed", *KIND)
    start = {name: getattr(network, name) for name in names} | {"depth": config.depths[-1], "row": row}
    start |= {"iterations": config.iterations, "learning_rate": config.learning_rate, "column": column}
    controls = {name: CONTROLS[name](value) for name, value in start.items()}
    for name in KIND:
        controls[f"second_{name}"] = CONTROLS[name](getattr(second or replace(network, initialisation="iid"), name))
    controls["compare"] = widgets.Checkbox(
        second is not None, description="compare with a second network", indent=False
    )

    def configs(values: Values) -> list[DepthsConfig]:
        first = replace(network, **{name: values[name] for name in names})
        networks = [first, replace(first, **{name: values[f"second_{name}"] for name in KIND})]
        return [
            DepthsConfig(each, list_depths(values["depth"]), values["iterations"], values["learning_rate"])
            for each in networks[: 2 if values["compare"] else 1]
        ]

    def make(values: Values) -> Run:
        states = advance_in_turns([depths_steps(each) for each in configs(values)])
        return Run(states, values["iterations"], lambda state: state.iteration, lambda comparison: comparison.sentence)

    def draw(comparison: Comparison, values: Values, figure: Figure | None) -> Figure:
        return draw_depths(comparison.states, values["row"], values["column"], figure)

    def table(comparison: Comparison, values: Values) -> dict[str, tables.Table]:
        named = zip(("first", "second"), comparison.states, strict=False)
        return {
            f"{name}_{kind}": table
            for name, state in named
            for kind, table in state.tables(values["row"], values["column"]).items()
        }

    def status(comparison: Comparison, values: Values) -> list[str]:
        losses = [f"{state.losses[values['depth']][-1]:.3g}" for state in comparison.states]
        return [f"iteration {comparison.iteration:,} of {values['iterations']:,}", f"loss {' and '.join(losses)}"]

    def reproduce(values: Values) -> tuple[str, Values, str]:
        first, *others = configs(values)
        times = sorted({1 + values["iterations"] * quarter // 4 for quarter in (1, 2, 3, 4)})
        shared = {name: values[name] for name in (*names, "learning_rate")}
        differing = [f"{name}: {getattr(other.network, name)}" for other in others for name in KIND]
        remark = f"for the second network: {', '.join(differing)}" if differing else ""
        shared["slope_from"] = min(8, *first.depths[-2:])
        return "figure_1_left", {"depths": first.depths, "iterations": times, **shared}, remark

    def limit_entry(_: object) -> None:
        for name in ("row", "column"):
            controls[name].max = min(controls["width"].value, controls["dimension"].value) - 1

    for name in ("width", "dimension"):
        controls[name].observe(limit_entry, names="value")
    limit_entry(None)
    stories = [widgets.Button(description=title, layout=Layout(width="auto")) for title in STORIES]
    explorer = Explorer(
        "explore_depth",
        controls,
        make,
        draw,
        reproduce=reproduce,
        panel=_depth_panel(controls),
        hint="press <b>Start</b> and watch the two slopes. Then one of these questions:",
        above=[arrange_in_row(*stories)],
        table=table,
        status=status,
        view=("row", "column"),
    )
    for button in stories:
        button.on_click(explorer.on_kernel_thread(partial(_compare, explorer)))
    return explorer


def _compare(explorer: Explorer, button: widgets.Button) -> None:
    *networks, learning_rate = STORIES[button.description]
    values = {"compare": True, "learning_rate": learning_rate}
    for prefix, words in zip(("", "second_"), networks, strict=True):
        values |= {f"{prefix}{name}": word for name, word in zip(KIND, words.split(), strict=True)}
    explorer.live.stop()
    explorer.set(**values)
    explorer.start()


def _depth_panel(controls: Mapping[str, widgets.ValueWidget]) -> list[widgets.Widget]:
    def group(*names: str, title: str = "", color: str = "") -> widgets.VBox:
        heading = [widgets.HTML(f'<b style="color: {color}">{title}</b>')] if title else []
        return widgets.VBox([*heading, *(controls[name] for name in names)])

    first = group(*KIND, title="first network", color=HUE_COLORS[0])
    second = group(*(f"second_{name}" for name in KIND), title="second network", color=HUE_COLORS[1])

    def show_second(_: object) -> None:
        second.layout.display = None if controls["compare"].value else "none"

    controls["compare"].observe(show_second, names="value")
    show_second(None)
    return [
        group("depth", "width", "dimension", "samples"),
        group("learning_rate", "iterations", "seed", "row", "column"),
        first,
        widgets.VBox([controls["compare"], second]),
    ]


def network_name(network: NetworkConfig) -> str:
    """Initialisation, activation and scaling of a network, in words."""
    return " · ".join(word(name) for name in (network.initialisation, network.activation, network.convention))


def draw_depths(states: Sequence[DepthsState], row: int = 0, column: int = 0, figure: Figure | None = None) -> Figure:
    """Draw networks of growing depth while they train, one or two ``states`` side by side.

    Above is the entry (``row``, ``column``) of V_k and of W_k over s = k/L, a curve for each depth, and dotted the
    initialisation of the deepest network. Below are the loss, and the successive distance against the depth with its
    slope. If ``figure``, from an earlier call, differs only in its data, it is updated and returned. Its lines are
    marked ``animated``, for `Frames`.
    """
    still = [(network_name(state.config.network), state.config.depths, state.config.iterations) for state in states]
    what = repr((still, row, column))
    new = figure is None or figure.get_label() != what
    with mpl.rc_context(LIVE_STYLE) if new else contextlib.nullcontext():
        if new:
            figure = _make_axes(states, row, column)
            figure.set_label(what)
        axes = {panel.get_label(): panel for panel in figure.axes}
        for number, state in enumerate(states):
            depths = state.config.depths
            colors = shades(number, len(depths))
            for depth, color in zip(depths, colors, strict=True):
                s = np.arange(1, depth + 1) / depth
                wide = 1.9 if depth == depths[-1] else 1.1
                dots = {"marker": "o", "markersize": 3} if depth <= 16 else {}
                for Z, entry in zip("VW", read_entries(state.weights[depth], row, column), strict=True):
                    draw_line(axes[f"{Z}{number}"], depth, s, entry, color=color, linewidth=wide, **dots)
                losses = state.losses[depth]
                line = {"color": color, "linewidth": wide, "linestyle": "-" if number == 0 else (0, (4, 1.2))}
                draw_line(axes["loss"], (number, depth), np.arange(len(losses)), losses, **line)
            now = {"color": HUE_COLORS[number], "marker": MARKERS[number], "markersize": 5}
            draw_line(axes["loss"], f"now {number}", [len(losses) - 1], losses[-1:], **now)
            for Z, entry in zip("VW", read_entries(state.start, row, column), strict=True):
                draw_line(axes[f"{Z}{number}"], "start", np.arange(1, len(entry) + 1) / len(entry), entry, **DOTTED)
            distances = [state.distances[depth]["max_distance"] for depth in depths]
            draw_distances(axes["distance"], depths, distances, state.slope(), number, side=number)
        adjust_limits(figure, new, ahead=not new)
    return figure


def _make_axes(states: Sequence[DepthsState], row: int, column: int) -> Figure:
    figure = Figure(figsize=(11, 5.8))
    above = [f"{Z}{number}" for number in range(len(states)) for Z in "VW"]
    span = 4 // len(above)
    mosaic = [[label for label in above for _ in range(span)], ["loss"] * 2 + ["distance"] * 2]
    axes = figure.subplot_mosaic(mosaic, height_ratios=[1, 1])
    figure.subplots_adjust(left=0.055, right=0.988, bottom=0.085, top=0.875, wspace=0.4, hspace=0.42)
    for number, state in enumerate(states):
        for Z in "VW":
            axes[f"{Z}{number}"].set_title(rf"$({Z}_k)_{{{row},{column}}}$")
        left, right = axes[f"V{number}"].get_position(), axes[f"W{number}"].get_position()
        name = network_name(state.config.network)
        style = {"color": HUE_COLORS[number], "weight": "bold", "size": 11}
        figure.text((left.x0 + right.x1) / 2, 0.95, name, ha="center", **style)
    axes["distance"].set_title(r"$\max_{k,\,t}\,\|Z_{k+1}(t)-Z_k(t)\|_F$", pad=9)  # between the two slopes
    config = states[0].config
    prepare_axes(axes, config.depths, config.iterations, columnspacing=1, handlelength=1.2)
    for panel in axes.values():
        panel.xaxis.set_label_coords(0.5, -0.13)  # without it, matplotlib computes the place in every drawing
    return figure
