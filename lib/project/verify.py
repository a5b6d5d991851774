"""How far the numbers of a run of this machine are from the tracked ones: `make verify`, a line a table.

The tables in ``figures/`` are those of the last run; the tracked ones are git's of the last commit. In a copy without
git they are those that it came with, which the runner keeps in ``figures/.shipped`` before it writes over them;
``--against`` names another commit, or a folder.

Two numbers agree if they differ by at most `TOLERANCE`, relative to the larger one, or by one in the last place of the
one that is written with more: what is known to few digits differs by that. Everything else (words, whole numbers, truth
values) is the same or it is not. Times are not compared.
"""

import argparse
import csv
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib import checks, digits, paths

TOLERANCE = 1e-6
TIMINGS = ("bench", "figure_seconds")
SHIPPED = paths.FIGURES / ".shipped"
WHOLE = re.compile(r"[-+]?[0-9]+")


class NotReproduced(RuntimeError):
    """A table is beyond the tolerance, or there is nothing to compare with."""


@dataclass(frozen=True)
class Comparison:
    """The largest relative distance of two numbers of a table that do not agree by their last place (0: none), and
    what is different beyond that, in words."""

    distance: float
    difference: str = ""

    @property
    def reproduced(self) -> bool:
        return not self.difference and self.distance <= TOLERANCE


# --- Comparing ------------------------------------------------------------------------------------------------------


def _places(text: str) -> int:
    """How many decimals a number is written with: 3 for 0.125, 9 for 1.5e-08, 0 for 12."""
    mantissa, _, exponent = text.lower().partition("e")
    return max(0, len(mantissa.partition(".")[2].rstrip("0")) - int(exponent or 0))


def _distance(tracked: str, found: str) -> float:
    """How far two entries of a table are apart; infinity if they are no numbers, or one of them is no finite one."""
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
    # With that many decimals a number is a computed one; 82.5 is not 82.6.
    if places >= digits.STATE_DECIMALS and gap < 1.5 * 10.0**-places:
        return 0.0
    return gap / max(abs(one), abs(other))


def compare(tracked: str, found: str) -> Comparison:
    """Two tables, each the text of a CSV file."""
    try:
        read = [list(csv.reader(text.splitlines())) or [[]] for text in (tracked, found)]
    except csv.Error as error:
        return Comparison(math.inf, f"it cannot be read as a table ({error})")
    (names, *expected), (columns, *rows) = read
    if columns != names:
        here, there = (", ".join(each) or "none" for each in (columns, names))
        return Comparison(math.inf, f"its columns are {here}, tracked are {there}")
    if len(rows) != len(expected):
        return Comparison(math.inf, f"it has {len(rows)} rows, tracked are {len(expected)}")
    farthest = 0.0
    for number, (old, new) in enumerate(zip(expected, rows, strict=True), start=1):
        if len(new) != len(old):
            return Comparison(math.inf, f"row {number} has {len(new)} entries, tracked are {len(old)}: it is cut off")
        for name, one, other in zip(names, old, new, strict=True):
            distance = _distance(one, other)
            if math.isinf(distance):
                return Comparison(distance, f"{name} in row {number} is {other!r}, tracked is {one!r}")
            farthest = max(farthest, distance)
    return Comparison(farthest)


# --- Tables ---------------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotReproduced("git, which has the tracked tables, is not on the PATH.") from None
    if done.returncode:
        raise NotReproduced(f"git has no tracked tables: {done.stderr.strip()}")
    return done.stdout


def _of_commit(commit: str) -> dict[str, str]:
    listed = _git("ls-tree", "--name-only", commit, "figures/").split()
    names = [Path(name).stem for name in listed if name.endswith(".csv")]
    return {name: _git("show", f"{commit}:./figures/{name}.csv") for name in names}


def _of_folder(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.csv"))}


def tracked(against: str = "") -> dict[str, str]:
    """The text of each tracked table by name, without those of times: of the folder or commit ``against``, else as the
    module says. Raises NotReproduced if there are none."""
    if against:
        found = _of_folder(Path(against)) if Path(against).is_dir() else _of_commit(against)
    elif (paths.ROOT / ".git").exists():
        found = _of_commit("HEAD")
    else:  # a table that no run has written over is the one that came
        found = _of_folder(paths.FIGURES) | _of_folder(SHIPPED)
    if not found:
        raise NotReproduced(f"{against or 'The last commit'} has no tables to compare with.")
    return {name: text for name, text in sorted(found.items()) if name not in TIMINGS}


def report(against: str = "") -> bool:
    """Print a line a table, and how many are reproduced; returns whether all are."""
    compared = {}
    for name, text in tracked(against).items():
        path = paths.FIGURES / f"{name}.csv"
        gone = Comparison(math.inf, "it is not here")
        compared[name] = compare(text, path.read_text(encoding="utf-8", errors="replace")) if path.exists() else gone
    for name, comparison in compared.items():
        print(f"{name + ':':28} {comparison.difference or _apart(comparison.distance)}")
    reproduced = sum(comparison.reproduced for comparison in compared.values())
    print(f"reproduced: {reproduced} of {len(compared)} tables within {TOLERANCE:g}")
    return reproduced == len(compared)


def _apart(distance: float) -> str:
    if distance == 0:
        return "the same"
    beyond = "" if distance <= TOLERANCE else f", beyond {TOLERANCE:g}"
    return f"within {distance:.0e}{beyond}"


# --- Command line ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """``python -m lib.project.verify [--against COMMIT|FOLDER]``: 0 if all tables are reproduced, else 1."""
    parser = argparse.ArgumentParser(prog="python -m lib.project.verify", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", default="", metavar="COMMIT|FOLDER", help="whose tables count as tracked")
    chosen = parser.parse_args(arguments)
    reproduced: list[bool] = []

    def command() -> None:
        paths.need_clone()
        reproduced.append(report(chosen.against))

    failed = checks.exit_code(command, failures=(NotReproduced, paths.NotAClone, OSError))
    return failed or int(not all(reproduced))


if __name__ == "__main__":
    sys.exit(main())
