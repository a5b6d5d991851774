"""All paths of the project, and files that are written whole."""

import errno
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# In a clone all files lie beside the package. Nothing is written beside an installed package: results go to a folder
# where Python was started, and the compiled engine to the user's cache.
IS_CLONE = (_PACKAGE.parent / "Makefile").is_file()
ROOT = _PACKAGE.parent if IS_CLONE else Path.cwd() / "neural-ode-regularization"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
# RESULTS_ROOT is another folder that holds these two, for tests of the stored notebooks.
FIGURES = Path(os.environ.get("RESULTS_ROOT") or ROOT) / "figures"
CHECKPOINTS = Path(os.environ.get("RESULTS_ROOT") or ROOT) / "checkpoints"
BUILD = ROOT / ".build"
CSRC = _PACKAGE / "engine" / "csrc"

STALE = 3600  # seconds; a draft that is older was left by a killed process


class NotAClone(RuntimeError):
    """The command needs the notebooks, and only the package is installed."""


class CannotWrite(OSError, RuntimeError):
    """A folder cannot be written. The message names it."""


def check_clone() -> None:
    """Raise NotAClone unless the notebooks lie beside the package."""
    if not IS_CLONE:
        raise NotAClone(
            f"The package is installed in {_PACKAGE.parent}, which has no notebooks: run this command in a clone of "
            f"the project."
        )


def shorten(path: Path) -> str:
    """The path relative to the root of the project, if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def engines_folder() -> Path:
    """The folder of the compiled engines: ``.build/engine`` in a clone, else in the user's cache."""
    if IS_CLONE:
        return BUILD / "engine"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "neural-ode-regularization" / "engine"


def figures_folder() -> Path:
    """The folder to which a notebook writes its figures. It may not exist yet.

    ``make`` sets it in the environment variable FIGURES_OUTPUT. A notebook that is run by hand writes to
    ``figures/custom``, so it never overwrites the tracked figures of the paper profile.
    """
    return Path(os.environ.get("FIGURES_OUTPUT") or FIGURES / "custom").absolute()


def figures_output() -> Path:
    """`figures_folder`, made if it does not exist. Raises CannotWrite."""
    return make_folder(figures_folder())


def cifar10_root() -> Path:
    """The folder of CIFAR-10, as torchvision arranges it: CIFAR10_ROOT if it is set, else ``.data``. A relative path
    starts at the project's root, wherever a notebook runs."""
    start = ROOT if IS_CLONE else Path.cwd()
    given = os.environ.get("CIFAR10_ROOT")
    return start / Path(given).expanduser() if given else ROOT / ".data"


def is_unattended() -> bool:
    """Whether no person looks at this run: ``make`` and the tests set NOTEBOOK_UNATTENDED.

    Progress bars and live loops are then off, so that stored notebooks hold none and every run ends.
    """
    return bool(os.environ.get("NOTEBOOK_UNATTENDED"))


# --- Files that are written whole -------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def describe_denied(folder: Path, error: OSError) -> CannotWrite:
    """The error for a folder that cannot be written, from the system's."""
    cure = "free some space" if error.errno in NO_ROOM else "make it writable, or work in a copy of the project"
    named = folder if folder == ROOT else shorten(folder)
    return CannotWrite(f"The folder {named} cannot be written ({error.strerror}): {cure}.")


def make_folder(folder: Path) -> Path:
    """Make the folder if it does not exist; returns it. Raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise describe_denied(folder, error) from error
    return folder


def check_writable(*folders: Path) -> None:
    """Raise CannotWrite unless files can be made in these folders; for a folder that does not exist, in the one above.

    Use it before a computation whose results go there. No file is left.
    """
    for folder in folders:
        there = folder
        while not os.path.lexists(there):
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise describe_denied(there, error) from error


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, to be written in the block. At its end the draft replaces ``path``. If the block
    raises, it is removed. So readers always find the whole old file or the whole new one, even after a loss of power.

    No other process or machine uses the same name, and the permissions are those of the umask. Raises CannotWrite.
    """
    remove_drafts(path.parent, STALE)
    beside = path.with_name(f".{secrets.token_hex(8)}.draft")
    try:
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode
    except OSError as error:
        raise describe_denied(path.parent, error) from error
    try:
        yield beside
        beside.chmod(mode)  # safetensors writes files that no other user may read
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise describe_denied(path.parent, error) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, with ``write``, which is called with its `draft`."""
    with draft(path) as beside:
        write(beside)


def write_content(path: Path, content: str | bytes) -> None:
    """Write a file with this content, whole or not at all; text in UTF-8."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_atomically(path, lambda draft: draft.write_bytes(data))


def remove_drafts(folder: Path, older_than: float) -> None:
    """Remove the drafts in the folder that were last written more than ``older_than`` seconds ago."""
    for left in folder.glob(".*.draft"):
        with suppress(OSError):  # another process has removed or replaced it, or it is another user's
            if left.stat().st_mtime < time.time() - older_than:
                left.unlink()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # the rename is part of the folder
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(handle)
