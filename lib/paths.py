"""Every path of the project, absolute, what the environment says about a run, how a file is written, and how two
processes keep out of each other's way."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
FIGURES = ROOT / "figures"
CHECKPOINTS = ROOT / "checkpoints"
BUILD = ROOT / ".build"
CSRC = ROOT / "lib" / "csrc"


def short(path: Path) -> str:
    """The path as a person writes it at the root of the project."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def figures_output() -> Path:
    """Folder that a notebook writes its figures to.

    The environment variable FIGURES_OUTPUT, which ``make`` sets, decides; a notebook run by hand writes
    to ``figures/custom``, so that it can never overwrite the tracked figures of the paper profile.
    """
    folder = Path(os.environ.get("FIGURES_OUTPUT") or FIGURES / "custom").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cifar10_root() -> Path:
    """Folder that holds CIFAR-10 as torchvision lays it out: CIFAR10_ROOT if set (a relative path starts at
    the project's root, wherever a notebook runs), else ``.data``."""
    return ROOT / Path(os.environ.get("CIFAR10_ROOT") or ".data").expanduser()


def unattended() -> bool:
    """Whether no person looks at this run: ``make``, papermill and nbval set NOTEBOOK_UNATTENDED.

    Progress bars and live loops are then off, so that stored notebooks hold none and every run ends.
    """
    return bool(os.environ.get("NOTEBOOK_UNATTENDED"))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that readers, and a machine that lost power, find the old one or the new one, whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        _flush_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


class Busy(RuntimeError):
    """Another process is at it."""


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Hold that lock file, which the system frees however the process ends; raises Busy, with the sentence ``busy``,
    where another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(busy) from None
        yield


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
