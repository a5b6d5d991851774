"""Locks between processes."""

import errno
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lib import locks

HERE = f"It is process {os.getpid()} on {socket.gethostname()}."


def test_who_holds_a_lock_is_said(tmp_path):
    lock = tmp_path / "locks" / "figure"
    with (
        locks.hold_lock(lock, "Busy."),
        pytest.raises(locks.Busy, match=f"^Busy. {HERE}$"),
        locks.hold_lock(lock, "Busy."),
    ):
        pass
    assert lock.read_text() == ""  # nobody
    lock.write_text("1 elsewhere\n")  # written by a process that was killed: the system has freed the lock
    with locks.hold_lock(lock, "Busy."):
        assert lock.read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_a_lock_is_for_every_user(tmp_path):
    lock, before = tmp_path / "lock", os.umask(0o077)
    try:
        with locks.hold_lock(lock, "Busy."):
            assert lock.stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_lock_of_another_user_that_can_only_be_read_is_held_all_the_same(tmp_path, monkeypatch):
    lock, opened = tmp_path / "lock", os.open
    lock.touch(0o644)

    def open_as_another_user(path, flags, *mode):
        if path == lock and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *mode)

    monkeypatch.setattr(locks.os, "open", open_as_another_user)
    with locks.hold_lock(lock, "Busy."), pytest.raises(locks.Busy), locks.hold_lock(lock, "Busy."):
        pass


def test_a_lock_is_waited_for_until_its_holder_ends_or_time_is_over(tmp_path):
    lock, got = tmp_path / "lock", []
    with locks.hold_lock(lock, "Busy."):
        with pytest.raises(locks.Busy, match="Busy"), locks.wait_for_lock(lock, "Busy.", seconds=0.1):
            pass
        waiting = threading.Thread(target=lambda: got.append(_hold_after_waiting(lock)))
        waiting.start()
        time.sleep(0.2)
        assert not got
    waiting.join(timeout=30)
    assert got == [True]


def _hold_after_waiting(lock: Path) -> bool:
    with locks.wait_for_lock(lock, "Busy."):
        with pytest.raises(locks.Busy), locks.hold_lock(lock, "Busy."):
            pass
        return True


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_without_a_lock_service_the_note_in_the_file_is_the_lock(tmp_path, monkeypatch, number):
    def refuse_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse_lock)
    lock = tmp_path / "lock"
    with (
        locks.hold_lock(lock, "Busy."),
        pytest.raises(locks.Busy, match=f"^Busy. {HERE}"),
        locks.hold_lock(lock, "Busy."),
    ):
        pass
    with locks.hold_lock(lock, "Busy."):  # free again
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock.write_text(f"{ended.pid} {socket.gethostname()}\n")
    with locks.hold_lock(lock, "Busy."):  # that process is gone
        pass
    lock.write_text("12 another-host\n")
    sentence = f"^Busy. It is process 12 on another-host. If it has ended, delete {lock}: "
    with pytest.raises(locks.Busy, match=sentence), locks.hold_lock(lock, "Busy."):
        pass


def test_other_errors_of_locking_pass_on(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), locks.hold_lock(tmp_path / "lock", "Busy."):
        pass
