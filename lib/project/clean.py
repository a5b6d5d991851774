"""Remove the files that make made. ``make clean`` runs this file as a script, with any Python, since it must work
whatever the state of the environment.

    .build/<kind>/      stamps and executed notebooks of a profile, of runs by hand and of the tests; the engine
    .build/<file>       reports and measurements
    figures/<profile>/  the files that the runs of a profile list, and the folder once it is empty

It also removes drafts that killed processes left. Files that a person made stay: training states (all that begins with
``.build/training``), figures and folders of other names, runs by hand in ``figures/custom``, tracked figures, CIFAR-10.
Locks stay too, since a process may hold one.
"""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "Makefile").is_file())
KINDS = {"quick", "custom", "stored", "nbval", "lab", "engine"}  # and the profiles
FILES = (".build/report-*.html", ".build/bench.csv", ".build/figure_seconds.csv", ".pytest_cache", ".ruff_cache")
MAY_HOLD_DRAFTS = (".build", "figures", "figures/*", "checkpoints", "checkpoints/records", "notebooks")
WRITTEN = 10  # seconds; no process still writes a draft that is older


def remove(path):
    """Remove a file, a link, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_figures(profile):
    """Remove the files below ``figures/<profile>`` that runs list. Those of ``paper`` lie above it, and stay."""
    folder = ROOT / "figures" / profile
    for made in (ROOT / ".build" / profile).glob("*.made"):
        for line in made.read_text(encoding="utf-8").splitlines():
            if folder not in (ROOT / line).parents or ".." in Path(line).parts:
                continue
            (ROOT / line).unlink(missing_ok=True)
            for parent in Path(line).parents[:-2]:  # up to figures/<profile>
                with suppress(OSError):  # it is not empty, or a link
                    (ROOT / parent).rmdir()


def clean():
    """Remove all files and folders of the module's docstring."""
    profiles = {folder.name for folder in (ROOT / "notebooks" / "profiles").glob("*") if folder.is_dir()}
    for kind in KINDS | {profile for profile in profiles if not profile.startswith(("training", "locks"))}:
        remove_figures(kind)
        remove(ROOT / ".build" / kind)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            remove(path)
    for folder in MAY_HOLD_DRAFTS:
        for draft in ROOT.glob(f"{folder}/.*.draft"):
            if draft.stat().st_mtime < time.time() - WRITTEN:
                remove(draft)


if __name__ == "__main__":
    try:
        clean()
    except OSError as error:
        sys.exit(f"Not all files could be removed: {error}.")
