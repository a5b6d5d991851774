"""Computations on several processes: the same results in the same order, and no process is left."""

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
    """Work of any size takes two processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(parallel, "WORTH", 0.0)
    yield
    torch.set_num_threads(before)


def find_process(number):
    time.sleep(0.2)
    return math.sqrt(number), os.getpid(), torch.get_num_threads()


def wait(seconds):
    time.sleep(seconds)
    return seconds


def kill_itself(number):
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def never_answer(answer):
    print("started", flush=True)
    time.sleep(1000)


def test_results_and_errors_of_other_processes_arrive_in_order(two_processes):
    found = []
    with pytest.raises(ValueError, match="math domain error"):
        found.extend(map_processes(find_process, [0, 1, 4, 9, -1, 16]))  # results before the error are kept
    roots, processes, threads = zip(*found, strict=True)
    assert roots == (0, 1, 2, 3)
    assert processes[0] == os.getpid()
    assert os.getpid() not in processes[1:]
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2


def test_a_process_that_dies_is_an_error(two_processes):
    with pytest.raises(BrokenProcessPool):
        list(map_processes(kill_itself, range(4)))


def test_little_work_starts_no_process():
    assert {process for _, process, _ in map_processes(find_process, range(3))} == {os.getpid()}
    assert list(map_processes(math.sqrt, [])) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_of_a_script_without_a_guard_end_with_it(number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, torch\nfrom lib import parallel\nfrom lib.tests import test_parallel\n"
        # In the background of a shell it is ignored, and so by all that is started there.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "torch.set_num_threads(2)\nparallel.WORTH = 0.0\n"
        "for found in parallel.map_processes(test_parallel.wait, [0, 0, 0, 1000, 1000]): print(found, flush=True)"
    )
    command = [sys.executable, script]
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(3):  # the second result comes from another process
            assert process.stdout.readline() == b"0\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_process_that_is_asked_ends_with_an_interruption():
    code = (
        "import signal\nfrom lib import parallel\nfrom lib.tests import test_parallel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nparallel.ask_process(test_parallel.never_answer)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"started\n"
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        alive = psutil.wait_procs(family, timeout=20)[1]
        for each in alive:
            each.kill()
    assert len(family) >= 2
    assert alive == []
