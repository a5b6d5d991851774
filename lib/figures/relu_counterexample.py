"""Appendix D: with ReLU, layers that start close to each other can end far apart.

The network has dimension one, depth 2L and no V. For one sample (x, C x) with x > 0 and C > 1,

    h_{k+1} = h_k + s(w_{k+1} h_k) / (2L),     h_0 = x,     w_k(0) = (-1)^k / (2L),     l = (h_{2L} - C x)^2,

trained by the flow dw_k/dt = -2L dl/dw_k. With s = ReLU, odd layers are inactive and never move. All even layers
converge to w* with (1 + w* / (2L))^L = C, so that w* >= 2 log C.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib import activations, checks
from lib.digits import round_difference, round_square
from lib.figures.claim import (
    Claim,
    Read,
    combine_margins,
    factor_above,
    factor_below,
    fit_in_depth,
    judge_margin,
    judge_rates,
    require_rows,
)
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, COLORS, GUIDE, MARKERS, make_panels, set_depth_axis, styled
from lib.tables import from_rows, select, word

NEAR = 1e-6  # the largest distance from w* that counts as convergence


@dataclass(frozen=True)
class Config:
    """The example for several ``half_depths`` L (2L layers), target factors ``factors`` C, and ``activations``.

    It is trained for ``iterations`` steps of 2L * ``learning_rate`` on one input ``x``. Slopes are fitted over the
    depths 2L from ``slope_from`` on.
    """

    half_depths: list[int]
    factors: list[float]
    activations: list[str]
    iterations: int
    learning_rate: float = 0.02
    x: float = 1.0
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.check_fields(self, "half_depths", "factors", "iterations", "learning_rate", "x")
        for factor in self.factors:
            if factor <= 1:
                raise ValueError(f"an entry of factors is {factor}, expected C > 1, so that even layers must grow.")
        checks.distinct_texts("activations", self.activations)
        for name in self.activations:
            activations.get(name)
        checks.slope_range(self.slope_from, [2 * half for half in self.half_depths])

    @property
    def shown(self) -> int:
        """The half depth whose layers are drawn one by one: 16, or the nearest to it."""
        return min(self.half_depths, key=lambda half: abs(math.log(half / 16)))


def limit_weight(half_depth: int, factor: float) -> float:
    """w* with (1 + w* / (2L))^L = C, the limit of every even layer with ReLU."""
    return 2 * half_depth * math.expm1(math.log(factor) / half_depth)


def train(half_depth: int, factors: Tensor, activation: str, iterations: int, learning_rate: float, x: float):
    """Train for c factors C at once, in float64. Returns the weights (2L, c) before and after training, and the last
    loss (c,)."""
    s, depth = activations.get(activation), 2 * half_depth
    sign = 1 - 2 * (torch.arange(1, depth + 1) % 2)  # (-1)^k, k = 1..2L
    start = (sign.double() / depth)[:, None].repeat(1, len(factors))
    w, target = start.clone(), factors * x
    h = torch.empty(depth + 1, len(factors), dtype=torch.float64)
    h[0] = x
    states, layers = h.unbind(), w.unbind()
    for _ in range(iterations):
        for before, after, weight in zip(states, states[1:], layers, strict=False):
            torch.add(before, s.function(weight * before), alpha=1 / depth, out=after)
        slope = s.derivative(w * h[:-1]) / depth
        # dh_{2L}/dh_{k+1}: the product of the later layers' 1 + s'(w h) w / (2L).
        factor = torch.cat([1 + (slope * w)[1:], torch.ones_like(w[:1])])
        later = factor.flip(0).cumprod(0).flip(0)
        w -= learning_rate * depth * 2 * (h[-1] - target) * later * slope * h[:-1]
    for before, after, weight in zip(states, states[1:], layers, strict=False):
        torch.add(before, s.function(weight * before), alpha=1 / depth, out=after)
    return start, w, (h[-1] - target).square()


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables: distances after training, and the weights of one depth.

    The first has columns activation, factor, half_depth, depth (= 2L), loss, ``start`` and ``end`` (the largest
    |w_{k+1} - w_k| before and after training), ``even`` (the mean of the even layers), ``even_spread`` (their largest
    deviation from the mean), ``odd_moved`` (the largest change of an odd layer), ``limit_weight`` w*. The second has
    columns activation, factor, depth, layer, weight, for the largest factor and the half depth ``config.shown``.
    """
    rows, shown = [], []
    factors = torch.tensor(config.factors, dtype=torch.float64)
    runs = [(name, half) for name in config.activations for half in config.half_depths]
    for name, half in progress(runs, len(runs)):
        start, end, loss = train(half, factors, name, config.iterations, config.learning_rate, config.x)
        for j, factor in enumerate(config.factors):
            odd, even = end[0::2, j], end[1::2, j]
            rows.append(
                {
                    "activation": name,
                    "factor": factor,
                    "half_depth": half,
                    "depth": 2 * half,
                    "loss": round_square(float(loss[j])),
                    "start": round_difference(float(start[:, j].diff().abs().max())),
                    "end": round_difference(float(end[:, j].diff().abs().max())),
                    "even": float(even.mean()),
                    "even_spread": round_difference(float((even - even.mean()).abs().max())),
                    "odd_moved": float((odd - start[0::2, j]).abs().max()),
                    "limit_weight": limit_weight(half, factor),
                }
            )
        if half == config.shown:
            best = int(np.argmax(config.factors))
            for layer, weight in enumerate(end[:, best].tolist(), start=1):
                point = {"depth": 2 * half, "layer": layer, "weight": weight}
                shown.append({"activation": name, "factor": config.factors[best], **point})
    return {"relu_counterexample": from_rows(rows), "relu_counterexample_weights": from_rows(shown)}


@styled
def draw(data: Data, config: Config) -> Figure:
    """The weights across the layers, in a panel for each activation, and the largest successive distance against
    depth."""
    table, weights = data["relu_counterexample"], data["relu_counterexample_weights"]
    names, factors = list(dict.fromkeys(table["activation"])), np.unique(table["factor"])
    figure, axes = make_panels(len(names) + 1, height=2.9, width_ratios=[1] * len(names) + [1.15])
    *across, compared = axes
    for panel, name in zip(across, names, strict=True):
        rows = select(weights, activation=name)
        panel.plot(rows["layer"], rows["weight"], "o-", markersize=3.5, linewidth=0.4, color=COLORS[2])
        panel.set(xlabel="layer $k$", title=f"{word(name)}: $w_k$, $C={rows['factor'][0]:g}$, after training")
        if name == "relu":
            star = select(table, activation=name, depth=rows["depth"][0], factor=rows["factor"][0])["limit_weight"][0]
            panel.axhline(star, linestyle="--", **GUIDE)
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
                # Odd layers stay at -1/(2L), even ones converge to w*.
                expected = rows["limit_weight"] + 1 / rows["depth"]
                compared.plot(rows["depth"], expected, "x", color=BLACK, markersize=6, zorder=3)
    compared.plot([], [], "x", color=BLACK, markersize=6, label="$w^*+1/(2L)$")
    set_depth_axis(compared, table["depth"])
    compared.set(xlabel="depth $2L$", yscale="log", title=r"$\max_k\,|w_{k+1}-w_k|$")
    figure.legend(*compared.get_legend_handles_labels(), loc="outside lower center", ncols=len(factors) + 1)
    return figure


def judge_claims(read: Read) -> Iterator[Claim]:
    table = read("relu_counterexample")
    relu = select(table, activation="relu")
    moved, away = np.abs(relu["odd_moved"]), np.abs(relu["even"] - relu["limit_weight"]) + relu["even_spread"]
    shares = relu["even"] / np.log(relu["factor"])
    margin = combine_margins(
        # Odd layers must not move at all.
        *(math.inf if distance == 0 else -distance for distance in moved),
        *(factor_below(distance, NEAR) for distance in away),
        *(factor_above(share, 2) for share in shares),
        require_rows(table, "activation", "factor", "depth"),
    )
    yield judge_margin(
        "ReLU: odd layers never move, all even layers go to one w* >= 2 log C",
        "App. D",
        "relu_counterexample",
        margin,
        f"odd layers moved by {np.max(moved):.0e}, even layers are at most {np.max(away):.0e} from w* and at least "
        f"{np.min(shares):.3f} log C",
        f"not at all, within {NEAR:.0e}, at least 2 log C",
    )
    ours = "App. D; GELU ours"
    for name, expected, bound, where, statement in (
        ("relu", 0.0, -1, "App. D", "ReLU: max_k |w_(k+1) - w_k| at the end stays Omega(1)"),
        ("gelu", -1.0, 1, ours, "GELU: on the same example max_k |w_(k+1) - w_k| at the end is O(1/L)"),
    ):
        rows = select(table, activation=name)
        fits = [fit_in_depth(select(rows, factor=factor), "end") for factor in np.unique(rows["factor"])]
        what = f"largest slope in L over {len(fits)} C" if bound > 0 else f"smallest slope in L over {len(fits)} C"
        yield judge_rates(statement, where, "relu_counterexample", fits, expected, what, bound)
