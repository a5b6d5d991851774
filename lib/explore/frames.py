"""Pictures that are brought up to date several times a second, in the style of `lib.plots`, and what draws them."""

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

from lib.plots import STYLE

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
