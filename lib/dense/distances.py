"""Distances between successive layers of a network, and between networks as functions of depth."""

import math

import torch
from torch import Tensor

from lib import checks
from lib.dense import conventions
from lib.dense.network import Weights
from lib.measures import integral_distance


def successive_squares(weights: Weights) -> tuple[Tensor, Tensor]:
    """|V_{k+1} - V_k|_F^2 and |W_{k+1} - W_k|_F^2 for k = 1..L-1: two tensors (L-1,)."""
    return tuple(torch.diff(Z, dim=0).square().sum(dim=(1, 2)) for Z in (weights.V, weights.W))


def largest_successive_distance(weights: Weights) -> float:
    """max over k of |Z_{k+1} - Z_k|_F, Z = (V, W)."""
    return math.sqrt(float(sum(successive_squares(weights)).max()))


class SuccessiveDistance:
    """Running maximum and aggregate of successive distances over the states of a training.

    The paper's quantity (Prop. 3, Figure 1 left) is the maximum over layers k and times t of

        |Z_{k+1}(t) - Z_k(t)|_F,      Z_k = (V_k, W_k),  |Z|_F^2 = |V|_F^2 + |W|_F^2.

    The released code's is, for V and W each, the square root of the sum over all t, k and entries of the squared
    differences. The maximum falls as 1/L, the aggregate (L terms of size 1/L^2) as L^(-1/2).
    """

    def __init__(self) -> None:
        self._max = self._max_V = self._max_W = self._sum_V = self._sum_W = 0.0

    def update(self, weights: Weights) -> None:
        """Include one more state."""
        if len(weights.V) < 2:
            return
        V, W = successive_squares(weights)
        self._max = max(self._max, float((V + W).max()))
        self._max_V, self._max_W = max(self._max_V, float(V.max())), max(self._max_W, float(W.max()))
        self._sum_V, self._sum_W = self._sum_V + float(V.sum()), self._sum_W + float(W.sum())

    def values(self) -> dict[str, float]:
        """The distances so far, by their column names in ``figure_1_left.csv``."""
        squares = {
            "max_distance": self._max,
            "max_distance_V": self._max_V,
            "max_distance_W": self._max_W,
            "aggregate_V": self._sum_V,
            "aggregate_W": self._sum_W,
        }
        return {name: math.sqrt(square) for name, square in squares.items()}


def left_end_distance(f: Tensor, g: Tensor) -> float:
    """( mean over the L cells of |f_k - g(left end of cell k)|_F^2 )^(1/2), the released code's sampling.

    ``f``: (L, ...) and ``g``: (R, ...), both constant on their cells.
    """
    L, R = len(f), len(g)
    cells = torch.arange(L, device=f.device) * R // L
    return math.sqrt(float((f - g[cells]).square_().sum()) / L)


def distance(f: Tensor, g: Tensor, rule: str = "integral") -> float:
    """Distance between two networks' weights as functions of s, by a rule of `conventions.SAMPLING_RULES`."""
    checks.choice("sampling", rule, conventions.SAMPLING_RULES)
    return integral_distance(f, g) if rule == "integral" else left_end_distance(f, g)
