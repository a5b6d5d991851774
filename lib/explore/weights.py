"""Browse the weights of trained networks, entry by entry: `explore_weights` and its drawing."""

import html
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from ipywidgets import Layout
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.cifar.choice import RELEASED, Setting
from lib.cifar.config import CifarConfig
from lib.cifar.dataset import CLASSES
from lib.cifar.records import CONVOLUTIONS
from lib.explore import trained
from lib.explore.controls import label, menu, scale, whole_number
from lib.explore.explorer import Explorer, Values
from lib.explore.frames import HUE_COLORS, LIVE_STYLE, shades
from lib.explore.live import Run
from lib.explore.trained import View
from lib.figures.style import GREY, SEQUENTIAL, VERMILION
from lib.tables import word


def explore_weights(folder: Path | None = None, choice: trained.Choice | None = None) -> widgets.Widget:
    """Browse the trained networks of a folder (by default ``checkpoints/``), one or two side by side.

    If the folder holds none, a message is shown instead of the explorer.
    """
    found, start = trained.find_checkpoints(folder), choice or trained.Choice()
    if not found:
        return widgets.HTML(trained.NOTHING_TRAINED)
    first, *others = trained.choose_pair(found)
    named = [(trained_name(config), path) for path, config in found.items()]
    shape = trained.load(first).weights("conv1").shape[1:]
    places = ("out channel", "in channel", "row", "column")
    controls: dict[str, widgets.ValueWidget] = {
        "run": widgets.Dropdown(options=named, value=first, **label("network")),
        "second": widgets.Dropdown(
            options=[("none", ""), *named], value=others[0] if others else "", **label("beside it")
        ),
        "convolution": menu("convolution", "of each layer", CONVOLUTIONS)(start.convolution),
        "how": menu("entry", "which of the entries to follow through the layers", trained.HOW)(start.how),
        "seed": whole_number("seed", "draws the entry, as entry_seed of figure_3 does")(start.seed),
    }
    for name, size, place in zip(places, shape, start.index, strict=True):
        controls[name] = widgets.IntSlider(place, 0, size - 1, continuous_update=False, **label(name))
    controls["image"] = whole_number("test image", "its number, from 0")(start.image)
    deepest = max(config.depth for config in found.values())
    controls["layers"] = scale(
        "layers kept",
        "for accuracy and path, the middle ones of as many equal parts",
        [deepest >> power for power in range(deepest.bit_length())],
    )(min(start.layers or deepest, deepest))

    def chosen(values: Values) -> trained.Choice:
        index = tuple(values[name] for name in places)
        chosen = {name: values[name] for name in ("convolution", "how", "seed", "image", "layers")}
        return trained.Choice(**chosen, index=index)

    def make(values: Values) -> Run:
        return Run(trained.browse([path for path in (values["run"], values["second"]) if path]))

    def draw(browsing: trained.Browsing, values: Values, _: Figure | None) -> Figure:
        choice = chosen(values)
        controls["image"].layout.display = None if browsing.images else "none"
        return draw_weights(browsing.views(choice), *browsing.image(choice))

    def status(browsing: trained.Browsing, values: Values) -> list[str]:
        lines = []
        for view in browsing.views(chosen(values)):
            ratio = view.ratios[view.entry]
            rank = int((view.ratios < ratio).sum()) + 1
            lines.append(f"von Neumann ratio {ratio:.2g}, number {rank:,} of {view.ratios.size:,} from the smoothest")
        lines += browsing.accuracies(chosen(values))
        image, sentence = browsing.image(chosen(values))
        return lines if image is not None else [*lines, html.escape(sentence)]

    def reproduce(values: Values) -> tuple[str, Values, str]:
        names = ("activation", "batch_norm", "seed", "epochs", "depth", "learning_rate")
        shown = {name: getattr(found[values["run"]], name) for name in names}
        if values["how"] == "random":
            return "figure_3", shown | {"entry_seed": values["seed"]}, ""
        return "figure_3", shown, "figure_3 draws its entries: choose 'random' here for the ones that it shows"

    def show_used_controls(_: object) -> None:
        how = controls["how"].value
        for name, counts in ({"seed": how == "random"} | dict.fromkeys(places, how == "index")).items():
            controls[name].layout.display = None if counts else "none"

    controls["how"].observe(show_used_controls, names="value")
    show_used_controls(None)
    view = [name for name in controls if name not in ("run", "second")]
    runs = widgets.VBox([controls["run"], controls["second"]], layout=Layout(max_width="700px"))
    return Explorer(
        "explore_weights",
        controls,
        make,
        draw,
        reproduce=reproduce,
        hint="<b>roughest</b> as the entry, then <b>smoothest</b> with the other network as the first.",
        panel=[controls[name] for name in view],
        above=[runs],
        table=lambda browsing, values: {"": browsing.table(chosen(values))},
        status=status,
        view=view,
        follow=True,
        buttons=False,
    )


# The range of the histogram and the map: from far below the ratio of any trained entry to above 2, that of independent
# layers.
RATIOS = (1e-4, 4.0)


def _norm(config: CifarConfig) -> str:
    if config.norm_groups:
        return f"group norm ({config.norm_groups})"
    return "" if config.batch_norm else "no batch norm"


def trained_name(config: CifarConfig) -> str:
    """A trained network in words: initialisation, activation, schedule, and all else that differs from the paper."""
    parts = [word(config.initialisation), word(config.activation)]
    parts += [_norm(config), f"L = {config.depth}", f"{config.epochs} epochs"]
    setting = Setting.from_config(config).words
    parts += [] if setting == RELEASED else [setting]
    return " · ".join([*filter(None, parts), f"seed {config.seed}"])


def draw_weights(views: Sequence[View], image: np.ndarray | None = None, caption: str = "") -> Figure:
    """Draw one entry of the convolutions of one or two trained networks, and the smoothness of all entries.

    Above is the entry across the layers. In the middle is the von Neumann ratio of every entry, as a map over kernels
    (out channel down, in channel across, each a block of 3 x 3) and as a histogram. If there is an ``image``
    (32, 32, 3), the path of its hidden states in the plane of their two principal axes is below, and the image with its
    ``caption``. If only some layers are kept for the path, dots mark them on the curve.
    """
    with mpl.rc_context(LIVE_STYLE | {"axes.titlesize": 10}):
        two = len(views) > 1
        below = ["path0", "path0", "path1", "path1"] + ["image"] * 2 if two else ["path0"] * 3 + ["image"] * 3
        rows = [
            ["curve0"] * 3 + ["curve1"] * 3 if two else ["curve0"] * 6,
            ["map0", "map0", "map1", "map1"] + ["histogram"] * 2 if two else ["map0"] * 3 + ["histogram"] * 3,
        ]
        heights = [1, 1.6]
        if image is not None:
            rows, heights = [*rows, below], [*heights, 1]
        height = 0.5 + 1.9 * sum(heights)
        figure = Figure(figsize=(11, height))
        axes = figure.subplot_mosaic(rows, height_ratios=heights)
        edges = {"bottom": 0.45 / height, "top": 1 - 0.8 / height}
        figure.subplots_adjust(left=0.07, right=0.988, **edges, wspace=0.8, hspace=0.52)
        out, into, row, column = views[0].entry
        name = f"{views[0].convolution}: out channel {out}, in channel {into}, row {row}, column {column} of the kernel"
        figure.suptitle(name, fontsize=11, y=1 - 0.18 / height)
        for number, view in enumerate(views):
            _draw_entry_curve(axes[f"curve{number}"], view, number)
            _draw_ratio_map(axes[f"map{number}"], view, number)
            if image is not None:
                _draw_image_path(axes[f"path{number}"], view, number)
        _draw_ratio_histogram(axes["histogram"], views)
        if image is not None:
            axes["image"].set_axis_off()
            axes["image"].imshow(image, interpolation="nearest")
            axes["image"].set_title(caption, wrap=True)
    return figure


def _draw_entry_curve(axes: Axes, view: View, number: int) -> None:
    axes.plot(np.arange(1, len(view.curve) + 1), view.curve, color=HUE_COLORS[number], linewidth=1.2)
    if view.kept is not None:
        axes.plot(view.kept + 1, view.curve[view.kept], "o", color=HUE_COLORS[number], markersize=3)
    axes.set_title(trained_name(view.config), color=HUE_COLORS[number], weight="bold")
    axes.set_xlabel("layer $k$")


def _draw_ratio_map(axes: Axes, view: View, number: int) -> None:
    out, into, *kernel = view.ratios.shape
    picture = view.ratios.transpose(0, 2, 1, 3).reshape(out * kernel[0], into * kernel[1])
    norm = LogNorm(*RATIOS, clip=True)
    axes.imshow(picture, norm=norm, cmap=SEQUENTIAL, interpolation="nearest", extent=(0, into, out, 0))
    for panel_axis, count in ((axes.xaxis, into), (axes.yaxis, out)):
        panel_axis.set_ticks(
            [place + 0.5 for place in range(0, count, 5)], [str(place) for place in range(0, count, 5)]
        )
        panel_axis.set_tick_params(length=0)
    axes.vlines(range(1, into), 0, out, color="white", linewidth=0.4)
    axes.hlines(range(1, out), 0, into, color="white", linewidth=0.4)
    o, i, row, column = view.entry
    corner = (i + column / kernel[1], o + row / kernel[0])
    axes.add_patch(Rectangle(corner, 1 / kernel[1], 1 / kernel[0], fill=False, color=VERMILION, linewidth=2))
    axes.set_title("smoothness of every entry", color=HUE_COLORS[number])
    axes.set_xlabel("in channel")
    axes.set_ylabel("out channel")


def _draw_ratio_histogram(axes: Axes, views: Sequence[View]) -> None:
    edges = np.geomspace(*RATIOS, 60)
    for number, view in enumerate(views):
        counts, _ = np.histogram(np.clip(view.ratios[np.isfinite(view.ratios)], *RATIOS), edges)
        axes.stairs(counts, edges, fill=True, color=HUE_COLORS[number], alpha=0.6)
        ratio = view.ratios[view.entry]
        if np.isfinite(ratio):
            axes.plot(np.clip(ratio, *RATIOS), 0, marker="^", color=HUE_COLORS[number], markersize=9, clip_on=False)
    axes.axvline(2, color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(*RATIOS)
    strip = axes.inset_axes([0, 1.01, 1, 0.04])  # the colours of the map
    strip.pcolormesh(edges, [0, 1], np.sqrt(edges[1:] * edges[:-1])[None], norm=LogNorm(*RATIOS), cmap=SEQUENTIAL)
    strip.set_xscale("log")
    strip.set_xlim(*RATIOS)
    strip.set_axis_off()
    axes.set_title("von Neumann ratio of the entries", pad=12)
    axes.set_xlabel("smooth  ←  → independent (2)")
    axes.set_ylabel("entries")


def _draw_image_path(axes: Axes, view: View, number: int) -> None:
    points = view.path.points
    colors = shades(number, len(points))
    axes.add_collection(LineCollection(np.stack([points[:-1], points[1:]], axis=1), colors=colors[1:], linewidths=2))
    for place, name in ((0, "$h_0$"), (-1, "$h_L$")):
        axes.plot(*points[place], "o", color=colors[place], markersize=6)
        axes.annotate(name, points[place], xytext=(6, 6), textcoords="offset points", size=10)
    axes.margins(0.15)
    seen = CLASSES[int(view.path.logits.argmax())]
    axes.set_title(f"the image's path, seen as {seen}", color=HUE_COLORS[number])
    first, second = view.path.shares
    axes.set_xlabel(f"first principal axis ({first:.1%})")
    axes.set_ylabel(f"second ({second:.1%})")
