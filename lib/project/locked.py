"""The exact versions that made the tracked figures, ``.locked/constraints.txt``: `make env LOCKED=yes` takes them.

``python -m lib.project.locked`` writes the file from the environment that runs it: do so when the tracked figures were
made anew in another one.
"""

import platform
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib import checks, paths

CONSTRAINTS = paths.ROOT / ".locked" / "constraints.txt"


def declared() -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def versions() -> dict[str, str]:
    """The version of each package that is here because of pyproject.toml, by name; without what tells one build of a
    version from another (as +cu130).

    Raises metadata.PackageNotFoundError if a declared one is not here.
    """
    found: dict[str, str] = {}
    waiting = [(requirement, "") for requirement in declared()]
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


def text() -> str:
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
    """Write the constraints file; returns 1 if it cannot be written, or a package is not here."""
    return checks.exit_code(_command, failures=(OSError, paths.NotAClone, metadata.PackageNotFoundError))


def _command() -> None:
    paths.need_clone()
    paths.make_folder(CONSTRAINTS.parent)
    if not CONSTRAINTS.exists() or CONSTRAINTS.read_text(encoding="utf-8") != text():  # it makes environments anew
        paths.write_content(CONSTRAINTS, text())
    print(f"{paths.short(CONSTRAINTS)}: {len(read())} packages")


if __name__ == "__main__":
    sys.exit(main())
