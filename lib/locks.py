"""Locks: one process at a time."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lib import paths

# The errors of locking if there is no lock service, or (EBADF) if a read-only file cannot be locked.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


class Busy(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def hold_lock(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file. The system frees it however the process ends. The file stays, and names the process that holds
    it.

    If another process holds it, raises Busy with the message ``busy`` and the host and number of the process. Raises
    CannotWrite. On a file system without locks, the content of the file is the lock. If a process on another host was
    killed, its lock must then be deleted by hand, and the message says so.
    """
    paths.make_folder(lock.parent)
    with os.fdopen(_open_lock(lock), "rb", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{busy}{_describe_holder(lock)}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _holder_may_run(lock):
                cure = f"If it has ended, delete {paths.shorten(lock)}: this file system has no locks"
                raise Busy(f"{busy}{_describe_holder(lock)} {cure} ({error.strerror}).") from None
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
            raise paths.describe_denied(lock.parent, error) from error
    except OSError as error:
        raise paths.describe_denied(lock.parent, error) from error
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
