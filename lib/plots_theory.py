"""The pictures of `lib.theory` and `lib.counterexample`, in the style of `lib.plots`."""

from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from lib.distances import fit_slope
from lib.plots import (
    COLORS,
    GREY,
    MARKERS,
    color_scale,
    depth_axis,
    panels,
    plain_ticks,
    rate_line,
    styled,
)
from lib.tables import Table, select, word
from lib.theory import LIMIT

BLACK, LIGHT = "#222222", "#B5B5B5"


def _depth_label(depth: int) -> str:
    return r"$L=\infty$" if depth == LIMIT else f"$L={depth}$"


# --- The neural ODE ----------------------------------------------------------------------------------------

ERRORS = {
    "hidden_states": "hidden states, sup over $x$, $k$",
    "output": "output, sup over $x$",
    "discretised": r"output, limit's weights",
    "scipy": "output, SciPy's ODE",
    "weights": "weights, sup over $s$",
}


@styled
def neural_ode(errors: Table, trajectories: Table, slope_from: int) -> Figure:
    """Networks beside the limit: hidden states, errors against depth at the end, slopes during training.

    ``errors`` has the columns of ``neural_ode.csv``, ``trajectories`` those of ``neural_ode_states.csv``.
    """
    figure, (states, error, slope) = panels(3, height=3.2, width_ratios=[1, 1.1, 1])
    depths = np.unique(trajectories["depth"])
    for depth, color in zip(depths, (BLACK, GREY, LIGHT), strict=False):
        for number in np.unique(trajectories["input"]):
            rows = select(trajectories, depth=depth, input=number)
            style = (
                {"linewidth": 1.4, "zorder": 3}
                if depth == LIMIT
                else {"marker": "o", "markersize": 3.5, "linewidth": 0.7}
            )
            label = _depth_label(depth) if number == 0 else None
            states.plot(rows["s"], rows["value"], color=color, label=label, **style)
    states.set_xlabel("$s=k/L$")
    states.set_title("first coordinate of $h_k$, a few inputs")
    low, high = states.get_ylim()
    states.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    states.legend(loc="upper center", ncols=3, handlelength=1.2, columnspacing=1)
    iterations = np.unique(errors["iteration"])
    last = select(errors, iteration=iterations[-1])
    for (name, label), color, marker in zip(ERRORS.items(), COLORS, MARKERS, strict=False):
        style = {"markerfacecolor": "none", "linestyle": "none", "markersize": 7} if name == "hidden_states" else {}
        error.plot(last["depth"], last[name], marker=marker, color=color, label=label, **style)
    fitted = last["depth"][last["depth"] >= slope_from]
    if len(fitted) > 1:
        fit = fit_slope(last["depth"], last["hidden_states"], slope_from)
        rate_line(error, fitted, fit, -1.0, "slope $-1$")
    depth_axis(error, last["depth"])
    error.set_yscale("log")
    error.set_title(f"distance at iteration {iterations[-1]}")
    for place, shift in ((4, -1), (1, 1)):
        name, times, fits = list(ERRORS)[place], [], []
        for iteration in iterations:
            rows = select(errors, iteration=iteration)
            if ((rows[name] > 1e-12) & (rows["depth"] >= slope_from)).sum() > 2:
                times.append(iteration + shift * 0.006 * iterations[-1])
                fits.append(fit_slope(rows["depth"], rows[name], slope_from))
        bars = [[fit.slope - fit.low for fit in fits], [fit.high - fit.slope for fit in fits]]
        slopes = [fit.slope for fit in fits]
        slope.errorbar(times, slopes, bars, color=COLORS[place], marker=MARKERS[place], linewidth=1, capsize=2)
    slope.axhline(-1, color=GREY, linestyle="--", linewidth=1, zorder=0)
    low, high = slope.get_ylim()
    slope.set_ylim(min(low, -1.1), max(high, -0.9))
    slope.set_xlabel("training iteration")
    slope.set_title("slope in $L$: weights, output")
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# --- Long times --------------------------------------------------------------------------------------------


@styled
def long_time(ratios: Table, curves: Table, weights: Table, samples: int) -> Figure:
    """PL ratios for several widths, then losses and final weights for several depths and the limit.

    ``ratios``, ``curves`` and ``weights`` have the columns of ``long_time.csv``, ``long_time_depths.csv`` and
    ``long_time_weights.csv``.
    """
    figure, ((along, least), (loss, final)) = panels(2, 2, height=4.8)
    widths, seeds = np.unique(ratios["width"]), np.unique(ratios["seed"])
    color, _ = color_scale(widths, log=True)
    for width in widths:
        rows = [select(ratios, width=width, seed=seed) for seed in seeds]
        middle = np.median([row["ratio"] for row in rows], axis=0)
        along.plot(rows[0]["time"], middle, color=color(width), label=f"$m={width}$")
        minima = [row["ratio"].min() for row in rows]
        least.plot([width] * len(minima), minima, "o", color=color(width))
    lowest = [np.median([select(ratios, width=width, seed=seed)["ratio"].min() for seed in seeds]) for width in widths]
    least.plot(widths, lowest, "-", color=GREY, zorder=0, label="median")
    least.axvline(samples, color=GREY, linestyle=":", linewidth=1)
    least.annotate("$m=n$", (samples, 0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points")
    least.set_xscale("log", base=2)
    least.set_xlabel("width $m$")
    least.set_title("smallest PL ratio along training, a dot a seed")
    along.set_xlabel("training time $t$")
    along.set_title("PL ratio" + (", median over seeds" if len(seeds) > 1 else ""))
    along.legend(ncols=2, loc="best", labelspacing=0.25, handlelength=1.2)
    depths = np.unique(curves["depth"])
    for depth, hue, line in zip(depths, cycle((BLACK, *COLORS)), cycle(("-", "--", "-.", ":", "--")), strict=False):
        label, rows = _depth_label(depth), select(curves, depth=depth)
        loss.plot(rows["time"], rows["loss"], line, color=hue, label=label, linewidth=1.6)
        rows = select(weights, depth=depth)
        if depth == LIMIT:
            final.plot(rows["s"], rows["entry_V"], color=hue, label=label)
        else:
            edges = np.linspace(0, 1, depth + 1)
            final.stairs(rows["entry_V"], edges, baseline=None, color=hue, label=label, linewidth=0.9)
    loss.set_xlabel("training time $t$")
    loss.set_title("loss")
    final.set_xlabel("$s=k/L$")
    final.set_title(f"one entry of $V$ at $t={curves['time'][-1]:.0f}$")
    for axes in (along, least, loss):
        axes.set_yscale("log")
    for axes in (loss, final):
        axes.legend(loc="best", labelspacing=0.25)
    return figure


# --- Initialisations ---------------------------------------------------------------------------------------


def _case_label(case: str) -> str:
    if case.startswith("Gaussian process"):
        return rf"Gaussian process, $\ell={case.split()[-1]}$"
    return {"iid": "i.i.d.", "iid 1/sqrt(L)": r"i.i.d., scaling $1/\sqrt{L}$"}.get(case, case)


COLUMNS = ("successive", "distance", "output", "variation")  # of the table, a panel each


@styled
def initialisation(table: Table, entries: Table) -> Figure:
    """Successive distance, distances of weights and of outputs to the limit and quadratic variation against depth, for
    each initialisation.

    Open markers and thin lines: before training; full ones: after. ``table`` and ``entries`` have the columns of
    ``initialisation.csv`` and ``initialisation_weights.csv``.
    """
    figure, axes = panels(3, 2, height=5.2)
    successive, distance, output, variation, entry, legend = axes.flat
    cases = list(dict.fromkeys(table["case"]))
    before, after = np.unique(table["iteration"])
    for case, color, marker in zip(cases, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        for iteration, style in ((before, {"markerfacecolor": "white", "linewidth": 0.7}), (after, {})):
            rows = select(table, case=case, iteration=iteration)
            for panel, name in zip((successive, distance, output, variation), COLUMNS, strict=True):
                values = np.where(np.nan_to_num(rows[name]) > 1e-10, rows[name], np.nan)
                panel.plot(rows["depth"], values, marker + "-", color=color, **style)
        rows = select(entries, case=case, iteration=after)
        if case != "iid 1/sqrt(L)":
            width = 0.5 if case == "iid" else 1.3
            entry.plot(rows["s"], rows["entry"], color=color, linewidth=width, zorder=1 if case == "iid" else 2)
        legend.plot([], [], marker + "-", color=color, label=_case_label(case))
    legend.plot([], [], "o", color=GREY, markerfacecolor="white", label="open: before training,\nif it differs")
    titles = {
        successive: r"$\max_k\,\|Z_{k+1}-Z_k\|_F$",
        distance: "weights to their limit",
        output: "outputs to their limit",
        variation: r"$\sum_k\,\|h_{k+1}-h_k\|^2$",
    }
    for panel, title in titles.items():
        depth_axis(panel, table["depth"])
        panel.set_yscale("log")
        panel.set_title(title)
    entry.set_xlabel("$s=k/L$")
    entry.set_title(f"one entry of $W_k$, $L={max(table['depth'])}$")
    legend.set_axis_off()
    legend.legend(loc="center left", title="i.i.d.: to the deepest network", title_fontsize=8)
    return figure


# --- The counterexample ------------------------------------------------------------------------------------


@styled
def relu_counterexample(table: Table, weights: Table) -> Figure:
    """Weights across the layers with ReLU and with GELU, and the largest successive distance against depth.

    ``table`` and ``weights`` have the columns of ``relu_counterexample.csv`` and ``..._weights.csv``; there is a panel
    for each activation.
    """
    names, factors = list(dict.fromkeys(table["activation"])), np.unique(table["factor"])
    figure, axes = panels(len(names) + 1, height=2.9, width_ratios=[1] * len(names) + [1.15])
    *across, compared = axes
    for panel, name in zip(across, names, strict=True):
        rows = select(weights, activation=name)
        panel.plot(rows["layer"], rows["weight"], "o-", markersize=3.5, linewidth=0.4, color=COLORS[2])
        panel.set_xlabel("layer $k$")
        panel.set_title(f"{word(name)}: $w_k$, $C={rows['factor'][0]:g}$, after training")
        if name == "relu":
            star = select(table, activation=name, depth=rows["depth"][0], factor=rows["factor"][0])["limit_weight"][0]
            panel.axhline(star, color=GREY, linestyle="--", linewidth=1, zorder=0)
            panel.set_ylim(top=1.15 * star)
            panel.annotate("$w^*$", (0.5, star), (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points")
    lows, highs = zip(*(panel.get_ylim() for panel in across), strict=True)
    for panel in across:
        panel.set_ylim(min(lows), max(highs))
    # Factor by factor, so that the legend, filled column by column, has a row for each activation.
    for factor, color, marker in zip(factors, cycle(COLORS), cycle(MARKERS), strict=False):
        for name, line in zip(names, cycle(("-", "--", "-.", ":")), strict=False):
            rows = select(table, activation=name, factor=factor)
            label = f"{word(name)}, $C={factor:g}$"
            compared.plot(rows["depth"], rows["end"], line, marker=marker, color=color, label=label)
            if name == "relu":
                # Odd layers stay at -1/(2L), even ones go to w*.
                expected = rows["limit_weight"] + 1 / rows["depth"]
                compared.plot(rows["depth"], expected, "x", color=BLACK, markersize=6, zorder=3)
    compared.plot([], [], "x", color=BLACK, markersize=6, label="$w^*+1/(2L)$")
    depth_axis(compared, table["depth"])
    compared.set_xlabel("depth $2L$")
    compared.set_yscale("log")
    compared.set_title(r"$\max_k\,|w_{k+1}-w_k|$")
    figure.legend(*compared.get_legend_handles_labels(), loc="outside lower center", ncols=len(factors) + 1)
    return figure


# --- The clipped flow --------------------------------------------------------------------------------------


@styled
def clipping(table: Table) -> Figure:
    """The clipped flow: weight norms and Lipschitz constants against depth and time, and the bound C t.

    ``table`` has the columns of ``clipping.csv``.
    """
    figure, ((norm, constant), (growth, change)) = panels(2, 2, height=5)
    clips, depths = np.unique(table["clip"]), np.unique(table["depth"])
    last, deepest = max(table["iteration"]), depths[-1]
    for clip, color, marker in zip(clips, cycle((BLACK, *COLORS)), cycle(MARKERS), strict=False):
        end = select(table, clip=clip, iteration=last)
        label = "no clipping" if clip == 0 else f"$C={clip:g}$"
        norm.plot(end["depth"], end["norm_V"], marker + "-", color=color, label=label)
        constant.plot(end["depth"], end["lipschitz"], marker + "-", color=color)
        path = select(table, clip=clip, depth=deepest)
        later = path["time"] > 0
        growth.plot(path["time"][later], path["lipschitz"][later], color=color)
        change.plot(path["time"][later], path["change"][later], color=color)
        if clip > 0:
            bound = clip * path["time"][later]
            change.plot(path["time"][later], bound, "--", color=LIGHT, linewidth=4, zorder=0)
    time = table["time"][-1]
    norm.set_title(rf"$\max_{{k,\,t\leq {time:g}}}\,\|V_k(t)\|_F$")
    constant.set_title(rf"$L\,\max_{{k,\,t\leq {time:g}}}\,\|Z_{{k+1}}(t)-Z_k(t)\|_F$")
    growth.set_title(rf"$L\,\max_k\,\|Z_{{k+1}}-Z_k\|_F$ up to time $t$, $L={deepest}$")
    change.set_title(r"largest change of an entry (dashes: bound $C\,t$)")
    for panel in (norm, constant):
        depth_axis(panel, depths)
        panel.set_ylim(0)
    for panel in (growth, change):
        panel.set_xlabel("training time $t$")
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_ticks(panel.xaxis)
    figure.legend(loc="outside lower center", ncols=len(clips))
    return figure


# --- Claims ------------------------------------------------------------------------------------------------


@styled
def claims(table: Table, within: float) -> Figure:
    """The claims on rates: how far the fitted slopes in L are from the claimed ones, with 95 % intervals.

    ``table`` has the columns of ``claims.csv``; how many rows without a slope are left out is said. The band is
    +- ``within``.
    """
    keep = np.isfinite(np.asarray(table["slope"], dtype=float))
    rows = {name: np.asarray(column)[keep] for name, column in table.items()}
    figure, axes = panels(1, height=0.6 + 0.2 * keep.sum())
    places = np.arange(keep.sum())[::-1]
    # An interval by resampling may leave its slope out.
    reach = np.maximum([rows["slope"] - rows["low"], rows["high"] - rows["slope"]], 0)
    axes.axvspan(-within, within, color="#E8EEF4", zorder=0)
    axes.axvline(0, color=GREY, linewidth=1, zorder=1)
    axes.errorbar(
        rows["slope"] - rows["expected"], places, xerr=reach, fmt="o", color=COLORS[0], capsize=2, linewidth=1
    )
    labels = [f"{statement} ({where})" for statement, where in zip(rows["statement"], rows["where"], strict=True)]
    axes.set_yticks(places, labels, fontsize=7)
    for place, expected in zip(places, rows["expected"], strict=True):
        text = f"{expected:g}".replace("-", "−")
        axes.annotate(text, (1.04, place), xycoords=("axes fraction", "data"), va="center", ha="center", fontsize=7)
    axes.annotate("claimed", (1.04, len(places) - 0.2), xycoords=("axes fraction", "data"), ha="center", fontsize=7)
    axes.set_ylim(-0.7, len(places) - 0.3)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.25 * within), max(high, 1.25 * within))
    axes.set_xticks([-within, 0, within])
    others = len(keep) - keep.sum()
    axes.set_xlabel("measured − claimed, 95 % interval")
    if others:
        figure.supxlabel(
            f"The other {others} claims are no slopes in $L$: claims.md has them.", fontsize=7, x=0.02, ha="left"
        )
    return figure
