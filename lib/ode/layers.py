"""Networks of another depth out of the layers of a trained one: linear maps over the depth.

Layer k of L, k = 0..L-1, stands for the cell [k/L, (k+1)/L) of s, with the middle (k + 1/2)/L; layer j of the n layers
that are asked for stands for [j/n, (j+1)/n). Each of the n layers is a combination of the L with coefficients that sum
to 1, by one of three rules:

    kept            the layer whose cell holds the middle of j's (of two that meet there, the later one)
    averaged        the mean over j's cell, each of the L layers constant on its own
    interpolated    the straight line between the two middles beside that of j's, constant beyond the outermost
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from lib import checks

RULES = ("kept", "averaged", "interpolated")


def matrix(depth: int, layers: int, rule: str = "kept") -> Tensor:
    """The coefficients of the rule: (n, L) in float64, for L = ``depth`` and n = ``layers``.

    n need not divide L. More layers than there are (n > L) are always interpolated; another rule then warns, in a
    sentence. Raises TypeError or ValueError, one sentence, if ``layers`` is no whole number of at least 1 or the
    rule none of `RULES`.
    """
    checks.positive_int("layers", layers)
    checks.choice("the rule of resampling", rule, RULES)
    if layers > depth and rule != "interpolated":
        warnings.warn(
            f"{layers} layers are asked of a network of {depth}: they are interpolated, not {rule}.", stacklevel=2
        )
        rule = "interpolated"
    if rule == "averaged":
        # Cells in units of 1/(n L): exact whole numbers.
        starts, theirs = np.arange(layers)[:, None] * depth, np.arange(depth)[None] * layers
        overlap = np.minimum(starts + depth, theirs + layers) - np.maximum(starts, theirs)
        return torch.from_numpy(overlap.clip(min=0) / depth)
    coefficients = torch.zeros(layers, depth, dtype=torch.float64)
    rows = torch.arange(layers)
    if rule == "kept":
        coefficients[rows, kept(depth, layers)] = 1
        return coefficients
    place = ((rows.double() + 0.5) * depth / layers - 0.5).clamp(0, depth - 1)
    below = place.long().clamp(max=max(depth - 2, 0))
    share = place - below
    coefficients[rows, below] = 1 - share
    coefficients[rows, (below + 1).clamp(max=depth - 1)] += share
    return coefficients


def kept(depth: int, layers: int) -> Tensor:
    """Which of the layers 0..L-1 are kept: (n,)."""
    return (2 * torch.arange(layers) + 1) * depth // (2 * layers)


def apply(coefficients: Tensor, stacked: Tensor) -> Tensor:
    """The combinations (n, L) of the layers ``stacked`` (L, ...): (n, ...), summed in float64, in their own dtype."""
    return torch.tensordot(coefficients, stacked.detach().double(), dims=1).to(stacked.dtype)
