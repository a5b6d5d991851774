"""Round numbers to the digits that are the same on every machine. Tables hold and pictures show only these digits.

Two processors add in different orders, and so round differently. Of a number of order one, computed in float64, the
last two or three of sixteen digits are random; of a difference of such numbers, more. If a number is written to
`DIGITS` digits, this changes it with a probability of about one in a million."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIGITS = 8  # significant digits
DECIMALS = 13  # known decimals of a difference of numbers of order one
LIMIT_DECIMALS = 10  # if one of them belongs to the large-depth limit, after many sums and sweeps
STATE_DECIMALS = 8  # if it is a hidden state of the limit, which is solved to 1e-10
ROOT_DECIMALS = 11  # of the root of a mean square over all samples and layers, after a long training


def significant(value: float, digits: int = DIGITS) -> float:
    """The number to that many significant digits; 0 for none. Infinity and nan stay."""
    return float(f"{value:.{digits - 1}e}") if digits > 0 else 0.0


def difference(value: float, decimals: int = DECIMALS) -> float:
    """A difference of numbers of order one (a distance, a change), which is known to that many decimals. It is 0 if it
    is zero up to rounding."""
    return significant(round(value, decimals)) + 0.0  # -0.0 becomes 0.0


def known_digits(value: float) -> int:
    """The number of known digits of a mean square of such differences (a loss), at most `DIGITS`: its root has that
    many digits up to the last of `ROOT_DECIMALS` decimals."""
    if not 0 < value < math.inf:
        return DIGITS
    return max(0, min(DIGITS, math.floor(math.log10(value) / 2) + ROOT_DECIMALS + 1))


def square(value: float) -> float:
    """A mean square of differences of numbers of order one, to its known digits."""
    return significant(value, known_digits(value))


def column(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The values, with floats to `DIGITS` digits and all others unchanged."""
    if isinstance(values, np.ndarray):
        return np.array([significant(value) for value in values.tolist()]) if values.dtype.kind == "f" else values
    if not isinstance(values, list | tuple):
        return values
    return [significant(value) if isinstance(value, float | np.floating) else value for value in values]


def table(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, Sequence[Any] | np.ndarray]:
    """The table with all columns rounded, as it is written."""
    return {name: column(values) for name, values in columns.items()}
