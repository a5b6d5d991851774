"""Fills the marked places of the READMEs with numbers from the tables: ``make readme``.

A place is ``<!--NAME ARGUMENTS-->text<!--/-->``, NAME a function of `lib.project.numbers`, which returns the text;
arguments are words, quoted if they have spaces: ``<!--accuracy "gelu iid 180"-->82.5<!--/-->``.
"""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

from lib import checks, paths
from lib.project import numbers

PLACE = re.compile(r"<!--(?P<call>[a-z][^>]*?)-->(?P<text>.*?)<!--/-->", re.DOTALL)


class UnknownNumber(ValueError):
    """A marked place that names no number."""


def files() -> list[Path]:
    """The READMEs."""
    folders = (paths.ROOT, paths.NOTEBOOKS, paths.ROOT / "lib", paths.ROOT / "checkpoints")
    return [folder / "README.md" for folder in folders]


def number(call: str) -> str:
    """What a place says, by what is written in its mark. Raises UnknownNumber."""
    name, *arguments = shlex.split(call)
    function = getattr(numbers, name, None)
    if getattr(function, "__module__", "") != numbers.__name__ or name.startswith("_"):
        raise UnknownNumber(f"A README has a place <!--{call}-->, but lib.project.numbers has no function {name}.")
    return function(*arguments)


def render(text: str) -> str:
    """The text with every marked place filled anew."""
    return PLACE.sub(lambda place: f"<!--{place['call']}-->{number(place['call'])}<!--/-->", text)


def _render_files() -> None:
    paths.need_clone()
    for path in files():
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            paths.write_content(path, after)
        print(f"{paths.short(path)}: {'written anew' if after != before else 'unchanged'}")


def main() -> int:
    """``python -m lib.project.readme``; returns 1 for a place that cannot be filled."""
    failures = (UnknownNumber, FileNotFoundError, paths.CannotWrite, paths.NotAClone)
    return checks.exit_code(partial(_render_files), "Interrupted.", failures=failures)


if __name__ == "__main__":
    sys.exit(main())
