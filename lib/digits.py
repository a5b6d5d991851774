"""The digits of a number that another machine finds too, which are those that tables hold and pictures show.

Two processors add in different orders, and round differently: of a number of order one, computed in float64, the last
two or three of sixteen digits are chance, of a difference of such numbers more. A number that is written to `DIGITS`
digits changes by that once in a million, which leaves a table as it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIGITS = 8  # significant ones
DECIMALS = 13  # of a difference of numbers of order one; what is less is rounding
LIMIT_DECIMALS = 10  # if one of them is the large-depth limit's, at the end of many sums and sweeps
STATE_DECIMALS = 8  # if it is a hidden state of the limit, which is solved to 1e-10
ROOT_DECIMALS = 11  # of what a mean square is of: a sum over all samples and layers, and over a long training


def significant(value: float, digits: int = DIGITS) -> float:
    """The number to so many significant digits; 0 for no digit at all. Infinity and nan stay."""
    return float(f"{value:.{digits - 1}e}") if digits > 0 else 0.0


def difference(value: float, decimals: int = DECIMALS) -> float:
    """A difference of numbers of order one (a distance, a change), which is known to so many decimals: 0 stands for all
    that is zero up to rounding."""
    return significant(round(value, decimals)) + 0.0  # which makes -0.0 of it 0.0


def known_digits(value: float) -> int:
    """How many digits of a mean square of such differences (a loss) are known, at most `DIGITS`: as many as its root
    has down to the last of `ROOT_DECIMALS` decimals."""
    if not 0 < value < math.inf:
        return DIGITS
    return max(0, min(DIGITS, math.floor(math.log10(value) / 2) + ROOT_DECIMALS + 1))


def square(value: float) -> float:
    """A mean square of differences of numbers of order one, to the digits that are known."""
    return significant(value, known_digits(value))


def column(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The values with floats to `DIGITS` digits, others as they are."""
    if isinstance(values, np.ndarray):
        return np.array([significant(value) for value in values.tolist()]) if values.dtype.kind == "f" else values
    if not isinstance(values, list | tuple):
        return values
    return [significant(value) if isinstance(value, float | np.floating) else value for value in values]


def table(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, Sequence[Any] | np.ndarray]:
    """The table as it is written."""
    return {name: column(values) for name, values in columns.items()}
