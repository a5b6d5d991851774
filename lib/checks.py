"""Checks of single values: each returns nothing or raises one sentence that names the value. And the status that a
command ends with where such a sentence is raised."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, arrays of them as lists; lists and tuples entry by entry. Everything
    else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value.tolist() if hasattr(value, "tolist") else value


def make_plain(config: Any) -> None:
    """Make every field of a frozen dataclass `plain`, so that what it holds is written, compared and named as Python's
    numbers are: the first line of each ``__post_init__``."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def positive_int(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is an int, numpy's included (not a bool), of at least ``least``."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number of at least {least}.")
    if value < least:
        raise ValueError(f"{name} is {value}, expected a whole number of at least {least}.")


def positive_float(name: str, value: Any, zero_allowed: bool = False) -> None:
    """Raise unless ``value`` is a finite number above zero (or zero, where that is allowed)."""
    expected = "a number of at least 0" if zero_allowed else "a number above 0"
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = " In YAML write 0.04 or 4.0e-2, since 4e-2 is read as text." if isinstance(value, str) else ""
        raise TypeError(f"{name} is {value!r}, expected {expected}.{hint}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ValueError(f"{name} is {value}, expected {expected}.")


def boolean(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(plain(value), bool):
        raise TypeError(f"{name} is {value!r}, expected True or False.")


def choice(name: str, value: Any, possible: Iterable[Any]) -> None:
    """Raise unless ``value`` is one of ``possible``; the sentence lists them."""
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


def two_sizes(slope_from: Any, depths: Any) -> None:
    """Raise unless ``slope_from`` is a depth that leaves two of ``depths`` or more to fit a slope over."""
    positive_int("slope_from", slope_from)
    if sum(depth >= slope_from for depth in depths) < 2:
        raise ValueError(
            f"slope_from is {slope_from}, which leaves fewer than two of the depths {list(depths)} "
            "to fit a slope over: lower it or add depths."
        )


def usable_device(device: "str | torch.device") -> "torch.device":
    """The device of that name, "auto" being CUDA where there is one and else the CPU.

    Raises ValueError with one sentence where this machine has none such.
    """
    import torch  # seconds to import, and no other check needs it

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda or cuda:0 and the like.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch sees no CUDA device here: use cpu.")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {device!r}, but PyTorch sees {count} CUDA devices here, numbered from 0.")
    return found


def exit_code(command: Callable[[], object], interrupted: str, *, failures: tuple, misuses: tuple) -> int:
    """Run a command and say in one sentence what went wrong: 1 for a failure, 2 for a misuse, 130 where a person
    interrupted it."""
    try:
        command()
    except failures as error:
        print(error, file=sys.stderr)
        return 1
    except misuses as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
