"""The record of every trained run, and the tables in ``checkpoints/`` that are gathered from the records.

A record is a JSON file of one run, all but its weights, which the run writes itself. `gather` makes of all records

    runs.csv                    one row a run,
    successive_distance.csv     one row a run, convolution and layer.

A run in ``runs.csv``, or with a record, is finished, and is never trained again.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import checks, measures, paths, tables
from lib.checks import Divergence
from lib.cifar import layer_log, states, training
from lib.cifar.checkpoints import Checkpoint, CheckpointError, load, save
from lib.cifar.config import CifarConfig, rename_saved
from lib.cifar.network import CONVOLUTIONS, ConvResNet

VERSION = 1
ENTRIES = ("run", "config", "summary", "versions", "successive_distance", "log")
PAPER_EPOCHS = 180
SHARES = tuple(f"smooth_share_{name}" for name in CONVOLUTIONS)  # of the depth; older records lack them
RUNS, DISTANCES, SWEEP = "runs.csv", "successive_distance.csv", "sweep.csv"
SPIKE, ROUNDING, PUBLISHED = "loss_spike.csv", "rounding.csv", "published_curves.csv"


# ------------------------------------------------------------------------------------------ of a finished run


def summarise(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The log in one line: epochs, accuracies (%; of the last epoch, and the best of the evaluated ones),
    losses, smoothness of both convolutions, seconds in all, device, engine and number of threads (several
    joined by " + " if a run moved)."""
    tested = [line for line in log if line["test_accuracy"] is not None]

    def together(name: str) -> str:
        return " + ".join(dict.fromkeys(str(line[name]) for line in log))

    return {
        "epochs": len(log),
        "train_accuracy": log[-1]["train_accuracy"],
        "train_accuracy_best": max(line["train_accuracy"] for line in log),
        "test_accuracy": tested[-1]["test_accuracy"],
        "test_accuracy_best": max(line["test_accuracy"] for line in tested),
        "train_loss": log[-1]["train_loss"],
        "test_loss": tested[-1]["test_loss"],
        "von_neumann_conv1": log[-1]["von_neumann_conv1"],
        "von_neumann_conv2": log[-1]["von_neumann_conv2"],
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "device": together("device"),
        "engine": together("engine"),
        "threads": together("threads"),
    }


def successive_distances(network: ConvResNet) -> dict[str, list[float]]:
    """|conv_{i,k+1} - conv_{i,k}|_F for i = 1, 2 and k = 1..L-1, by the names "conv1" and "conv2"."""
    return {
        name: torch.diff(weight.double(), dim=0).flatten(1).norm(dim=1).tolist()
        for name, weight in training.kernels(network).items()
    }


def export(config: CifarConfig, folder: Path | str | None = None) -> tuple[Path, Path]:
    """Write the checkpoint and the record of a finished run into the folder of its state; returns both paths.

    The layer log of the run is written beside its record. Raises ValueError if the run has not reached its last
    epoch, or the state is that of another run, and Divergence if its losses or weights are not finite.
    """
    folder = Path(folder) if folder is not None else states.run_folder(config)
    state = states.read_state(folder)
    complete = state["epoch"] if state else 0
    if complete < config.epochs:
        raise ValueError(
            f"The run {config.name} has {complete} of {config.epochs} epochs in {folder}: train it to the end first."
        )
    states.check_same(state, config, folder)
    network = ConvResNet(config.network)
    network.load_state_dict(state["network"])
    summary = summarise(state["log"])
    losses = {f"its {name.replace('_', ' ')}": summary[name] for name in ("train_loss", "test_loss")}
    if found := training.not_finite({**network.state_dict(), **losses}):
        raise Divergence(
            f"The run {config.name} in {folder} is no result, since {found}: train one with a learning rate below "
            f"{config.learning_rate:g}."
        )
    shares = (measures.smooth_share(of) for of in training.kernels(network).values())
    summary |= {name: None if math.isnan(share) else share for name, share in zip(SHARES, shares, strict=True)}
    weights = folder / f"{config.name}.safetensors"
    save(weights, Checkpoint(config, network, summary, state["versions"]))
    entries = {
        "version": VERSION,
        "run": config.name,
        "config": asdict(config),
        "summary": summary,
        "versions": state["versions"],
        "successive_distance": successive_distances(network),
        "log": state["log"],
    }
    record = folder / f"{config.name}.json"
    layers = state.get("layers")
    if layers:
        layer_log.write(folder / f"{config.name}{layer_log.ENDING}", layers, config.name)
    paths.write_content(record, _json(entries))
    return weights, record


def _json(entries: dict[str, Any]) -> str:
    """JSON with a line an entry, and a line an epoch of the log."""
    lines = {name: json.dumps(value) for name, value in entries.items()}
    lines["log"] = "[\n  " + ",\n  ".join(json.dumps(line) for line in entries["log"]) + "\n ]"
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {text}" for name, text in lines.items()) + "\n}\n"


def publish(config: CifarConfig, folder: Path | str | None = None, into: Path | None = None) -> Path:
    """Copy what `export` wrote to ``checkpoints/`` (or ``into``); returns the record's new path.

    The record goes last, since it is what says that the run is finished.
    """
    folder = Path(folder) if folder is not None else states.run_folder(config)
    into = into or paths.CHECKPOINTS
    record = record_path(config, into)
    paths.make_folder(record.parent)
    for source, target in (
        (folder / f"{config.name}.safetensors", into / f"{config.name}.safetensors"),
        (folder / f"{config.name}{layer_log.ENDING}", layer_log_path(config, into)),
        (folder / f"{config.name}.json", record),
    ):
        if source.name.endswith(layer_log.ENDING) and not source.exists():
            continue  # a run that ended before there was such a log
        paths.write_content(target, source.read_bytes())
    return record


def record_path(config: CifarConfig, folder: Path | None = None) -> Path:
    """Where the record of a run is, or will be."""
    return (folder or paths.CHECKPOINTS) / "records" / f"{config.name}.json"


def layer_log_path(config: CifarConfig, folder: Path | None = None) -> Path:
    """Where the layer log of a run is, or will be."""
    return (folder or paths.CHECKPOINTS) / "records" / f"{config.name}{layer_log.ENDING}"


# ------------------------------------------------------------------------------------------------ the tables


def gather(folder: Path | None = None) -> int:
    """Write ``runs.csv`` and ``successive_distance.csv``; returns the number of runs.

    Rows of runs whose record is not there are kept as they are. Raises CheckpointError for a broken record.
    """
    folder = folder or paths.CHECKPOINTS
    while True:
        found = _record_paths(folder)
        runs = _write_tables(folder, found)
        # Of two runs that gather at the same time, the one that writes last may not have read the other's record.
        if _record_paths(folder) == found:
            return runs


def _record_paths(folder: Path) -> list[Path]:
    return sorted((folder / "records").glob("*.json"))


def _write_tables(folder: Path, found: Sequence[Path]) -> int:
    records = [_read_record(path) for path in found]
    recorded = {record["run"] for record in records}
    runs, layers = _kept_rows(folder / RUNS, recorded), _kept_rows(folder / DISTANCES, recorded)
    runs = [asdict(CifarConfig()) | rename_saved(row) for row in runs]  # older rows lack some
    runs = [{"run": row["run"], **row, **dict.fromkeys(SHARES, math.nan), **row} for row in runs]
    for record in records:
        config = asdict(CifarConfig(**rename_saved(record["config"])))
        summary = {name: value for name, value in record["summary"].items() if name not in config}
        summary |= {name: summary.get(name) for name in SHARES}
        row = {"run": record["run"], **config, **summary, **record["versions"]}
        runs.append({name: math.nan if value is None else value for name, value in row.items()})
        for name, values in record["successive_distance"].items():
            layers += [
                {"run": record["run"], "convolution": name, "layer": layer, "distance": distance}
                for layer, distance in enumerate(values, start=1)
            ]
    order = {name: place for place, name in enumerate(sorted(row["run"] for row in runs))}
    runs.sort(key=lambda row: order[row["run"]])
    layers.sort(key=lambda row: order.get(row["run"], len(order)))
    if runs:
        tables.write_csv(folder / RUNS, tables.from_rows(runs), exact=True)
        tables.write_csv(folder / DISTANCES, tables.from_rows(layers), exact=True)
    return len(runs)


def _read_record(path: Path) -> dict[str, Any]:
    aside = "move it aside, and restore it from where the run was trained"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole record of a run ({error!r}): {aside}.") from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} has record version {version!r}, expected {VERSION}: read it with the version of this project that "
            "wrote it."
        )
    if lacking := [name for name in ENTRIES if name not in record]:
        raise CheckpointError(f"{path} is not a whole record of a run (it lacks {', '.join(lacking)}): {aside}.")
    if record["run"] != path.stem:
        raise CheckpointError(
            f"{path} is the record of {record['run']}, expected that of its name: rename it, or {aside}."
        )
    return record


def _rows(path: Path, ended: bool = True) -> list[dict[str, Any]]:
    return tables.rows(tables.read_csv(path, ended)) if path.exists() else []


def _kept_rows(path: Path, recorded: set[str]) -> list[dict[str, Any]]:
    return [row for row in _rows(path) if row["run"] not in recorded]


def _entry(value: Any) -> Any:
    # One entry that is no number makes texts of its whole column: the others are none the worse for it.
    value = checks.plain(value)
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


@dataclass(frozen=True)
class Run:
    """A row of ``runs.csv``: the ``config`` and every other column in ``values`` (nan if undefined)."""

    config: CifarConfig
    values: dict[str, Any]
    folder: Path

    @property
    def path(self) -> Path:
        """Its checkpoint; the file exists if ``has_weights``."""
        return self.folder / f"{self.config.name}.safetensors"

    @property
    def has_weights(self) -> bool:
        return self.path.exists()

    def load(self) -> Checkpoint:
        """Its network, rebuilt from the checkpoint."""
        return load(self.path)

    def log(self) -> list[dict[str, Any]]:
        """A line an epoch (`progress.EpochRecord`), out of its record; none if the record is not there."""
        path = record_path(self.config, self.folder)
        return _read_record(path)["log"] if path.exists() else []

    def layers(self) -> layer_log.LayerLog:
        """Its layer log (`lib.cifar.layer_log`); an empty one if the run was trained before there were such logs."""
        path = layer_log_path(self.config, self.folder)
        return layer_log.read(path, self.config.name) if path.exists() else {}


def read_runs(folder: Path | None = None) -> list[Run]:
    """The rows of ``checkpoints/runs.csv`` (none if there is no such file)."""
    folder = folder or paths.CHECKPOINTS
    names = [field.name for field in fields(CifarConfig)]
    runs = []
    for number, row in enumerate(_rows(folder / RUNS), start=2):
        try:
            row = rename_saved(row)
            config = CifarConfig(**{name: _entry(row[name]) for name in names if name in row})
        except (ValueError, TypeError) as error:
            raise tables.TableError(f"{paths.short(folder / RUNS)}, line {number}: {error}") from error
        values = {name: checks.plain(value) for name, value in row.items() if name not in names}
        runs.append(Run(config, values, folder))
    return runs


def read_distances(folder: Path | None = None) -> dict[str, np.ndarray]:
    """``checkpoints/successive_distance.csv`` as a table; without rows if there is no such file."""
    return read_table(DISTANCES, ("run", "convolution", "layer", "distance"), folder)


def read_spike() -> dict[str, np.ndarray]:
    """``checkpoints/loss_spike.csv``, a line a step (`training.watch`); no rows if there is no such file."""
    return read_table(SPIKE, ("epoch", "step", "loss", "stem_scale", "path_length"))


def read_rounding() -> dict[str, np.ndarray]:
    """``checkpoints/rounding.csv``, runs in float32 and in float64, a line every so many steps
    (`training.watch`); no rows if there is no such file."""
    measured = (f"{what}_{name}" for what in ("von_neumann", "noise") for name in CONVOLUTIONS)
    return read_table(ROUNDING, ("depth", "batch_size", "dtype", "seed", "epoch", "step", "loss", *measured))


def read_published() -> dict[str, np.ndarray]:
    """``checkpoints/published_curves.csv``: four entries of the authors' network (GELU, weight-tied) over its layers,
    read off the two pictures of it that they published; no rows if there is no such file."""
    return read_table(PUBLISHED, ("picture", "convolution", "layer", "entry"))


# Tables of `lib.cifar.measured` by name, ``checkpoints/<name>.csv``, and their columns.
MEASURED = {
    "resampling": ("run", "layers", "weights", "statistics", "images", "accuracy", "accuracy_all", "distance"),
    "solvers": ("run", "method", "steps", "evaluations", "error", "error_network"),
    "reversible": ("run", "method", "layers", "state", "gradient"),
    "memory": ("layers", "stored", "backwards"),
}
KEPT = {"weights": "kept", "statistics": "kept"}  # the rows of "resampling" for layers as they are


def read_measured(name: str) -> dict[str, np.ndarray]:
    """A table of `MEASURED`; no rows if there is no such file."""
    return read_table(f"{name}.csv", MEASURED[name])


def read_table(name: str, columns: Iterable[str], folder: Path | None = None) -> dict[str, np.ndarray]:
    """The table of that file name in ``checkpoints/``; these columns without rows if there is no such file."""
    path = (folder or paths.CHECKPOINTS) / name
    return tables.read_csv(path, ended=True) if path.exists() else {column: np.array([]) for column in columns}


def select(runs: Iterable[Run], **conditions: Any) -> list[Run]:
    """The runs whose config has these values; a condition of None is left out."""
    wanted = {name: value for name, value in conditions.items() if value is not None}
    return [run for run in runs if all(getattr(run.config, name) == value for name, value in wanted.items())]


def training_length(epochs: int) -> str:
    """In words, how long a network was trained beside the paper's: "own schedule of 30 epochs (paper: 180)"."""
    if epochs == PAPER_EPOCHS:
        return f"{epochs} epochs"
    return f"own schedule of {epochs} epochs (paper: {PAPER_EPOCHS})"


# ------------------------------------------------------------------------------------------------- the sweep


def sweep(epochs: int | None = None, folder: Path | None = None) -> list[CifarConfig]:
    """The runs listed in ``checkpoints/sweep.csv``, in order; ``epochs`` replaces the length of all."""
    names = {field.name for field in fields(CifarConfig)}
    configs = []
    for number, row in enumerate(_rows((folder or paths.CHECKPOINTS) / SWEEP, ended=False), start=2):  # people edit it
        try:
            row = rename_saved(row)
            config = CifarConfig(**{name: _entry(row[name]) for name in names if name in row})
        except (ValueError, TypeError) as error:
            raise tables.TableError(f"{SWEEP}, line {number}: {error}") from error
        if unknown := sorted(row.keys() - names):
            raise ValueError(f"{SWEEP} has a column {unknown[0]}, expected some of: {', '.join(sorted(names))}.")
        configs.append(config if epochs is None else replace(config, epochs=epochs))
    return configs


def finished(folder: Path | None = None) -> set[str]:
    """The names of all runs in ``runs.csv`` or with a record."""
    folder = folder or paths.CHECKPOINTS
    recorded = {path.stem for path in _record_paths(folder)}
    return recorded | {str(row["run"]) for row in _rows(folder / RUNS)}


# --- Command line: python -m lib.cifar.records pending | gather ---


def main(arguments: list[str] | None = None) -> int:
    """``pending [--epochs N]`` lists the runs of the sweep that are not finished, ``gather`` makes the tables."""
    parser = argparse.ArgumentParser(prog="python -m lib.cifar.records", description="The records of trained networks.")
    commands = parser.add_subparsers(required=True, dest="command")
    pending = commands.add_parser("pending", help=f"list the runs of checkpoints/{SWEEP} that are not finished")
    pending.add_argument("--epochs", type=int, help="for schedules of this length")
    commands.add_parser("gather", help=f"make {RUNS} and {DISTANCES} from the records")
    chosen = parser.parse_args(arguments)
    return checks.exit_code(partial(_command, chosen), failures=(ValueError, TypeError, OSError))


def _command(chosen: argparse.Namespace) -> None:
    if chosen.command == "gather":
        print(f"checkpoints/{RUNS}: {gather()} runs")
        return
    done = finished()
    print("\n".join(config.name for config in sweep(chosen.epochs) if config.name not in done))


if __name__ == "__main__":
    sys.exit(main())
