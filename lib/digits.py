"""Round numbers to the digits that are the same on every machine. Tables and pictures have only these digits.

Two processors add in different orders, so they round differently. If a number of order one is computed in float64, the
last two or three of its sixteen digits depend on the processor. In a difference of such numbers, more digits do. A
number written to `DIGITS` digits then changes with a probability of about one in a million."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIGITS = 8  # significant digits
# The known decimals of a difference of numbers of order one: in general, with a weight of the large-depth limit, and
# with a hidden state of the limit, which is solved to 1e-10.
DECIMALS, LIMIT_DECIMALS, STATE_DECIMALS = 13, 10, 8
ROOT_DECIMALS = 11  # known decimals of a root mean square over all samples and layers, after a long training


def round_significant(value: float, digits: int = DIGITS) -> float:
    """The number rounded to that many significant digits (0 if ``digits`` is 0). Infinity and nan stay."""
    return float(f"{value:.{digits - 1}e}") if digits > 0 else 0.0


def round_difference(value: float, decimals: int = DECIMALS) -> float:
    """A difference of numbers of order one (a distance, a change), rounded to its known decimals. It becomes 0 if it is
    zero up to rounding."""
    return round_significant(round(value, decimals)) + 0.0  # -0.0 becomes 0.0


def count_known_digits(value: float) -> int:
    """The number of known digits of a mean square of such differences (a loss), at most `DIGITS`. It is the number of
    digits of the root that are within `ROOT_DECIMALS` decimals."""
    if not 0 < value < math.inf:
        return DIGITS
    return max(0, min(DIGITS, math.floor(math.log10(value) / 2) + ROOT_DECIMALS + 1))


def round_square(value: float) -> float:
    """A mean square of differences of numbers of order one, rounded to its known digits."""
    return round_significant(value, count_known_digits(value))


def round_column(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The values, with floats rounded to `DIGITS` digits and everything else unchanged."""
    if isinstance(values, np.ndarray):
        return np.array([round_significant(value) for value in values.tolist()]) if values.dtype.kind == "f" else values
    if not isinstance(values, list | tuple):
        return values
    return [round_significant(value) if isinstance(value, float | np.floating) else value for value in values]


def round_table(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, Sequence[Any] | np.ndarray]:
    """The table with all columns rounded, as `tables.write_csv` writes it."""
    return {name: round_column(values) for name, values in columns.items()}
