"""Pictures that are updated several times a second, in the style of `lib.figures.style`."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation
from matplotlib.transforms import IdentityTransform
from PIL import Image

from lib.explore.depth_training import ROUNDING
from lib.figures.style import GREY, MARKERS, STYLE, format_number, set_depth_axis
from lib.rates import Slope

# A colour map for each of two networks that are compared: light for shallow, dark for deep.
HUES = ("Blues", "Oranges")
HUE_COLORS = ("#1B5E9E", "#C4500A")
DOTTED = {"color": GREY, "linewidth": 0.9, "linestyle": ":", "zorder": 1}  # the line of weights before training
TOO_LARGE = 1e30  # numbers above it, of a network that diverges, are not drawn
# The layout is fixed: one that follows the tick labels would move in every picture.
LIVE_STYLE = {
    **STYLE,
    "figure.constrained_layout.use": False,
    "axes.titlesize": 11,
    "axes.titley": 1.0,  # without it, matplotlib computes a place in every drawing
    "axes.labelsize": 10,
}


class Frames:
    """Pictures of one figure, several a second.

    Lines and texts marked ``animated`` are drawn for every picture. The background is stored for each resolution, and
    the part of one axes is drawn again if its limits have changed. Labels of different axes must not overlap.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure, self._canvas = figure, FigureCanvasAgg(figure)
        figure.set_layout_engine("none")  # the layout has been computed, and stays
        self._backgrounds = {}  # dpi -> the background, and the limits of its axes
        self._cells = {}  # axes -> its place in the figure with its labels, in inches

    def pixels(self, dpi: float = 100) -> np.ndarray:
        """The figure as it is now: (height, width, 3) uint8."""
        self.figure.set_dpi(dpi)
        limits = {axes: self._limits(axes) for axes in self.figure.axes}
        if dpi not in self._backgrounds:
            with mpl.rc_context(LIVE_STYLE):
                self._canvas.draw()
            self._store_background(dpi, limits)
        background, drawn = self._backgrounds[dpi]
        self._canvas.restore_region(background)
        if limits != drawn:
            with mpl.rc_context(LIVE_STYLE):
                for axes in limits:
                    if limits[axes] != drawn[axes]:
                        self._redraw(axes)
            self._store_background(dpi, limits)
        renderer = self._canvas.get_renderer()
        for axes in limits:
            moving = [artist for artist in (*axes.lines, *axes.texts) if artist.get_animated()]
            for artist in sorted(moving, key=lambda artist: artist.get_zorder()):
                artist.draw(renderer)
        return np.ascontiguousarray(np.asarray(self._canvas.buffer_rgba())[..., :3])

    def _store_background(self, dpi: float, limits: dict) -> None:
        self._backgrounds[dpi] = self._canvas.copy_from_bbox(self.figure.bbox), limits

    def _redraw(self, axes: Axes) -> None:
        renderer, (left, bottom, right, top) = self._canvas.get_renderer(), self._cell(axes) * self.figure.dpi
        place = {"color": "white", "transform": IdentityTransform()}
        Rectangle((left, bottom), right - left, top - bottom, **place).draw(renderer)
        axes.draw(renderer)

    def _cell(self, axes: Axes) -> np.ndarray:
        # Labels of the y axis may grow to the left, so the cell begins where that of the neighbour ends.
        if axes not in self._cells:
            renderer = self._canvas.get_renderer()
            boxes = {each: each.get_tightbbox(renderer).padded(1) for each in self.figure.axes}
            for each, box in boxes.items():
                left = [o.x1 for o in boxes.values() if o.x1 <= box.x0 and o.y0 < box.y1 and box.y0 < o.y1]
                self._cells[each] = np.array([max(left, default=0.0), box.y0, box.x1, box.y1]) / self.figure.dpi
        return self._cells[axes]

    def _limits(self, axes: Axes) -> tuple:
        return axes.get_xlim(), axes.get_ylim()


# Options of the two formats. JPEG takes a tenth of the time of PNG, and is for pictures that are soon replaced.
FORMATS = {"png": {"compress_level": 1}, "jpeg": {"quality": 90, "subsampling": 0}}


def encode(pixels: np.ndarray, form: str) -> bytes:
    """Pixels (height, width, 3) uint8 as "png" or "jpeg"."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, **FORMATS[form])
    return buffer.getvalue()


class PlainLogFormatter(LogFormatterSciNotation):
    """Tick labels of a logarithmic axis, as plain numbers if these are short."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        label = super().__call__(x, pos)
        return f"{x:g}" if label and 1e-3 < x < 1e4 else label


@lru_cache
def shades(number: int, count: int) -> tuple[tuple, ...]:
    """``count`` colours of the network ``number``, from light to dark."""
    return tuple(mpl.colormaps[HUES[number]](level) for level in np.linspace(0.35, 1, count))


def draw_line(axes: Axes, key: object, x: Sequence[float], y: Sequence[float], **style) -> None:
    """Update the animated line of that key with the data, or add it if there is none yet."""
    gid = f"line {key}"
    line = next((line for line in axes.lines if line.get_gid() == gid), None)
    y = np.asarray(y, dtype=float)
    y = np.where(np.abs(y) < TOO_LARGE, y, np.nan)
    if line is None:
        axes.plot(x, y, gid=gid, animated=True, **style)
    else:
        line.set_data(x, y)


def draw_note(axes: Axes, number: int, text: str, color: str) -> None:
    """Write the animated note of that number above the axes: 0 at the left end, 1 at the right end."""
    gid = f"note {number}"
    found = next((old for old in axes.texts if old.get_gid() == gid), None)
    if found is None:
        place = {"transform": axes.transAxes, "va": "bottom", "size": 11, "weight": "bold"}
        place["ha"] = ("left", "right")[number]
        found = axes.text(number, 1.03, "", gid=gid, animated=True, color=color, **place)
    found.set_text(text)


def find_extent(values: Sequence[Sequence[float]], log: bool = False) -> tuple[float, float]:
    """Smallest and largest of the finite values (with ``log``, of the positive ones); (0, 0) or (1, 1) if there are
    none."""
    together = np.concatenate([np.asarray(value, dtype=float) for value in values])
    together = together[np.isfinite(together)]
    together = together[together > 0] if log else together
    return (float(together.min()), float(together.max())) if len(together) else (float(log), float(log))


def fills_axis(axes: Axes, low: float, high: float) -> bool:
    """Whether data from ``low`` to ``high`` lie within the y axis and fill enough of it, so that it can stay."""
    ends = (*axes.get_ylim(), low, high)
    bottom, top, low, high = map(math.log10, ends) if axes.get_yscale() == "log" else ends
    return bottom <= low <= high <= top and high - low > 0.4 * (top - bottom)


def set_limits(axes: Axes, low: float, high: float, decades: float, ahead: bool = False) -> None:
    """Set the limits of the y axis to round numbers around the data. A logarithmic axis has at least that many
    ``decades``. With ``ahead``, a third of the data's range is added on each side on which they have left the axis."""
    log = axes.get_yscale() == "log"
    bottom, top = axes.get_ylim()
    if log:
        low, high, bottom, top = map(math.log10, (low, high, bottom, top))
    if ahead:
        room = (high - low) / 3
        low, high = low - room * (low < bottom), high + room * (high > top)
    if log and high - low < decades:
        low, high = (low + high - decades) / 2, (low + high + decades) / 2
    elif high - low <= 3e-4 * abs(high):  # nearly constant: there is no space for more digits
        low, high = low - (0.5 * abs(high) or 0.5), high + (0.5 * abs(high) or 0.5)
    margin = 0.08 * (high - low)
    step = 10 ** (math.floor(3 * math.log10((high - low) / 2)) / 3)  # three sizes in each decade
    low, high = step * math.floor((low - margin) / step), step * math.ceil((high + margin) / step)
    axes.set_ylim(*((10**low, 10**high) if log else (low, high)))


# --- Networks of several depths ---------------------------------------------------------------------------------------


def prepare_axes(axes: Mapping[str, Axes], depths: Sequence[int], iterations: int, **legend) -> None:
    """Set scales, limits and labels of the axes "loss" and "distance", and of all others, which show an entry of the
    weights over s = k/L. ``legend`` goes to that of the depths."""
    for panel in (panel for name, panel in axes.items() if name not in ("loss", "distance")):
        panel.set_xlabel(r"$s=k/L$")
        panel.set_xlim(0, 1.02)
        panel.ticklabel_format(useOffset=False)
    set_depth_axis(axes["distance"], depths)
    axes["distance"].set_yscale("log")
    loss = axes["loss"]
    loss.set_title("loss", loc="left")
    loss.set(xlabel="training iteration", xlim=(0, iterations), yscale="log")
    loss.yaxis.set_major_formatter(PlainLogFormatter())
    loss.yaxis.set_minor_formatter(PlainLogFormatter())
    keys = [mpl.lines.Line2D([], [], color=color, linewidth=2.2) for color in shades(0, len(depths))]
    loss.legend(keys, depths, title="depth $L$", title_fontsize=8, loc="upper right", ncols=2, **legend)


def draw_distances(
    axes: Axes, depths: Sequence[int], distances: Sequence[float], fit: Slope | None, number: int, side: int
) -> None:
    """Draw the largest successive distances of the network ``number`` against the depth, and note their slope at the
    ``side`` (`draw_note`). Distances up to rounding are left out."""
    shown = np.where(np.asarray(distances) <= ROUNDING, np.nan, distances)
    style = {"color": HUE_COLORS[number], "marker": MARKERS[number], "markersize": 5, "linewidth": 1.3}
    draw_line(axes, number, depths, shown, **style)
    without = "equal layers" if np.isnan(shown).all() else ""
    draw_note(axes, side, f"slope {format_number(fit.slope, 2)}" if fit else without, style["color"])


def adjust_limits(figure: Figure, new: bool, ahead: bool = False) -> None:
    """Set the limits of each y axis that is ``new`` or that its lines leave or no longer fill (`set_limits`)."""
    for panel in figure.axes:
        low, high = find_extent([line.get_ydata() for line in panel.lines], log=panel.get_yscale() == "log")
        if new or not fills_axis(panel, low, high):
            set_limits(panel, low, high, decades=0.9 if panel.get_label() == "distance" else 0.2, ahead=ahead)
