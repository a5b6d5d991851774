"""Rates of root mean squares over seeds, with intervals by resampling the seeds."""

from dataclasses import dataclass

import numpy as np

from lib.measures import LEVEL, Slope, fit_slope
from lib.tables import Table, select

RESAMPLES = 1000  # of the seeds, for an interval


def _squared(table: Table, quantity: str, **chosen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The squared distances (k, seeds) of the chosen networks, by the k sizes: depths (k,), widths (k,)."""
    rows = select(table, **chosen)
    sizes = list(dict.fromkeys(zip(rows["width"].tolist(), rows["depth"].tolist(), strict=True)))
    found = [select(rows, width=width, depth=depth)[quantity] for width, depth in sizes]
    widths, depths = np.array(sizes).T
    return depths, widths, np.square(found)


def _resampled(squares: np.ndarray) -> np.ndarray:
    """Root mean squares over draws with replacement among the seeds: (`RESAMPLES`, k)."""
    seeds = squares.shape[1]
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    return np.sqrt(squares[:, drawn].mean(axis=2)).T


def _interval(values: np.ndarray) -> np.ndarray:
    """The bounds of the 95 % interval of the values along the first axis: (2, ...)."""
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def root_mean_squares(table: Table, quantity: str, **chosen) -> dict[str, np.ndarray]:
    """Of the distances of the chosen networks, over the seeds: columns depth, width, value, low, high (95 % intervals,
    by resampling the seeds)."""
    depths, widths, squares = _squared(table, quantity, **chosen)
    low, high = _interval(_resampled(squares))
    value = np.sqrt(squares.mean(axis=1))
    return {"depth": depths, "width": widths, "value": value, "low": low, "high": high}


def slope_in_depth(table: Table, quantity: str, at_least: int, **chosen) -> Slope:
    """The rate in L of the root mean square over the seeds, over depths of ``at_least``, for networks of one width; its
    95 % interval by resampling the seeds."""
    depths, _, squares = _squared(table, quantity, **chosen)
    fit = fit_slope(depths, np.sqrt(squares.mean(axis=1)), at_least)
    keep = depths >= at_least
    centred = np.log(depths[keep]) - np.log(depths[keep]).mean()
    low, high = _interval(np.log(_resampled(squares)[:, keep]) @ centred / (centred @ centred))
    return Slope(fit.slope, float(low), float(high), fit.constant)


@dataclass(frozen=True)
class TwoTerms:
    """The distance as sqrt((a/L)^2 + b^2/(L m)): ``a``, ``b``, 95 % intervals of both by resampling the seeds, and
    ``residual``, the root mean square of the relative deviation over the sizes."""

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    residual: float

    @property
    def crossover(self) -> float:
        """L/m at which the two terms are equal: a^2/b^2."""
        return (self.a / self.b) ** 2

    def value(self, depth, width):
        """The fitted distance."""
        return _two_terms(self.a, self.b, depth, width)


def _two_terms(a, b, depth, width):
    return np.sqrt((a / depth) ** 2 + b**2 / (depth * width))


def two_terms(table: Table, quantity: str, **chosen) -> TwoTerms:
    """Fit both terms to the root mean square over the seeds of all sizes, by non-negative least squares in the relative
    deviation of the squares."""
    from scipy.optimize import nnls

    depths, widths, squares = _squared(table, quantity, **chosen)
    terms = np.stack([1.0 / depths**2, 1.0 / (depths * widths)], axis=1)

    def fit(values: np.ndarray) -> np.ndarray:
        return np.sqrt(nnls(terms / values[:, None] ** 2, np.ones(len(values)))[0])

    values = np.sqrt(squares.mean(axis=1))
    a, b = fit(values)
    low, high = _interval(np.array([fit(drawn) for drawn in _resampled(squares)])).tolist()
    deviation = _two_terms(a, b, depths, widths) / values - 1
    residual = float(np.sqrt(np.square(deviation).mean()))
    return TwoTerms(float(a), float(b), *zip(low, high, strict=True), residual)
