"""Rates in the depth over several seeds, with intervals over the seeds and of the fit."""

import math
from dataclasses import dataclass

import numpy as np

from lib.measures import LEVEL, Slope, fit_slope, mean_interval
from lib.tables import Table, select

RESAMPLES = 1000  # of the seeds, for an interval


@dataclass(frozen=True)
class SlopeOverSeeds(Slope):
    """A rate over ``seeds`` draws: ``low`` and ``high`` bound the 95 % interval over the seeds, ``fit_low`` and
    ``fit_high`` that of the fit of their mean, which says how straight the line is."""

    fit_low: float
    fit_high: float
    seeds: int

    def __str__(self) -> str:
        return f"{super().__str__()}, fit [{self.fit_low:.3f}, {self.fit_high:.3f}]"


def mean_slope(table: Table, column: str, at_least: float = 0.0) -> SlopeOverSeeds:
    """The mean over the seeds of the slopes in L of a column, fitted over the depths of ``at_least`` that all have.

    ``table`` has columns seed and depth, a row for each pair. The mean of the slopes is the slope of the geometric
    mean, as each is linear in log y; the interval of that fit stands beside Student's over the seeds, which is nan with
    one seed. Everything is nan if a number is missing (nan), or if there are no two depths at which all seeds are
    positive.
    """
    runs = [select(table, seed=seed) for seed in np.unique(table["seed"])]
    values = [dict(zip(run["depth"].tolist(), run[column].tolist(), strict=True)) for run in runs]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    shared = [depth for depth in shared if depth >= at_least]
    missing = any(math.isnan(each[depth]) for each in values for depth in shared)
    depths = [depth for depth in shared if all(each[depth] > 0 for each in values)]
    if missing or len(depths) < 2:
        return SlopeOverSeeds(*[math.nan] * 6, seeds=len(runs))
    fits = [fit_slope(depths, [each[depth] for depth in depths]).slope for each in values]
    mean = fit_slope(depths, np.exp(np.mean([[math.log(each[depth]) for depth in depths] for each in values], axis=0)))
    return SlopeOverSeeds(mean.slope, *mean_interval(fits), mean.constant, mean.low, mean.high, len(runs))


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


def slope_in_depth(table: Table, quantity: str, at_least: int, **chosen) -> SlopeOverSeeds:
    """The rate in L of the root mean square over the seeds, over depths of ``at_least``, for networks of one width; its
    95 % interval by resampling the seeds. Everything is nan if a number is missing."""
    depths, _, squares = _squared(table, quantity, **chosen)
    if not np.isfinite(squares).all():
        return SlopeOverSeeds(*[math.nan] * 6, seeds=squares.shape[1])
    fit = fit_slope(depths, np.sqrt(squares.mean(axis=1)), at_least)
    keep = depths >= at_least
    centred = np.log(depths[keep]) - np.log(depths[keep]).mean()
    low, high = _interval(np.log(_resampled(squares)[:, keep]) @ centred / (centred @ centred))
    interval = float(low), float(high)
    return SlopeOverSeeds(fit.slope, *interval, fit.constant, fit.low, fit.high, squares.shape[1])


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
    deviation of the squares. Everything is nan if a number is missing."""
    from scipy.optimize import nnls

    depths, widths, squares = _squared(table, quantity, **chosen)
    if not np.isfinite(squares).all():
        return TwoTerms(math.nan, math.nan, (math.nan,) * 2, (math.nan,) * 2, math.nan)
    terms = np.stack([1.0 / depths**2, 1.0 / (depths * widths)], axis=1)

    def fit(values: np.ndarray) -> np.ndarray:
        return np.sqrt(nnls(terms / values[:, None] ** 2, np.ones(len(values)))[0])

    values = np.sqrt(squares.mean(axis=1))
    a, b = fit(values)
    low, high = _interval(np.array([fit(drawn) for drawn in _resampled(squares)])).tolist()
    deviation = _two_terms(a, b, depths, widths) / values - 1
    residual = float(np.sqrt(np.square(deviation).mean()))
    return TwoTerms(float(a), float(b), *zip(low, high, strict=True), residual)
