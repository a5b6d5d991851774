"""Norms and differences of every layer's kernels after every epoch of a run, in one small file beside its record.

For each convolution i = 1, 2, with Z_k its kernel in layer k = 1..L:

    norm_conv{i}               |Z_k|_F                              (epochs, L)
    distance_conv{i}           |Z_{k+1} - Z_k|_F                    (epochs, L-1)
    second_difference_conv{i}  |Z_{k+2} - 2 Z_{k+1} + Z_k|_F        (epochs, L-2)

in float32, and ``epoch`` (epochs,), the number (0, 1, ...) of the epoch after which the row was measured. Older runs
may have no rows for their first epochs.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import paths
from lib.cifar.network import CONVOLUTIONS

FORMAT = "layer log"
FORMAT_VERSION = 1
ENDING = ".layers.safetensors"
MEASURED = ("norm", "distance", "second_difference")
NAMES = ("epoch", *(f"{what}_{name}" for name in CONVOLUTIONS for what in MEASURED))
ASIDE = "move it aside, and restore it from where the run was trained"
LayerLog = dict[str, Tensor]


class LayerLogError(ValueError):
    """The file is not the complete layer log of the run. The message says what is wrong."""


@torch.no_grad()
def measure(weights: Mapping[str, Tensor]) -> LayerLog:
    """One row of the log (float32, on the CPU) of kernels by name ("conv1", "conv2"), each (L, ...)."""
    row = {}
    for name, kernels in weights.items():
        flat = kernels.double().flatten(1)
        difference = flat.diff(dim=0)
        row[f"norm_{name}"] = flat.norm(dim=1)
        row[f"distance_{name}"] = difference.norm(dim=1)
        row[f"second_difference_{name}"] = difference.diff(dim=0).norm(dim=1)
    return {name: values.float().cpu() for name, values in row.items()}


def extend(log: LayerLog, epoch: int, weights: Mapping[str, Tensor]) -> LayerLog:
    """The log with one more row: ``weights`` (see `measure`) after that epoch (0-based). {} is the empty log."""
    row = {"epoch": torch.tensor(epoch, dtype=torch.int32), **measure(weights)}
    return {name: torch.cat([*([log[name]] if log else []), values[None]]) for name, values in row.items()}


def write(path: Path, log: LayerLog, run: str) -> None:
    """Write the log of the run of that name, atomically."""
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "run": json.dumps(run)}
    tensors = {name: values.contiguous() for name, values in log.items()}
    paths.write_atomically(path, lambda draft: save_file(tensors, draft, metadata=header))


def read(path: Path, run: str) -> LayerLog:
    """The log of the run of that name. Raises FileNotFoundError if there is none, and LayerLogError if the file is
    damaged or belongs to another run."""
    if not path.exists():
        raise FileNotFoundError(f"There is no layer log {path}: runs write one from their first epoch on.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            log = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise LayerLogError(f"{path} is not a complete layer log ({error}): {ASIDE}.") from error
    if header.get("format") != FORMAT or header.get("format_version") != str(FORMAT_VERSION):
        raise LayerLogError(f"{path} has format {header.get('format')!r}, expected {FORMAT!r}: it is not a layer log.")
    if (found := header.get("run")) != json.dumps(run):
        raise LayerLogError(f"{path} is the layer log of {found}, expected that of {run}: it belongs to another run.")
    if lacking := [name for name in NAMES if name not in log]:
        raise LayerLogError(f"{path} lacks {', '.join(lacking)}, which a layer log has: {ASIDE}.")
    if len({len(values) for values in log.values()}) != 1:
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in log.items())
        raise LayerLogError(f"{path} holds {shapes or 'nothing'}, expected one row for each epoch: {ASIDE}.")
    return log
