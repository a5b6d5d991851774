"""Layers of a network of another depth, as linear combinations of the layers of a trained one.

Layer k of L, k = 0..L-1, stands for the cell [k/L, (k+1)/L) of s, whose middle is (k + 1/2)/L. Layer j of the n new
layers stands for [j/n, (j+1)/n). Each new layer is a combination of the L layers, with coefficients that sum to 1, by
one of three rules:

    kept            the layer whose cell holds the middle of cell j (on a border, the later layer)
    averaged        the mean over cell j, with each of the L layers constant on its cell
    interpolated    linear between the middles of the L cells, and constant beyond the first and the last middle
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from lib import checks

RULES = ("kept", "averaged", "interpolated")


def matrix(depth: int, layers: int, rule: str = "kept") -> Tensor:
    """The coefficients of the rule: (n, L) in float64, for L = ``depth`` and n = ``layers``.

    n need not divide L. If n > L, the layers are interpolated whatever the rule, with a warning if the rule is another.
    Raises TypeError or ValueError if ``layers`` is not a whole number of at least 1, or the rule is not in `RULES`.
    """
    checks.positive_int("layers", layers)
    checks.choice("the rule of resampling", rule, RULES)
    if layers > depth and rule != "interpolated":
        warnings.warn(
            f"layers is {layers} and the network has {depth}: the layers are interpolated, not {rule}.", stacklevel=4
        )
        rule = "interpolated"
    if rule == "averaged":
        # In units of 1/(n L), the borders of the cells are whole numbers.
        starts, theirs = np.arange(layers)[:, None] * depth, np.arange(depth)[None] * layers
        overlap = np.minimum(starts + depth, theirs + layers) - np.maximum(starts, theirs)
        return torch.from_numpy(overlap.clip(min=0) / depth)
    coefficients = torch.zeros(layers, depth, dtype=torch.float64)
    rows = torch.arange(layers)
    if rule == "kept":
        coefficients[rows, kept_indices(depth, layers)] = 1
        return coefficients
    place = ((rows.double() + 0.5) * depth / layers - 0.5).clamp(0, depth - 1)
    below = place.long().clamp(max=max(depth - 2, 0))
    share = place - below
    coefficients[rows, below] = 1 - share
    coefficients[rows, (below + 1).clamp(max=depth - 1)] += share
    return coefficients


def kept_indices(depth: int, layers: int) -> Tensor:
    """Which of the layers 0..L-1 are kept: (n,)."""
    return (2 * torch.arange(layers) + 1) * depth // (2 * layers)


def apply(coefficients: Tensor, stacked: Tensor) -> Tensor:
    """Apply the coefficients (n, L) to the layers ``stacked`` (L, ...): (n, ...), summed in float64, in their dtype."""
    return torch.tensordot(coefficients, stacked.detach().double(), dims=1).to(stacked.dtype)
