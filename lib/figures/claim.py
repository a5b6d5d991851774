"""A claim of the paper, and how one is judged from the tables that the figures were drawn from."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lib.measures import Slope, fit_slope
from lib.tables import Table, select

HOLDS, FAILS, OPEN = "as claimed", "not as claimed", "open"
RATE_WITHIN = 0.1  # how far a fitted slope may lie from the claimed one
LEAST_DEPTH = 16  # slopes are fitted over depths of at least this, if not said otherwise
FIT_DECIMALS = 6  # of fitted slopes and their intervals
BEYOND = "beyond the paper"
Read = Callable[[str], dict[str, np.ndarray]]  # the table of that name


@dataclass(frozen=True)
class Claim:
    """What is said and where, what was measured and by which ``criterion`` it is judged (in words), the interval of
    what was measured, the verdict and the figure.

    Claims on a rate also hold it as numbers: the ``expected`` slope and the fitted one with its bounds. A verdict is
    `OPEN` if nothing of the paper's size has been run.
    """

    statement: str
    where: str
    measured: str
    criterion: str
    interval: str
    verdict: str
    figure: str
    expected: float = math.nan
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan


def judge_rate(
    statement: str, where: str, figure: str, fit: Slope, expected: float, what: str = "slope in L", bound: int = 1
) -> Claim:
    """A claim on a slope: an upper bound (``bound`` 1), which a steeper fall fulfils too, a lower one (-1), or the
    slope itself (0)."""
    off = fit.slope - expected
    verdict = judge((bound * off if bound else abs(off)) <= RATE_WITHIN)
    criteria = {1: f"at most {expected + RATE_WITHIN:g}", -1: f"at least {expected - RATE_WITHIN:g}"}
    criterion = criteria.get(bound, f"within {RATE_WITHIN}")
    measured = f"{what} {fit.slope:.3f}, claimed {expected:g}"
    interval = f"[{fit.low:.3f}, {fit.high:.3f}]"
    # An interval of points next to a straight line is all rounding beyond some digits.
    numbers = (round(number, FIT_DECIMALS) for number in (fit.slope, fit.low, fit.high))
    return Claim(statement, where, measured, criterion, interval, verdict, figure, expected, *numbers)


def fit_in_depth(rows: Table, column: str, at_least: int = LEAST_DEPTH) -> Slope:
    """The slope in L of a column over depths of ``at_least`` (small profiles: over the larger half of the depths)."""
    depths = np.unique(rows["depth"])
    # Small sizes have few depths: take the larger half of them.
    start = at_least if (depths >= at_least).sum() >= 3 else depths[len(depths) // 2 - 1]
    return fit_slope(rows["depth"], rows[column], start)


def select_last(table: Table, column: str = "iteration") -> dict[str, np.ndarray]:
    """The rows of the last training time."""
    return select(table, **{column: max(table[column])})


def maximise_over_time(table: Table, *columns: str) -> dict[str, np.ndarray]:
    """The largest value of each column over the training times, by depth."""
    depths = np.unique(table["depth"])
    largest = {name: [np.max(select(table, depth=depth)[name]) for depth in depths] for name in columns}
    return {"depth": depths} | {name: np.array(values) for name, values in largest.items()}


def find_largest(fits: Iterable[Slope]) -> Slope:
    """The fit with the largest slope."""
    return max(fits, key=lambda fit: fit.slope)


def judge(true: bool) -> str:
    """The verdict in words."""
    return HOLDS if true else FAILS
