"""What ships: the tracked files of ``checkpoints/`` and ``figures/``, without what a user has added to them.

A network that a user adds to ``checkpoints/`` changes the tables there and, after ``make figures``, those in
``figures/``. Tests judge what ships: if something was added, they read both folders as git's index has them. So a run
ships as soon as it is added to git. Without git, all files count as shipped.
"""

import atexit
import shutil
import subprocess
import tempfile
from pathlib import Path

from lib import paths

FOLDERS = ("checkpoints", "figures")


def _git(*arguments: str) -> str:
    # What git prints, or nothing if git or a repository is missing.
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def list_tracked() -> list[str]:
    """List the tracked files of both folders, relative to the project; none without git."""
    return _git("ls-files", "-z", "--", *FOLDERS).split("\0")[:-1]


def list_added() -> list[str]:
    """List the files of ``checkpoints/`` that are not tracked, without the weights of runs with a tracked record."""
    runs = tuple(f"{Path(file).stem}." for file in list_tracked() if file.endswith(".json"))
    others = _git("ls-files", "-z", "--others", "--", "checkpoints").split("\0")[:-1] if runs else []
    return [file for file in others if not Path(file).name.startswith((".", *runs))]


def find_root() -> Path:
    """Find the folder that holds ``checkpoints/`` and ``figures/`` as they ship: the project, or a copy of both."""
    if not list_added():
        return paths.ROOT
    copy = Path(tempfile.mkdtemp(prefix="shipped-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    _git("checkout-index", f"--prefix={copy}/", "--", *list_tracked())
    return copy / _git("rev-parse", "--show-prefix").strip()  # if the project is a folder of a repository


ROOT = find_root()
