"""Trained networks as safetensors files that rebuild themselves, and a converter of the released ones.

A file holds the network's state dict (the released names, see `lib.convnet`) and, as JSON in its header, the
whole configuration, a summary of the log, library versions and the format's version.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import cifar_training, paths
from lib.cifar_training import CifarConfig
from lib.convnet import ConvResNet

FORMAT = "convolutional residual network"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network with what is known about it.

    ``summary`` holds epochs, last and best accuracies in %, smoothness, seconds, device and engine (see
    `lib.records.summarise`); ``versions`` the libraries that trained it; ``origin`` "trained here" or the file it was
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
    paths.make_folder(path.parent)
    paths.write_atomically(path, lambda draft: save_file(tensors, draft, metadata=header))
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
    measured = cifar_training.measured(network)
    summary = {
        "epochs": len(train),
        "train_accuracy": train[-1],
        "train_accuracy_best": max(train),
        "test_accuracy": test[-1],
        "test_accuracy_best": max(test),
        "train_loss": log["train_loss"][-1],
        "test_loss": log["test_loss"][-1],
        "von_neumann_conv1": measured["von_neumann_conv1"],
        "von_neumann_conv2": measured["von_neumann_conv2"],
    }
    target = Path(target) if target is not None else source.with_suffix(".safetensors")
    return save(target, Checkpoint(config, network, summary, {}, origin=f"converted from {source.name}"))


def main(arguments: list[str] | None = None) -> int:
    """``python -m lib.checkpoints convert FILE.pth [TARGET] [--epochs N]``, or ``show FILE``."""
    parser = argparse.ArgumentParser(prog="python -m lib.checkpoints", description="Look at and convert checkpoints.")
    commands = parser.add_subparsers(required=True, dest="command")
    convert = commands.add_parser("convert", help="convert a .pth file of the released format to safetensors")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path, nargs="?")
    convert.add_argument("--epochs", type=int, help="length of its schedule (default: the epochs of its log)")
    show = commands.add_parser("show", help="print what the header of a checkpoint says")
    show.add_argument("source", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        path = chosen.source
        if chosen.command == "convert":
            path = convert_released(chosen.source, chosen.target, chosen.epochs)
        config, summary = read_header(path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: {config.name}")
    for name, value in {**asdict(config), **summary}.items():
        print(f"  {name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
