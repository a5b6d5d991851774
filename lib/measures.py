"""Measures of the smoothness of weights along the depth."""

import math

import numpy as np
import torch
from torch import Tensor

from lib import checks

# Take a smooth curve plus independent noise in each layer, with a share p of the variance across layers. Its von
# Neumann ratio is about 2 p. If the ratio is below 0.1, at least 95 % of the variance along the depth is smooth in this
# model. A random walk over the layers has 6/L, which is 0.023 for 256 layers; a ratio well below that is the sign of a
# curve.
SMOOTH_BELOW = 0.1


def von_neumann_ratio(weights: Tensor) -> float:
    """Smoothness along the depth as a number, without units.

    For ``weights`` (L, ...) it is the mean squared successive difference of every entry, summed over entries, divided
    by the sum of their variances across layers (unbiased). It is about 2 for independent layers. If layers sample a
    Lipschitz curve, it tends to 0 as 1/L^2. It is nan if the weights do not vary with depth, or if L < 2.

    Source: von Neumann, "Distribution of the ratio of the mean square successive difference to the
    variance", 1941.
    """
    weights = checks.as_tensor("weights", weights)
    if not weights.ndim or weights.is_complex():
        raise TypeError(
            f"weights is {weights.dtype} of the shape {tuple(weights.shape)}, expected real numbers (L, ...), "
            "one layer a row."
        )
    flat = (weights.flatten(1) if weights.ndim > 1 else weights[:, None]).detach().double()  # a part may have no layers
    variances = _variances(flat)
    if variances is None:
        return math.nan
    return float(torch.diff(flat, dim=0).square().mean(dim=0).sum()) / float(variances.sum())


def _variances(flat: Tensor) -> Tensor | None:
    # The variance of every entry across layers; None if the weights do not vary with depth.
    if len(flat) < 2:
        return None
    variances = flat.var(dim=0)
    # With identical layers, the rounding of the mean leaves a variance relative to the entries' size.
    return None if float(variances.sum()) <= 1e-28 * float(flat.square().sum()) else variances


PARTS = 8  # of the layers, for smoothness along the depth
NOISE_ORDER = 6  # of the differences from which a share of noise is computed


def ratios_along_depth(weights: Tensor, parts: int = PARTS) -> list[float]:
    """The von Neumann ratio in each of ``parts`` equal parts of the layers, from the input to the output.

    Compare it with `straight_line_ratio`: smooth curves over few layers are near that ratio.
    """
    return [von_neumann_ratio(part) for part in weights.tensor_split(parts)]


def smooth_share(weights: Tensor, parts: int = PARTS) -> float:
    """The share of the depth whose layers are smooth: the share of ``parts`` equal parts of ``weights`` (L, ...) whose
    von Neumann ratio is below `SMOOTH_BELOW`. nan if a part does not vary with depth, or is so short that a straight
    line would not count as smooth (fewer than 11 layers)."""
    ratios = np.array(ratios_along_depth(weights, parts))
    long_enough = straight_line_ratio(len(weights) // parts) < SMOOTH_BELOW
    return float((ratios < SMOOTH_BELOW).mean()) if long_enough and np.isfinite(ratios).all() else math.nan


def straight_line_ratio(layers: int) -> float:
    """The von Neumann ratio of n = ``layers`` points on a straight line: 12/(n(n+1)), nan below two points."""
    return 12 / (layers * (layers + 1)) if layers > 1 else math.nan


def von_neumann_ratios(weights: Tensor) -> Tensor:
    """`von_neumann_ratio` of each single entry: (L, ...) -> (...), nan if an entry does not vary with depth."""
    weights = weights.double()
    if len(weights) < 2:
        return torch.full(weights.shape[1:], math.nan, dtype=torch.float64)
    variance = weights.var(dim=0)
    ratio = torch.diff(weights, dim=0).square().mean(dim=0) / variance
    return torch.where(variance > 1e-28 * weights.square().sum(dim=0), ratio, math.nan)


ROUGH = 0.75  # half the local roughness of independent layers


def local_roughness(distance, second_difference, parts: int = 0) -> np.ndarray:
    """The roughness of layers Z_1, ..., Z_L at layer k = 2..L-1,

        |Z_{k+1} - 2 Z_k + Z_{k-1}|^2 / (|Z_{k+1} - Z_k|^2 + |Z_k - Z_{k-1}|^2).

    With the steps a to layer k and b from it, this is 1 - 2 <a, b> / (|a|^2 + |b|^2), between 0 and 2. It is 0 on a
    straight line, O(1/L^2) on a smooth curve, 1 if successive steps are uncorrelated, as in a random walk, 3/2 on
    average for independent layers, and 2 if each step reverses the one before.

    ``distance`` is |Z_{k+1} - Z_k|, of shape (..., L-1); ``second_difference`` has shape (..., L-2). Returns (...,
    L-2), or with ``parts`` P > 0 the means over equal parts of the layers, (..., P). They are nan if three layers are
    equal, and for parts without layers."""
    above = np.square(np.asarray(second_difference, dtype=float))
    steps = np.square(np.asarray(distance, dtype=float))
    below = steps[..., 1:] + steps[..., :-1]
    found = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    if not parts:
        return found
    split = np.array_split(found, parts, axis=-1)
    return np.stack([part.mean(axis=-1) if part.shape[-1] else found.sum(axis=-1) * np.nan for part in split], axis=-1)


def layer_noise(weights: Tensor, order: int = 8) -> float:
    """Standard deviation of the noise that is independent from layer to layer, apart from a smooth curve.

    It is the root of the mean over layers and entries of (Delta^n Z)^2 / binom(2n, n). Z is ``weights`` (L, ...), Delta
    the difference of successive layers, and n the ``order``. Independent noise of standard deviation sigma gives sigma;
    a smooth curve gives O(L^-n). Rounding is such noise, and is seen however small it is.

    Raises ValueError if L <= n.
    """
    flat = weights.flatten(1).double()
    if len(flat) <= order:
        raise ValueError(f"Noise by differences of order {order} needs more than {order} layers, found {len(flat)}.")
    differences = torch.diff(flat, n=order, dim=0)
    return math.sqrt(float(differences.square().mean()) / math.comb(2 * order, order))


def noise_share(weights: Tensor) -> float:
    """The share of the variance across layers that is noise from layer to layer: `layer_noise` squared, divided by the
    mean variance (unbiased) of the entries of ``weights`` (L, ...).

    It is 1 for independent layers, and near 0 for a curve that the layers resolve, however steep: a curve that
    oscillates within a dozen layers has a large von Neumann ratio and no noise. A single layer that differs from its
    neighbours counts as noise. nan if L <= `NOISE_ORDER`, or if the weights do not vary with depth.
    """
    return noise_along_depth(weights, 1)[0]


def noise_along_depth(weights: Tensor, parts: int = PARTS) -> list[float]:
    """The `noise_share` of each of ``parts`` equal parts of the layers, from the input to the output, relative to the
    variance across all layers. nan if a part has at most `NOISE_ORDER` layers, or the weights do not vary with
    depth."""
    variances = _variances(weights.flatten(1).double())
    if variances is None:
        return [math.nan] * parts
    variance = float(variances.mean())
    return [
        layer_noise(part, NOISE_ORDER) ** 2 / variance if len(part) > NOISE_ORDER else math.nan
        for part in weights.tensor_split(parts)
    ]


def integral_distance(f: Tensor, g: Tensor) -> float:
    """( int_0^1 |f(s) - g(s)|_F^2 ds )^(1/2) of two piecewise constant functions of depth.

    ``f`` (L, ...) holds the values on the cells [(k-1)/L, k/L), ``g`` (R, ...) those on R cells. The integral is exact
    for every L and R.
    """
    L, R = len(f), len(g)
    if R % L == 0:
        # Each cell of f holds R/L cells of g.
        difference = g.reshape(L, R // L, -1) - f.reshape(L, 1, -1)
        return math.sqrt(float(difference.square_().sum()) / R)
    # On the common refinement, in exact integer arithmetic: breakpoints in units of 1/(L R).
    breaks = np.union1d(np.arange(L + 1) * R, np.arange(R + 1) * L)
    left, width = breaks[:-1], np.diff(breaks)
    difference = (f[left // R] - g[left // L]).flatten(1)
    weights = torch.as_tensor(width / (L * R), dtype=f.dtype, device=f.device)
    return math.sqrt(float(weights @ difference.square_().sum(dim=1)))
