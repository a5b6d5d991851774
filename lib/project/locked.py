"""The exact versions that made the tracked figures, in ``.locked/constraints.txt``: `make env LOCKED=yes` uses them.

``python -m lib.project.locked`` writes the file from the environment that runs it. Do so when the tracked figures were
made in another environment.
"""

import platform
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib import commands, paths

CONSTRAINTS = paths.ROOT / ".locked" / "constraints.txt"


def read_declared() -> list[Requirement]:
    """The dependencies in pyproject.toml."""
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def versions() -> dict[str, str]:
    """The installed version of each package that pyproject.toml needs, directly or not, by name; without a suffix of
    the build, such as +cu130.

    Raises metadata.PackageNotFoundError if one is not installed.
    """
    found: dict[str, str] = {}
    waiting = [(requirement, "") for requirement in read_declared()]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            package = metadata.distribution(name)
            found[name] = Version(package.version).public
            waiting += [(Requirement(text), wanted) for text in package.requires or ()]
    return dict(sorted(found.items()))


def format_constraints() -> str:
    """The constraints file for this environment."""
    header = (
        f"# The versions that made the tracked figures, with Python {platform.python_version()}: make env LOCKED=yes\n"
        "# takes them. `python -m lib.project.locked` writes this file from the environment that it runs in.\n"
    )
    return header + "".join(f"{name}=={version}\n" for name, version in versions().items())


def read() -> dict[str, str]:
    """The locked versions by name."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def main() -> int:
    """Write the constraints file; returns 1 if it cannot be written, or if a package is not installed."""
    return commands.exit_code(_command, failures=(OSError, paths.NotAClone, metadata.PackageNotFoundError))


def _command() -> None:
    paths.check_clone()
    paths.make_folder(CONSTRAINTS.parent)
    text = format_constraints()
    # Environments are made anew when the file changes.
    if not CONSTRAINTS.exists() or CONSTRAINTS.read_text(encoding="utf-8") != text:
        paths.write_content(CONSTRAINTS, text)
    print(f"{paths.shorten(CONSTRAINTS)}: {len(read())} packages")


if __name__ == "__main__":
    sys.exit(main())
