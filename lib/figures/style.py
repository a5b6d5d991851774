"""One style for every picture, and the pieces that several share. Nothing here trains or reads files.

Figures are `matplotlib.figure.Figure` objects without pyplot, so none stays behind in a global list, and the same data
gives the same bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from lib import digits, tables
from lib.dense.limit import LIMIT
from lib.rates import Slope, SlopeOverSeeds

TEXT_WIDTH = 7.2  # inches: a figure over the full width of a page
HEIGHT = 2.7
SEQUENTIAL = "viridis"  # perceptually uniform, readable without red-green vision and in grey
# Okabe and Ito's colours, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = "osD^vP"
BLACK, LIGHT = "#222222", "#B5B5B5"
# Other activations share a colour of their own.
ACTIVATION_COLORS = {"identity": GREEN, "gelu": BLUE, "relu": VERMILION}
INITIALISATION_COLORS = {"weight-tied": BLUE, "iid": VERMILION}
GUIDE = {"color": GREY, "linewidth": 1, "zorder": 0}  # a line to compare with, behind the data

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "mathtext.fontset": "cm",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": False,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "image.cmap": SEQUENTIAL,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}

# The style in which a figure is written. Its layout is fixed, and matplotlib would make it anew for a second file.
SAVED = {**STYLE, "figure.constrained_layout.use": False}


def _round_tables(value: Any) -> Any:
    # A table, or several by name.
    if not isinstance(value, Mapping):
        return value
    if any(isinstance(part, Mapping) for part in value.values()):
        return {name: _round_tables(part) for name, part in value.items()}
    return digits.round_table(value)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function in the one style, whatever the caller's rcParams are. Its tables are rounded as they are
    written, so that a picture shows no digit that its table does not have."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        args = [_round_tables(value) for value in args]
        kwargs = {name: _round_tables(value) for name, value in kwargs.items()}
        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, "backend": mpl.rcParams["backend"]}):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure).draw()  # fixes the layout while the style holds
            return figure

    return drawn


def make_panels(columns: int, rows: int = 1, height: float = HEIGHT, width: float = TEXT_WIDTH, **kwargs):
    """A new figure over the page's width and its axes, as `Figure.subplots` returns them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def make_color_scale(
    values: Sequence[float], log: bool = False
) -> tuple[Callable[[float], tuple], mpl.cm.ScalarMappable]:
    """A function value -> colour over the sequential map (its lightest end left out), and its mappable."""
    low, high = min(values), max(values)
    norm = LogNorm(low, high) if log else Normalize(low, high if high > low else low + 1)
    cmap = mpl.colors.ListedColormap(mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.92, 256)))
    mappable = mpl.cm.ScalarMappable(norm, cmap)
    return mappable.to_rgba, mappable


def draw_color_bar(
    figure: Figure, mappable: mpl.cm.ScalarMappable, axes: Any, label: str = "", **place: Any
) -> Colorbar:
    """A colour bar beside the axes, without a frame; ``place`` as for `Figure.colorbar`."""
    bar = figure.colorbar(mappable, ax=axes, **place)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return bar


def draw_slopes(axes: Axes, times: Sequence[float], fits: Sequence[Slope], **style: Any) -> None:
    """Slopes against the training time, with their intervals (none if they are nan)."""
    slopes, low, high = (np.array([getattr(fit, name) for fit in fits]) for name in ("slope", "low", "high"))
    bars = np.maximum(np.nan_to_num([slopes - low, high - slopes]), 0)
    axes.errorbar(times, slopes, bars, linewidth=1, capsize=2, **style)


def format_number(number: float, digits: int = 3) -> str:
    """A number for a label, with a true minus sign."""
    return f"{number:.{digits}f}".replace("-", "−")


def describe_intervals(fit: SlopeOverSeeds) -> str:
    """The intervals of a slope for a label: over the seeds, if there are several, and of the fit."""
    of_fit = f"fit [{format_number(fit.fit_low)}, {format_number(fit.fit_high)}]"
    over = f"{fit.seeds} seeds [{format_number(fit.low)}, {format_number(fit.high)}]" if fit.seeds > 1 else "1 seed"
    return f"95 %: {over},\n{of_fit}"


def draw_rate_line(axes: Axes, x: Sequence[float], fit: Slope, exponent: float, label: str | None = None) -> None:
    """A dashed guide C x^exponent through the middle of a fit, slightly above the data."""
    x = np.asarray(x, dtype=float)
    middle = np.sqrt(x[0] * x[-1])
    level = 1.6 * fit.constant * middle**fit.slope
    axes.plot(x, level * (x / middle) ** exponent, "--", color=GREY, linewidth=1, label=label, zorder=1)


def set_plain_ticks(axis: Axis) -> None:
    """Plain numbers 1, 2, 5, 10, ... at the ticks of a logarithmic axis, for one or two decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def set_depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """A logarithmic axis of depths with a tick at powers of two (every other one if there are many)."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel(r"depth $L$")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.set_xlim(min(depths) / 1.25, max(depths) * 1.25)


def leave_room_for_legend(axes: Axes, share: float) -> None:
    """Lengthen a logarithmic y axis downwards by this share of its length."""
    low, high = axes.get_ylim()
    if low > 0:  # else nothing is drawn on it
        axes.set_ylim(low * (low / high) ** share, high)


def leave_room_above(axes: Axes, share: float) -> None:
    """Lengthen a linear y axis upwards by this share of its length."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + share * (high - low))


def write_across(axes: Axes, text: str, **style: Any) -> None:
    """A sentence in the middle of the axes, in place of data that are missing."""
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, **style)


def activation_color(activation: str) -> str:
    """The colour of a network with that activation. Activations without a colour of their own share purple."""
    return ACTIVATION_COLORS.get(activation, PURPLE)


def compute_cell_edges(centres: np.ndarray) -> np.ndarray:
    """Cell edges around sorted centres, for pcolormesh."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def style_tied_run(rows: tables.Table, longest: int) -> tuple[str, dict[str, str]]:
    """The label and the line style of a weight-tied run: the colour of its activation, solid for the longest schedule
    and dashed for shorter ones."""
    activation, epochs = str(rows["activation"][0]), int(rows["epochs"][0])
    style = {"color": activation_color(activation), "linestyle": "-" if epochs == longest else "--"}
    return f"{tables.word(activation)}, {epochs} epochs", style


def label_depth(depth: int) -> str:
    """The depth for a legend; `LIMIT` is infinite."""
    return r"$L=\infty$" if depth == LIMIT else f"$L={depth}$"


def set_layers_axis(axes: Axes, layers: Iterable[int]) -> None:
    """A logarithmic axis of layers, a plain number at every second power of two."""
    ticks = sorted({int(count) for count in layers})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-2][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
