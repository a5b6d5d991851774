"""All paths of the project, the environment variables about a run, files that are written whole, and locks."""

import errno
import fcntl
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


class Busy(RuntimeError):
    """Another process holds the lock."""


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


def figures_output() -> Path:
    """The folder to which a notebook writes its figures.

    ``make`` sets it in the environment variable FIGURES_OUTPUT. A notebook that is run by hand writes to
    ``figures/custom``, so it never overwrites the tracked figures of the paper profile. Raises CannotWrite.
    """
    return make_folder(Path(os.environ.get("FIGURES_OUTPUT") or FIGURES / "custom").absolute())


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


def _cannot_write(folder: Path, error: OSError) -> CannotWrite:
    cure = "free some space" if error.errno in NO_ROOM else "make it writable, or work in a copy of the project"
    named = folder if folder == ROOT else shorten(folder)
    return CannotWrite(f"The folder {named} cannot be written ({error.strerror}): {cure}.")


def make_folder(folder: Path) -> Path:
    """Make the folder if it does not exist; returns it. Raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
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
            raise _cannot_write(there, error) from error


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
        raise _cannot_write(path.parent, error) from error
    try:
        yield beside
        beside.chmod(mode)  # safetensors writes files that no other user may read
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


# --- One process at a time --------------------------------------------------------------------------------------------

# The errors of locking if there is no lock service, or (EBADF) if a read-only file cannot be locked.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


@contextmanager
def hold_lock(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file. The system frees it however the process ends. The file stays, and names the process that holds
    it.

    If another process holds it, raises Busy with the message ``busy`` and the host and number of the process. Raises
    CannotWrite. On a file system without locks, the content of the file is the lock. If a process on another host was
    killed, its lock must then be deleted by hand, and the message says so.
    """
    make_folder(lock.parent)
    with os.fdopen(_open_lock(lock), "rb", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{busy}{_describe_holder(lock)}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _holder_may_run(lock):
                ended = f" If it has ended, delete {shorten(lock)}: this file system has no locks ({error.strerror})."
                raise Busy(f"{busy}{_describe_holder(lock)}{ended}") from None
        _write_holder(lock, f"{os.getpid()} {socket.gethostname()}\n")
        try:
            yield
        finally:
            _write_holder(lock, "")


@contextmanager
def wait_for_lock(lock: Path, busy: str, seconds: float = 60.0) -> Iterator[None]:
    """`hold_lock`, once another process that holds it has ended. Raises Busy if it has not after ``seconds``."""
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(lock, busy))
                break
            except Busy:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def _open_lock(lock: Path) -> int:
    # All users of a shared checkout lock the same file. A user who may not write it opens it for reading.
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


def _write_holder(lock: Path, text: str) -> None:
    with suppress(OSError):  # another user's, which may only be read
        lock.write_text(text)


def _read_holder(lock: Path) -> tuple[int, str] | None:
    # The number and the host of the process in the lock file, if there is one.
    with suppress(OSError, ValueError):
        number, host = lock.read_text().split()
        return int(number), host
    return None


def _describe_holder(lock: Path) -> str:
    holder = _read_holder(lock)
    return f" It is process {holder[0]} on {holder[1]}." if holder else ""


def _holder_may_run(lock: Path) -> bool:
    # Whether the process in the lock file may still run. It may if it is on another host.
    holder = _read_holder(lock)
    if holder is None:
        return False
    number, host = holder
    if host != socket.gethostname():
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
