"""Pictures of the explorers: drawing functions as in `lib.plots`, in the same style, that can be brought up to date
several times a second."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation
from matplotlib.transforms import IdentityTransform
from PIL import Image

from lib.cifar import CLASSES
from lib.cifar_training import CifarConfig
from lib.depths import ROUNDING, DepthsState
from lib.experiments import entries
from lib.network import NetworkConfig
from lib.plots import GREY, MARKERS, SEQUENTIAL, STYLE, VERMILION, depth_axis, minus
from lib.tables import word
from lib.trained import View

# A hue for each of two networks that are compared, light for shallow, dark for deep.
HUES = ("Blues", "Oranges")
HUE_COLORS = ("#1B5E9E", "#C4500A")
# A diverging network's last numbers are not drawn.
TOO_LARGE = 1e30
# A fixed layout, since one that follows the tick labels trembles.
LIVE_STYLE = {**STYLE, "figure.constrained_layout.use": False, "axes.titlesize": 11, "axes.labelsize": 10}


class Frames:
    """Pictures of one figure, several a second.

    Artists marked ``animated`` are drawn for every picture; what stands still around them only where the limits of
    its axes have changed, one axes at a time (no axes' labels may reach over another's).
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        figure.set_layout_engine("none")  # which `plots.styled` has let do its work
        self._dpi = self._background = None
        self._drawn = {}  # axes -> (limits, box in pixels) as they are in the background

    def pixels(self, dpi: float = 100) -> np.ndarray:
        """The figure as it is now: (height, width, 3) uint8."""
        with mpl.rc_context(LIVE_STYLE):
            if dpi != self._dpi:
                self._draw_all(dpi)
            self.figure.canvas.restore_region(self._background)
            self._draw_changed()
            for axes in self.figure.axes:
                for artist in sorted(axes.get_children(), key=lambda artist: artist.get_zorder()):
                    if artist.get_animated():
                        axes.draw_artist(artist)
        return np.ascontiguousarray(np.asarray(self.figure.canvas.buffer_rgba())[..., :3])

    def _draw_all(self, dpi: float) -> None:
        self.figure.set_dpi(dpi)
        FigureCanvasAgg(self.figure).draw()
        moving = [axes for axes in self.figure.axes if any(each.get_animated() for each in axes.get_children())]
        self._drawn = {axes: self._now(axes) for axes in moving}
        self._keep(dpi)

    def _draw_changed(self) -> None:
        changed = [axes for axes, (limits, _) in self._drawn.items() if limits != self._limits(axes)]
        renderer = self.figure.canvas.get_renderer()
        for axes in changed:
            before, self._drawn[axes] = self._drawn[axes], self._now(axes)
            for _, box in (before, self._drawn[axes]):
                white = Rectangle(box.min, box.width, box.height, color="white", transform=IdentityTransform())
                white.draw(renderer)
            axes.draw(renderer)
        if changed:
            self._keep(self._dpi)

    def _keep(self, dpi: float) -> None:
        self._dpi, self._background = dpi, self.figure.canvas.copy_from_bbox(self.figure.bbox)

    def _now(self, axes: Axes) -> tuple:
        return self._limits(axes), axes.get_tightbbox(self.figure.canvas.get_renderer()).padded(1)

    def _limits(self, axes: Axes) -> tuple:
        return axes.get_xlim(), axes.get_ylim()


# Options of the two formats: JPEG takes a tenth of the time of PNG, for pictures that are gone in a moment.
FORMATS = {"png": {"compress_level": 1}, "jpeg": {"quality": 90, "subsampling": 0}}


def encode(pixels: np.ndarray, form: str) -> bytes:
    """Pixels (height, width, 3) uint8 as "png" or "jpeg"."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, **FORMATS[form])
    return buffer.getvalue()


def network_name(network: NetworkConfig) -> str:
    """What distinguishes networks in the explorer, in words: initialisation, activation, scaling."""
    return " · ".join(word(name) for name in (network.initialisation, network.activation, network.convention))


def explore_depth(states: Sequence[DepthsState], row: int = 0, column: int = 0, figure: Figure | None = None) -> Figure:
    """Networks of growing depth while they train, one or two ``states`` side by side.

    Above, the entry (``row``, ``column``) of V_k and of W_k over s = k/L, a curve for each depth (dotted: the deepest
    one's initialisation); below, the loss and the successive distance against the depth with its slope.

    ``figure``, from an earlier call with the same configurations and the same entry, is brought up to date and
    returned: its lines are marked ``animated``, for `Frames`.
    """
    with mpl.rc_context(LIVE_STYLE):
        new = figure is None
        figure = figure or _explore_depth_axes(states, row, column)
        axes = {panel.get_label(): panel for panel in figure.axes}
        for number, state in enumerate(states):
            depths = state.config.depths
            colors = hue(number, len(depths))
            for depth, color in zip(depths, colors, strict=True):
                s = np.arange(1, depth + 1) / depth
                wide = 1.9 if depth == depths[-1] else 1.1
                dots = {"marker": "o", "markersize": 3} if depth <= 16 else {}
                for Z, entry in zip("VW", entries(state.weights[depth], row, column), strict=True):
                    bring(axes[f"{Z}{number}"], depth, s, entry, color=color, linewidth=wide, **dots)
                losses = state.losses[depth]
                line = {"color": color, "linewidth": wide, "linestyle": "-" if number == 0 else (0, (4, 1.2))}
                bring(axes["loss"], (number, depth), np.arange(len(losses)), losses, **line)
            now = {"color": HUE_COLORS[number], "marker": MARKERS[number], "markersize": 5}
            bring(axes["loss"], f"now {number}", [len(losses) - 1], losses[-1:], **now)
            start = {"color": GREY, "linewidth": 0.9, "linestyle": ":", "zorder": 1}
            for Z, entry in zip("VW", entries(state.start, row, column), strict=True):
                bring(axes[f"{Z}{number}"], "start", np.arange(1, len(entry) + 1) / len(entry), entry, **start)
            distances = np.array([state.distances[depth]["max_distance"] for depth in depths])
            distances[distances <= ROUNDING] = np.nan
            style = {"color": HUE_COLORS[number], "marker": MARKERS[number], "markersize": 5, "linewidth": 1.3}
            bring(axes["distance"], number, depths, distances, **style)
            fit = state.slope()
            text = "equal layers" if np.isnan(distances).all() else ""
            note(axes["distance"], number, f"slope {minus(fit.slope, 2)}" if fit else text, HUE_COLORS[number])
        for panel in figure.axes:
            values = [line.get_ydata() for line in panel.lines]
            low, high = extent(values, log=panel.get_yscale() == "log")
            if new or not fills(panel, low, high):
                set_limits(panel, low, high, decades=0.9 if panel is axes["distance"] else 0.2)
    return figure


def _explore_depth_axes(states: Sequence[DepthsState], row: int, column: int) -> Figure:
    figure = Figure(figsize=(9.6, 6))
    above = [f"{Z}{number}" for number in range(len(states)) for Z in "VW"]
    span = 4 // len(above)
    mosaic = [[label for label in above for _ in range(span)], ["loss"] * 2 + ["distance"] * 2]
    axes = figure.subplot_mosaic(mosaic, height_ratios=[1, 1])
    figure.subplots_adjust(left=0.065, right=0.985, bottom=0.085, top=0.875, wspace=0.42, hspace=0.42)
    for number, state in enumerate(states):
        for Z in "VW":
            panel = axes[f"{Z}{number}"]
            panel.set_title(rf"$({Z}_k)_{{{row},{column}}}$")
            panel.set_xlabel(r"$s=k/L$")
            panel.set_xlim(0, 1.02)
            panel.ticklabel_format(useOffset=False)
        left, right = axes[f"V{number}"].get_position(), axes[f"W{number}"].get_position()
        name = network_name(state.config.network)
        style = {"color": HUE_COLORS[number], "weight": "bold", "size": 11}
        figure.text((left.x0 + right.x1) / 2, 0.95, name, ha="center", **style)
    depths, iterations = states[0].config.depths, states[0].config.iterations
    axes["loss"].set_title("loss", loc="left")
    axes["loss"].set_xlabel("training iteration")
    axes["loss"].set_xlim(0, iterations)
    axes["distance"].set_title(r"$\max_{k,\,t}\,\|Z_{k+1}(t)-Z_k(t)\|_F$", loc="left")
    depth_axis(axes["distance"], depths)
    axes["distance"].set_xlabel("depth $L$")
    for label in ("loss", "distance"):
        axes[label].set_yscale("log")
    keys = [mpl.lines.Line2D([], [], color=color, linewidth=2.2) for color in hue(0, len(depths))]
    axes["loss"].yaxis.set_major_formatter(PlainLogFormatter())
    axes["loss"].yaxis.set_minor_formatter(PlainLogFormatter())
    axes["loss"].legend(
        keys, depths, title="depth $L$", title_fontsize=8, loc="upper right", ncols=2, columnspacing=1, handlelength=1.2
    )
    return figure


class PlainLogFormatter(LogFormatterSciNotation):
    """Tick labels of a logarithmic axis, as plain numbers where these are short."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        label = super().__call__(x, pos)
        return f"{x:g}" if label and 1e-3 < x < 1e4 else label


def hue(number: int, count: int) -> list[tuple]:
    """``count`` colours of the network ``number``, from light to dark."""
    return [mpl.colormaps[HUES[number]](level) for level in np.linspace(0.35, 1, count)]


def bring(axes: Axes, key: object, x: Sequence[float], y: Sequence[float], **style) -> None:
    """Move the animated line of that key to the data, or draw it where there is none yet."""
    gid = f"line {key}"
    line = next((line for line in axes.lines if line.get_gid() == gid), None)
    y = np.asarray(y, dtype=float)
    y = np.where(np.abs(y) < TOO_LARGE, y, np.nan)
    if line is None:
        axes.plot(x, y, gid=gid, animated=True, **style)
    else:
        line.set_data(x, y)


def note(axes: Axes, number: int, text: str, color: str) -> None:
    """Write the animated note of that number above the axes."""
    gid = f"note {number}"
    found = next((old for old in axes.texts if old.get_gid() == gid), None)
    if found is None:
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "size": 11, "weight": "bold"}
        found = axes.text(0.74 + 0.26 * number, 1.03, "", gid=gid, animated=True, color=color, **place)
    found.set_text(text)


def extent(values: Sequence[Sequence[float]], log: bool = False) -> tuple[float, float]:
    """Smallest and largest of the finite values (with ``log``, of the positive ones); (0, 0), or (1, 1), of none."""
    together = np.concatenate([np.asarray(value, dtype=float) for value in values])
    together = together[np.isfinite(together)]
    together = together[together > 0] if log else together
    return (float(together.min()), float(together.max())) if len(together) else (float(log), float(log))


def fills(axes: Axes, low: float, high: float) -> bool:
    """Whether data from ``low`` to ``high`` lie within the y axis and take up much of it, so that it can stay."""
    ends = (*axes.get_ylim(), low, high)
    bottom, top, low, high = map(math.log10, ends) if axes.get_yscale() == "log" else ends
    return bottom <= low <= high <= top and high - low > 0.4 * (top - bottom)


def set_limits(axes: Axes, low: float, high: float, decades: float) -> None:
    """Limits of the y axis at round numbers around the data, at least ``decades`` of them where it is logarithmic."""
    log = axes.get_yscale() == "log"
    if log:
        low, high = math.log10(low), math.log10(high)
    if log and high - low < decades:
        low, high = (low + high - decades) / 2, (low + high + decades) / 2
    elif high - low <= 3e-4 * abs(high):  # as good as constant, and no room for more digits
        low, high = low - (0.5 * abs(high) or 0.5), high + (0.5 * abs(high) or 0.5)
    margin = 0.08 * (high - low)
    step = 10 ** (math.floor(3 * math.log10((high - low) / 2)) / 3)  # three sizes a decade
    low, high = step * math.floor((low - margin) / step), step * math.ceil((high + margin) / step)
    axes.set_ylim(*((10**low, 10**high) if log else (low, high)))


# --- Entries of trained convolutions ---------------------------------------------------------------------------------

# Ratios of the histogram and the map: from far below any trained entry's to above that of independent layers, 2.
RATIOS = (1e-4, 4.0)


def trained_name(config: CifarConfig) -> str:
    """A trained network in words: initialisation, activation, schedule and what else differs from the paper."""
    parts = ["weight-tied" if config.smooth_init else "i.i.d.", word(config.activation)]
    parts += ["" if config.batch_norm else "no batch norm", f"L = {config.depth}", f"{config.epochs} epochs"]
    return " · ".join([*filter(None, parts), f"seed {config.seed}"])


def explore_weights(views: Sequence[View], image: np.ndarray | None = None, caption: str = "") -> Figure:
    """One entry of the convolutions of one or two trained networks, and all entries by their smoothness.

    Above, the entry across the layers; in the middle, the von Neumann ratio of every entry as a map over kernels
    (out channel down, in channel across, each a block of 3 x 3) and as a histogram; below, the path of the hidden
    states of ``image`` (32, 32, 3) in the plane of its two principal axes, or ``caption`` alone without an image. Where
    only some layers are kept for that, dots mark them on the curve.
    """
    with mpl.rc_context(LIVE_STYLE | {"axes.titlesize": 10}):
        two = len(views) > 1
        below = ["path0", "path0", "path1", "path1"] + ["image"] * 2 if two else ["path0"] * 3 + ["image"] * 3
        figure = Figure(figsize=(9.6, 7.2))
        axes = figure.subplot_mosaic(
            [
                ["curve0"] * 3 + ["curve1"] * 3 if two else ["curve0"] * 6,
                ["map0", "map0", "map1", "map1"] + ["histogram"] * 2 if two else ["map0"] * 3 + ["histogram"] * 3,
                below if image is not None else ["image"] * 6,
            ],
            height_ratios=[1, 1.25, 1],
        )
        figure.subplots_adjust(left=0.085, right=0.985, bottom=0.06, top=0.89, wspace=0.8, hspace=0.52)
        out, into, row, column = views[0].entry
        name = f"{views[0].convolution}: out channel {out}, in channel {into}, row {row}, column {column} of the kernel"
        figure.suptitle(name, fontsize=11, y=0.975)
        for number, view in enumerate(views):
            _entry_curve(axes[f"curve{number}"], view, number)
            _ratio_map(axes[f"map{number}"], view, number)
            if image is not None:
                _image_path(axes[f"path{number}"], view, number)
        _ratio_histogram(axes["histogram"], views)
        axes["image"].set_axis_off()
        if image is not None:
            axes["image"].imshow(image, interpolation="nearest")
            axes["image"].set_title(caption, wrap=True)
        else:
            place = {"ha": "center", "va": "center", "transform": axes["image"].transAxes}
            axes["image"].text(0.5, 0.5, caption, wrap=True, **place)
    return figure


def _entry_curve(axes: Axes, view: View, number: int) -> None:
    axes.plot(np.arange(1, len(view.curve) + 1), view.curve, color=HUE_COLORS[number], linewidth=1.2)
    if view.kept is not None:
        axes.plot(view.kept + 1, view.curve[view.kept], "o", color=HUE_COLORS[number], markersize=3)
    axes.set_title(trained_name(view.config), color=HUE_COLORS[number], weight="bold")
    axes.set_xlabel("layer $k$")


def _ratio_map(axes: Axes, view: View, number: int) -> None:
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


def _ratio_histogram(axes: Axes, views: Sequence[View]) -> None:
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


def _image_path(axes: Axes, view: View, number: int) -> None:
    points = view.path.points
    colors = hue(number, len(points))
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


# --- Tables ----------------------------------------------------------------------------------------------------------


def table(readable: Mapping[str, Sequence[str]]) -> Figure:
    """A table of texts as a picture, columns as wide as what they hold."""
    with mpl.rc_context(LIVE_STYLE):
        rows = list(zip(*readable.values(), strict=True))
        wide = [2 + max(map(len, [*name.split(), *column])) for name, column in readable.items()]
        lines = max(len(name.split()) for name in readable)
        figure = Figure(figsize=(max(8.0, 0.085 * sum(wide)), 0.3 * len(rows) + 0.22 * lines))
        axes = figure.add_axes([0.01, 0.01, 0.98, 0.98])
        axes.set_axis_off()
        drawn = axes.table(
            rows,
            colLabels=[name.replace(" ", "\n") for name in readable],
            colWidths=[width / sum(wide) for width in wide],
            cellLoc="center",
            edges="horizontal",
            bbox=[0, 0, 1, 1],
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(9)
        for (row, _), cell in drawn.get_celld().items():
            cell.set_height(0.75 * lines if row == 0 else 1)
            cell.set_linewidth(0.5)
            cell.set_text_props(weight="bold" if row == 0 else "normal")
    return figure
