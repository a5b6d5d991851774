"""The runs of ``make train`` and ``make checkpoints``: the notebook train_cifar, executed once a network.

Every run has a folder of its own, ``.build/training/<run>``, with its state, its executed notebook, checkpoint and
record; the last two go to ``checkpoints/`` when it is finished. A finished run is never trained again.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import nbformat

from lib import checks, cifar, cifar_training, engine, notebooks, parameters, paths, records
from lib.cifar_training import CifarConfig

NOTEBOOK = "train_cifar"


def config_of(values: Mapping[str, Any]) -> CifarConfig:
    """The config that the notebook builds from these values of its parameters, its own where there is none."""
    values = {name: parameter.default for name, parameter in parameters.offered(NOTEBOOK).items()} | dict(values)
    return CifarConfig(**{field.name: values[field.name] for field in fields(CifarConfig) if field.name in values})


def train(values: Mapping[str, Any], into: Path | None = None) -> Path:
    """Train, or go on training, the run with these values of the notebook's parameters; returns its folder.

    Its checkpoint and record go to ``checkpoints/`` (or ``into``), except for a trial on a part of the images.
    Nothing is done where the run is finished. Raises cifar.DataNotFoundError, parameters.WrongParameters,
    notebooks.RunFailed, paths.Busy where another process is training it, or ValueError for a state that cannot be
    read.
    """
    config = config_of(values)
    folder = cifar_training.run_folder(config)
    if config.name in records.finished(into):
        print(f"{config.name} is finished: {paths.short(records.record_path(config, into))}.", flush=True)
        return folder
    cifar.load(train=False)  # says in one sentence, and at once, where the images are missing
    with cifar_training.alone_in(folder):  # said here in one sentence, not out of the notebook
        state = None if config.trial else cifar_training.read_state(folder)
    doing = f"going on after epoch {state['epoch']} of {config.epochs}" if state else "training"
    print(f"{config.name}: {doing}", flush=True)
    if values.get("device", "cpu") == "cpu" and (missing := engine.missing()):
        print(f"PyTorch trains, three to five times slower than the compiled engine: {missing}.", flush=True)
    # Threads that spin for long while they wait, the usual policy, slow each other down on a machine with other work;
    # threads that do not spin at all take a seventh longer for a step on idle cores (191 ms for 168).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("TRAINING_PROGRESS", "bar" if _one_at_a_terminal() else "lines")
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "outputs"
    output.mkdir(exist_ok=True)
    notebook = notebooks.execute_with(NOTEBOOK, values, output, folder / "unfinished.ipynb", show_stderr=True)
    for cell in notebook.cells:  # the progress, which was shown
        if cell.cell_type == "code":
            cell.outputs = [item for item in cell.outputs if item.get("name") != "stderr"]
    nbformat.write(notebooks.normalise(notebook, output), folder / f"{NOTEBOOK}.ipynb")
    shutil.rmtree(output)
    if config.trial:
        print(f"{config.name}: finished, a trial that stays in {paths.short(folder)}", flush=True)
    else:
        published = records.publish(config, folder, into)
        print(f"{config.name}: finished, {paths.short(published)}", flush=True)
    return folder


def _one_at_a_terminal() -> bool:
    return sys.stderr.isatty() and "-j" not in os.environ.get("MAKEFLAGS", "")


def listed_values(name: str, epochs: int | None, others: Mapping[str, Any], chosen: Iterable[str]) -> dict[str, Any]:
    """The values for the run of that name in ``checkpoints/sweep.csv``.

    Raises parameters.WrongParameters where none is listed, or where values were ``chosen`` by hand that the list has.
    """
    if fixed := [parameter for parameter in chosen if parameter in asdict(CifarConfig())]:
        raise parameters.WrongParameters(
            f"{name} is listed in checkpoints/{records.SWEEP}, {fixed[0]} with it: train a run of other values with "
            f"make train."
        )
    for config in records.sweep(epochs):
        if config.name == name:
            return {**others, **asdict(config)}
    raise parameters.WrongParameters(f"checkpoints/{records.SWEEP} lists no run of the name {name}.")


# --- Command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.runs [NAME] [--profile PROFILE] [--set "NAME=VALUE ..."]``.

    Returns 2 for wrong parameters, 1 for a run that failed, 130 for an interrupted one.
    """
    parser = argparse.ArgumentParser(prog="python -m lib.runs", description="Train a network, or go on training it.")
    parser.add_argument("run", nargs="?", help=f"a name that checkpoints/{records.SWEEP} lists")
    parser.add_argument("--profile", default=parameters.PAPER, help="whose values the run starts from")
    parser.add_argument("--set", default="", metavar="'NAME=VALUE ...'", help="values in their place")
    parser.add_argument("--epochs", type=int, help="a schedule of this length for a listed run")
    chosen = parser.parse_args(arguments)
    return checks.exit_code(
        partial(_train_command, chosen),
        "Interrupted; the same command goes on after the last complete epoch.",
        failures=(notebooks.RunFailed, RuntimeError, cifar.DataNotFoundError, records.CheckpointError),
        misuses=(ValueError, TypeError),
    )


def _train_command(chosen: argparse.Namespace) -> None:
    by_hand = parameters.parse_settings(chosen.set)
    values = parameters.profile_values(NOTEBOOK, chosen.profile) | by_hand
    if chosen.run:
        values = listed_values(chosen.run, chosen.epochs, values, by_hand)
    parameters.check_values(NOTEBOOK, values)
    train(values)
    if not chosen.run:  # of several runs, make gathers the records at the end
        records.gather()


if __name__ == "__main__":
    sys.exit(main())
