"""Trained networks as safetensors files that rebuild themselves, and the records of all trained runs.

A checkpoint holds the network's state dict (the released names) and, as JSON in the file's header, the whole
configuration, a summary of the log, library versions and the format's version. A record is a small JSON file
a run, weights not included: whole log, smoothness, per-layer successive distances. The two tables
``runs.csv`` and ``successive_distance.csv`` are gathered from the records, so that parallel runs cannot clash.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import cifar_training, paths, tables
from lib.cifar_training import CifarConfig, write_atomically
from lib.convnet import ConvResNet

FORMAT = "convolutional residual network"
FORMAT_VERSION = 1
RECORD_VERSION = 1
CONVOLUTIONS = ("conv1", "conv2")


@dataclass(frozen=True)
class Checkpoint:
    """A network with what is known about it.

    ``summary`` holds epochs, last and best accuracies in %, smoothness, seconds, device and engine (see
    `summarise`); ``versions`` the libraries that trained it; ``origin`` "trained here" or the file it was
    converted from.
    """

    config: CifarConfig
    network: ConvResNet
    summary: dict[str, Any]
    versions: dict[str, str]
    origin: str = "trained here"


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this format; the sentence says what is wrong where."""


# -------------------------------------------------------------------------------------- safetensors files


def save(path: Path | str, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, atomically. Returns the path."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()  # safetensors refuses views of one storage
        for name, tensor in checkpoint.network.state_dict().items()
    }
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(asdict(checkpoint.config)),
        "summary": json.dumps(checkpoint.summary),
        "versions": json.dumps(checkpoint.versions),
        "origin": checkpoint.origin,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda draft: save_file(tensors, draft, metadata=header))
    return path


def load(path: Path | str, device: str | torch.device = "cpu") -> Checkpoint:
    """Rebuild a network, in evaluation mode, from the file alone.

    Raises FileNotFoundError, or CheckpointError with one sentence that names the file and, where a tensor is
    at fault, the tensor and both shapes.
    """
    path = Path(path)
    header, tensors = _read(path)
    config = _config(path, header)
    network = ConvResNet(config.network)
    _check_tensors(path, tensors, network.state_dict())
    network.load_state_dict(tensors)
    summary, versions = (json.loads(header[name]) for name in ("summary", "versions"))
    return Checkpoint(config, network.to(device).eval(), summary, versions, header["origin"])


def read_header(path: Path | str) -> tuple[CifarConfig, dict[str, Any]]:
    """The config and the summary of a checkpoint, without its weights."""
    header, _ = _read(Path(path), with_tensors=False)
    return _config(Path(path), header), json.loads(header["summary"])


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}: train it with make train, or check the name.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): it was cut off or is of another format; "
            f"fetch or train it again."
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file whose header has format {header.get('format')!r}, expected "
            f"{FORMAT!r}: it was not written by this project."
        )
    if header.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {header.get('format_version')!r}, expected {FORMAT_VERSION}: "
            f"read it with the version of this project that wrote it."
        )
    return header, tensors


def _config(path: Path, header: dict[str, str]) -> CifarConfig:
    try:
        return CifarConfig(**json.loads(header["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a configuration that cannot be read: {error}") from error


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{path} lacks the tensor {name}, expected with shape {tuple(tensor.shape)}: "
                f"its configuration does not describe its weights."
            )
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: the tensor {name} has shape {tuple(found[name].shape)}, expected "
                f"{tuple(tensor.shape)}: its configuration does not describe its weights."
            )
        if found[name].dtype != tensor.dtype:
            raise CheckpointError(f"{path}: the tensor {name} has type {found[name].dtype}, expected {tensor.dtype}.")
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(
                f"{path} holds a tensor {name} of shape {tuple(tensor.shape)} that its network does not have: "
                f"its configuration does not describe its weights."
            )


# ------------------------------------------------------------------------------------------------ records


def summarise(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The log in one line: epochs, accuracies (%; last and best of the evaluated epochs), smoothness of both
    convolutions, seconds in all, device and engine (joined by " + " where a run moved), threads."""
    tested = [line for line in log if line.get("test_accuracy") is not None]

    def together(name: str) -> str:
        return " + ".join(dict.fromkeys(str(line[name]) for line in log if name in line))

    return {
        "epochs": len(log),
        "train_accuracy": log[-1]["train_accuracy"],
        "train_accuracy_best": max(line["train_accuracy"] for line in log),
        "test_accuracy": tested[-1]["test_accuracy"] if tested else None,
        "test_accuracy_best": max(line["test_accuracy"] for line in tested) if tested else None,
        "train_loss": log[-1]["train_loss"],
        "test_loss": tested[-1]["test_loss"] if tested else None,
        "von_neumann_conv1": log[-1].get("von_neumann_conv1"),
        "von_neumann_conv2": log[-1].get("von_neumann_conv2"),
        "seconds": round(sum(line.get("seconds", 0.0) for line in log), 1),
        "device": together("device"),
        "engine": together("engine"),
        "threads": together("threads"),
    }


def successive_distances(network: ConvResNet) -> dict[str, list[float]]:
    """|conv_{i,k+1} - conv_{i,k}|_F for i = 1, 2 and k = 1..L-1, by the names "conv1" and "conv2"."""
    weights = {name: network.residual_layers.stacked(f"{name}.weight").detach() for name in CONVOLUTIONS}
    return {
        name: torch.diff(weight.double(), dim=0).flatten(1).norm(dim=1).tolist() for name, weight in weights.items()
    }


def export(config: CifarConfig, folder: Path | str | None = None) -> Path:
    """Write the checkpoint and the record of a finished run beside its state; returns their folder.

    Raises ValueError where the run has not reached its last epoch.
    """
    folder = Path(folder) if folder is not None else cifar_training.run_folder(config)
    state = cifar_training.read_state(folder)
    complete = state["epoch"] if state else 0
    if complete < config.epochs:
        raise ValueError(
            f"The run {config.name} is at epoch {complete} of {config.epochs} in {folder}: train it to the end first."
        )
    network = ConvResNet(config.network)
    network.load_state_dict(state["network"])
    summary = summarise(state["log"])
    save(folder / f"{config.name}.safetensors", Checkpoint(config, network, summary, state["versions"]))
    record = {
        "record_version": RECORD_VERSION,
        "run": config.name,
        "config": asdict(config),
        "summary": summary,
        "versions": state["versions"],
        "log": state["log"],
        "successive_distance": successive_distances(network),
    }
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / f"{config.name}.json", lambda draft: draft.write_text(text))
    return folder


def publish(config: CifarConfig, folder: Path | str | None = None, into: Path | None = None) -> Path:
    """Copy what `export` wrote to ``checkpoints/`` (or ``into``); the record goes last: it means finished."""
    folder = Path(folder) if folder is not None else cifar_training.run_folder(config)
    into = into or paths.CHECKPOINTS
    record = record_path(config, into)
    record.parent.mkdir(parents=True, exist_ok=True)
    for source, target in (
        (folder / f"{config.name}.safetensors", into / f"{config.name}.safetensors"),
        (folder / f"{config.name}.json", record),
    ):
        content = source.read_bytes()
        write_atomically(target, lambda draft, content=content: draft.write_bytes(content))
    return record


def record_path(config: CifarConfig, folder: Path | None = None) -> Path:
    """Where the record of a run is, or will be."""
    return (folder or paths.CHECKPOINTS) / "records" / f"{config.name}.json"


def read_records(folder: Path | None = None) -> list[dict[str, Any]]:
    """All records of ``checkpoints/records`` (or of another such folder), by name."""
    records = []
    for path in sorted(((folder or paths.CHECKPOINTS) / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text())
            version = record["record_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a whole record of a run ({error}): train it again.") from error
        if version != RECORD_VERSION:
            raise CheckpointError(f"{path} has record version {version!r}, expected {RECORD_VERSION}.")
        records.append(record)
    return records


def gather(folder: Path | None = None) -> int:
    """Write ``runs.csv`` and ``successive_distance.csv`` from the records; returns the number of runs."""
    folder = folder or paths.CHECKPOINTS
    records = read_records(folder)
    runs = [{"run": r["run"], **r["config"], **_completed(r["summary"], r["config"]), **r["versions"]} for r in records]
    layers = [
        {"run": r["run"], "convolution": name, "layer": layer, "distance": distance}
        for r in records
        for name, values in r["successive_distance"].items()
        for layer, distance in enumerate(values, start=1)
    ]
    tables.write_csv(folder / "runs.csv", tables.from_rows(runs))
    tables.write_csv(folder / "successive_distance.csv", tables.from_rows(layers))
    return len(records)


def _completed(summary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    # A record exists for finished runs alone, where the epochs are the configuration's.
    row = {name: value for name, value in summary.items() if name not in config}
    return {name: math.nan if value is None else value for name, value in row.items()}


# -------------------------------------------------------------------------- the authors' released format

_RELEASED_NAME = re.compile(
    r"ckpt_lr_(?P<learning_rate>[^_]+)_depth_(?P<depth>\d+)_seed_(?P<seed>\d+)_use_bn_(?P<batch_norm>True|False)"
    r"_smooth_init_(?P<smooth_init>True|False)_adaptive_(?P<adaptive>True|False)_non_lin_(?P<activation>\w+)\.pth"
)


def convert_released(source: Path | str, target: Path | str | None = None, epochs: int | None = None) -> Path:
    """Convert a ``.pth`` file of the authors' released format; returns the path of the safetensors file.

    Such a file holds {"net", "acc", "epoch", "log_dict"}; the arguments are in its name alone. ``epochs`` is
    the length of the cosine schedule, which neither tells: by default the number of epochs in its log. The
    pickle is read with ``weights_only=True``, which runs no code from the file.
    """
    source = Path(source)
    match = _RELEASED_NAME.fullmatch(source.name)
    if match is None:
        raise CheckpointError(
            f"{source.name} does not name its run, expected a name such as ckpt_lr_4e-02_depth_256_seed_0"
            f"_use_bn_True_smooth_init_True_adaptive_False_non_lin_gelu.pth."
        )
    if not source.exists():
        raise FileNotFoundError(f"There is no file {source}.")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        tensors, log = dict(content["net"]), content["log_dict"]
        train, test = log["train_acc"], log["test_acc"]
    except Exception as error:  # the unpickler raises many types; each means the same here
        raise CheckpointError(
            f"{source} is not a whole checkpoint of the released format ({type(error).__name__}: {error})."
        ) from error
    config = CifarConfig(
        activation=match["activation"],
        smooth_init=match["smooth_init"] == "True",
        batch_norm=match["batch_norm"] == "True",
        depth=int(match["depth"]),
        learning_rate=float(match["learning_rate"]),
        epochs=epochs or len(train),
        adaptive=match["adaptive"] == "True",
        seed=int(match["seed"]),
    )
    network = ConvResNet(config.network)
    _check_tensors(source, tensors, network.state_dict())
    network.load_state_dict(tensors)
    summary = {
        "epochs": len(train),
        "train_accuracy": train[-1],
        "train_accuracy_best": max(train),
        "test_accuracy": test[-1],
        "test_accuracy_best": max(test),
        "train_loss": log["train_loss"][-1],
        "test_loss": log["test_loss"][-1],
        "von_neumann_conv1": cifar_training.smoothness(network, "conv1"),
        "von_neumann_conv2": cifar_training.smoothness(network, "conv2"),
    }
    target = Path(target) if target is not None else source.with_suffix(".safetensors")
    return save(target, Checkpoint(config, network, summary, {}, origin=f"converted from {source.name}"))
