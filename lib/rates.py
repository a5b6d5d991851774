"""Rates in the depth, with intervals of the fit and intervals over the seeds."""

import math
from dataclasses import dataclass

import numpy as np

from lib import checks
from lib.tables import Table, group, select

LEVEL = 0.95  # of the confidence intervals
RESAMPLES = 1000  # of the seeds, for an interval


@dataclass(frozen=True)
class Slope:
    """A rate: y ~ C x^slope, fitted by least squares in log-log. ``low`` and ``high`` are the bounds of the slope's 95
    % confidence interval (Student's t; nan with two points), and ``constant`` is C."""

    slope: float
    low: float
    high: float
    constant: float

    def __str__(self) -> str:
        return f"{self.slope:.3f} [{self.low:.3f}, {self.high:.3f}]"


NO_SLOPE = Slope(*[math.nan] * 4)  # of numbers that are missing or too few


def mean_interval(values) -> tuple[float, float]:
    """The 95 % interval of the mean of independent draws (Student's t; nan for a single draw)."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def fit_slope(x, y, at_least: float = 0.0) -> Slope:
    """Fit y ~ C x^slope over the points with x >= ``at_least``, x > 0 and y > 0 (which leaves out NaN).

    ``x`` and ``y``: (n,) each, all that `lib.checks.as_tensor` takes. Raises ValueError if fewer than two points
    remain, if all have the same x, or if one is infinite.
    """
    from scipy import stats  # half a second to import

    x, y = (np.ravel(checks.as_tensor(*each).detach().cpu().double().numpy()) for each in (("x", x), ("y", y)))
    if len(x) != len(y):
        raise ValueError(f"A slope needs as many y as x, found {len(x)} x and {len(y)} y.")
    if np.isinf(x).any() or np.isinf(y).any():
        raise ValueError(f"A slope needs finite numbers, found {np.isinf(x).sum() + np.isinf(y).sum()} infinite ones.")
    keep = (x >= at_least) & (x > 0) & (y > 0)
    if keep.sum() > 1 and np.ptp(x[keep]) == 0:
        raise ValueError(f"A slope needs two different x, found {x[keep][0]:g} alone: add depths.")
    if keep.sum() < 2:
        cure = "add depths, or lower the depth that the fit starts from"
        if (y[x >= at_least] == 0).any():  # the first step leaves layers equal
            cure = "y is 0 if layers are equal, so train for more steps"
        raise ValueError(f"A slope needs two points with x >= {at_least:g} and y > 0, found {int(keep.sum())}: {cure}.")
    fit = stats.linregress(np.log(x[keep]), np.log(y[keep]))
    freedom = int(keep.sum()) - 2
    # scipy gives no error for constants; it is zero.
    error = 0.0 if np.ptp(y[keep]) == 0 else fit.stderr
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * error) if freedom else math.nan
    slope = float(fit.slope)
    return Slope(slope, slope - half, slope + half, float(np.exp(fit.intercept)))


@dataclass(frozen=True)
class SlopeOverSeeds(Slope):
    """A rate over ``seeds`` draws. ``low`` and ``high`` bound the 95 % interval over the seeds. ``fit_low`` and
    ``fit_high`` bound the interval of the fit of the mean, which shows how straight the line is."""

    fit_low: float
    fit_high: float
    seeds: int

    def __str__(self) -> str:
        return f"{super().__str__()}, fit [{self.fit_low:.3f}, {self.fit_high:.3f}]"


def no_slope(seeds: int) -> SlopeOverSeeds:
    """The rate over ``seeds`` draws of numbers of which some are missing or zero: everything is nan."""
    return SlopeOverSeeds(*[math.nan] * 6, seeds=seeds)


def fit_mean_slope(table: Table, column: str, at_least: float = 0.0) -> SlopeOverSeeds:
    """The mean over the seeds of a column's slopes in L, fitted over the depths >= ``at_least`` that all seeds have.

    ``table`` has columns seed and depth, and one row for each pair. A slope is linear in log y, so the mean of the
    slopes is the slope of the geometric mean. The interval over the seeds is Student's (nan with one seed). Everything
    is nan if a number is missing (nan), or if all seeds are positive at fewer than two depths.
    """
    runs = [select(table, seed=seed) for seed in np.unique(table["seed"])]
    values = [dict(zip(run["depth"].tolist(), run[column].tolist(), strict=True)) for run in runs]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    shared = [depth for depth in shared if depth >= at_least]
    missing = any(math.isnan(each[depth]) for each in values for depth in shared)
    depths = [depth for depth in shared if all(each[depth] > 0 for each in values)]
    if missing or len(depths) < 2:
        return no_slope(len(runs))
    fits = [fit_slope(depths, [each[depth] for depth in depths]).slope for each in values]
    mean = fit_slope(depths, np.exp(np.mean([[math.log(each[depth]) for depth in depths] for each in values], axis=0)))
    return SlopeOverSeeds(mean.slope, *mean_interval(fits), mean.constant, mean.low, mean.high, len(runs))


def _select_squares(table: Table, quantity: str, **chosen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depths (k,), widths (k,) and squared distances (k, seeds) of the chosen networks of k sizes; nan without a
    row."""
    rows = select(table, **chosen)
    seeds = np.unique(rows["seed"])
    sizes = group(rows, "width", "depth")
    found = [dict(zip(part["seed"].tolist(), part[quantity].tolist(), strict=True)) for part in sizes.values()]
    widths, depths = np.array(list(sizes)).T
    return depths, widths, np.square([[each.get(seed, math.nan) for seed in seeds.tolist()] for each in found])


def _resample(squares: np.ndarray) -> np.ndarray:
    """Root mean squares over draws with replacement among the seeds: (`RESAMPLES`, k)."""
    seeds = squares.shape[1]
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    return np.sqrt(squares[:, drawn].mean(axis=2)).T


def _compute_interval(values: np.ndarray, seeds: int) -> np.ndarray:
    """The bounds of the 95 % interval of the values along the first axis: (2, ...); nan with one seed."""
    if seeds < 2:
        return np.full((2, *values.shape[1:]), math.nan)
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def compute_root_mean_squares(table: Table, quantity: str, **chosen) -> dict[str, np.ndarray]:
    """The root mean squares over the seeds of the chosen networks' distances: columns depth, width, value, low, high
    (95 % intervals, by resampling the seeds)."""
    depths, widths, squares = _select_squares(table, quantity, **chosen)
    low, high = _compute_interval(_resample(squares), squares.shape[1])
    value = np.sqrt(squares.mean(axis=1))
    return {"depth": depths, "width": widths, "value": value, "low": low, "high": high}


def fit_slope_in_depth(table: Table, quantity: str, at_least: int, **chosen) -> SlopeOverSeeds:
    """The rate in L of the root mean square over the seeds, over depths >= ``at_least``, for networks of one width. Its
    95 % interval is by resampling the seeds. Everything is nan if a number is missing or zero."""
    depths, _, squares = _select_squares(table, quantity, **chosen)
    keep = depths >= at_least
    if not np.isfinite(squares).all() or not squares[keep].all():
        return no_slope(squares.shape[1])
    fit = fit_slope(depths, np.sqrt(squares.mean(axis=1)), at_least)
    centred = np.log(depths[keep]) - np.log(depths[keep]).mean()
    low, high = _compute_interval(np.log(_resample(squares)[:, keep]) @ centred / (centred @ centred), squares.shape[1])
    interval = float(low), float(high)
    return SlopeOverSeeds(fit.slope, *interval, fit.constant, fit.low, fit.high, squares.shape[1])


@dataclass(frozen=True)
class TwoTerms:
    """A fit of the distance by sqrt((a/L)^2 + b^2/(L m)). The 95 % intervals of a and b are by resampling the seeds.
    ``residual`` is the root mean square over the sizes of the relative deviation."""

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    residual: float

    @property
    def crossover(self) -> float:
        """a^2/b^2, the L/m at which the two terms are equal; infinity if b is 0."""
        return (self.a / self.b) ** 2 if self.b else math.inf

    def value(self, depth, width):
        """The fitted distance."""
        return _add_terms(self.a, self.b, depth, width)


def _add_terms(a, b, depth, width):
    return np.sqrt((a / depth) ** 2 + b**2 / (depth * width))


def fit_two_terms(table: Table, quantity: str, **chosen) -> TwoTerms:
    """Fit both terms to the root mean square over the seeds of all sizes, by non-negative least squares in the relative
    deviation of the squares. Everything is nan if a number is missing."""
    from scipy.optimize import nnls

    depths, widths, squares = _select_squares(table, quantity, **chosen)
    if not np.isfinite(squares).all():
        return TwoTerms(math.nan, math.nan, (math.nan,) * 2, (math.nan,) * 2, math.nan)
    terms = np.stack([1.0 / depths**2, 1.0 / (depths * widths)], axis=1)

    def fit(values: np.ndarray) -> np.ndarray:
        return np.sqrt(nnls(terms / values[:, None] ** 2, np.ones(len(values)))[0])

    values = np.sqrt(squares.mean(axis=1))
    a, b = fit(values)
    low, high = _compute_interval(np.array([fit(drawn) for drawn in _resample(squares)]), squares.shape[1]).tolist()
    deviation = _add_terms(a, b, depths, widths) / values - 1
    residual = float(np.sqrt(np.square(deviation).mean()))
    return TwoTerms(float(a), float(b), *zip(low, high, strict=True), residual)
