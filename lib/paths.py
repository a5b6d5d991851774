"""Every path of the project, absolute, and what the environment says about a run, in one place."""

import os
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
    return ROOT / (os.environ.get("CIFAR10_ROOT") or ".data")


def unattended() -> bool:
    """Whether no person looks at this run: ``make``, papermill and nbval set NOTEBOOK_UNATTENDED.

    Progress bars and live loops are then off, so that stored notebooks hold none and every run ends.
    """
    return bool(os.environ.get("NOTEBOOK_UNATTENDED"))
