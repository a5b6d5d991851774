"""The runs of ``make train`` and ``make checkpoints``: networks trained on CIFAR-10, each in its own folder.

The folder ``.build/training/<run>`` holds the run's state, logs, checkpoint and record. The last two are copied to
``checkpoints/`` when the run is finished. A finished run is never trained again. The notebook train_cifar shows the
same training, and its parameters are the values of a run.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from lib import checks, commands, parameters, paths
from lib.checks import Divergence
from lib.cifar import dataset, records, states, training
from lib.cifar.config import CifarConfig
from lib.cifar.progress import progress
from lib.engine import build as engine
from lib.project import variables

NOTEBOOK = "train_cifar"
INTERRUPTED = "Interrupted; the same command goes on after the last complete epoch."
INTERRUPTED_LIST = "No further run is started; the same command goes on."
REPORT_EVERY = 20  # batches between two updates of the bar


class RunsFailed(RuntimeError):
    """Some runs did not finish. The message names them."""


def build_config(values: Mapping[str, Any]) -> CifarConfig:
    """The config that the notebook builds from these values of its parameters; its defaults for the others."""
    values = {name: parameter.default for name, parameter in parameters.read_parameters(NOTEBOOK).items()} | dict(
        values
    )
    return CifarConfig(**{field.name: values[field.name] for field in fields(CifarConfig) if field.name in values})


def train(values: Mapping[str, Any], into: Path | None = None) -> Path:
    """Train the run with these values of the notebook's parameters, or go on training it; returns its folder.

    Its checkpoint and record go to ``checkpoints/`` (or ``into``), except those of a trial on a part of the images. If
    the run is finished, nothing is done.

    Before anything is computed, raises dataset.DataNotFoundError, locks.Busy if another process trains the run,
    paths.CannotWrite if the result cannot be written, and ValueError for wrong values or a state that cannot be read.
    Raises Divergence if the training diverges; the state of the last complete epoch stays.
    """
    config = build_config(values)
    folder = states.run_folder(config)
    if config.name in records.finished_runs(into):
        print(f"{config.name} is finished: {paths.shorten(records.record_path(config, into))}.", flush=True)
        return folder
    if not config.trial:
        paths.check_writable(records.record_path(config, into).parent, into or paths.CHECKPOINTS)
    dataset.load(train=False)  # raises now if the images are missing
    if values.get("start_anew", False):
        states.start_trial_anew(config)
    with states.lock_folder(folder):
        state = states.read_state(folder)
    if config.trial and state and state["epoch"] == config.epochs and (folder / f"{config.name}.json").exists():
        print(f"{config.name} is finished, a trial that stays in {paths.shorten(folder)}.", flush=True)
        return folder
    doing = f"going on after epoch {state['epoch']} of {config.epochs}" if state else "training"
    print(f"{config.name}: {doing}", flush=True)
    device = values.get("device", "cpu")
    if device == "cpu" and (missing := engine.explain_missing()):
        print(f"PyTorch trains, three to five times slower than the compiled engine: {missing}.", flush=True)
    reports = training.train(config, device=device, threads=values.get("threads", 0), report_every=REPORT_EVERY)
    for _ in progress(reports, config, "bar" if _is_at_terminal() else "lines"):
        pass
    records.export(config)
    if config.trial:
        print(f"{config.name}: finished, a trial that stays in {paths.shorten(folder)}", flush=True)
    else:
        published = records.publish(config, folder, into)
        print(f"{config.name}: finished, {paths.shorten(published)}", flush=True)
    return folder


def _is_at_terminal() -> bool:
    # Not if make runs several jobs, whose bars would overwrite each other.
    return sys.stderr.isatty() and "-j" not in os.environ.get("MAKEFLAGS", "")


def read_listed_values(name: str, by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the run of that name in ``checkpoints/sweep.csv``, with the epochs, device and threads
    ``by_hand``.

    Raises parameters.WrongParameters if the run is not listed, or if a value by hand is one that the list sets.
    """
    others = {parameter: value for parameter, value in by_hand.items() if parameter != "epochs"}
    if fixed := [parameter for parameter in others if parameter in asdict(CifarConfig())]:
        raise parameters.WrongParameters(
            f"{fixed[0]} is set, but checkpoints/{records.SWEEP} sets it for {name}: train a run of other values with "
            f"make train."
        )
    for config in _read_listed(by_hand):
        if config.name == name:
            return {**parameters.profile_values(NOTEBOOK, parameters.PAPER), **others, **asdict(config)}
    raise parameters.WrongParameters(f"checkpoints/{records.SWEEP} lists no run {name}: check the name.")


def _read_listed(by_hand: Mapping[str, Any]) -> list[CifarConfig]:
    if "epochs" in by_hand:
        checks.positive_int("epochs", by_hand["epochs"])
    return records.read_sweep(by_hand.get("epochs"))


# --- Several runs -----------------------------------------------------------------------------------------------------


def train_listed(by_hand: Mapping[str, Any], given: Sequence[str], jobs: int = 1, launch: str = "") -> None:
    """Train every run of ``checkpoints/sweep.csv`` that is not finished, each in a process of its own.

    ``by_hand`` are values for all of them, and ``given`` the words of the command line that set these values. ``jobs``
    is the number of runs at a time (0: one for each core). ``launch`` is put before each run's command. If a run fails,
    the others go on. If a signal ends a run, no other is started.

    Before anything is started, raises ValueError for wrong values, and dataset.DataNotFoundError. At the end, raises
    RunsFailed with the names of the runs that failed.
    """
    checks.positive_int("jobs", jobs, least=0)
    try:
        prefix = shlex.split(launch)
    except ValueError as error:
        raise ValueError(f"LAUNCH is {launch!r}: {str(error).lower()}.") from None
    if prefix and not shutil.which(prefix[0]):
        raise ValueError(f"LAUNCH is {launch!r}: there is no command {prefix[0]}; check the spelling and the PATH.")
    done = records.finished_runs()
    waiting = [config.name for config in _read_listed(by_hand) if config.name not in done]
    if waiting:
        parameters.check_types(NOTEBOOK, read_listed_values(waiting[0], by_hand))
        dataset.load(train=False)  # all images are fetched before runs start side by side
    running: dict[subprocess.Popen, str] = {}
    failed: list[str] = []
    ended = False
    while running or (waiting and not ended):
        while waiting and not ended and len(running) < (jobs or os.cpu_count() or 1):
            name = waiting.pop(0)
            running[subprocess.Popen([*prefix, sys.executable, "-m", "lib.project.runs", name, *given])] = name
        for process in [process for process in running if process.poll() is not None]:
            name, status = running.pop(process), process.returncode
            # Popen's status for a signal, or a shell's.
            ended = ended or -status in commands.ENDING or status - 128 in commands.ENDING
            if status:
                failed.append(name)
            else:
                records.gather()
        time.sleep(0.1)
    print(f"checkpoints/{records.RUNS}: {records.gather()} runs", flush=True)
    if failed:
        left = f"; {len(waiting)} more were not started, since one was ended" if ended else ""
        raise RunsFailed(f"{len(failed)} of the listed runs did not finish: {', '.join(failed)}{left}.")


# --- Command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.project.runs [NAME] [VARIABLE=VALUE ...] [--set "NAME=VALUE ..."]``, or ``--listed`` for all
    listed runs.

    Returns 2 for wrong parameters, 1 for a run that failed, 130 for an interrupted one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lib.project.runs", description="Train a network, or go on training it."
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help=f"a run of checkpoints/{records.SWEEP}, or a variable: DEPTH=256"
    )
    parser.add_argument("--profile", default=parameters.PAPER, help="profile with the values of the run")
    parser.add_argument(
        "--set", default="", metavar="'NAME=VALUE ...'", help="values that replace those of the profile"
    )
    parser.add_argument(
        "--parameters", default="", metavar="FILE", help="YAML file with values that replace those of the profile"
    )
    parser.add_argument("--listed", action="store_true", help="every listed run that is not finished")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (0: one for each core)")
    parser.add_argument("--launch", default="", metavar="'WORD ...'", help="put before the command of each run")
    chosen = parser.parse_args(arguments)
    return commands.exit_code(
        partial(_train_command, chosen),
        INTERRUPTED_LIST if chosen.listed else INTERRUPTED,
        failures=(RuntimeError, OSError, MemoryError, Divergence, records.CheckpointError),
        misuses=(ValueError, TypeError),
    )


def _train_command(chosen: argparse.Namespace) -> None:
    paths.check_clone()
    given = [word for word in chosen.words if "=" in word]
    names = [word for word in chosen.words if "=" not in word]
    if len(names) > 1:
        raise parameters.WrongParameters(f"{' and '.join(names)} are several runs, expected one at a time.")
    by_hand = _values_by_hand(chosen, given)
    if chosen.listed:
        if not chosen.launch:  # LAUNCH may start the run on another machine
            _check_place(by_hand)
        given += ["--set", chosen.set] if chosen.set else []
        given += ["--parameters", chosen.parameters] if chosen.parameters else []
        train_listed(by_hand, given, chosen.jobs, chosen.launch)
        return
    if names:
        values = read_listed_values(names[0], by_hand)
    else:
        values = parameters.profile_values(NOTEBOOK, chosen.profile) | by_hand
    parameters.check_types(NOTEBOOK, values)
    config = build_config(values)
    _check_place(values)
    train(values)
    # The records of listed runs are gathered by the process that started them. A trial has none.
    if not names and not config.trial:
        records.gather()


def _check_place(values: Mapping[str, Any]) -> None:
    # Neither is part of the config.
    checks.usable_device(values.get("device", "cpu"))
    checks.thread_count("threads", values.get("threads", 0))


def _values_by_hand(chosen: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """The values in make's variables, SET and PARAMETERS. Raises WrongParameters if two of them differ."""
    values = variables.read_values(given)
    for parameter, value in parameters.read_by_hand(chosen.set, chosen.parameters).items():
        if values.setdefault(parameter, value) != value:
            raise parameters.WrongParameters(
                f"{parameter} is {values[parameter]!r} and {value!r} at the same time: give it one value."
            )
    return values


if __name__ == "__main__":
    sys.exit(main())
