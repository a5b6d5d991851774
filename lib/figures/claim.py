"""A claim of the paper, and how it is judged from the tables of the figures."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.rates import NO_SLOPE, Slope, SlopeOverSeeds, fit_mean_slope, fit_slope, no_slope
from lib.tables import Table, from_rows, group, select

HOLDS, FAILS, OPEN = "as claimed", "not as claimed", "open"
RATE_WITHIN = 0.1  # how far a slope may lie from the claimed one
LEAST_DEPTH = 16  # slopes are judged over depths of at least this: terms of higher order in 1/L are small from here on
FIT_DECIMALS = 6  # of fitted slopes and their intervals
BEYOND = "beyond the paper"
RATE_OURS = "; rate ours"  # behind the place of a statement that the paper makes without a rate
PROVED = "; proved"  # behind the place of a statement that only an error in the computation could break
Read = Callable[[str], dict[str, np.ndarray]]  # the table of that name


@dataclass(frozen=True)
class Claim:
    """A statement and its place in the paper, the measured value, the ``criterion`` in words, the interval of the
    measured value, the verdict and the figure.

    ``margin`` is the distance to the criterion, negative if the criterion is missed. For a slope it is a difference.
    For everything else it is a power of ten (`factor_below`, `factor_above`). A claim on a slope also has the
    ``expected`` slope, the measured ``slope``, its interval ``low``, ``high`` over the seeds, the interval ``fit_low``,
    ``fit_high`` of the fit, and the bounds ``at_least``, ``at_most`` of the criterion. The verdict is `OPEN` if nothing
    of the paper's size has been run, if numbers are missing, or if an interval of a slope contains a bound.
    """

    statement: str
    where: str
    measured: str
    criterion: str
    interval: str
    verdict: str
    figure: str
    margin: float = math.nan
    expected: float = math.nan
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan
    fit_low: float = math.nan
    fit_high: float = math.nan
    at_least: float = -math.inf
    at_most: float = math.inf


def judge_rate(
    statement: str, where: str, figure: str, fit: Slope, expected: float, what: str = "slope in L", bound: int = 1
) -> Claim:
    """Judge a claim on a slope. If ``bound`` is 1, ``expected`` is an upper bound, which a steeper fall fulfils too. If
    it is -1, ``expected`` is a lower bound. If it is 0, ``expected`` is the slope itself.

    The claim holds if the interval over the seeds and that of the fit are both within the criterion: a bent curve has
    no slope. It fails if the interval over the seeds is outside of it (that of the fit if nothing is drawn at random).
    """
    at_least = expected - RATE_WITHIN if bound <= 0 else -math.inf
    at_most = expected + RATE_WITHIN if bound >= 0 else math.inf
    margin = float(np.min([at_most - fit.slope, fit.slope - at_least]))
    seeds = isinstance(fit, SlopeOverSeeds)
    of_fit = (fit.fit_low, fit.fit_high) if seeds else (fit.low, fit.high)
    if not all(map(math.isfinite, (fit.slope, fit.low, fit.high))):
        verdict = OPEN
    elif at_least <= fit.low and fit.high <= at_most:
        verdict = HOLDS if at_least <= of_fit[0] and of_fit[1] <= at_most else OPEN
    else:
        verdict = FAILS if fit.low > at_most or fit.high < at_least else OPEN
    criterion = {1: f"at most {at_most:g}", -1: f"at least {at_least:g}"}.get(bound, f"within {RATE_WITHIN}")
    measured = f"{what} {fit.slope:z.3f}, claimed {expected:g}"
    # If the points are on a straight line, later digits of the interval are rounding errors.
    values = (round(number, FIT_DECIMALS) for number in (margin, expected, fit.slope, fit.low, fit.high, *of_fit))
    interval = f"{fit.seeds} seeds [{fit.low:z.3f}, {fit.high:z.3f}], " if seeds else "nothing drawn, "
    interval += "fit [{:z.3f}, {:z.3f}]".format(*of_fit)
    return Claim(statement, where, measured, criterion, interval, verdict, figure, *values, at_least, at_most)


def judge_rates(
    statement: str,
    where: str,
    figure: str,
    fits: Iterable[Slope],
    expected: float,
    what: str = "slope in L",
    bound: int = 1,
) -> Claim:
    """Judge a claim on several slopes, each by `judge_rate`. Returns the claim on the slope that decides.

    The claim fails if one slope fails, even if others are missing. Else it is open if one slope is open, or if there is
    none. Of several slopes with the deciding verdict, the one with the least margin is returned.
    """
    fits = list(fits) or [NO_SLOPE]
    parts = [judge_rate(statement, where, figure, fit, expected, what, bound) for fit in fits]
    verdict = next(verdict for verdict in (FAILS, OPEN, HOLDS) if any(part.verdict == verdict for part in parts))
    deciding = [part for part in parts if part.verdict == verdict]
    return min(deciding, key=lambda part: -math.inf if math.isnan(part.margin) else part.margin)


def judge(margin: float) -> str:
    """The verdict on a margin: it holds if the margin is at least 0, and is open if it is nan."""
    return OPEN if math.isnan(margin) else HOLDS if margin >= 0 else FAILS


def judge_margin(
    statement: str,
    where: str,
    figure: str,
    margin: float,
    measured: str,
    criterion: str,
    interval: str = "",
    **more: Any,
) -> Claim:
    """A claim with the verdict on its margin; ``more`` are further fields of the `Claim`, or another verdict."""
    fields = {"verdict": judge(margin), "margin": margin} | more
    return Claim(statement, where, measured, criterion, interval, figure=figure, **fields)


def factor_below(value: float, bound: float) -> float:
    """The margin log10(bound / value) of the criterion that a ``value`` >= 0 is at most ``bound``."""
    with np.errstate(divide="ignore"):
        return float(np.log10(bound) - np.log10(value))


def factor_above(value: float, bound: float) -> float:
    """The margin log10(value / bound) of the criterion that a ``value`` >= 0 is at least ``bound``."""
    return -factor_below(value, bound)


def combine_margins(*margins: float) -> float:
    """The margin of a claim of several parts: the least of theirs.

    A negative margin makes the claim fail, even if others are missing (nan). Else a missing one gives nan.
    """
    failing = [margin for margin in margins if margin < 0]
    return float(min(failing)) if failing else float(np.min(margins, initial=math.inf if margins else math.nan))


def require_rows(table: Table, *columns: str) -> float:
    """A margin for `combine_margins`: infinite if the table has each combination of the values of these columns, else
    nan."""
    sizes = (len(np.unique(table[name])) for name in columns)
    return math.inf if len(group(table, *columns)) == math.prod(sizes) else math.nan


def _choose_first_depth(depths: np.ndarray) -> int:
    # Small profiles have few depths: take the larger half of them.
    return LEAST_DEPTH if (depths >= LEAST_DEPTH).sum() >= 3 else depths[len(depths) // 2 - 1]


def _select_fitted(rows: Table, column: str) -> dict[str, np.ndarray] | None:
    # The rows of the depths over which slopes are judged; None if one of their numbers is missing or not positive.
    depths = np.asarray(rows["depth"])
    keep = depths >= _choose_first_depth(np.unique(depths)) if len(depths) else depths > 0
    values = np.asarray(rows[column], dtype=float)[keep]
    return {name: np.asarray(each)[keep] for name, each in rows.items()} if (values > 0).all() else None


def fit_in_depth(rows: Table, column: str) -> Slope:
    """The slope in L of a column over the depths from `LEAST_DEPTH` on (in small profiles, over the larger half of the
    depths). It is nan if there are fewer than two numbers, or if one of them is missing or not positive."""
    fitted = _select_fitted(rows, column)
    return fit_slope(fitted["depth"], fitted[column]) if fitted and len(fitted[column]) > 1 else NO_SLOPE


def fit_over_seeds(rows: Table, column: str, own_depths: bool = False) -> SlopeOverSeeds:
    """The same slope as a mean over seeds (`lib.rates.fit_mean_slope`); ``rows`` have columns seed and depth.

    It is nan if a seed lacks a depth. If seeds may have their ``own_depths``, it is over those that all have.
    """
    fitted = _select_fitted(rows, column)
    if fitted is None or not (own_depths or require_rows(rows, "seed", "depth") > 0):
        return no_slope(len(np.unique(rows["seed"])))
    return fit_mean_slope(fitted, column)


def select_last(table: Table, column: str = "iteration") -> dict[str, np.ndarray]:
    """The rows of the last training time."""
    return select(table, **{column: max(table[column])})


def maximise_over_time(table: Table, *columns: str) -> dict[str, np.ndarray]:
    """The largest value of each column over the training times, by seed and depth; nan if a time is missing."""
    found, times = [], len(np.unique(table["iteration"]))
    for (seed, depth), rows in group(table, "seed", "depth").items():
        whole = len(rows["depth"]) == times
        largest = {name: np.max(rows[name]) if whole else math.nan for name in columns}
        found.append({"seed": seed, "depth": depth} | largest)
    return {name: np.array(values) for name, values in from_rows(found).items()}
