"""The files that a figure is made from, and the rules that tell make."""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lib
from lib import parameters, paths

# The characters that a file name in a makefile can have, and those that need a backslash ($ is doubled).
_WRITABLE, _ESCAPED = re.compile(r"[\w $#,@^+./()~!'\"{}-]+"), re.compile(r"[ #]")

# No result depends on these packages: the compiled engine computes the same as PyTorch, and explorers only show
# results.
NO_DEPENDENCY = ("engine", "explore")


def _find_imports(tree: ast.AST) -> set[Path]:
    # The files of lib that the code imports: modules, and the packages that they are in.
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    exported = {lib.EXPORTS[name.removeprefix("lib.")] for name in names if name.removeprefix("lib.") in lib.EXPORTS}
    return {file for name in names | exported for file in _find_files(name) if _is_dependency(file)}


def _find_files(name: str) -> Iterator[Path]:
    # The file of a name such as "lib.dense.training", and the __init__ of every package that it is in.
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


def _is_dependency(file: Path) -> bool:
    return not any(file.is_relative_to(paths.ROOT / "lib" / package) for package in NO_DEPENDENCY)


def _find_folders(tree: ast.AST) -> set[str]:
    # The folders of results that the code names, as paths.CHECKPOINTS or paths.FIGURES.
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return named & {"CHECKPOINTS", "FIGURES"}


def find_dependencies(name: str, profile: str) -> list[Path]:
    """The files that a result is made from.

    These are the notebook, its profile, and the modules of ``lib`` that it imports, directly or not. If one of them
    reads ``paths.CHECKPOINTS``, these are also the trained networks and their folder. If one reads ``paths.FIGURES``,
    these are also the tracked tables of the other figures.
    """
    tree = ast.parse("\n".join(parameters.extract_python(cell) for cell in parameters.code_cells(name)))
    folders = _find_folders(tree)
    modules, waiting = set(), _find_imports(tree)
    while waiting:
        module = waiting.pop()
        modules.add(module)
        tree = ast.parse(module.read_text(encoding="utf-8"))
        folders |= _find_folders(tree)
        waiting |= _find_imports(tree) - modules
    found = [paths.NOTEBOOKS / f"{name}.ipynb"]
    if profile != parameters.QUICK:
        found.append(paths.PROFILES / profile / f"{name}.yaml")
    found += sorted(modules)
    if "FIGURES" in folders:
        found += sorted(path for path in paths.FIGURES.glob("*.csv") if not path.stem.startswith(name))
    if "CHECKPOINTS" in folders:
        found.append(paths.CHECKPOINTS)  # a folder changes when a file is added or removed
        found += sorted(path for kind in ("*.csv", "*.safetensors") for path in paths.CHECKPOINTS.glob(kind))
    return found


def make_rules(target: Path, prerequisites: Sequence[Path]) -> str:
    """The makefile text that says that ``target`` depends on ``prerequisites``."""
    # A folder is written as "checkpoints/.", since `make checkpoints` is a target.
    listed = [f"{paths.shorten(path)}/." if path.is_dir() else paths.shorten(path) for path in prerequisites]
    unwritable = [path for path in listed if not _WRITABLE.fullmatch(path)]
    for path in unwritable:
        print(f"{path!r} is not checked for changes, since make cannot read such a name: rename it.", file=sys.stderr)
    listed = [_ESCAPED.sub(r"\\\g<0>", path.replace("$", "$$")) for path in listed if path not in unwritable]
    # An empty rule for each file, so that one that is deleted later does not stop make (like gcc -MP).
    return "\n".join([f"{paths.shorten(target)}: {' '.join(listed)}", *(f"{path}:" for path in listed)]) + "\n"
