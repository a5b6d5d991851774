"""Appendix D: with ReLU, layers that start next to each other can end far apart.

The network has one dimension, depth 2L and no V; for one sample (x, C x), x > 0, C > 1,

    h_{k+1} = h_k + s(w_{k+1} h_k) / (2L),     h_0 = x,     w_k(0) = (-1)^k / (2L),     l = (h_{2L} - C x)^2,

trained by the flow dw_k/dt = -2L dl/dw_k. With s = ReLU odd layers are inactive and never move, and even layers all
go to w* with (1 + w* / (2L))^L = C, w* >= 2 log C.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib import activations, checks
from lib.digits import difference, square
from lib.experiments import Progress, silent
from lib.tables import from_rows


@dataclass(frozen=True)
class CounterexampleConfig:
    """The example at several ``half_depths`` L (2L layers) and target factors ``factors`` C, for ``activations``.

    Trained for ``iterations`` steps of 2L * ``learning_rate`` from the one input ``x``. ``slope_from``: the smallest
    depth 2L that slopes are fitted over.
    """

    half_depths: list[int]
    factors: list[float]
    activations: list[str]
    iterations: int
    learning_rate: float = 0.02
    x: float = 1.0
    slope_from: int = 16

    def __post_init__(self) -> None:
        checks.make_plain(self)
        checks.positive_ints("half_depths", self.half_depths)
        checks.positive_floats("factors", self.factors)
        for factor in self.factors:
            if factor <= 1:
                raise ValueError(f"an entry of factors is {factor}, expected C > 1, so that even layers must grow.")
        if not self.activations or len(set(self.activations)) < len(self.activations):
            raise ValueError(f"activations is {self.activations!r}, expected one name or more, without repeats.")
        for name in self.activations:
            activations.get(name)
        checks.positive_int("iterations", self.iterations)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.positive_float("x", self.x)
        checks.two_sizes(self.slope_from, [2 * half for half in self.half_depths])

    @property
    def shown(self) -> int:
        """The half depth whose layers are looked at one by one: 16, or the nearest to it."""
        return min(self.half_depths, key=lambda half: abs(math.log(half / 16)))


def limit_weight(half_depth: int, factor: float) -> float:
    """w* with (1 + w* / (2L))^L = C: what every even layer goes to with ReLU."""
    return 2 * half_depth * math.expm1(math.log(factor) / half_depth)


def train(half_depth: int, factors: Tensor, activation: str, iterations: int, learning_rate: float, x: float):
    """Weights (2L, c) before and after training, and the last loss (c,), for c factors C at once (float64)."""
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


def counterexample(
    config: CounterexampleConfig, progress: Progress = silent
) -> tuple[dict[str, list], dict[str, list]]:
    """Two tables: distances at the end, and the weights of one depth to look at.

    The first has columns activation, factor, half_depth, depth (= 2L), loss, ``start`` and ``end`` (the largest
    |w_{k+1} - w_k| before and after), ``even`` (the mean of the even layers), ``even_spread`` (their largest
    deviation from it), ``odd_moved`` (the largest change of an odd layer), ``limit_weight`` w*. The second has columns
    activation, factor, depth, layer, weight, for the largest factor and ``config.shown``.
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
                    "loss": square(float(loss[j])),
                    "start": difference(float(start[:, j].diff().abs().max())),
                    "end": difference(float(end[:, j].diff().abs().max())),
                    "even": float(even.mean()),
                    "even_spread": difference(float((even - even.mean()).abs().max())),
                    "odd_moved": float((odd - start[0::2, j]).abs().max()),
                    "limit_weight": limit_weight(half, factor),
                }
            )
        if half == config.shown:
            best = int(np.argmax(config.factors))
            for layer, weight in enumerate(end[:, best].tolist(), start=1):
                point = {"depth": 2 * half, "layer": layer, "weight": weight}
                shown.append({"activation": name, "factor": config.factors[best], **point})
    return from_rows(rows), from_rows(shown)
