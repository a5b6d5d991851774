"""Checks of single values, each of which raises one sentence that names the value, and the end of a command: its exit
status, its message, and the end of its child processes."""

import contextlib
import dataclasses
import itertools
import logging
import math
import operator
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGEST_INT = 2**63 - 1  # of a tensor, and of a seed
# The signals by which a person, a terminal or the machine ends a process.
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
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


# --- How a command ends -----------------------------------------------------------------------------------------------


class Ended(KeyboardInterrupt):
    """The signal ``number`` has asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(
    command: Callable[[], object], interrupted: str = "Interrupted.", *, failures: tuple, misuses: tuple = ()
) -> int:
    """Run a command; print an error as one sentence, and return the exit status: 1 for a failure, 2 for a misuse.

    If a person interrupts the command, or a SIGTERM or the loss of its terminal ends it, its child processes are ended
    too. Only ``interrupted`` is printed, and the status is 128 plus the signal's number (130 after Ctrl-C). If ``make``
    started the command and ends, the command ends too. If its output is closed, as by ``| head``, it ends without a
    message, with 141.
    """
    received: list[int] = []
    try:
        with _end_on_signals(received):
            command()
            sys.stdout.flush()
    except BaseException as error:
        # An interruption may appear as any error, such as the death of the kernel that it ended.
        if received or isinstance(error, KeyboardInterrupt):
            _say(interrupted)
            return 128 + (received[0] if received else signal.SIGINT)
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 128 + signal.SIGPIPE
        if isinstance(error, failures):
            _say(error)
            return 1
        if isinstance(error, misuses):
            _say(error)
            return 2
        raise
    return 0


def _say(sentence: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(sentence, file=sys.stderr, flush=True)


def _output_is_closed() -> bool:
    output = select.poll()
    output.register(sys.stdout, 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:  # Python flushes the output once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


@contextlib.contextmanager
def _end_on_signals(received: list[int]) -> Iterator[None]:
    """At a signal that ends the process: append it to ``received``, end all child processes, and raise `Ended`."""

    def end(number: int, _: object) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        # Libraries would print errors about the kernels that are ended.
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = threading.excepthook = lambda _: None
        _end_children()
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    # Ignored signals stay ignored: SIGHUP under nohup, SIGINT in the background of a script.
    before = {each: handler for each in ENDING if (handler := signal.getsignal(each)) in defaults}
    over = threading.Event()
    try:
        for each in before:
            signal.signal(each, end)
        if "MAKELEVEL" in os.environ:
            end_with_parent(os.getppid(), over)
        yield
    finally:
        over.set()
        if not received:
            for each, handler in before.items():
                signal.signal(each, handler)


def end_with_parent(parent: int, over: threading.Event | None = None) -> None:
    """From now on, until ``over`` is set, this process ends (SIGTERM) when ``parent`` is not its parent any more."""
    over = over or threading.Event()

    def watch() -> None:
        # A killed make sends no signal, and its recipe's shell does not pass on a SIGTERM.
        while not over.wait(0.5):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()


def _end_children(patience: float = 5) -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
