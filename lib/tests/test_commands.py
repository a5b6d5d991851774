"""How a command ends: with its status, with one sentence, and with all its processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lib import commands, paths

# A command that starts a process, prints its number and waits. An interruption is turned into `raised`.
WAITS = """
import subprocess, sys, time
from lib import commands

def command():
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    try:
        time.sleep(600)
    except BaseException:
        {raised}

sys.exit(commands.exit_code(command, "Interrupted.", failures=(ValueError,)))
"""
PARENT = f"""
import subprocess, sys, time

subprocess.Popen([sys.executable, "-c", {WAITS.format(raised="raise")!r}])
time.sleep(600)
"""
PRINTS = """
import sys
from lib import commands

sys.exit(commands.exit_code(lambda: [print(number) for number in range(99999)], failures=(OSError,)))
"""


def start(code, **changes):
    return start_command("-c", code, **changes)


def start_command(*arguments, **changes):
    environment = {name: value for name, value in os.environ.items() if name != "MAKELEVEL"} | changes
    options = {
        "cwd": paths.ROOT,
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }

    def reset_signals():
        # Tests in the background ignore SIGINT, tests under nohup SIGHUP, and their processes would inherit that.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen([sys.executable, *arguments], preexec_fn=reset_signals, **options)


def wait_until_gone(number):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (signal.SIGINT, "raise RuntimeError('the kernel died')"),
        (signal.SIGTERM, "raise"),
        (signal.SIGHUP, "raise ValueError('as a failure would')"),
    ],
)
def test_a_signal_ends_a_command_and_its_children_with_one_sentence(number, raised):
    process = start(WAITS.format(raised=raised))
    child = int(process.stdout.readline())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "Interrupted.\n")
    assert wait_until_gone(child)


@pytest.mark.parametrize("module", ["lib.engine.build", "lib.project.report", "lib.cifar.records"])
def test_a_command_that_still_imports_is_interrupted_with_one_sentence(module, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    (tmp_path / "nbformat.py").write_text("import torch\n")
    process = start_command("-m", module, PYTHONPATH=f"{tmp_path}{os.pathsep}{paths.ROOT}")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, "Interrupted.\n")


def test_a_command_of_make_ends_with_it():
    # A process in the place of make starts the command and is killed, so it cannot pass a signal on.
    process = start(PARENT, MAKELEVEL="1")
    child = int(process.stdout.readline())
    command = psutil.Process(child).ppid()
    process.kill()
    assert wait_until_gone(command)
    assert wait_until_gone(child)


def test_a_command_by_hand_outlives_its_shell():
    process = start(PARENT)
    child = psutil.Process(int(process.stdout.readline()))
    command = child.parent()
    process.kill()
    process.wait()
    time.sleep(1.5)
    assert command.is_running()
    command.terminate()
    assert wait_until_gone(child.pid)


def test_a_closed_pipe_ends_a_command_without_a_word():
    process = start(PRINTS)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_failures_and_misuses_have_their_status_and_other_errors_pass(capsys):
    def end_with(error, **kinds):
        def command():
            raise error

        return commands.exit_code(command, **kinds)

    kinds = {"failures": (RuntimeError,), "misuses": (ValueError,)}
    assert end_with(RuntimeError("it failed"), **kinds) == 1
    assert end_with(ValueError("it is wrong"), **kinds) == 2
    assert capsys.readouterr().err == "it failed\nit is wrong\n"
    with pytest.raises(KeyError):
        end_with(KeyError("unforeseen"), **kinds)
    before = signal.getsignal(signal.SIGTERM)
    assert commands.exit_code(lambda: None, **kinds) == 0
    assert signal.getsignal(signal.SIGTERM) is before
