"""Which files a figure is made from, and the rules that tell make."""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lib
from lib import parameters, paths

# What a makefile can hold as a file's name, and which of it after a backslash ($ is doubled).
_WRITABLE, _ESCAPED = re.compile(r"[\w $#,@^+./()~!'\"{}-]+"), re.compile(r"[ #]")

# The compiled engine computes what the PyTorch engine computes, and explorers show what there is: no result depends on
# them.
NO_DEPENDENCY = ("engine", "explore")


def _imports(tree: ast.AST) -> set[Path]:
    # The files of lib that a piece of code names: modules, and the packages that they lie in.
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    exported = {lib.EXPORTS[name.removeprefix("lib.")] for name in names if name.removeprefix("lib.") in lib.EXPORTS}
    return {file for name in names | exported for file in _files(name) if _counts(file)}


def _files(name: str) -> Iterator[Path]:
    # The file of "lib.dense.training", and the __init__ of every package around it; nothing for a name of another kind.
    first, *others = name.split(".")
    if first != "lib":
        return
    place = paths.ROOT / "lib"
    for part in others:
        if (place / "__init__.py").is_file():
            yield place / "__init__.py"
        place /= part
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            yield file


def _counts(file: Path) -> bool:
    return not any(file.is_relative_to(paths.ROOT / "lib" / package) for package in NO_DEPENDENCY)


def _reads(tree: ast.AST) -> set[str]:
    # Which folders of results a piece of code names, as paths.CHECKPOINTS or paths.FIGURES.
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return named & {"CHECKPOINTS", "FIGURES"}


def dependencies(name: str, profile: str) -> list[Path]:
    """The files that a result is made from: the notebook, its profile, the modules of ``lib`` that it imports, those
    that they import in turn; the trained networks, and the folder that they come to, if one of them reads
    ``paths.CHECKPOINTS``; the tracked tables of the other figures if one reads ``paths.FIGURES``."""
    tree = ast.parse("\n".join(parameters.code(cell) for cell in parameters.code_cells(name)))
    reads = _reads(tree)
    modules, waiting = set(), _imports(tree)
    while waiting:
        module = waiting.pop()
        modules.add(module)
        tree = ast.parse(module.read_text(encoding="utf-8"))
        reads |= _reads(tree)
        waiting |= _imports(tree) - modules
    found = [paths.NOTEBOOKS / f"{name}.ipynb"]
    if profile != parameters.QUICK:
        found.append(paths.PROFILES / profile / f"{name}.yaml")
    found += sorted(modules)
    if "FIGURES" in reads:
        found += sorted(path for path in paths.FIGURES.glob("*.csv") if not path.stem.startswith(name))
    if "CHECKPOINTS" in reads:
        found.append(paths.CHECKPOINTS)  # a folder changes when a file comes or goes
        found += sorted(path for kind in ("*.csv", "*.safetensors") for path in paths.CHECKPOINTS.glob(kind))
    return found


def make_rules(target: Path, prerequisites: Sequence[Path]) -> str:
    # A folder by another name than that of a target: `make checkpoints` trains.
    listed = [f"{paths.short(path)}/." if path.is_dir() else paths.short(path) for path in prerequisites]
    unwritable = [path for path in listed if not _WRITABLE.fullmatch(path)]
    for path in unwritable:
        print(f"{path!r} is not watched for changes, since make cannot read such a name: rename it.", file=sys.stderr)
    listed = [_ESCAPED.sub(r"\\\g<0>", path.replace("$", "$$")) for path in listed if path not in unwritable]
    # An empty rule for each file, so that one that is deleted later does not stop make (like gcc -MP).
    return "\n".join([f"{paths.short(target)}: {' '.join(listed)}", *(f"{path}:" for path in listed)]) + "\n"
