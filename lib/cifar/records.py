"""The record of every trained run, and the tables in ``checkpoints/`` that are gathered from the records.

A record is a JSON file that a run writes of everything but its weights. `gather` writes two tables from all records:

    runs.csv                    one row for each run,
    successive_distance.csv     one row for each run, convolution and layer.

A run that has a record or a row in ``runs.csv`` is finished, and is never trained again.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import checks, commands, measures, paths, tables
from lib.checks import Divergence
from lib.cifar import layer_log, monitor, states
from lib.cifar.checkpoints import Checkpoint, CheckpointError, load, save
from lib.cifar.config import CifarConfig, rename_saved
from lib.cifar.network import CONVOLUTIONS, ConvResNet

VERSION = 1
ENTRIES = ("run", "config", "summary", "versions", "successive_distance", "log")
NAMES = tuple(field.name for field in fields(CifarConfig))
PAPER_EPOCHS = 180
SHARES = tuple(f"smooth_share_{name}" for name in CONVOLUTIONS)  # of the depth; older records lack them
RUNS, DISTANCES, SWEEP = "runs.csv", "successive_distance.csv", "sweep.csv"
SPIKE, ROUNDING, PUBLISHED = "loss_spike.csv", "rounding.csv", "published_curves.csv"


# ------------------------------------------------------------------------------------------ of a finished run


def summarise(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a log: epochs, accuracies (%; last and best), losses, smoothness of both convolutions, seconds in
    all, device, engine and number of threads. If a run changed its device, engine or threads, all are joined by " + ".
    """
    tested = [line for line in log if line["test_accuracy"] is not None]

    def join(name: str) -> str:
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
        "device": join("device"),
        "engine": join("engine"),
        "threads": join("threads"),
    }


def successive_distances(network: ConvResNet) -> dict[str, list[float]]:
    """|conv_{i,k+1} - conv_{i,k}|_F for i = 1, 2 and k = 1..L-1, by the names "conv1" and "conv2"."""
    return {
        name: torch.diff(weight.double(), dim=0).flatten(1).norm(dim=1).tolist()
        for name, weight in network.kernels().items()
    }


def export(config: CifarConfig, folder: Path | str | None = None) -> tuple[Path, Path]:
    """Write the checkpoint and the record of a finished run into the folder of its state; returns both paths.

    The layer log of the run is written beside its record. Raises ValueError if the run has not reached its last epoch,
    or if the state belongs to another run, and Divergence if its losses or weights are not finite.
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
    if found := monitor.find_not_finite({**network.state_dict(), **losses}):
        raise Divergence(
            f"The run {config.name} in {folder} is not a result, since {found}: train one with a learning rate below "
            f"{config.learning_rate:g}."
        )
    shares = (measures.smooth_share(kernels) for kernels in network.kernels().values())
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
    paths.write_content(record, _format_record(entries))
    return weights, record


def _format_record(entries: dict[str, Any]) -> str:
    """JSON with one line for each entry, and in the log one line for each epoch."""
    lines = {name: json.dumps(value) for name, value in entries.items()}
    lines["log"] = "[\n  " + ",\n  ".join(json.dumps(line) for line in entries["log"]) + "\n ]"
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {text}" for name, text in lines.items()) + "\n}\n"


def publish(config: CifarConfig, folder: Path | str | None = None, into: Path | None = None) -> Path:
    """Copy the files that `export` wrote to ``checkpoints/`` (or ``into``); returns the record's new path.

    The record is copied last, since it marks the run as finished.
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
            continue  # older runs have no layer log
        paths.write_content(target, source.read_bytes())
    return record


def record_path(config: CifarConfig, folder: Path | None = None) -> Path:
    """The path of a run's record, whether it exists or not."""
    return (folder or paths.CHECKPOINTS) / "records" / f"{config.name}.json"


def layer_log_path(config: CifarConfig, folder: Path | None = None) -> Path:
    """The path of a run's layer log, whether it exists or not."""
    return (folder or paths.CHECKPOINTS) / "records" / f"{config.name}{layer_log.ENDING}"


# ------------------------------------------------------------------------------------------------ the tables


def gather(folder: Path | None = None) -> int:
    """Write ``runs.csv`` and ``successive_distance.csv``; returns the number of runs.

    If a run has a row but no record, its row is kept as it is. Raises CheckpointError if a record is damaged.
    """
    folder = folder or paths.CHECKPOINTS
    while True:
        found = _record_paths(folder)
        runs = _write_tables(folder, found)
        # Two processes may gather at the same time. The last to write may not have read the other's record yet.
        if _record_paths(folder) == found:
            return runs


def _record_paths(folder: Path) -> list[Path]:
    return sorted((folder / "records").glob("*.json"))


def _write_tables(folder: Path, found: Sequence[Path]) -> int:
    records = [_read_record(path) for path in found]
    recorded = {record["run"] for record in records}
    runs, layers = (_rows_without_record(folder / name, recorded) for name in (RUNS, DISTANCES))
    runs = [asdict(CifarConfig()) | rename_saved(row) for row in runs]  # older rows lack some options
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
    next_step = layer_log.ASIDE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete record of a run ({error!r}): {next_step}.") from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} has record version {version!r}, expected {VERSION}: read it with the version of this project that "
            "wrote it."
        )
    if lacking := [name for name in ENTRIES if name not in record]:
        raise CheckpointError(f"{path} is not a complete record of a run (it lacks {', '.join(lacking)}): {next_step}.")
    if record["run"] != path.stem:
        raise CheckpointError(
            f"{path} is the record of {record['run']}, expected a file of that name: rename it, or {next_step}."
        )
    return record


def _rows(path: Path) -> list[dict[str, Any]]:
    return tables.rows(tables.read_csv(path, ended=True)) if path.exists() else []


def _rows_without_record(path: Path, recorded: set[str]) -> list[dict[str, Any]]:
    return [row for row in _rows(path) if row["run"] not in recorded]


def _parse_entry(value: Any) -> Any:
    # If one entry of a column is a text, all its entries are read as texts, numbers and booleans too.
    value = checks.plain(value)
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


@dataclass(frozen=True)
class Run:
    """A row of ``runs.csv``: the ``config``, and every other column in ``values`` (nan if undefined)."""

    config: CifarConfig
    values: dict[str, Any]
    folder: Path

    @property
    def path(self) -> Path:
        """The path of its checkpoint. The file exists if ``has_weights``."""
        return self.folder / f"{self.config.name}.safetensors"

    @property
    def has_weights(self) -> bool:
        return self.path.exists()

    def load(self) -> Checkpoint:
        """Its network, rebuilt from the checkpoint."""
        return load(self.path)

    def log(self) -> list[dict[str, Any]]:
        """One line for each epoch (`progress.EpochRecord`), from its record; empty if there is no record."""
        path = record_path(self.config, self.folder)
        return _read_record(path)["log"] if path.exists() else []

    def layers(self) -> layer_log.LayerLog:
        """Its layer log (`lib.cifar.layer_log`); empty if there is none."""
        path = layer_log_path(self.config, self.folder)
        return layer_log.read(path, self.config.name) if path.exists() else {}


def read_runs(folder: Path | None = None) -> list[Run]:
    """The rows of ``checkpoints/runs.csv`` (none if there is no such file)."""
    folder = folder or paths.CHECKPOINTS
    return [
        Run(config, {name: checks.plain(value) for name, value in row.items() if name not in NAMES}, folder)
        for row, config in _parse_configs(folder / RUNS)
    ]


def _parse_configs(path: Path, ended: bool = True) -> Iterator[tuple[dict[str, Any], CifarConfig]]:
    """Each row of a table (none if there is no file), by the names of `CifarConfig`, and its config."""
    table, lines = tables.read_numbered(path, ended) if path.exists() else ({}, [])
    for line, row in zip(lines, tables.rows(table), strict=True):
        try:
            row = rename_saved(row)
            yield row, CifarConfig(**{name: _parse_entry(row[name]) for name in NAMES if name in row})
        except (ValueError, TypeError) as error:
            raise tables.TableError(f"{paths.shorten(path)}, line {line}: {error}") from error


def read_distances(folder: Path | None = None) -> dict[str, np.ndarray]:
    """``checkpoints/successive_distance.csv``, one row for each run, convolution and layer (see `read_table`)."""
    return read_table(DISTANCES, ("run", "convolution", "layer", "distance"), folder)


def read_spike() -> dict[str, np.ndarray]:
    """``checkpoints/loss_spike.csv``, one row for each step (`monitor.watch`)."""
    return read_table(SPIKE, ("epoch", "step", "loss", "stem_scale", "path_length"))


def read_rounding() -> dict[str, np.ndarray]:
    """``checkpoints/rounding.csv``: runs in float32 and in float64, measured every so many steps (`monitor.watch`)."""
    measured = (f"{what}_{name}" for what in ("von_neumann", "noise") for name in CONVOLUTIONS)
    return read_table(ROUNDING, ("depth", "batch_size", "dtype", "seed", "epoch", "step", "loss", *measured))


def read_published() -> dict[str, np.ndarray]:
    """``checkpoints/published_curves.csv``: four entries of the authors' network (GELU, weight-tied) over its layers,
    read off the two pictures that they published."""
    return read_table(PUBLISHED, ("picture", "convolution", "layer", "entry"))


# The tables ``checkpoints/<name>.csv`` of `lib.cifar.measured`, by name, with their columns.
MEASURED = {
    "resampling": ("run", "layers", "weights", "statistics", "images", "accuracy", "accuracy_all", "distance"),
    "solvers": ("run", "method", "steps", "evaluations", "error", "error_network"),
    "reversible": ("run", "method", "layers", "state", "gradient"),
    "memory": ("layers", "stored", "backwards"),
}
KEPT = {"weights": "kept", "statistics": "kept"}  # rows of "resampling" in which every r-th layer is kept as it is


def read_measured(name: str) -> dict[str, np.ndarray]:
    """A table of `MEASURED`, by its name."""
    return read_table(f"{name}.csv", MEASURED[name])


def read_table(name: str, columns: Sequence[str], folder: Path | None = None) -> dict[str, np.ndarray]:
    """The table of that file name in ``checkpoints/``, which has these columns at least. Without the file it has no
    rows."""
    path = (folder or paths.CHECKPOINTS) / name
    found = tables.read_csv(path, ended=True) if path.exists() else dict.fromkeys(columns, np.array([]))
    if lacking := [column for column in columns if column not in found]:
        raise tables.TableError(f"{paths.shorten(path)} has no column {lacking[0]}: restore the file, or remove it.")
    return found


def select(runs: Iterable[Run], **conditions: Any) -> list[Run]:
    """The runs whose config has these values. A condition that is None is ignored."""
    wanted = {name: value for name, value in conditions.items() if value is not None}
    return [run for run in runs if all(getattr(run.config, name) == value for name, value in wanted.items())]


def describe_length(epochs: int) -> str:
    """The length of a training in words, compared with the paper's: "a schedule of 30 epochs (paper: 180)"."""
    if epochs == PAPER_EPOCHS:
        return f"{epochs} epochs"
    return f"a schedule of {epochs} epochs (paper: {PAPER_EPOCHS})"


# ------------------------------------------------------------------------------------------------- the sweep


def read_sweep(epochs: int | None = None, folder: Path | None = None) -> list[CifarConfig]:
    """The runs listed in ``checkpoints/sweep.csv``, in order. If given, ``epochs`` replaces the length of all."""
    configs, path = [], (folder or paths.CHECKPOINTS) / SWEEP
    for row, config in _parse_configs(path, ended=False):  # people edit it
        if unknown := sorted(row.keys() - {*NAMES}):
            expected = f"expected columns among: {', '.join(sorted(NAMES))}"
            raise ValueError(f"{paths.shorten(path)} has a column {unknown[0]}, {expected}.")
        configs.append(config if epochs is None else replace(config, epochs=epochs))
    return configs


def finished_runs(folder: Path | None = None) -> set[str]:
    """The names of all runs in ``runs.csv`` or with a record."""
    folder = folder or paths.CHECKPOINTS
    recorded = {path.stem for path in _record_paths(folder)}
    return recorded | {str(row["run"]) for row in _rows(folder / RUNS)}


# --- Command line: python -m lib.cifar.records pending | gather ---


def main(arguments: list[str] | None = None) -> int:
    """``pending [--epochs N]`` lists the runs of the sweep that are not finished, ``gather`` makes the tables."""
    parser = argparse.ArgumentParser(prog="python -m lib.cifar.records", description="The records of trained networks.")
    parsers = parser.add_subparsers(required=True, dest="command")
    pending = parsers.add_parser("pending", help=f"list the runs of checkpoints/{SWEEP} that are not finished")
    pending.add_argument("--epochs", type=int, help="for schedules of this length")
    parsers.add_parser("gather", help=f"make {RUNS} and {DISTANCES} from the records")
    chosen = parser.parse_args(arguments)
    return commands.exit_code(partial(_command, chosen), failures=(ValueError, TypeError, OSError))


def _command(chosen: argparse.Namespace) -> None:
    if chosen.command == "gather":
        print(f"checkpoints/{RUNS}: {gather()} runs")
        return
    done = finished_runs()
    print("\n".join(config.name for config in read_sweep(chosen.epochs) if config.name not in done))


if __name__ == "__main__":
    sys.exit(main())
