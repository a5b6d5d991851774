"""A claim of the paper, and how one is judged from the tables that the figures were drawn from."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lib.measures import Slope, fit_slope
from lib.rates import SlopeOverSeeds, mean_slope
from lib.tables import Table, select

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
    """What is said and where, what was measured and by which ``criterion`` it is judged (in words), the interval of
    what was measured, the verdict and the figure.

    ``margin`` is the distance to the criterion, negative where it is missed: of a slope the difference, of all else the
    power of ten of the factor (`factor_below`, `factor_above`). Claims on a slope also hold the ``expected`` one, the
    measured one with its interval ``low``, ``high`` over the seeds, the interval ``fit_low``, ``fit_high`` of the fit,
    and the slopes ``at_least``, ``at_most`` that the criterion allows. A verdict is `OPEN` if nothing of the paper's
    size has been run, if numbers are missing, and if an interval of a slope has a part on either side.
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
    """A claim on a slope: an upper bound (``bound`` 1), which a steeper fall fulfils too, a lower one (-1), or the
    slope itself (0).

    The whole interval over the seeds has to be allowed, and that of the fit too, if it is known: a curve that bends
    has no slope. Outside lies a claim by the interval over the seeds, or that of the fit if nothing is drawn at random.
    """
    at_least = expected - RATE_WITHIN if bound <= 0 else -math.inf
    at_most = expected + RATE_WITHIN if bound >= 0 else math.inf
    margin = float(np.min([at_most - fit.slope, fit.slope - at_least]))
    seeds = isinstance(fit, SlopeOverSeeds)
    of_fit = (fit.fit_low, fit.fit_high) if seeds else (fit.low, fit.high)
    if not all(map(math.isfinite, (fit.slope, fit.low, fit.high))):
        verdict = OPEN
    elif at_least <= fit.low and fit.high <= at_most:
        verdict = OPEN if of_fit[0] < at_least or of_fit[1] > at_most else HOLDS
    else:
        verdict = FAILS if fit.low > at_most or fit.high < at_least else OPEN
    criterion = {1: f"at most {at_most:g}", -1: f"at least {at_least:g}"}.get(bound, f"within {RATE_WITHIN}")
    measured = f"{what} {fit.slope:z.3f}, claimed {expected:g}"
    # An interval of points next to a straight line is all rounding beyond some digits.
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
    """A claim on several slopes, each judged by `judge_rate`: the one that decides.

    A slope that fails makes the claim fail, whatever is missing of the others; else an open one leaves it open. Of
    several with that verdict the one with the least margin is told.
    """
    parts = [judge_rate(statement, where, figure, fit, expected, what, bound) for fit in fits]
    verdict = next(verdict for verdict in (FAILS, OPEN, HOLDS) if any(part.verdict == verdict for part in parts))
    deciding = [part for part in parts if part.verdict == verdict]
    return min(deciding, key=lambda part: -math.inf if math.isnan(part.margin) else part.margin)


def judge(margin: float) -> str:
    """The verdict in words: as claimed from 0 on, open for nan."""
    return OPEN if math.isnan(margin) else HOLDS if margin >= 0 else FAILS


def factor_below(value: float, bound: float) -> float:
    """The margin of a ``value`` >= 0 that is to be at most ``bound``: log10(bound / value)."""
    with np.errstate(divide="ignore"):
        return float(np.log10(bound) - np.log10(value))


def factor_above(value: float, bound: float) -> float:
    """The margin of a ``value`` >= 0 that is to be at least ``bound``: log10(value / bound)."""
    return -factor_below(value, bound)


def tightest(*margins: float) -> float:
    """The margin of a claim of several parts: the least of theirs.

    A part that fails makes the claim fail, whatever is missing of the others; else a missing part (nan) leaves it open.
    """
    failing = [margin for margin in margins if margin < 0]
    return float(min(failing)) if failing else float(np.min(margins, initial=math.inf if margins else math.nan))


def _first_depth(depths: np.ndarray) -> int:
    # Small sizes have few depths: take the larger half of them.
    return LEAST_DEPTH if (depths >= LEAST_DEPTH).sum() >= 3 else depths[len(depths) // 2 - 1]


def _fitted(rows: Table, column: str) -> dict[str, np.ndarray] | None:
    # The rows of the depths that slopes are judged over; None if a number among them is missing or not positive.
    depths = np.asarray(rows["depth"])
    keep = depths >= _first_depth(np.unique(depths)) if len(depths) else depths > 0
    values = np.asarray(rows[column], dtype=float)[keep]
    return {name: np.asarray(each)[keep] for name, each in rows.items()} if (values > 0).all() else None


def fit_in_depth(rows: Table, column: str) -> Slope:
    """The slope in L of a column over depths of `LEAST_DEPTH` (small profiles: over the larger half of the depths); nan
    if there are no two numbers, or if one is missing or not positive: it has no logarithm, so nothing is known."""
    fitted = _fitted(rows, column)
    return fit_slope(fitted["depth"], fitted[column]) if fitted and len(fitted[column]) > 1 else Slope(*[math.nan] * 4)


def slope_over_seeds(rows: Table, column: str) -> SlopeOverSeeds:
    """The same as a mean over seeds (`lib.rates.mean_slope`); ``rows`` have columns seed and depth."""
    fitted = _fitted(rows, column)
    if fitted is None:
        return SlopeOverSeeds(*[math.nan] * 6, seeds=len(np.unique(rows["seed"])))
    return mean_slope(fitted, column)


def select_last(table: Table, column: str = "iteration") -> dict[str, np.ndarray]:
    """The rows of the last training time."""
    return select(table, **{column: max(table[column])})


def maximise_over_time(table: Table, *columns: str) -> dict[str, np.ndarray]:
    """The largest value of each column over the training times, by seed and depth; nan if a time is missing."""
    found = {name: [] for name in ("seed", "depth", *columns)}
    times = len(np.unique(table["iteration"]))
    for seed in np.unique(table["seed"]):
        of_seed = select(table, seed=seed)
        for depth in np.unique(of_seed["depth"]):
            rows = select(of_seed, depth=depth)
            whole = len(rows["depth"]) == times
            values = (seed, depth, *(np.max(rows[name]) if whole else math.nan for name in columns))
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}
