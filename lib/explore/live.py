"""Runs that advance by themselves in slices of the kernel's event loop, so that the notebook still responds."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lib.figures.experiment import Progress
from lib.parallel import use_one_thread

SLICE = 0.02  # seconds of work between two moments at which a button can respond
PAUSE = 0.001  # seconds left to the kernel after each slice
WAIT = 0.005  # seconds between two checks of a function that works in a thread
# The errors of wrong values, divergence and missing files, whose message is for the reader.
SENTENCES = (ValueError, TypeError, ArithmeticError, FileNotFoundError)


@dataclass(frozen=True)
class Run:
    """An iterator of ``states``, one for each step (None: no new state yet).

    ``done`` gives the number of steps, of ``total``, before a state. ``warning`` gives a message about a state, or "".
    """

    states: Iterator[Any]
    total: int = 1
    done: Callable[[Any], int] = lambda state: 0
    warning: Callable[[Any], str] = lambda state: ""


class Live:
    """A run that can start and stop. Of all such runs, at most one advances.

    ``news`` is called after a slice with a new ``state``, ``halted`` when the run has ended or was stopped, and ``say``
    with the message of an error.
    """

    _advancing: ClassVar["Live | None"] = None

    def __init__(self, news: Callable[[], None], halted: Callable[[], None], say: Callable[[str], None]) -> None:
        self._news, self._halted, self._say = news, halted, say
        self._task: asyncio.Task | None = None
        self.run, self.state, self.finished = Run(iter(())), None, True

    @property
    def running(self) -> bool:
        """Whether the run advances by itself."""
        return self._task is not None

    def begin(self, make: Callable[[], Run], first: Any = None) -> bool:
        """Replace the run by a new one and take its first state (or ``first``, before its first step); returns whether
        there is a new state to show."""
        self._cancel()
        getattr(self.run.states, "close", lambda: None)()
        try:
            self.run = make()
            with use_one_thread():  # also for a thread that the first step starts
                state = next(self.run.states) if first is None else first
        except SENTENCES as error:
            self.run, self.finished = Run(iter(())), True
            self._say(str(error))
            return False
        self.finished = False
        self.state = self.state if state is None else state
        return state is not None

    def start(self) -> None:
        """Let the run advance. Needs a running event loop."""
        if self.running or self.finished:
            return
        Live.stop_all()
        self._task, Live._advancing = asyncio.get_running_loop().create_task(self._advance_to_end()), self

    def stop(self) -> None:
        """Stop the run. `start` goes on from there."""
        if self.running:
            self._cancel()
            self._halted()

    @classmethod
    def stop_all(cls) -> None:
        """Stop the run that advances: that of a cell that is run again, or of another explorer."""
        if cls._advancing is not None:
            cls._advancing.stop()

    def _cancel(self) -> None:
        if self.running:
            self._task.cancel()
            self._task = Live._advancing = None

    async def _advance_to_end(self) -> None:
        try:
            while self.advance(SLICE):
                await asyncio.sleep(PAUSE)
        except Exception as error:  # an error of the project is shown too
            self.finished = True
            self._say(f"{type(error).__name__}: {error}")
            raise
        finally:
            if asyncio.current_task() is self._task:
                self._task = Live._advancing = None
                self._halted()

    def advance(self, seconds: float = 0.0) -> bool:
        """Take steps for about ``seconds``, at least one; returns whether there are more."""
        until, new = time.perf_counter() + seconds, False
        try:
            with use_one_thread():
                while not self.finished:
                    state = next(self.run.states)
                    if state is not None:
                        self.state, new = state, True
                    if time.perf_counter() > until:
                        break
        except StopIteration:
            self.finished = True
        except SENTENCES as error:
            self.finished = True
            self._say(str(error))
        if new:
            self._news()
        return not self.finished


# --- Functions that report their progress -----------------------------------------------------------------------------


class _Halt(BaseException):
    """Ends the work of a thread whose result is no longer needed."""


def run_in_thread(function: Callable[[Progress], Any], reported: list[float]) -> Iterator[Any]:
    """Run a function that reports its progress as an iterator: yields None while it works, then its result.

    It works in a thread of its own. Where it reports (in per cent, to ``reported``), the thread waits until the
    iterator is advanced. The thread ends when the iterator is closed."""
    waits, go, outcome, closed = threading.Event(), threading.Event(), [], []

    def progress(items: Iterable, total: int) -> Iterator[Any]:
        for count, item in enumerate(items):
            reported.append(100 * count / total)
            waits.set()
            go.wait()
            go.clear()
            if closed:
                raise _Halt
            yield item

    def work() -> None:
        try:
            outcome.append(function(progress))
        except _Halt:
            pass
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="explorer", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if waits.is_set():
                waits.clear()
                go.set()
            thread.join(WAIT)
            yield None
    finally:
        closed.append(True)
        go.set()
        thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    reported.append(100.0)
    yield outcome[0]
