"""The state of a run on CIFAR-10: the files in its folder, read and checked."""

import io
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib import locks, paths
from lib.cifar import layer_log
from lib.cifar.config import CifarConfig, rename_saved

STATE_FORMAT = 1
STATE_FILE = "state.pt"
LOG_FILE = "log.json"
LAYER_LOG_FILE = f"log{layer_log.ENDING}"
# A run that sees at most so many images in all its epochs takes seconds, as that of the notebook.
TINY_TRIAL = 10_000
STATE_ENTRIES = ("config", "epoch", "network", "optimizer", "generator", "log", "versions")


def run_folder(config: CifarConfig) -> Path:
    """Where the run of that config keeps its state: an ignored folder, so that a clone starts clean."""
    return paths.BUILD / "training" / config.name


def epochs_done(folder: Path | str) -> int:
    """How many epochs of the run in the folder are complete. Raises what `read_state` raises."""
    state = read_state(folder)
    return state["epoch"] if state else 0


def start_trial_anew(config: CifarConfig) -> bool:
    """Delete the state of a trial that takes seconds (TINY_TRIAL); say whether this is one. Every other run goes on
    from its state. Raises locks.Busy if another process trains it."""
    if not 0 < config.train_images * config.epochs <= TINY_TRIAL:
        return False
    folder = run_folder(config)
    with lock_folder(folder):
        (folder / STATE_FILE).unlink(missing_ok=True)
    return True


def read_state(folder: Path | str) -> dict[str, Any] | None:
    """The state that a run left in the folder, on the CPU, or None if there is none.

    It is a dict with format, config, epoch (how many are complete), network, optimizer, generator, log, layers (a
    `lib.cifar.layer_log`) and versions. Raises ValueError if the file is not such a state, and OSError or MemoryError
    if the system cannot read the file.
    """
    folder = Path(folder)
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = read_saved(path)
    except DamagedFile as error:
        raise ValueError(f"{path} cannot be read as a training state ({error}): {advise_restart(folder)}.") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(f"{path} has state format {found!r}, expected {STATE_FORMAT}: {advise_restart(folder)}.")
    if lacking := [name for name in STATE_ENTRIES if name not in state]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}, which a training state has: {advise_restart(folder)}.")
    return state


def advise_restart(folder: Path) -> str:
    """What to do about a state that cannot be used, as the end of a sentence."""
    return f"move {folder} aside to start anew"


class DamagedFile(ValueError):
    """The file is incomplete, or is not what `torch.save` writes of tensors and plain values."""


def read_saved(path: Path) -> Any:
    """What `torch.save` wrote to the file, on the CPU. No code in the file is run.

    Raises DamagedFile. If the system cannot read the file, raises OSError or MemoryError (RuntimeError if PyTorch's
    allocator finds no memory).
    """
    content = path.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise DamagedFile(f"{type(error).__name__}, {len(content)} bytes") from error


def check_same(state: dict[str, Any], config: CifarConfig, folder: Path) -> None:
    """Raise ValueError if the state in the folder belongs to a run of another config."""
    wanted = asdict(config)
    found = asdict(CifarConfig()) | rename_saved(state["config"])  # older states lack some options
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} {found.get(name)!r}, expected {wanted.get(name)!r}: "
                f"give this run another folder, or {advise_restart(folder)}."
            )


def lock_folder(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes from training the run in the folder. Raises locks.Busy if one trains it already."""
    return locks.hold_lock(folder / "lock", f"Another process is training the run in {folder}: wait for it, or end it.")
