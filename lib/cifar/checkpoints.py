"""Trained networks as safetensors files, from which alone they are rebuilt, and a converter of the released files.

A file holds the network's state dict, with the released names (see `lib.cifar.network`). Its header holds, as JSON, the
whole configuration, a summary of the log, library versions and the format's version.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib import commands, paths
from lib.cifar import monitor, states
from lib.cifar.config import CifarConfig, rename_saved
from lib.cifar.network import ConvResNet

FORMAT = "convolutional residual network"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network with what is known about it.

    ``summary`` holds epochs, last and best accuracies in %, smoothness, seconds, device and engine (see
    `lib.cifar.records.summarise`). ``versions`` are those of the libraries that trained it. ``origin`` is "trained
    here" or the file that it was converted from.
    """

    config: CifarConfig
    network: ConvResNet
    summary: dict[str, Any]
    versions: dict[str, str]
    origin: str = "trained here"


class CheckpointError(ValueError):
    """The file is not a complete checkpoint of this format. The message says what is wrong."""


# -------------------------------------------------------------------------------------- safetensors files


def save(path: Path | str, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, atomically; returns the path. Raises CheckpointError if a tensor is not finite."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()  # safetensors refuses views of one storage
        for name, tensor in checkpoint.network.state_dict().items()
    }
    if found := monitor.find_not_finite(tensors):
        raise CheckpointError(f"{path} is not written, since {found}, expected finite numbers.")
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(asdict(checkpoint.config)),
        "summary": json.dumps(checkpoint.summary),
        "versions": json.dumps(checkpoint.versions),
        "origin": checkpoint.origin,
    }
    path = Path(path)
    paths.make_folder(path.parent)
    paths.write_atomically(path, lambda draft: safetensors.torch.save_file(tensors, draft, metadata=header))
    return path


def load(path: Path | str, device: str | torch.device = "cpu") -> Checkpoint:
    """Rebuild a network, in evaluation mode, from the file alone.

    Raises CheckpointError, which names the file and, if a tensor is wrong, the tensor and both shapes. Raises OSError
    if the system cannot read the file.
    """
    path = Path(path)
    header, tensors = _read(path)
    config, summary = _parse_header(path, header)
    network = ConvResNet(config.network)
    _check_tensors(path, tensors, network.state_dict(), "fetch or train it again")
    network.load_state_dict(tensors)
    return Checkpoint(config, network.to(device).eval(), summary, json.loads(header["versions"]), header["origin"])


def read_header(path: Path | str) -> tuple[CifarConfig, dict[str, Any]]:
    """The config and the summary of a checkpoint, without its weights."""
    header, _ = _read(Path(path), with_tensors=False)
    return _parse_header(Path(path), header)


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a checkpoint, such as {path}/NAME.safetensors.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}: train it with make train, or check the name.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}): it was cut off or is of another format; move it "
            f"aside, and fetch or train it again."
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file whose header has format {header.get('format')!r}, expected "
            f"{FORMAT!r}: it was not written by this project "
            "(python -m lib.cifar.checkpoints convert takes .pth files)."
        )
    if header.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {header.get('format_version')!r}, expected {FORMAT_VERSION}: "
            f"read it with the version of this project that wrote it."
        )
    return header, tensors


def _parse_header(path: Path, header: dict[str, str]) -> tuple[CifarConfig, dict[str, Any]]:
    """The config and the summary in a checkpoint's header."""
    if lacking := [name for name in ("config", "summary", "versions", "origin") if name not in header]:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)} in its header: fetch or train it again.")
    try:
        return CifarConfig(**rename_saved(json.loads(header["config"]))), json.loads(header["summary"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a configuration that cannot be read: {error}") from error


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor], next_step: str) -> None:
    mismatch = f"its configuration does not fit its weights; {next_step}"
    others = [name for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            instead = f" (it holds {others[0]})" if others else ""
            raise CheckpointError(
                f"{path} lacks the tensor {name}, expected with shape {tuple(tensor.shape)}{instead}: {mismatch}."
            )
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: the tensor {name} has shape {tuple(found[name].shape)}, expected "
                f"{tuple(tensor.shape)}: {mismatch}."
            )
        if found[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: the tensor {name} has type {found[name].dtype}, expected {tensor.dtype}: {mismatch}."
            )
    if others:
        shape = tuple(found[others[0]].shape)
        raise CheckpointError(
            f"{path} holds a tensor {others[0]} of shape {shape} that its network does not have: {mismatch}."
        )


# -------------------------------------------------------------------------- the authors' released format

_RELEASED_NAME = re.compile(
    r"ckpt_lr_(?P<learning_rate>[^_]+)_depth_(?P<depth>\d+)_seed_(?P<seed>\d+)_use_bn_(?P<batch_norm>True|False)"
    r"_smooth_init_(?P<smooth_init>True|False)_adaptive_(?P<adaptive>True|False)_non_lin_(?P<activation>[A-Za-z_]+)"
)
_EXAMPLE = "ckpt_lr_4e-02_depth_256_seed_0_use_bn_True_smooth_init_True_adaptive_False_non_lin_gelu.pth"
# Prefixes that wrappers add to the names of tensors, and counters that a profiler (thop) adds to the tensors.
_PREFIXES = ("module.", "_orig_mod.")
_COUNTERS = ("total_ops", "total_params")
_STATE_DICTS = ("net", "state_dict", "model_state_dict", "model")
_LAYER = re.compile(r"residual_layers\.(\d+)\.")


def convert_released(
    source: Path | str,
    target: Path | str | None = None,
    epochs: int | None = None,
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a ``.pth`` file of the authors' released format; returns the path of the safetensors file.

    Such a file holds {"net", "acc", "epoch", "log_dict"}. Its arguments are only in its name; if the file was renamed,
    give the original ``name``. ``epochs`` is the length of the cosine schedule, which the file does not hold: by
    default it is the number of epochs in the log. A state dict alone, names with the prefix ``module.``, half and
    double precision, and an incomplete log are accepted too. What the log lacks is None in the summary. No code in the
    file is run.

    Raises FileNotFoundError; FileExistsError if ``target`` exists and ``overwrite`` is False; and CheckpointError if
    the file cannot be converted.
    """
    source = Path(source)
    target = Path(target) if target is not None else source.with_suffix(".safetensors")
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}: check the path.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already: name another target, or replace it with --overwrite.")
    values = _parse_name(source, name)
    tensors, log = _read_released(source)
    trained = len(log["train_acc"])
    if epochs is None and not trained:
        raise CheckpointError(
            f"{source} holds no log that tells how many epochs the network was trained: give the number with --epochs."
        )
    try:
        config = CifarConfig(**values, epochs=trained if epochs is None else epochs)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source} cannot be converted: {error}") from error
    network = ConvResNet(config.network)
    tensors = _match_tensors(source, tensors, network.state_dict(), config)
    _check_tensors(source, tensors, network.state_dict(), "look at its name and at where the network was made")
    network.load_state_dict(tensors)
    measured = monitor.measure(network)
    summary = {
        "epochs": trained or config.epochs,
        "train_accuracy": _last(log["train_acc"]),
        "train_accuracy_best": max(log["train_acc"], default=None),
        "test_accuracy": _last(log["test_acc"]),
        "test_accuracy_best": max(log["test_acc"], default=None),
        "train_loss": _last(log["train_loss"]),
        "test_loss": _last(log["test_loss"]),
        "von_neumann_conv1": measured["von_neumann_conv1"],
        "von_neumann_conv2": measured["von_neumann_conv2"],
    }
    return save(target, Checkpoint(config, network, summary, {}, origin=f"converted from {source.name}"))


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _parse_name(source: Path, name: str | None) -> dict[str, Any]:
    """The values of a config that the name of a released file holds."""
    match = _RELEASED_NAME.search(name or source.name)
    if match is None:
        raise CheckpointError(
            f"{name or source} does not name its run, expected a name such as {_EXAMPLE}: rename the file, or give its "
            "original name with --name."
        )
    found = match.groupdict()
    try:
        found["learning_rate"] = float(found["learning_rate"])
    except ValueError:
        raise CheckpointError(
            f"{name or source} names the learning rate {found['learning_rate']!r}, expected a number as in {_EXAMPLE}."
        ) from None
    flags = {flag: found[flag] == "True" for flag in ("batch_norm", "smooth_init", "adaptive")}
    return rename_saved(found | flags) | {"depth": int(found["depth"]), "seed": int(found["seed"])}


def _read_released(source: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The tensors of a released file, and its log: train and test loss and accuracy, each a list of numbers, which is
    empty if the file has none."""
    with torch.serialization.safe_globals(_plain_data()):
        try:
            content = states.read_saved(source)
        except states.DamagedFile as error:
            raise CheckpointError(
                f"{source} is not a complete file of tensors and numbers ({error}){_advise(source)}."
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, expected a dict with the entries net and log_dict, or a state "
            "dict: save it with torch.save(network.state_dict(), file) where it was trained."
        )
    key = next((key for key in _STATE_DICTS if isinstance(content.get(key), dict)), None)
    tensors, log = (content, {}) if key is None else (content[key], content.get("log_dict"))
    arrays = {entry for entry, value in tensors.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"}
    tensors = {entry: torch.tensor(value) if entry in arrays else value for entry, value in tensors.items()}
    wrong = [entry for entry, value in tensors.items() if _name_type(value) != "Tensor" or not isinstance(entry, str)]
    if wrong or not tensors:
        found = f"{wrong[0]}, a {_name_type(tensors[wrong[0]])}" if wrong else "nothing"
        raise CheckpointError(
            f"{source} holds {found}{f' in {key}' if key else ''}, expected the tensors of a state dict, alone or "
            "under net: save it with torch.save(network.state_dict(), file) where it was trained."
        )
    log = log if isinstance(log, dict) else {}
    return tensors, {name: _read_curve(log.get(name)) for name in ("train_loss", "test_loss", "train_acc", "test_acc")}


def _name_type(value: Any) -> str:
    # "Tensor" only for a dense tensor that holds numbers.
    if isinstance(value, Tensor) and value.is_meta:
        return "tensor without numbers (meta)"
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return "sparse tensor"
    return type(value).__name__


def _plain_data() -> list[Any]:
    """The types in a pickle of numpy's numbers and arrays and of a command's arguments. They are data, not code."""
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.array(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and of numpy 2
    named = [(maker, f"{module}.{name}") for name, maker in makers.items() for module in modules]
    return [
        *named,
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdSUMm"},
    ]


def _advise(source: Path) -> str:
    """What to do about a file that `states.read_saved` does not read, as the end of a sentence."""
    try:
        with torch.serialization.safe_globals(_plain_data()):
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:  # not a pickle
        objects = []
    if objects:
        listed = ", ".join(sorted(objects)[:3])
        return (
            f", as it holds objects of {listed}, which could run code: save only the network's state_dict() where it "
            "was trained, and convert that"
        )
    return ": it was cut off or is of another format; fetch it again"


def _read_curve(values: Any) -> list[float]:
    """A curve of a log: a list of numbers or tensors, one tensor, or one array. Empty for everything else."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return []


def _match_tensors(
    source: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor], config: CifarConfig
) -> dict[str, Tensor]:
    """The tensors by the network's names and in its dtypes. Names that the network does not have stay as they are."""
    fitted = {}
    for name, tensor in tensors.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name in fitted:
            raise CheckpointError(f"{source} holds {name} twice, with and without a prefix: keep one of them.")
        if name.rpartition(".")[2] not in _COUNTERS:
            fitted[name] = tensor
    layers = {int(match[1]) for name in fitted if (match := _LAYER.match(name))}
    if layers and len(layers) != config.depth:
        raise CheckpointError(
            f"{source} holds {len(layers)} residual layers (up to residual_layers.{max(layers)}), expected "
            f"{config.depth} by its name: give the right name with --name ckpt_..._depth_{len(layers)}_..."
        )
    for name, tensor in expected.items():
        if name not in fitted and name.endswith("num_batches_tracked"):
            fitted[name] = tensor  # old PyTorch versions saved no such counters
        elif name in fitted and (fitted[name].is_floating_point() or not tensor.is_floating_point()):
            fitted[name] = fitted[name].to(tensor.dtype)
    if found := monitor.find_not_finite(fitted):
        raise CheckpointError(
            f"{source} is not a trained network, since {found}: convert a state from before it diverged."
        )
    return fitted


def main(arguments: list[str] | None = None) -> int:
    """``python -m lib.cifar.checkpoints convert FILE.pth [TARGET] [--epochs N] [--name NAME] [--overwrite]``, or ``show
    FILE``."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.cifar.checkpoints", description="Look at and convert checkpoints."
    )
    parsers = parser.add_subparsers(required=True, dest="command")
    convert = parsers.add_parser("convert", help="convert a .pth file of the released format to safetensors")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path, nargs="?")
    convert.add_argument("--epochs", type=int, help="length of its schedule (default: the epochs of its log)")
    convert.add_argument("--name", help=f"the name that a renamed file had, such as {_EXAMPLE}")
    convert.add_argument("--overwrite", action="store_true", help="replace a target that is there")
    show = parsers.add_parser("show", help="print what the header of a checkpoint says")
    show.add_argument("source", type=Path)
    chosen = parser.parse_args(arguments)
    return commands.exit_code(partial(_command, chosen), failures=(ValueError, OSError, MemoryError, RuntimeError))


def _command(chosen: argparse.Namespace) -> None:
    path = chosen.source
    if chosen.command == "convert":
        options = {"name": chosen.name, "overwrite": chosen.overwrite}
        path = convert_released(chosen.source, chosen.target, chosen.epochs, **options)
    config, summary = read_header(path)
    print(f"{path}: {config.name}")
    for name, value in {**asdict(config), **summary}.items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
