"""Checks of single values: each returns nothing or raises one sentence that names the value. And how a command ends:
its status, its sentence, and no process of its own left behind."""

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

LARGEST_INT = 2**63 - 1  # of a tensor; a seed may not be larger either
# Signals with which a person, a terminal or the machine ends a process.
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MOST_THREADS = 1024  # of one process: with many more, OpenMP ends the process instead of raising


class Divergence(ArithmeticError):
    """A training whose loss is no longer a finite number."""


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, arrays of them and ranges as lists; lists and tuples entry by entry.
    Everything else as it is."""
    if isinstance(value, range):
        return list(value)
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def make_plain(config: Any) -> None:
    """Make every field of a frozen dataclass `plain`, so that what it holds is written, compared and named as Python's
    numbers are: the first line of each ``__post_init__``."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def positive_int(name: str, value: Any, least: int = 1, most: int = LARGEST_INT) -> None:
    """Raise unless ``value`` is an int, numpy's included (not a bool), from ``least`` to ``most``."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number of at least {least}.")
    if value < least:
        raise ValueError(f"{name} is {value}, expected a whole number of at least {least}.")
    if value > most:
        shown = value if value < 10**30 else "a number of more than 30 digits"
        raise ValueError(f"{name} is {shown}, expected a whole number of at most {most}.")


def positive_float(name: str, value: Any, zero_allowed: bool = False) -> None:
    """Raise unless ``value`` is a finite number above zero (or zero, if that is allowed)."""
    expected = "a number of at least 0" if zero_allowed else "a number above 0"
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected {expected}.")
    if isinstance(value, int) and value > LARGEST_INT:
        raise ValueError(f"{name} is a whole number above {LARGEST_INT}, expected {expected} that a float can hold.")
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


def as_tensor(name: str, values: Any) -> "torch.Tensor":
    """``values`` as a tensor: a tensor as it is (dense), all else that numpy takes for an array of real numbers in
    float64, with NaN for what is masked.

    Raises TypeError, one sentence that begins with ``name``, for what is no such array.
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
        if array.dtype.kind not in "biufO":  # numpy would read texts as numbers and drop imaginary parts
            raise TypeError(f"its entries are of type {array.dtype}")
        filled = np.ma.filled(np.ma.asanyarray(array).astype(np.float64), math.nan)
        return torch.from_numpy(np.array(filled))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise TypeError(
            f"{name} is a {type(values).__name__} that is no array of real numbers ({reason}): expected a tensor, a "
            "numpy array, or lists of equal lengths."
        ) from error


def finite_entries(name: str, tensor: "torch.Tensor") -> None:
    """Raise ValueError if an entry is NaN or infinite; the sentence says where the first one is, counted from 0."""
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
        f"leave it out or fill it in."
    )


def usable_device(device: "str | torch.device") -> "torch.device":
    """The device of that name, "auto" being CUDA if there is one and else the CPU.

    Raises ValueError with one sentence if this machine has none such.
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


def thread_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number of threads, 0 for PyTorch's own choice."""
    positive_int(name, value, least=0, most=MOST_THREADS)


def moments(record_at: Iterable[int] | None, iterations: int) -> Sequence[int]:
    """The iterations to record, in order (None: all of 0..``iterations``); raise ValueError for others than these."""
    wanted = range(iterations + 1) if record_at is None else record_at
    wanted = wanted if isinstance(wanted, range) else plain(wanted)
    try:
        wanted = wanted if isinstance(wanted, range) else sorted({operator.index(plain(each)) for each in wanted})
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
    """A signal that asks the process to end; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(
    command: Callable[[], object], interrupted: str = "Interrupted.", *, failures: tuple, misuses: tuple = ()
) -> int:
    """Run a command and say in one sentence what went wrong: 1 for a failure, 2 for a misuse.

    If a person interrupts it, or a SIGTERM or the loss of its terminal ends it, its child processes end with it,
    ``interrupted`` is all that is said, and the status is 128 and the signal's number (130 after Ctrl-C). A command
    that ``make`` started ends if that make does. If nobody reads its output any longer, as in ``| head``, it ends
    without a word, with 141.
    """
    received: list[int] = []
    try:
        with _ended_by_signals(received):
            command()
            sys.stdout.flush()
    except BaseException as error:
        # An interruption may come out as anything, such as the death of the kernel that it ended.
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
    if closed:  # Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


@contextlib.contextmanager
def _ended_by_signals(received: list[int]) -> Iterator[None]:
    """Raise `Ended` at a signal that ends the process, note it in ``received``, and leave no child process then."""

    def end(number: int, _: object) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        # A person who ends a run wants none of what libraries say of a kernel that is suddenly gone.
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = threading.excepthook = lambda _: None
        _end_children()
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    # What is ignored stays so: SIGHUP under nohup, SIGINT in the background of a script.
    before = {each: handler for each in ENDING if (handler := signal.getsignal(each)) in defaults}
    over = threading.Event()
    try:
        for each in before:
            signal.signal(each, end)
        if "MAKELEVEL" in os.environ:
            threading.Thread(target=_end_with_parent, args=(os.getppid(), over), daemon=True).start()
        yield
    finally:
        over.set()
        if not received:
            for each, handler in before.items():
                signal.signal(each, handler)


def _end_with_parent(parent: int, over: threading.Event) -> None:
    # A make that is killed tells nobody, and its recipe's shell does not hand on the SIGTERM that it gets.
    while not over.wait(0.5):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _end_children(patience: float = 5) -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
