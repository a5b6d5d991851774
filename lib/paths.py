"""Every path of the project, absolute, what the environment says about a run, how a file is written, and how two
processes keep out of each other's way."""

import errno
import fcntl
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# In a clone everything lies beside the package. Of an installed package nothing is written beside it: what a run
# leaves goes to a folder where Python was started, the compiled engine to the user's cache.
IS_CLONE = (_PACKAGE.parent / "Makefile").is_file()
ROOT = _PACKAGE.parent if IS_CLONE else Path.cwd() / "neural-ode-regularization"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
# RESULTS_ROOT names another folder with these two in it: tests of the stored notebooks read what ships.
FIGURES = Path(os.environ.get("RESULTS_ROOT") or ROOT) / "figures"
CHECKPOINTS = Path(os.environ.get("RESULTS_ROOT") or ROOT) / "checkpoints"
BUILD = ROOT / ".build"
CSRC = _PACKAGE / "engine" / "csrc"

STALE = 3600  # seconds; a draft that nobody has written to for so long is the leftover of a process that was killed


class NotAClone(RuntimeError):
    """A command that needs the notebooks, called where only the package is installed."""


class CannotWrite(OSError, RuntimeError):
    """A folder that cannot be written; the sentence names it."""


class Busy(RuntimeError):
    """Another process is at it."""


def need_clone() -> None:
    """Raise NotAClone unless the notebooks lie beside the package."""
    if not IS_CLONE:
        raise NotAClone(
            f"The package is installed in {_PACKAGE.parent}, which has no notebooks: this command wants a clone of the "
            f"project, and is run in it."
        )


def short(path: Path) -> str:
    """The path as a person writes it at the root of the project."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def engines() -> Path:
    """Folder of the compiled engines: ``.build/engine`` in a clone, else in the user's cache."""
    if IS_CLONE:
        return BUILD / "engine"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "neural-ode-regularization" / "engine"


def figures_output() -> Path:
    """Folder that a notebook writes its figures to.

    The environment variable FIGURES_OUTPUT, which ``make`` sets, decides; a notebook run by hand writes
    to ``figures/custom``, so that it can never overwrite the tracked figures of the paper profile. Raises CannotWrite.
    """
    return make_folder(Path(os.environ.get("FIGURES_OUTPUT") or FIGURES / "custom").absolute())


def cifar10_root() -> Path:
    """Folder that holds CIFAR-10 as torchvision lays it out: CIFAR10_ROOT if set (a relative path starts at
    the project's root, wherever a notebook runs), else ``.data``."""
    start = ROOT if IS_CLONE else Path.cwd()
    given = os.environ.get("CIFAR10_ROOT")
    return start / Path(given).expanduser() if given else ROOT / ".data"


def unattended() -> bool:
    """Whether no person looks at this run: ``make``, papermill and nbval set NOTEBOOK_UNATTENDED.

    Progress bars and live loops are then off, so that stored notebooks hold none and every run ends.
    """
    return bool(os.environ.get("NOTEBOOK_UNATTENDED"))


# --- Files that are whole ---------------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _cannot_write(folder: Path, error: OSError) -> CannotWrite:
    cure = "make room" if error.errno in NO_ROOM else "make it writable, or work in a copy of the project"
    named = folder if folder == ROOT else short(folder)
    return CannotWrite(f"The folder {named} cannot be written ({error.strerror}): {cure}.")


def make_folder(folder: Path) -> Path:
    """The folder, made if need be. Raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def check_writable(*folders: Path) -> None:
    """Raise CannotWrite unless files can be made in these folders, or in the ones that they would be made in.

    For use before a computation whose results go there; nothing is left behind.
    """
    for folder in folders:
        there = folder
        while not os.path.lexists(there):
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise _cannot_write(there, error) from error


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, to be written in the block. At its end the draft takes the place of ``path``; if
    the block raises it is removed. So readers, and a machine that lost power, find the old file or the new one, whole.

    Its name is its own, whatever other processes and machines write there, and its permissions are those that the
    umask gives. Raises CannotWrite.
    """
    remove_drafts(path.parent, STALE)
    beside = path.with_name(f".{secrets.token_hex(8)}.draft")
    try:
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode
    except OSError as error:
        raise _cannot_write(path.parent, error) from error
    try:
        yield beside
        beside.chmod(mode)  # safetensors writes files that nobody else may read
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _cannot_write(path.parent, error) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file with ``write``, which is given the `draft` of it."""
    with draft(path) as beside:
        write(beside)


def write_content(path: Path, content: str | bytes) -> None:
    """Write a file of this content, as `write_atomically`; text in UTF-8."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_atomically(path, lambda draft: draft.write_bytes(data))


def remove_drafts(folder: Path, older_than: float) -> None:
    """Remove the drafts in the folder that nobody has written to for so many seconds."""
    for left in folder.glob(".*.draft"):
        with suppress(OSError):  # another process has removed or replaced it, or it is another user's
            if left.stat().st_mtime < time.time() - older_than:
                left.unlink()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(handle)


# --- One process at a time --------------------------------------------------------------------------------------------

# What locking says if there is no lock service, or (EBADF) if a file that may only be read cannot be locked.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Hold that lock file, which the system frees however the process ends. The file says who holds it, and stays.

    Raises Busy, with the sentence ``busy`` and the host and number of the process, if another process holds it, and
    CannotWrite. On a file system without locks, what the file says is the lock: that of a process which ended on
    another host without a word has to be deleted by hand, and the sentence says so.
    """
    make_folder(lock.parent)
    with os.fdopen(_open_lock(lock), "rb", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{busy}{_holder(lock)}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _may_run(lock):
                ended = f" If it has ended, delete {short(lock)}: this file system frees no locks ({error.strerror})."
                raise Busy(f"{busy}{_holder(lock)}{ended}") from None
        _note(lock, f"{os.getpid()} {socket.gethostname()}\n")
        try:
            yield
        finally:
            _note(lock, "")


def _open_lock(lock: Path) -> int:
    # Of everybody who can reach it: a second user of a shared checkout locks the same file, if need be by reading it.
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        try:
            return os.open(lock, os.O_RDONLY)
        except OSError as error:
            raise _cannot_write(lock.parent, error) from error
    except OSError as error:
        raise _cannot_write(lock.parent, error) from error
    with suppress(OSError):  # another user's
        os.fchmod(handle, 0o666)  # whatever the umask
    return handle


def _note(lock: Path, text: str) -> None:
    with suppress(OSError):  # another user's, which may only be read
        lock.write_text(text)


def _noted(lock: Path) -> tuple[int, str] | None:
    # Process and host that hold the lock, if it says so.
    with suppress(OSError, ValueError):
        number, host = lock.read_text().split()
        return int(number), host
    return None


def _holder(lock: Path) -> str:
    noted = _noted(lock)
    return f" It is process {noted[0]} on {noted[1]}." if noted else ""


def _may_run(lock: Path) -> bool:
    # Whether the process that the lock names may still be there: of other hosts nothing is known.
    noted = _noted(lock)
    if noted is None:
        return False
    number, host = noted
    if host != socket.gethostname():
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
