"""Computations on several processes: the same results in the same order, and nothing is left behind."""

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest
import torch

from lib import parallel, paths
from lib.parallel import map_processes


@pytest.fixture
def two_processes(monkeypatch):
    """As if the work were worth two processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(parallel, "WORTH", 0.0)
    yield
    torch.set_num_threads(before)


def find_process(number):
    time.sleep(0.2)
    return number, os.getpid(), torch.get_num_threads()


def kill_itself(number):
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_are_in_order_and_come_from_other_processes(two_processes):
    numbers, processes, threads = zip(*map_processes(find_process, range(6)), strict=True)
    assert numbers == tuple(range(6))
    assert processes[0] == os.getpid()
    assert os.getpid() not in processes[1:]
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2


def test_little_work_starts_no_process():
    assert {process for _, process, _ in map_processes(find_process, range(3))} == {os.getpid()}
    assert list(map_processes(math.sqrt, [])) == []


def test_an_error_arrives(two_processes):
    with pytest.raises(ValueError, match="math domain error"):
        list(map_processes(math.sqrt, [4, 1, -1, 9]))
    with pytest.raises(BrokenProcessPool):
        list(map_processes(kill_itself, range(4)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(number):
    code = (
        "import time, torch\nfrom lib import parallel\nfrom lib.tests import test_parallel\n"
        "torch.set_num_threads(2)\nparallel.WORTH = 0.0\n"
        "for found in parallel.map_processes(test_parallel.find_process, range(10000)): print(found, flush=True)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(3):  # the second result comes from another process
            process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=20)[1] == []
