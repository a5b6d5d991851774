"""Fill the marked places of the READMEs with numbers from the tables: ``make readme``.

A place is ``<!--NAME ARGUMENTS-->text<!--/-->``. NAME is a function of `lib.project.numbers`, which returns the text.
Arguments are words, in quotes if they have spaces: ``<!--accuracy "gelu iid 180"-->82.5<!--/-->``.
"""

import re
import shlex
import sys
from pathlib import Path

from lib import commands, paths
from lib.project import numbers

MARK = re.compile(r"<!--(?P<call>[a-z][^>]*?)-->")
PLACE = re.compile(MARK.pattern + r"(?P<text>(?:(?!<!--).)*)<!--/-->", re.DOTALL)


class WrongPlace(ValueError):
    """A marked place that cannot be filled."""


def files() -> list[Path]:
    """The READMEs."""
    folders = (paths.ROOT, paths.NOTEBOOKS, paths.ROOT / "lib", paths.ROOT / "checkpoints")
    return [folder / "README.md" for folder in folders]


def compute_number(call: str) -> str:
    """The text of a place, from its mark's NAME and ARGUMENTS. Raises WrongPlace."""
    try:
        name, *arguments = shlex.split(call)
    except ValueError as error:
        raise WrongPlace(f"its words cannot be told apart ({str(error).lower()})") from error
    function = getattr(numbers, name, None)
    if getattr(function, "__module__", "") != numbers.__name__ or name.startswith("_"):
        raise WrongPlace(f"lib.project.numbers has no function {name}")
    try:
        return function(*arguments)
    except FileNotFoundError as error:
        table = Path(error.filename)
        raise WrongPlace(f"{paths.shorten(table)} is not there: `make figures` makes the tables") from error
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise WrongPlace(f"the tables have no such number ({type(error).__name__}: {error})") from error


def render(text: str) -> str:
    """The text with every marked place filled. Raises WrongPlace, with the mark, if a place has no end or names no
    number."""
    ended = [place.start() for place in PLACE.finditer(text)]
    for mark in MARK.finditer(text):
        if mark.start() not in ended:
            raise WrongPlace(f"The place {mark[0]} has no end: write <!--/--> after its text.")

    def fill(place: re.Match) -> str:
        try:
            return f"<!--{place['call']}-->{compute_number(place['call'])}<!--/-->"
        except WrongPlace as error:
            raise WrongPlace(f"The place <!--{place['call']}--> cannot be filled: {error}.") from error

    return PLACE.sub(fill, text)


def _render_files() -> None:
    paths.check_clone()
    for path in files():
        before = path.read_text(encoding="utf-8")
        try:
            after = render(before)
        except WrongPlace as error:
            raise WrongPlace(f"{paths.shorten(path)}: {error}") from error
        if after != before:
            paths.write_content(path, after)
        print(f"{paths.shorten(path)}: {'written anew' if after != before else 'unchanged'}")


def main() -> int:
    """``python -m lib.project.readme``; returns 1 if a place cannot be filled."""
    failures = (WrongPlace, FileNotFoundError, paths.CannotWrite, paths.NotAClone)
    return commands.exit_code(_render_files, "Interrupted.", failures=failures)


if __name__ == "__main__":
    sys.exit(main())
