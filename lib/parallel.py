"""Independent computations, such as trainings from several seeds, on several processes of one thread each."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from lib import commands

Item, Result = TypeVar("Item"), TypeVar("Result")

WORTH = 20.0  # seconds of work in one process, from which on others are started: each imports PyTorch first
MOST = 16  # processes


def map_processes(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order, on as many processes as PyTorch may use threads.

    The first item is computed here. If what is left would take less than `WORTH`, so is the rest. ``function`` must be
    importable by name. Its results do not depend on the number of processes, since PyTorch has one thread in all of
    them. Its exceptions arrive here. When this process is interrupted or killed, the others end.
    """
    items = list(items)
    workers = min(torch.get_num_threads(), len(items) - 1, MOST)
    with use_one_thread():
        started = time.monotonic()
        for item in items[:1]:
            yield function(item)
        if workers < 2 or (time.monotonic() - started) * (len(items) - 1) < WORTH:
            yield from map(function, items[1:])
            return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
    try:
        with _hidden_main():
            results = pool.map(function, items[1:])  # starts the processes
        yield from results
    except BaseException:  # what the processes compute has no use any more
        for process in {*multiprocessing.active_children()} - {*others}:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def use_one_thread() -> Iterator[None]:
    """Run PyTorch on one thread, for small networks while other work shares the processor.

    The threads of a product wait for each other: if one of two has no core to itself, a step of milliseconds takes a
    second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the main script again, which may have no guard against that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def ask_process(function: Callable[..., None], *arguments: Any) -> Any:
    """What ``function(*arguments, answer)`` sends to the connection ``answer`` in a new process, such as how its memory
    grew. Use it in the main thread. Raises EOFError if the process dies.

    An interruption from the keyboard, which does not reach the new process, or another exception here ends it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sender))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process takes over
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()
    try:
        return receiver.recv()
    except BaseException:  # what the process computes has no use any more
        process.terminate()
        raise
    finally:
        process.join()


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the computation
    commands.end_with_parent(parent)
    torch.set_num_threads(1)
