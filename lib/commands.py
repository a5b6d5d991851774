"""How a command ends: its exit status, its message, and its child processes."""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# The signals by which a person, a terminal or the machine ends a process.
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


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
