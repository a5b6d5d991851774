"""The runs of ``make train`` and ``make checkpoints``: networks trained on CIFAR-10, each in a folder of its own.

The folder ``.build/training/<run>`` holds the run's state, logs, checkpoint and record. The last two go to
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

from lib import checks, parameters, paths
from lib.checks import Divergence
from lib.cifar import dataset, records, states, training
from lib.cifar.config import CifarConfig
from lib.cifar.progress import progress
from lib.engine import build as engine
from lib.project import variables

NOTEBOOK = "train_cifar"
INTERRUPTED = "Interrupted; the same command goes on after the last complete epoch."
REPORT_EVERY = 20  # batches between two moves of the bar


class RunsFailed(RuntimeError):
    """Some of several runs did not finish; the sentence names them."""


def config_of(values: Mapping[str, Any]) -> CifarConfig:
    """The config that the notebook builds from these values of its parameters, its own if there is none."""
    values = {name: parameter.default for name, parameter in parameters.offered(NOTEBOOK).items()} | dict(values)
    return CifarConfig(**{field.name: values[field.name] for field in fields(CifarConfig) if field.name in values})


def train(values: Mapping[str, Any], into: Path | None = None) -> Path:
    """Train, or go on training, the run with these values of the notebook's parameters; returns its folder.

    Its checkpoint and record go to ``checkpoints/`` (or ``into``), except for a trial on a part of the images.
    Nothing is done if the run is finished. Raises, before anything is computed, dataset.DataNotFoundError, paths.Busy
    if another process is training the run, paths.CannotWrite for a folder that cannot take the result, and ValueError
    for wrong values or a state that cannot be read. Raises Divergence later: the state of the last epoch stays.
    """
    config = config_of(values)
    folder = states.run_folder(config)
    if config.name in records.finished(into):
        print(f"{config.name} is finished: {paths.short(records.record_path(config, into))}.", flush=True)
        return folder
    if not config.trial:
        paths.check_writable(records.record_path(config, into).parent, into or paths.CHECKPOINTS)
    dataset.load(train=False)  # says in one sentence, and at once, if the images are missing
    if values.get("start_anew", False):
        training.start_trial_anew(config)
    with states.alone_in(folder):
        state = states.read_state(folder)
    if config.trial and state and state["epoch"] == config.epochs and (folder / f"{config.name}.json").exists():
        print(f"{config.name} is finished, a trial that stays in {paths.short(folder)}.", flush=True)
        return folder
    doing = f"going on after epoch {state['epoch']} of {config.epochs}" if state else "training"
    print(f"{config.name}: {doing}", flush=True)
    device = values.get("device", "cpu")
    if device == "cpu" and (missing := engine.missing()):
        print(f"PyTorch trains, three to five times slower than the compiled engine: {missing}.", flush=True)
    reports = training.train(config, device=device, threads=values.get("threads", 0), report_every=REPORT_EVERY)
    for _ in progress(reports, config, "bar" if _one_at_a_terminal() else "lines"):
        pass
    records.export(config)
    if config.trial:
        print(f"{config.name}: finished, a trial that stays in {paths.short(folder)}", flush=True)
    else:
        published = records.publish(config, folder, into)
        print(f"{config.name}: finished, {paths.short(published)}", flush=True)
    return folder


def _one_at_a_terminal() -> bool:
    return sys.stderr.isatty() and "-j" not in os.environ.get("MAKEFLAGS", "")


def listed_values(name: str, by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the run of that name in ``checkpoints/sweep.csv``, with the schedule and the place ``by_hand``.

    Raises parameters.WrongParameters if none is listed, or for a value by hand that the list has.
    """
    others = {parameter: value for parameter, value in by_hand.items() if parameter != "epochs"}
    if fixed := [parameter for parameter in others if parameter in asdict(CifarConfig())]:
        raise parameters.WrongParameters(
            f"{name} is listed in checkpoints/{records.SWEEP}, {fixed[0]} with it: train a run of other values with "
            f"make train."
        )
    for config in _listed(by_hand):
        if config.name == name:
            return {**parameters.profile_values(NOTEBOOK, parameters.PAPER), **others, **asdict(config)}
    raise parameters.WrongParameters(f"checkpoints/{records.SWEEP} lists no run of the name {name}.")


def _listed(by_hand: Mapping[str, Any]) -> list[CifarConfig]:
    if "epochs" in by_hand:
        checks.positive_int("epochs", by_hand["epochs"])
    return records.sweep(by_hand.get("epochs"))


# --- Several runs -----------------------------------------------------------------------------------------------------


def train_listed(by_hand: Mapping[str, Any], given: Sequence[str], jobs: int = 1, launch: str = "") -> None:
    """Train every run of ``checkpoints/sweep.csv`` that is not finished, each in a process of its own.

    ``by_hand`` are values for all of them, ``given`` the words of the command line that say the same, ``jobs`` how many
    run at a time (0: one a core), and ``launch`` the words that go before each run's command. A run that fails leaves
    the others alone; after one that a signal ended no other is started. Raises ValueError for wrong values before
    anything is started, and RunsFailed at the end with the names of those that failed.
    """
    checks.positive_int("jobs", jobs, least=0)
    try:
        prefix = shlex.split(launch)
    except ValueError as error:
        raise ValueError(f"LAUNCH is {launch!r}: {str(error).lower()}.") from None
    if prefix and not shutil.which(prefix[0]):
        raise ValueError(f"LAUNCH is {launch!r}: there is no command {prefix[0]}.")
    done = records.finished()
    waiting = [config.name for config in _listed(by_hand) if config.name not in done]
    if waiting:
        listed_values(waiting[0], by_hand)  # what one run refuses, all do
    running: dict[subprocess.Popen, str] = {}
    failed: list[str] = []
    ended = False
    while running or (waiting and not ended):
        while waiting and not ended and len(running) < (jobs or os.cpu_count() or 1):
            name = waiting.pop(0)
            running[subprocess.Popen([*prefix, sys.executable, "-m", "lib.project.runs", name, *given])] = name
        for process in [process for process in running if process.poll() is not None]:
            name, status = running.pop(process), process.returncode
            # A shell's status for a signal, or Popen's.
            ended = ended or -status in checks.ENDING or status - 128 in checks.ENDING
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
    """``python -m lib.project.runs [NAME] [VARIABLE=VALUE ...] [--set "NAME=VALUE ..."]``, or ``--listed`` for all of a
    list.

    Returns 2 for wrong parameters, 1 for a run that failed, 130 for an interrupted one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lib.project.runs", description="Train a network, or go on training it."
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help=f"a run of checkpoints/{records.SWEEP}, or a variable: DEPTH=256"
    )
    parser.add_argument("--profile", default=parameters.PAPER, help="whose values the run starts from")
    parser.add_argument("--set", default="", metavar="'NAME=VALUE ...'", help="values in their place")
    parser.add_argument("--parameters", default="", metavar="FILE", help="YAML file with values in their place")
    parser.add_argument("--listed", action="store_true", help="every listed run that is not finished")
    parser.add_argument("--jobs", type=int, default=1, help="so many of them at a time (0: one a core)")
    parser.add_argument("--launch", default="", metavar="'WORD ...'", help="goes before the command of each of them")
    chosen = parser.parse_args(arguments)
    return checks.exit_code(
        partial(_train_command, chosen),
        "No further run is started." if chosen.listed else INTERRUPTED,
        failures=(RuntimeError, OSError, MemoryError, Divergence, records.CheckpointError),
        misuses=(ValueError, TypeError),
    )


def _train_command(chosen: argparse.Namespace) -> None:
    paths.need_clone()
    given = [word for word in chosen.words if "=" in word]
    names = [word for word in chosen.words if "=" not in word]
    if len(names) > 1:
        raise parameters.WrongParameters(f"{' and '.join(names)} are several runs, expected one at a time.")
    by_hand = _values_by_hand(chosen, given)
    if chosen.listed:
        if not chosen.launch:  # which may lead to another machine
            _check_place(by_hand)
        given += ["--set", chosen.set] if chosen.set else []
        given += ["--parameters", chosen.parameters] if chosen.parameters else []
        train_listed(by_hand, given, chosen.jobs, chosen.launch)
        return
    if names:
        values = listed_values(names[0], by_hand)
    else:
        values = parameters.profile_values(NOTEBOOK, chosen.profile) | by_hand
    parameters.check_types(NOTEBOOK, values)
    config = config_of(values)
    _check_place(values)
    train(values)
    # Of several runs, the process that started them gathers the records; a trial has none.
    if not names and not config.trial:
        records.gather()


def _check_place(values: Mapping[str, Any]) -> None:
    # The config knows nothing of the two.
    checks.usable_device(values.get("device", "cpu"))
    checks.thread_count("threads", values.get("threads", 0))


def _values_by_hand(chosen: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Those of make's variables, of SET and of PARAMETERS; WrongParameters if two of them differ."""
    values = variables.values(given)
    for parameter, value in parameters.by_hand(chosen.set, chosen.parameters).items():
        if values.setdefault(parameter, value) != value:
            raise parameters.WrongParameters(
                f"{parameter} is {values[parameter]!r} and {value!r} at the same time: give it one value."
            )
    return values


if __name__ == "__main__":
    sys.exit(main())
