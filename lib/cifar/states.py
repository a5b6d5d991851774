"""The state of a run on CIFAR-10: the files in its folder, read and checked."""

import io
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib import paths
from lib.cifar import layer_log
from lib.cifar.config import CifarConfig, rename_saved

STATE_FORMAT = 1
STATE_FILE = "state.pt"
LOG_FILE = "log.json"
LAYER_LOG_FILE = f"log{layer_log.ENDING}"
STATE_ENTRIES = ("config", "epoch", "network", "optimizer", "generator", "log", "versions")


def run_folder(config: CifarConfig) -> Path:
    """Where the run of that config keeps its state: an ignored folder, so that a clone starts clean."""
    return paths.BUILD / "training" / config.name


def epochs_done(folder: Path | str) -> int:
    """How many epochs the run in the folder has complete; raises as `read_state`."""
    state = read_state(folder)
    return state["epoch"] if state else 0


def read_state(folder: Path | str) -> dict[str, Any] | None:
    """The state that a run left in the folder, on the CPU, or None if there is none.

    A dict with format, config, epoch (how many are complete), network, optimizer, generator, log, layers (a
    `lib.cifar.layer_log`), versions. Raises ValueError with one sentence for a file that is not such a state, and
    OSError or MemoryError if the system cannot read one that may well be.
    """
    folder = Path(folder)
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = read_saved(path)
    except DamagedFile as error:
        raise ValueError(f"{path} cannot be read as a training state ({error}): {_aside(folder)}.") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(f"{path} has state format {found!r}, expected {STATE_FORMAT}: {_aside(folder)}.")
    if lacking := [name for name in STATE_ENTRIES if name not in state]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}, expected with a state: {_aside(folder)}.")
    return state


def _aside(folder: Path) -> str:
    return f"move {folder} aside to start anew"


class DamagedFile(ValueError):
    """A file that is not, or not wholly, what `torch.save` writes of tensors and plain values."""


def read_saved(path: Path) -> Any:
    """What `torch.save` wrote to the file, on the CPU; no code of the file is run.

    Raises DamagedFile, or what the system says about a file that it cannot read: OSError, MemoryError (RuntimeError,
    if PyTorch's allocator says it).
    """
    content = path.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise DamagedFile(f"{type(error).__name__}, {len(content)} bytes") from error


def check_same(state: dict[str, Any], config: CifarConfig, folder: Path) -> None:
    """Raise ValueError if the state in the folder is that of another run than this config's."""
    wanted = asdict(config)
    found = asdict(CifarConfig()) | rename_saved(state["config"])  # an older state lacks the options that came later
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} {found.get(name)!r}, expected {wanted.get(name)!r}: "
                f"give this run another folder, or {_aside(folder)}."
            )


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Be the one that trains the run in the folder; paths.Busy if another process does."""
    return paths.alone(folder / "lock", f"Another process is training the run in {folder}: wait for it, or end it.")
