"""Pictures of the explorers: drawing functions as in `lib.plots`, in the same style, that can be brought up to date
several times a second."""

import io
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation
from matplotlib.transforms import IdentityTransform
from PIL import Image

from lib.depths import ROUNDING, DepthsState
from lib.experiments import entries
from lib.network import NetworkConfig
from lib.plots import GREY, MARKERS, STYLE, depth_axis, minus

# A hue for each of two networks that are compared, light for shallow, dark for deep.
HUES = ("Blues", "Oranges")
HUE_COLORS = ("#1B5E9E", "#C4500A")
# A fixed layout, since one that follows the tick labels trembles.
LIVE_STYLE = {**STYLE, "figure.constrained_layout.use": False, "axes.titlesize": 11, "axes.labelsize": 10}


class Frames:
    """PNG pictures of one figure, several a second.

    Artists marked ``animated`` are drawn for every picture; what stands still around them only where the limits of
    its axes have changed, one axes at a time (no axes' labels may reach over another's).
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self._dpi = self._background = None
        self._drawn = {}  # axes -> (limits, box in pixels) as they are in the background

    def png(self, dpi: float = 100) -> bytes:
        """The figure as it is now."""
        with mpl.rc_context(LIVE_STYLE):
            if dpi != self._dpi:
                self._draw_all(dpi)
            self.figure.canvas.restore_region(self._background)
            self._draw_changed()
            for axes in self.figure.axes:
                for artist in sorted(axes.get_children(), key=lambda artist: artist.get_zorder()):
                    if artist.get_animated():
                        axes.draw_artist(artist)
        return encode(np.asarray(self.figure.canvas.buffer_rgba()))

    def _draw_all(self, dpi: float) -> None:
        self.figure.set_dpi(dpi)
        FigureCanvasAgg(self.figure).draw()
        self._drawn = {axes: self._now(axes) for axes in self.figure.axes}
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


def encode(pixels: np.ndarray) -> bytes:
    """Pixels (height, width, 3 or 4) uint8 as PNG, quickly: a little larger than `png` makes it."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., :3])).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def network_name(network: NetworkConfig) -> str:
    """What distinguishes networks in the explorer, in words: initialisation, activation, scaling."""
    initialisation = {"iid": "i.i.d.", "gaussian-process": "Gaussian process"}.get(
        network.initialisation, network.initialisation
    )
    activation = {"gelu": "GELU", "relu": "ReLU", "leaky_relu": "leaky ReLU"}.get(
        network.activation, network.activation
    )
    scaling = {"released": "released scaling", "eq3": "scaling of eq. (3)"}[network.convention]
    return f"{initialisation} · {activation} · {scaling}"


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
            text = "all layers equal" if np.isnan(distances).all() else ""
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
    # A diverging network's last numbers are no scale for a picture.
    together = together[np.isfinite(together) & (np.abs(together) < 1e30)]
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
    elif high - low <= 1e-13 * abs(high):
        low, high = low - (0.5 * abs(high) or 0.5), high + (0.5 * abs(high) or 0.5)
    margin = 0.08 * (high - low)
    step = 10 ** (math.floor(3 * math.log10((high - low) / 2)) / 3)  # three sizes a decade
    low, high = step * math.floor((low - margin) / step), step * math.ceil((high + margin) / step)
    axes.set_ylim(*((10**low, 10**high) if log else (low, high)))
