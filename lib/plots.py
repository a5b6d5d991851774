"""Every picture of the project: functions that take data, draw in one style and return a matplotlib Figure.

Nothing here trains or reads files. Figures are `matplotlib.figure.Figure` objects without pyplot, so none
stays behind in a global list, and the same data gives the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lib import digits, paths, tables
from lib.distances import Slope, fit_slope

TEXT_WIDTH = 7.2  # inches: a figure over the full width of a page
HEIGHT = 2.7
SEQUENTIAL = "viridis"  # perceptually uniform, readable without red-green vision and in grey
# Okabe and Ito's colours, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = "osD^vP"

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


# What a figure is written in: its layout is fixed, and matplotlib would make it anew for a second file.
SAVED = {**STYLE, "figure.constrained_layout.use": False}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function in the one style, whatever the caller's rcParams are, on tables as they are written: a
    picture shows no digit that its table does not have."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        args = [digits.table(value) if isinstance(value, Mapping) else value for value in args]
        kwargs = {name: digits.table(value) if isinstance(value, Mapping) else value for name, value in kwargs.items()}
        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, "backend": mpl.rcParams["backend"]}):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure).draw()  # fixes the layout while the style holds
            return figure

    return drawn


def panels(columns: int, rows: int = 1, height: float = HEIGHT, width: float = TEXT_WIDTH, **kwargs):
    """A new figure over the page's width and its axes, as `Figure.subplots` returns them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def png(figure: Figure, dpi: float = 150) -> bytes:
    """The figure as PNG, without a date or a program's name in it."""
    buffer = io.BytesIO()
    with mpl.rc_context(SAVED):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def show(figure: Figure) -> None:
    """Show a figure in a notebook, sharp on dense screens."""
    from IPython.display import display

    display(_image(figure))


def _image(figure: Figure):
    from IPython.display import Image

    return Image(png(figure), width=round(figure.get_figwidth() * 110))


def save(name: str, figure: Figure, data: Mapping[str, tables.Table] | None = None) -> list[Path]:
    """Write ``<name>.pdf`` and ``.png``, and a CSV for each table in ``data`` (by file name without ending).

    The folder is `paths.figures_output`. The same figure gives the same bytes.
    """
    folder = paths.figures_output()
    written = []
    with mpl.rc_context(SAVED):
        for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            target = folder / f"{name}.{ending}"
            paths.write_atomically(target, partial(figure.savefig, format=ending, metadata=metadata))
            written.append(target)
    written += [tables.write_csv(folder / f"{stem}.csv", table) for stem, table in (data or {}).items()]
    return written


def color_scale(values: Sequence[float], log: bool = False) -> tuple[Callable[[float], tuple], mpl.cm.ScalarMappable]:
    """A function value -> colour over the sequential map (its lightest end left out), and its mappable."""
    low, high = min(values), max(values)
    norm = LogNorm(low, high) if log else Normalize(low, high if high > low else low + 1)
    cmap = mpl.colors.ListedColormap(mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.92, 256)))
    mappable = mpl.cm.ScalarMappable(norm, cmap)
    return mappable.to_rgba, mappable


def minus(number: float, digits: int = 3) -> str:
    """A number for a label, with a true minus sign."""
    return f"{number:.{digits}f}".replace("-", "−")


def rate_line(axes: Axes, x: Sequence[float], fit: Slope, exponent: float, label: str | None = None) -> None:
    """A dashed guide C x^exponent through the middle of a fit, slightly above the data."""
    x = np.asarray(x, dtype=float)
    middle = np.sqrt(x[0] * x[-1])
    level = 1.6 * fit.constant * middle**fit.slope
    axes.plot(x, level * (x / middle) ** exponent, "--", color=GREY, linewidth=1, label=label, zorder=1)


def plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis over a decade or two: plain numbers, 1, 2, 5, 10, ..."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """A logarithmic axis of depths with a tick at powers of two (every other one where there are many)."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel(r"depth $L$")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.set_xlim(min(depths) / 1.25, max(depths) * 1.25)


# --- Figure 1 left -----------------------------------------------------------------------------------------


@styled
def figure_1_left(table: tables.Table, slope_from: int = 16) -> Figure:
    """Successive distance against depth, a curve for each training time: the paper's quantity, then the
    released aggregate. ``table`` has the columns of ``figure_1_left.csv``; rows that are 0 are not drawn."""
    columns = {name: np.asarray(column) for name, column in table.items()}
    aggregate = np.maximum(columns["aggregate_V"], columns["aggregate_W"])
    times = [t for t in np.unique(columns["iterations"]) if aggregate[columns["iterations"] == t].max() > 0]
    depths = np.unique(columns["depth"])
    figure, axes = panels(2)
    color, mappable = color_scale(times or [0])
    quantities = (
        (columns["max_distance"], r"$\max_{k,\,t}\;\|Z_{k+1}(t)-Z_k(t)\|_F$", "the paper's quantity", -1.0),
        (aggregate, r"$\left(\sum_{t,\,k}\;\|Z_{k+1}(t)-Z_k(t)\|_F^2\right)^{1/2}$", "the released aggregate", -0.5),
    )
    for panel, (values, label, title, exponent) in zip(axes, quantities, strict=True):
        fit = None
        for time in times:
            rows = (columns["iterations"] == time) & (values > 0)
            order = np.argsort(columns["depth"][rows])
            x, y = columns["depth"][rows][order], values[rows][order]
            panel.plot(x, y, "o-", color=color(time), markeredgewidth=0)
            if (x >= slope_from).sum() >= 2:
                fit = fit_slope(x, y, slope_from)
        if fit is not None:
            fitted = depths[depths >= slope_from]
            rate_line(panel, fitted, fit, exponent, f"slope ${'-1' if exponent == -1 else '-1/2'}$")
            panel.legend(loc="lower left", title=f"slope, {times[-1]} iterations: {minus(fit.slope)}", title_fontsize=8)
        depth_axis(panel, depths)
        panel.set_yscale("log")
        _room_for_legend(panel, 0.2)
        panel.set_ylabel(label)
        panel.set_title(title)
    if times:
        bar = figure.colorbar(mappable, ax=axes, pad=0.01, aspect=28)
        bar.set_label("training iterations")
        bar.outline.set_visible(False)
    return figure


# --- Figure 1 right ----------------------------------------------------------------------------------------


@styled
def figure_1_right(table: tables.Table, slope_from: int = 16) -> Figure:
    """Distance to the limit: images over (iteration, depth) for V and W, and the rate at the last iteration.

    ``table`` has the columns of ``figure_1_right.csv``; entries that are 0 stay white.
    """
    depths, iterations = np.unique(table["depth"]), np.unique(table["iteration"])
    shape = len(depths), len(iterations)
    order = np.lexsort((table["iteration"], table["depth"]))
    images = {Z: np.asarray(table[f"distance_{Z}"])[order].reshape(shape) for Z in "VW"}
    figure, axes = panels(3, width_ratios=[1, 1, 0.95])
    edges = _edges(iterations)
    for panel, (Z, image) in zip(axes, images.items(), strict=False):
        # Twelve orders below the largest, and at 1e-13 of weights of order 1, there is rounding only.
        positive = np.ma.masked_less_equal(image, max(image.max() * 1e-12, 1e-13))
        if positive.count() == 0:
            panel.set_axis_off()
            continue
        # The first steps are orders of magnitude below the rest; the scale starts where the picture does.
        norm = LogNorm(np.quantile(positive.compressed(), 0.02), positive.max())
        mesh = panel.pcolormesh(edges, np.arange(len(depths) + 1), positive, norm=norm, rasterized=True)
        panel.set_yticks(np.arange(len(depths)) + 0.5, [str(depth) for depth in depths])
        panel.set_xlabel("training iteration")
        panel.set_title(rf"$\|{Z}^L(\cdot,t)-{Z}(\cdot,t)\|$")
        bar = figure.colorbar(mesh, ax=panel, location="bottom", pad=0.02, aspect=25, extend="min")
        bar.outline.set_visible(False)
    axes[0].set_ylabel(r"depth $L$")
    rate = axes[2]
    for Z, color, marker in zip("VW", COLORS, MARKERS, strict=False):
        final = images[Z][:, -1]
        if (final[depths >= slope_from] > 0).sum() >= 2:
            fit = fit_slope(depths, final, slope_from)
            rate_line(rate, depths[depths >= slope_from], fit, -1.0, "slope $-1$" if Z == "W" else None)
            rate.plot(depths, final, marker + "-", color=color, label=f"${Z}$: slope {minus(fit.slope)}")
        else:
            rate.plot(depths, np.where(final > 0, final, np.nan), marker + "-", color=color, label=f"${Z}$")
    depth_axis(rate, depths)
    rate.set_yscale("log")
    rate.set_title(f"at iteration {iterations[-1]}")
    _room_for_legend(rate, 0.35)
    rate.legend(loc="lower left")
    return figure


def _room_for_legend(axes: Axes, share: float) -> None:
    """Lengthen a logarithmic y axis downwards by this share of its length."""
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** share, high)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Cell edges around sorted centres, for pcolormesh."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


# --- Figure 2 ----------------------------------------------------------------------------------------------


@styled
def figure_2(loss: tables.Table, weights: tables.Table) -> Figure:
    """One entry of V and of W across layers, lighter as training goes on, and the loss.

    ``loss`` and ``weights`` have the columns of ``figure_2.csv`` and ``figure_2_weights.csv``.
    """
    figure, axes = panels(3)
    iterations = np.unique(weights["iteration"])
    color, mappable = color_scale(iterations)
    layers = np.unique(weights["layer"])
    for panel, Z in zip(axes, "VW", strict=False):
        order = np.lexsort((weights["layer"], weights["iteration"]))
        curves = np.asarray(weights[f"entry_{Z}"])[order].reshape(len(iterations), len(layers))
        for iteration, curve in zip(iterations, curves, strict=True):
            panel.plot(layers, curve, color=color(iteration), linewidth=0.8)
        row, column = weights["row"][0], weights["column"][0]
        panel.set_title(rf"$({Z}_k)_{{{row},{column}}}$")
        panel.set_xlabel(r"layer $k$")
    bar = figure.colorbar(mappable, ax=axes[1], pad=0.02, aspect=28)
    bar.set_label("training iteration")
    bar.outline.set_visible(False)
    if iterations[-1] >= 10_000:
        bar.formatter.set_powerlimits((3, 3))
        bar.formatter.set_useMathText(True)
    axes[2].plot(loss["iteration"], loss["loss"], color=BLUE)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("training iteration")
    axes[2].set_title("loss")
    if iterations[-1] >= 10_000:
        axes[2].ticklabel_format(axis="x", style="sci", scilimits=(3, 3), useMathText=True)
    return figure


# --- Networks trained on CIFAR-10 --------------------------------------------------------------------------


def show_anew(figure: Figure, handle=None):
    """Show a figure in a notebook in place of the one that ``handle`` stands for; returns the handle."""
    from IPython.display import display

    if handle is None:
        return display(_image(figure), display_id=True)
    handle.update(_image(figure))
    return handle


@styled
def training_curves(log: Sequence[Mapping], epochs: int) -> Figure:
    """Loss and accuracy against the epoch; ``log`` has a line an epoch (`cifar_training.EpochRecord`), test
    values where they were measured, ``epochs`` is the length of the schedule."""
    figure, axes = panels(2)
    done = [line["epoch"] + 1 for line in log]
    tested = [line for line in log if line["test_loss"] is not None]
    for panel, quantity, label in zip(axes, ("loss", "accuracy"), ("cross-entropy", "accuracy (%)"), strict=True):
        panel.plot(done, [line[f"train_{quantity}"] for line in log], "-", color=BLUE, label="train (running)")
        panel.plot(
            [line["epoch"] + 1 for line in tested],
            [line[f"test_{quantity}"] for line in tested],
            "o-",
            color=VERMILION,
            label="test",
        )
        panel.set_xlim(0, epochs + 0.5)
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
    axes[0].legend()
    return figure


INITIALISATIONS = ((True, "weight-tied", BLUE), (False, "i.i.d.", VERMILION))


@styled
def figure_3(
    table: tables.Table, titles: Mapping[tuple[int, bool], str], entries: Mapping[str, Sequence[int]]
) -> Figure:
    """One entry of conv1 and of conv2 across the layers, weight-tied beside i.i.d., two rows for each schedule.

    ``table`` has the columns of ``figure_3.csv``; ``titles`` says of each (epochs, smooth_init) which network it
    is; ``entries`` names the entry (out, in, row, column) of "conv1" and "conv2".
    """
    schedules = sorted(set(table["epochs"])) or [0]
    figure, axes = panels(2, rows=2 * len(schedules), height=3.6 * len(schedules), sharex=True)
    for first, epochs in zip(axes[::2], schedules, strict=True):
        for panel, (smooth, name, _) in zip(first, INITIALISATIONS, strict=True):
            panel.set_title(titles.get((epochs, smooth), name))
    shown = [(epochs, convolution) for epochs in schedules for convolution in entries]
    for row, (epochs, convolution) in zip(axes, shown, strict=True):
        for panel, (smooth, _, color) in zip(row, INITIALISATIONS, strict=True):
            curve = tables.select(table, epochs=epochs, smooth_init=smooth, convolution=convolution)
            if len(curve["layer"]) == 0:
                panel.text(0.5, 0.5, "no such network is here", ha="center", transform=panel.transAxes)
                panel.set_axis_off()
                continue
            # A scale of its own for each: what matters is whether a curve is smooth, not where it lies.
            panel.plot(curve["layer"], curve["value"], color=color, linewidth=0.8)
            panel.set_ylabel(f"{convolution} $[{','.join(str(i) for i in entries[convolution])}]$")
    for panel in axes[-1]:
        panel.set_xlabel("layer $k$")
    return figure


@styled
def figure_4(layers: tables.Table, averages: tables.Table, titles: Mapping[int, str]) -> Figure:
    """Successive Frobenius distance of conv1 and conv2, a row a schedule: across the layers, and on average with a dot
    a run.

    ``layers`` has the columns epochs, smooth_init, convolution, layer, distance (mean over runs); ``averages`` epochs,
    smooth_init, convolution, seed, average (over layers), as in ``figure_4.csv``; ``titles`` has one for each schedule.
    """
    rows = max(len(titles), 1)
    figure, axes = panels(2, rows=rows, height=HEIGHT * rows, width_ratios=[1.5, 1], sharey=True)
    if not titles:
        axes[0].text(0.5, 0.5, "no such network is trained yet", ha="center", transform=axes[0].transAxes)
        for panel in axes:
            panel.set_axis_off()
        return figure
    for (epochs, title), (curves, points) in zip(titles.items(), np.reshape(axes, (-1, 2)), strict=True):
        for smooth, name, color in INITIALISATIONS:
            for place, (convolution, line) in enumerate((("conv1", "-"), ("conv2", "--"))):
                of = {"epochs": epochs, "smooth_init": smooth, "convolution": convolution}
                curve, values = tables.select(layers, **of), tables.select(averages, **of)["average"]
                if len(values) == 0:
                    continue
                label = f"{name}, {convolution}"
                curves.plot(curve["layer"], curve["distance"], line, color=color, linewidth=0.8, label=label)
                x = place + (-0.15 if smooth else 0.15)
                points.hlines(np.median(values), x - 0.12, x + 0.12, color=color, linewidth=2)
                points.plot([x] * len(values), values, "o", color=color, alpha=0.7)
        curves.set_ylabel(r"$\|\mathrm{conv}_{i,k+1}-\mathrm{conv}_{i,k}\|_F$")
        curves.set_title(title)
        points.set_xticks([0, 1], ["conv1", "conv2"])
        points.set_xlim(-0.5, 1.5)
        points.set_title("mean over layers, by run")
        curves.set_yscale("log")
    first, last = np.reshape(axes, (-1, 2))[[0, -1], 0]
    first.legend()
    last.set_xlabel("layer $k$")
    return figure


# Other activations share a colour of their own.
ACTIVATION_COLORS = {"identity": GREEN, "gelu": BLUE, "relu": VERMILION}


@styled
def smoothness(
    training: tables.Table,
    depth: tables.Table,
    deeper: tables.Table,
    lost: tables.Table,
    convolution: str = "conv1",
    below: float = 0.1,
    straight: float = 0.0,
) -> Figure:
    """The von Neumann ratio of a convolution along training, and at its end in equal parts of the layers; then along
    training in networks of several depths, and the training time at which each stops being smooth.

    ``training``, ``depth``, ``deeper`` and ``lost`` have the columns of ``smoothness.csv``, ``smoothness_depth.csv``,
    ``smoothness_depths.csv`` and ``smoothness_lost.csv``: a line a seed, weight-tied runs in the colour of their
    activation, solid for the longest schedule and dashed for shorter ones, i.i.d. runs grey. ``below`` is the ratio
    under which weights count as smooth, ``straight`` that of a straight line over a part.
    """
    figure, ((course, parts), (depths, times)) = panels(2, rows=2, width_ratios=[1.4, 1], height=5.4)
    parts.sharey(course)
    parts.tick_params(labelleft=False)
    if len(training["run"]) == 0:
        course.text(0.5, 0.5, "no such network is trained yet", ha="center", transform=course.transAxes)
        for panel in (course, parts, depths, times):
            panel.set_axis_off()
        return figure
    longest = max(training["epochs"])
    runs = [tables.select(training, run=run) for run in dict.fromkeys(training["run"])]
    # The shorter schedules on top: where both agree, one sees both.
    for rows in sorted(runs, key=lambda rows: (not rows["smooth_init"][0], -rows["epochs"][0])):
        style = _tied_run(rows, longest)[1] if rows["smooth_init"][0] else {"color": GREY, "linewidth": 0.8}
        course.plot(rows["time"], rows[f"von_neumann_{convolution}"], **style)
        ends = tables.select(depth, run=rows["run"][0])
        if len(ends["part"]):
            # Hollow and of different sizes, so that one sees all of those that lie on top of each other.
            marker = {"markerfacecolor": "white", "markersize": 5 + 2 * (ends["activation"][0] == "identity")}
            parts.plot(ends["part"], ends[f"von_neumann_{convolution}"], "o", **style, **marker)
    for activation in dict.fromkeys(tables.select(training, smooth_init=True)["activation"].tolist()):
        course.plot([], [], color=ACTIVATION_COLORS.get(activation, PURPLE), label=tables.word(activation))
    for epochs in np.unique(training["epochs"])[::-1]:
        course.plot([], [], "-" if epochs == longest else "--", color="black", label=f"{epochs} epochs")
    if not all(training["smooth_init"]):
        course.plot([], [], color=GREY, linewidth=0.8, label="i.i.d.")
    for panel in (course, parts):
        panel.axhline(below, color=GREY, linestyle=":", linewidth=1, zorder=0)
    course.annotate("below: smooth", (1, below), (0, -3), xycoords=("axes fraction", "data"),
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
        parts.text(0.5, 0.5, "their weights are not here", ha="center", transform=parts.transAxes)
    _by_depth(depths, times, deeper, lost, convolution, below)
    return figure


def _by_depth(
    depths: Axes, times: Axes, deeper: tables.Table, lost: tables.Table, convolution: str, below: float
) -> None:
    # The lower panels of `smoothness`.
    for panel, rows in ((depths, deeper["run"]), (times, lost["depth"])):
        if not len(rows):
            panel.text(0.5, 0.5, "none is here", ha="center", transform=panel.transAxes)
    if len(deeper["run"]):
        color, _ = color_scale(deeper["depth"], log=True)
        for layers in np.unique(deeper["depth"]):
            rows = tables.select(deeper, depth=layers)
            ratio, label = rows[f"von_neumann_{convolution}"], f"{layers} layers"
            depths.plot(rows["time"], ratio, color=color(layers), label=label)
        depths.axhline(below, color=GREY, linestyle=":", linewidth=1, zorder=0)
        depths.legend(loc="lower right")
        depths.set(yscale="log", xlabel="training time $t$", ylabel=f"von Neumann ratio of {convolution}")
        depths.set_title(f"{tables.word(deeper['activation'][0])}, weight-tied, by depth")
    if len(lost["depth"]):
        times.plot(lost["depth"], lost["lost_at"], "o", color=BLUE)
        times.set(yscale="log", ylabel="training time $t$", title="where smoothness is lost")
        if len(lost["depth"]) > 1:
            fit = fit_slope(lost["depth"], lost["lost_at"])
            fitted = np.array([min(lost["depth"]), max(lost["depth"])], dtype=float)
            times.plot(
                fitted, fit.constant * fitted**fit.slope, color=BLUE, linewidth=1, label=f"slope {minus(fit.slope, 2)}"
            )
            times.legend(loc="upper left")
        depth_axis(times, lost["depth"])
        plain_ticks(times.yaxis)


def _tied_run(rows: tables.Table, longest: int) -> tuple[str, dict[str, str]]:
    """Label and line of a weight-tied run: the colour of its activation, solid for the longest schedule."""
    activation, epochs = str(rows["activation"][0]), int(rows["epochs"][0])
    style = {"color": ACTIVATION_COLORS.get(activation, PURPLE), "linestyle": "-" if epochs == longest else "--"}
    return f"{tables.word(activation)}, {epochs} epochs", style


@styled
def rounding(precision: tables.Table, depth: tables.Table, convolution: str = "conv1") -> Figure:
    """The share of noise from layer to layer in a convolution and its von Neumann ratio along training in two
    precisions, and the share at the end of training in equal parts of the layers.

    ``precision`` and ``depth`` have the columns of ``rounding.csv`` and ``rounding_depth.csv``: networks of another
    depth in another colour, a line a seed, float32 solid and float64 dashed; trained networks in the colour of their
    activation, solid for the longest schedule and dashed for shorter ones.
    """
    figure, (share, ratio, parts) = panels(3, width_ratios=[1.15, 1.15, 1], height=3.0)
    column = f"noise_{convolution}"
    for panel, name in ((share, column), (ratio, f"von_neumann_{convolution}")):
        for color, of in zip(cycle((PURPLE, ORANGE, SKY)), dict.fromkeys(precision["depth"]), strict=False):
            for dtype, line in (("float32", "-"), ("float64", "--")):
                label = f"{of} layers, {dtype}"
                for seed in dict.fromkeys(tables.select(precision, depth=of, dtype=dtype)["seed"]):
                    rows = tables.select(precision, depth=of, dtype=dtype, seed=seed)
                    panel.plot(rows["time"], rows[name], line, color=color, linewidth=1, label=label)
                    label = None  # one of the runs stands for all
        panel.set(yscale="log", xlabel="training time $t$")
    longest = max(depth["epochs"], default=0)
    for run in dict.fromkeys(depth["run"]):
        rows = tables.select(depth, run=run)
        label, style = _tied_run(rows, longest)
        parts.plot(rows["part"], rows[column], "o", markerfacecolor="white", label=label, **style)
    share.set_ylabel(f"share of noise in {convolution}")
    ratio.set_ylabel(f"von Neumann ratio of {convolution}")
    share.set_title("noise in two precisions")
    ratio.set_title("smoothness in two precisions")
    parts.set_title("noise at the end of training")
    parts.set(yscale="log", xlabel="part of the layers")
    _room_for_legend(parts, 0.4)
    parts.set_xticks(np.unique(depth["part"]) if len(depth["part"]) else [])
    for panel, rows in ((share, precision["depth"]), (ratio, precision["depth"]), (parts, depth["run"])):
        if not len(rows):
            panel.text(0.5, 0.5, "none is here", ha="center", transform=panel.transAxes)
        elif panel is share:
            panel.legend(loc="lower right", handlelength=1.6)
        elif panel is parts:
            panel.legend(loc="lower left", fontsize=7, handlelength=1.6, labelspacing=0.2)
    return figure


@styled
def stem(networks: tables.Table, training: tables.Table, spike: tables.Table, below: float = 0.0) -> Figure:
    """What the size of the stem goes with, what comes of keeping it, and a spike of the loss step by step.

    ``networks``, ``training`` and ``spike`` have the columns of ``stem.csv``, ``stem_training.csv`` and
    ``stem_spike.csv``: networks in the colour of their activation, weight-tied ones full, i.i.d. ones hollow, squares
    where the stem was held, the larger the longer their schedule; in training a line a run, and one at ``below``.
    """
    figure, axes = panels(2, rows=3, height=6.4, width_ratios=[1.25, 1])
    (accuracy, ratio, rougher), (loss, length, longer) = axes.T
    for above, under in ((accuracy, ratio), (loss, length)):
        above.sharex(under)
        above.tick_params(labelbottom=False)
    lengths = np.unique(networks["epochs"]).tolist()
    sizes = dict(zip(lengths[::-1], (7, 4.5, 3), strict=False))
    for name, panel in (("test_accuracy", accuracy), ("von_neumann_conv1", ratio)):
        for row in tables.rows(networks):
            color = ACTIVATION_COLORS.get(row["activation"], PURPLE)
            face = color if row["smooth_init"] else "white"
            marker = "s" if row["hold_stem"] else "o"
            place = row["relative_path_length"], row[name]
            size = sizes.get(row["epochs"], min(sizes.values()))
            panel.plot(*place, marker, color=color, markerfacecolor=face, markersize=size)
    accuracy.set(ylabel="test accuracy (%)", title="networks at the end of training")
    ratio.set(yscale="log", xlabel="relative path length", ylabel="von Neumann ratio of conv1")
    for activation in dict.fromkeys(networks["activation"]):
        label, color = tables.word(activation), ACTIVATION_COLORS.get(activation, PURPLE)
        ratio.plot([], [], "o", color=color, label=label)
    ratio.plot([], [], "o", color=GREY, label="full: weight-tied")
    ratio.plot([], [], "o", color=GREY, markerfacecolor="white", label="hollow: i.i.d.")
    if any(networks["hold_stem"]):
        ratio.plot([], [], "s", color=GREY, label="stem held")
    for epochs, size in sizes.items():
        ratio.plot([], [], "o", color=GREY, markersize=size, label=f"{epochs} epochs")
    ratio.legend(loc="lower right", labelspacing=0.3, ncols=2, columnspacing=0.8)
    for hold_stem, label, color in ((False, "stem trains", BLUE), (True, "stem held", PURPLE)):
        rows = tables.select(training, hold_stem=hold_stem)
        for run in dict.fromkeys(rows["run"]):
            line = tables.select(rows, run=run)
            longer.plot(line["epoch"], line["relative_path_length"], color=color, linewidth=1, label=label)
            rougher.plot(line["epoch"], line["von_neumann_conv1"], color=color, linewidth=1)
            label = None  # one of the runs stands for all
    if below:
        rougher.axhline(below, color=GREY, linestyle=":", linewidth=1, zorder=0)
    for panel, name in ((rougher, "von Neumann ratio of conv1"), (longer, "relative path length")):
        panel.set(yscale="log", xlabel="epochs complete", ylabel=name)
    if len(training["run"]):
        rougher.set_title(f"{training['depth'][0]} layers, {tables.word(training['activation'][0])}, weight-tied")
        longer.set_title("the same networks")
        longer.legend(loc="lower right", handlelength=1.2)
    loss.plot(spike["epochs"], spike["loss"], color=GREY, linewidth=1)
    length.plot(spike["epochs"], spike["relative_path_length"], color=BLUE, linewidth=1)
    loss.set(ylabel="training loss", title="a spike of the loss: GELU, i.i.d.")
    length.set(yscale="log", xlabel="epochs complete", ylabel="relative path length")
    ratio.set_xscale("log")
    ratio.margins(x=0.12, y=0.12)
    for axis in (ratio.xaxis, longer.yaxis, length.yaxis):
        plain_ticks(axis)
    for panel, rows in ((ratio, networks["run"]), (rougher, training["run"]), (length, spike["epochs"])):
        if not len(rows):
            panel.text(0.5, 0.5, "none is here", ha="center", transform=panel.transAxes)
    return figure
