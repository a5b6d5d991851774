"""Checks of single values. Each raises one sentence that names the value."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGEST_INT = 2**63 - 1  # of a tensor, and of a seed
MOST_THREADS = 1024  # with many more, OpenMP ends the process instead of raising an error


class Divergence(ArithmeticError):
    """The loss or a weight of a training is not finite."""


def plain(value: Any) -> Any:
    """Convert numbers of numpy and torch to Python's, and their arrays and ranges to lists. Lists and tuples are
    converted entry by entry. Everything else stays as it is."""
    if isinstance(value, range):
        return list(value)
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def make_plain(config: Any) -> None:
    """Make every field of a frozen dataclass `plain`, so that its values are written and compared as Python's. Call it
    first in ``__post_init__``."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def check_fields(config: Any, *names: str, **least: int) -> None:
    """Make every field of a frozen dataclass `plain`, then raise unless the named ones have values as annotated:
    positive numbers (int, float), lists of them (list[int], list[float]), or truth values (bool).

    ``least`` are fields with another least value, as in ``recorded=2``. For a float it is 0.
    """
    make_plain(config)
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    check = {int: positive_int, float: positive_float, list[int]: positive_ints, list[float]: positive_floats}
    for name in names:
        (check | {bool: boolean})[kinds[name]](name, getattr(config, name))
    for name, smallest in least.items():
        whole = kinds[name] in (int, list[int])
        check[kinds[name]](name, getattr(config, name), smallest if whole else smallest == 0)


def positive_int(name: str, value: Any, least: int = 1, most: int = LARGEST_INT) -> None:
    """Raise unless ``value`` is an int (also numpy's, but not a bool) from ``least`` to ``most``."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number of at least {least}.")
    shown = value if abs(value) < 10**30 else "a number of more than 30 digits"
    if value < least:
        raise ValueError(f"{name} is {shown}, expected a whole number of at least {least}.")
    if value > most:
        raise ValueError(f"{name} is {shown}, expected a whole number of at most {most}.")


def positive_float(name: str, value: Any, zero_allowed: bool = False) -> None:
    """Raise unless ``value`` is a finite number above zero, or zero if that is allowed."""
    expected = "a number of at least 0" if zero_allowed else "a number above 0"
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected {expected}.")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        bound = f"above {LARGEST_INT}" if value > 0 else f"below {-LARGEST_INT}"
        raise ValueError(f"{name} is a whole number {bound}, expected {expected} that a float can hold.")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name} is {value}, expected {expected}.")


def boolean(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(plain(value), bool):
        raise TypeError(f"{name} is {value!r}, expected True or False.")


def choice(name: str, value: Any, possible: Iterable[Any]) -> None:
    """Raise unless ``value`` is one of ``possible``. The message lists them."""
    possible = list(possible)
    if value not in possible:
        listed = ", ".join(str(item) for item in possible)
        raise ValueError(f"{name} is {value!r}, expected one of: {listed}.")


def positive_ints(name: str, values: Any, least: int = 1) -> None:
    """Raise unless ``values`` is a non-empty, strictly increasing list or tuple of ints >= ``least``."""
    values = plain(values)
    if not isinstance(values, list | tuple) or not values:
        raise TypeError(f"{name} is {values!r}, expected a non-empty list of whole numbers.")
    for value in values:
        positive_int(f"an entry of {name}", value, least)
    if any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError(f"{name} is {list(values)}, expected increasing numbers without repeats.")


def positive_floats(name: str, values: Any, zero_allowed: bool = False) -> None:
    """Raise unless ``values`` is a non-empty list or tuple of numbers above (or at) zero without repeats."""
    values = plain(values)
    if not isinstance(values, list | tuple) or not values:
        raise TypeError(f"{name} is {values!r}, expected a non-empty list of numbers.")
    for value in values:
        positive_float(f"an entry of {name}", value, zero_allowed)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} is {list(values)}, expected numbers without repeats.")


def distinct_texts(name: str, values: Any) -> None:
    """Raise unless ``values`` is a non-empty list or tuple of texts without repeats."""
    values = plain(values)
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} is {values!r}, expected a list of texts.")
    if not values:
        raise ValueError(f"{name} is {values!r}, expected one text or more.")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"an entry of {name} is {value!r}, expected a text.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} is {list(values)}, expected texts without repeats.")


def slope_range(slope_from: Any, depths: Any) -> None:
    """Raise unless at least two of the ``depths`` are >= ``slope_from``, so that a slope can be fitted."""
    positive_int("slope_from", slope_from)
    if sum(depth >= slope_from for depth in depths) < 2:
        raise ValueError(
            f"slope_from is {slope_from}, which leaves fewer than two of the depths {list(depths)} "
            "to fit a slope over: lower it or add depths."
        )


def as_tensor(name: str, values: Any) -> "torch.Tensor":
    """``values`` as a tensor. A tensor stays as it is, but dense. An array of real numbers, or anything that numpy
    converts to one, becomes float64, with NaN for masked entries.

    Raises TypeError, with ``name`` in the message, if it is not such an array.
    """
    import numpy as np
    import torch

    if values is None:
        raise TypeError(f"{name} is None, expected a tensor, a numpy array, or lists of equal lengths.")
    if isinstance(values, torch.Tensor):
        if values.is_meta:
            raise TypeError(f"{name} is on the meta device, expected a tensor that holds numbers, as on cpu or cuda.")
        return values if values.layout == torch.strided else values.to_dense()
    try:
        array = np.asanyarray(values)
        if array.dtype.kind not in "biufO":  # numpy would convert texts to numbers and drop imaginary parts
            raise TypeError(f"its entries are of type {array.dtype}")
        filled = np.ma.filled(np.ma.asanyarray(array).astype(np.float64), math.nan)
        return torch.from_numpy(np.array(filled))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise TypeError(
            f"{name} is a {type(values).__name__} that is not an array of real numbers ({reason}): expected a tensor, "
            "a numpy array, or lists of equal lengths."
        ) from error


def finite_entries(name: str, tensor: "torch.Tensor") -> None:
    """Raise ValueError if an entry is NaN or infinite. The message gives the place of the first one, counted from 0."""
    wrong = (~tensor.isfinite()).nonzero()
    if not len(wrong):
        return
    first, *others = place = wrong[0].tolist() or [0]
    where = f"row {first}" if tensor.ndim < 3 else f"layer {first}" if name in "VW" else f"sample {first}"
    if others:
        where += f", column {others[0]}" if tensor.ndim == 2 else f" at {tuple(others)}"
    counted = "entry is" if len(wrong) == 1 else "entries are"
    raise ValueError(
        f"{name} holds {float(tensor[tuple(place)] if tensor.ndim else tensor)} in {where} (counted from 0; "
        f"{len(wrong)} {counted} not finite in {str(tensor.dtype).removeprefix('torch.')}), expected finite numbers: "
        f"remove it or replace it."
    )


def usable_device(device: "str | torch.device") -> "torch.device":
    """The device of that name. "auto" is CUDA if there is one, else the CPU.

    Raises ValueError if this machine does not have the device.
    """
    import torch  # takes seconds to import, and few checks need it

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda, or a number as in cuda:0.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch sees no CUDA device here: use cpu.")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {device!r}, but PyTorch sees {count} CUDA devices here, numbered from 0.")
    return found


def thread_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number of threads; 0 stands for PyTorch's choice."""
    positive_int(name, value, least=0, most=MOST_THREADS)


def record_iterations(record_at: Iterable[int] | None, iterations: int) -> Sequence[int]:
    """The iterations to record, in order (None: all of 0..``iterations``). Raises ValueError if one is not among these,
    TypeError if they are not whole numbers."""
    wanted = range(iterations + 1) if record_at is None else record_at
    try:
        if not isinstance(wanted, range) or wanted.step < 0:
            wanted = sorted({operator.index(plain(each)) for each in plain(wanted)})
    except TypeError:
        raise TypeError(
            f"record_at is {record_at!r}, expected a list of whole numbers within 0 to {iterations}."
        ) from None
    if len(wanted) and not 0 <= wanted[0] <= wanted[-1] <= iterations:
        raise ValueError(
            f"record_at asks for iterations {wanted[0]} to {wanted[-1]}, expected them within 0 to {iterations}."
        )
    return wanted
