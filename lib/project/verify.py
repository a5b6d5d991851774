"""Compare the numbers of the last run on this machine with the tracked ones: `make verify`, one line for each table.

The tables in ``figures/`` are those of the last run. The tracked tables are those of git's last commit. In a copy
without git they are those that the copy came with; `lib.project.notebooks` keeps them in ``figures/.shipped`` before it
overwrites them. ``--against`` names another commit, or a folder.

Two numbers agree if they differ by at most `TOLERANCE`, relative to the larger one. They also agree if they differ by
one in the last decimal of the one with more decimals, and it has at least `digits.STATE_DECIMALS` decimals. Everything
else (words, whole numbers, truth values) agrees if it is equal. Times are not compared."""

import argparse
import csv
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib import commands, digits, paths

TOLERANCE = 1e-6
TIMINGS = ("bench", "figure_seconds")
SHIPPED = paths.FIGURES / ".shipped"
WHOLE = re.compile(r"[-+]?[0-9]+")


class NotReproduced(RuntimeError):
    """A table differs by more than the tolerance, or there is nothing to compare with."""


@dataclass(frozen=True)
class Comparison:
    """The largest relative distance of the numbers of two tables (0 if they agree), and every other difference, in
    words."""

    distance: float
    difference: str = ""

    @property
    def reproduced(self) -> bool:
        return not self.difference and self.distance <= TOLERANCE


# --- Comparing ------------------------------------------------------------------------------------------------------


def _places(text: str) -> int:
    """The number of decimals of a number: 3 for 0.125, 9 for 1.5e-08, 0 for 12."""
    mantissa, _, exponent = text.lower().partition("e")
    return max(0, len(mantissa.partition(".")[2].rstrip("0")) - int(exponent or 0))


def _distance(tracked: str, found: str) -> float:
    """The relative distance of two entries of a table; infinity if they differ and are not finite numbers."""
    if tracked == found:
        return 0.0
    if WHOLE.fullmatch(tracked) and WHOLE.fullmatch(found):
        return math.inf
    try:
        one, other = float(tracked), float(found)
    except ValueError:
        return math.inf
    if not (math.isfinite(one) and math.isfinite(other)) or one == other:
        return 0.0 if one == other else math.inf
    gap, places = abs(one - other), max(_places(tracked), _places(found))
    # A number with fewer decimals must be equal: 82.5 is not 82.6.
    if places >= digits.STATE_DECIMALS and gap < 1.5 * 10.0**-places:
        return 0.0
    return gap / max(abs(one), abs(other))


def compare(tracked: str, found: str) -> Comparison:
    """Compare two tables, each the text of a CSV file."""
    try:
        read = [list(csv.reader(text.splitlines())) or [[]] for text in (tracked, found)]
    except csv.Error as error:
        return Comparison(math.inf, f"it cannot be read as a table ({error})")
    (names, *expected), (columns, *rows) = read
    if columns != names:
        here, there = (", ".join(each) or "none" for each in (columns, names))
        return Comparison(math.inf, f"its columns are {here}, expected {there}")
    if len(rows) != len(expected):
        return Comparison(math.inf, f"it has {len(rows)} rows, expected {len(expected)}")
    farthest = 0.0
    for number, (old, new) in enumerate(zip(expected, rows, strict=True), start=1):
        if len(new) != len(old):
            return Comparison(math.inf, f"row {number} has {len(new)} entries, expected {len(old)}: it is cut off")
        for name, one, other in zip(names, old, new, strict=True):
            distance = _distance(one, other)
            if math.isinf(distance):
                return Comparison(distance, f"{name} in row {number} is {other!r}, expected {one!r}")
            farthest = max(farthest, distance)
    return Comparison(farthest)


# --- Tables ---------------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotReproduced("git is not on the PATH, and it holds the tracked tables: install it.") from None
    if done.returncode:
        raise NotReproduced(f"git finds no tracked tables there: {done.stderr.strip()}")
    return done.stdout


def _read_commit(commit: str) -> dict[str, str]:
    listed = _git("ls-tree", "--name-only", commit, "figures/").split()
    names = [Path(name).stem for name in listed if name.endswith(".csv")]
    return {name: _git("show", f"{commit}:./figures/{name}.csv") for name in names}


def _read_folder(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.csv"))}


def read_tracked(against: str | None = None) -> dict[str, str]:
    """The text of each tracked table by name, without those of times.

    They are those of the folder or commit ``against``, or by default those of the module's docstring. Raises
    NotReproduced if there are none.
    """
    if against == "":
        raise NotReproduced("--against is empty, expected a commit or a folder: leave it out for the last commit.")
    if against:
        found = _read_folder(Path(against)) if Path(against).is_dir() else _read_commit(against)
    elif (paths.ROOT / ".git").exists():
        found = _read_commit("HEAD")
    else:  # the tables that a run has overwritten are in SHIPPED
        found = _read_folder(paths.FIGURES) | _read_folder(SHIPPED)
    if not found:
        raise NotReproduced(f"{against or 'The last commit'} has no tables to compare with: name another one.")
    return {name: text for name, text in sorted(found.items()) if name not in TIMINGS}


def report(against: str | None = None) -> bool:
    """Print one line for each table, and how many are reproduced; returns whether all are."""
    compared = {}
    for name, text in read_tracked(against).items():
        path = paths.FIGURES / f"{name}.csv"
        gone = Comparison(math.inf, "it is not here")
        compared[name] = compare(text, path.read_text(encoding="utf-8", errors="replace")) if path.exists() else gone
    for name, comparison in compared.items():
        print(f"{name + ':':28} {comparison.difference or _describe_distance(comparison.distance)}")
    reproduced = sum(comparison.reproduced for comparison in compared.values())
    print(f"reproduced: {reproduced} of {len(compared)} tables within {TOLERANCE:g}")
    return reproduced == len(compared)


def _describe_distance(distance: float) -> str:
    if distance == 0:
        return "the same"
    beyond = "" if distance <= TOLERANCE else f", beyond {TOLERANCE:g}"
    return f"within {distance:.0e}{beyond}"


# --- Command line ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """``python -m lib.project.verify [--against COMMIT|FOLDER]``: 0 if all tables are reproduced, else 1."""
    parser = argparse.ArgumentParser(prog="python -m lib.project.verify", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="COMMIT|FOLDER", help="commit or folder of the tracked tables")
    parser.add_argument("--look", action="store_true", help="only look whether there are tables to compare with")
    chosen = parser.parse_args(arguments)
    reproduced: list[bool] = []

    def command() -> None:
        paths.check_clone()
        reproduced.append(bool(read_tracked(chosen.against)) if chosen.look else report(chosen.against))

    failed = commands.exit_code(command, failures=(NotReproduced, paths.NotAClone, OSError))
    return failed or int(not all(reproduced))


if __name__ == "__main__":
    sys.exit(main())
