"""What ships: the tracked files of ``checkpoints/`` and ``figures/``, whatever a user has added to them.

A network that a user trains, or puts into ``checkpoints/``, changes the tables there and, after ``make figures``, those
in ``figures/``. Tests judge what ships: if something was added, they read both folders as git's index has them. So a
run that is to ship counts once it is added to git. Without git, all that is there counts as shipped.
"""

import atexit
import shutil
import subprocess
import tempfile
from pathlib import Path

from lib import paths

FOLDERS = ("checkpoints", "figures")


def _git(*arguments: str) -> str:
    # What git prints, nothing if there is no git or the project is no repository of its own.
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def tracked() -> list[str]:
    """The tracked files of both folders, relative to the project; none without git."""
    return _git("ls-files", "-z", "--", *FOLDERS).split("\0")[:-1]


def added() -> list[str]:
    """The files of ``checkpoints/`` that are neither tracked nor those of a run whose record is (other weights)."""
    runs = tuple(f"{Path(file).stem}." for file in tracked() if file.endswith(".json"))
    others = _git("ls-files", "-z", "--others", "--", "checkpoints").split("\0")[:-1] if runs else []
    return [file for file in others if not Path(file).name.startswith((".", *runs))]


def root() -> Path:
    """The folder that holds ``checkpoints/`` and ``figures/`` as they ship: the project, or a copy for this process."""
    if not added():
        return paths.ROOT
    copy = Path(tempfile.mkdtemp(prefix="shipped-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    _git("checkout-index", f"--prefix={copy}/", "--", *tracked())
    return copy / _git("rev-parse", "--show-prefix").strip()  # of a project that is a folder of a repository


ROOT = root()
