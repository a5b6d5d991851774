"""Gaussian processes on [0, 1] for the smooth initialisation of section 4.3. A seed determines the functions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib import checks


class GaussianProcess:
    """Independent centred Gaussian processes f_ij(s) with covariance exp(-(s - s')^2 / (2 ell^2)).

    The covariance matrix of many points is singular to machine precision, so the Fourier coefficients of the functions
    are drawn instead. On a circle of circumference P = 1 + 8 ell the covariance is

        sum_k c_k exp(2 pi i k (s - s') / P),     c_k = sqrt(2 pi) ell / P * exp(-2 (pi k ell / P)^2),

    up to exp(-32) from the other way around the circle, and with standard Gaussian a_k, b_k

        f(s) = sqrt(c_0) a_0 + sum_{k >= 1} sqrt(2 c_k) (a_k cos(2 pi k s / P) + b_k sin(2 pi k s / P)).

    A few dozen frequencies suffice, and every depth evaluates the same f.

    Arguments: ``shape`` of f(s); ``length_scale`` ell; ``randn``, which draws standard Gaussians of a given shape.
    """

    def __init__(self, shape: tuple[int, ...], length_scale: float, randn: Callable[..., Tensor]) -> None:
        checks.positive_float("length_scale", length_scale)
        period = 1 + 8 * length_scale
        # c_k / c_0 falls below 1e-17 at pi k ell / P = sqrt(20).
        count = 1 + math.ceil(math.sqrt(20) * period / (math.pi * length_scale))
        k = torch.arange(count, dtype=torch.float64)
        variance = math.sqrt(2 * math.pi) * length_scale / period
        variance = variance * torch.exp(-2 * (math.pi * k * length_scale / period) ** 2)
        amplitude = torch.sqrt(variance * torch.where(k > 0, 2.0, 1.0))
        self._frequency = 2 * math.pi * k / period
        coefficients = randn(count, 2, *shape).double()  # frequency by frequency, cosine then sine
        self._coefficients = coefficients * amplitude.reshape(-1, *[1] * (len(shape) + 1))

    def __call__(self, s: Tensor) -> Tensor:
        """The functions at the points s: (k,) -> (k, *shape), in float64."""
        angle = s.double()[:, None] * self._frequency
        features = torch.stack([angle.cos(), angle.sin()], dim=2)
        return torch.tensordot(features, self._coefficients, dims=2)
