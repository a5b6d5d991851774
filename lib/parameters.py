"""The notebooks' parameters: which there are, where their values come from, and their check before anything runs.

A notebook's values are the defaults of its cell tagged ``parameters`` (the profile ``quick``), replaced by those of
``notebooks/profiles/<profile>/<notebook>.yaml``, replaced by those set by hand for one run. Every function raises
WrongParameters, one sentence, if something does not exist or does not fit.
"""

import ast
import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lib import paths

if TYPE_CHECKING:  # a second to import, and an explorer goes without
    from nbformat import NotebookNode

QUICK, PAPER, CUSTOM = "quick", "paper", "custom"
# Notebooks of these names are opened or trained by a person: they are no figures.
NOT_FIGURES = ("explore_", "train_")
START = "start"  # the page that `make lab` opens, which takes no parameters
# Names that make, a shell and a link take as they are; the Makefile looks for the same.
FITTING = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
UNFITTING = "its name has other characters than letters, digits, _, . and -, so rename it"
# By their tags in YAML. A whole number has no leading zero.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
# What each type of a parameters cell accepts, and how a sentence calls it.
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "True or False"),
    "list": ((list, tuple), "a list"),
}


class WrongParameters(ValueError):
    """A profile, notebook or parameter that does not exist, or a value of a wrong type or range."""


@dataclass(frozen=True)
class Parameter:
    """One line ``name: type = default  # words`` of a parameters cell."""

    name: str
    type: str
    default: Any
    words: str = ""


class _Loader(yaml.SafeLoader):
    """YAML of plain values with the numbers of everyday life: 4e-2 is one, as it is in YAML 1.2; 010, which would be 8,
    and 1:30, which would be 90, are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} has more than one value")
        return super().construct_mapping(node, deep)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def names() -> list[str]:
    """Every notebook of the project, without the suffix: those with a cell tagged ``parameters``."""
    return sorted(path.stem for path in _files() if not _why_left_out(path, path.stat().st_mtime_ns))


def stored() -> list[str]:
    """The notebooks whose outputs are stored: all of `names`, and the start page if it is there."""
    return names() + [START] * (paths.NOTEBOOKS / f"{START}.ipynb").is_file()


def left_out() -> list[str]:
    """A sentence for every other notebook in the folder, such as the Untitled.ipynb that JupyterLab makes, and for
    every file of a profile that no notebook can have."""
    found = {path: _why_left_out(path, path.stat().st_mtime_ns) for path in _files()}
    found |= {path: UNFITTING for path in sorted(paths.PROFILES.glob("*/*.yaml")) if not FITTING.fullmatch(path.stem)}
    return [f"{paths.short(path)} is left out: {why}." for path, why in found.items() if why]


def _files() -> list[Path]:
    return sorted(
        path
        for path in paths.NOTEBOOKS.glob("*.ipynb")
        if path.is_file() and path.name[0] != "." and path.stem != START
    )


@functools.cache
def _why_left_out(path: Path, changed: int) -> str:
    # Read once for every time of change.
    if not FITTING.fullmatch(path.stem):
        return UNFITTING
    try:
        cells = json.loads(path.read_bytes())["cells"]
        tags = {tag for cell in cells for tag in cell["metadata"].get("tags", [])}
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        return "it cannot be read as a notebook"
    return "" if "parameters" in tags else "no cell of it is tagged 'parameters'"


def figures() -> list[str]:
    """The notebooks that ``make figures`` runs: all but explorers and training."""
    return [name for name in names() if not name.startswith(NOT_FIGURES)]


def profiles() -> list[str]:
    """``quick`` (the notebooks' own defaults) and the folders of ``notebooks/profiles``."""
    return [QUICK, *sorted(path.name for path in paths.PROFILES.iterdir() if path.is_dir())]


def _check_name(name: str) -> None:
    if name not in stored():
        reasons = "".join(f" ({sentence})" for sentence in left_out() if f"/{name}.ipynb " in sentence)
        raise WrongParameters(f"There is no notebook {name!r}{reasons}; the notebooks are: {', '.join(names())}.")


def read(name: str) -> "NotebookNode":
    """The notebook of that name, whole; WrongParameters lists the names if there is none."""
    import nbformat

    _check_name(name)
    return nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)


@dataclass(frozen=True)
class CodeCell:
    """A code cell: what is written in it, and its tags."""

    source: str
    tags: tuple[str, ...]


def code_cells(name: str) -> list[CodeCell]:
    """The code cells of a notebook, in order; raises as `read`."""
    _check_name(name)
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_bytes())["cells"]
    return [
        CodeCell("".join(cell["source"]), tuple(cell["metadata"].get("tags", [])))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def tagged(cells: Iterable[CodeCell], tag: str) -> list[CodeCell]:
    """The cells that carry ``tag``, in order."""
    return [cell for cell in cells if tag in cell.tags]


def code(cell: "CodeCell | NotebookNode") -> str:
    """The Python of a code cell: IPython's own lines (%magic, !command) are left empty."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines())


def offered(name: str) -> dict[str, Parameter]:
    """The parameters that a notebook offers, read from its one cell tagged ``parameters``.

    The cell holds one literal a line, ``name: type = value  # plain words``, with a type of ``TYPES``.
    """
    cells = tagged(code_cells(name), "parameters")
    if len(cells) != 1:
        raise WrongParameters(f"{name} has {len(cells)} cells tagged 'parameters', expected exactly one.")
    found = {}
    for line in ast.parse(code(cells[0])).body:
        written = ast.unparse(line)
        try:
            target, default, kind = line.target, ast.literal_eval(line.value), ast.unparse(line.annotation)
        except (AttributeError, TypeError, ValueError):
            raise WrongParameters(
                f"{name}: the parameters cell holds {written!r}, expected a line 'name: type = literal'."
            ) from None
        kind = kind.partition("[")[0]
        if kind not in TYPES:
            raise WrongParameters(f"{name}: {target.id} has the type {kind}, expected one of: {', '.join(TYPES)}.")
        words = code(cells[0]).splitlines()[line.end_lineno - 1].partition("  # ")[2]
        found[target.id] = Parameter(target.id, kind, default, words)
    # papermill reads lines, and takes a value from what follows the one '=' of a line.
    once = {line.split(":")[0].strip() for line in cells[0].source.splitlines() if line.count("=") == 1}
    if unseen := sorted(set(found) - once):
        raise WrongParameters(
            f"{name}: papermill does not see {', '.join(unseen)} in the parameters cell; "
            "a line takes one '=' only, comments included."
        )
    return found


def in_profile(name: str, profile: str) -> bool:
    """Whether the notebook has values for that profile."""
    return profile == QUICK or (paths.PROFILES / profile / f"{name}.yaml").is_file()


def read_yaml(path: Path) -> dict[str, Any]:
    """The values in a YAML file of lines ``name: value``."""
    try:
        values = yaml.load(path.read_bytes(), _Loader)  # bytes: UTF-16 is recognised by its first two
    except FileNotFoundError:
        raise WrongParameters(f"There is no file {paths.short(path)} to read parameters from.") from None
    except OSError as error:
        raise WrongParameters(f"{paths.short(path)} cannot be read: {error.strerror}.") from None
    except yaml.reader.ReaderError:
        raise WrongParameters(f"{paths.short(path)} is not text in UTF-8: save it in that encoding.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise WrongParameters(f"{paths.short(path)} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WrongParameters(f"{paths.short(path)} holds {values!r}, expected lines 'name: value'.")
    return values


def _known(profile: str) -> str:
    if profile not in profiles():
        raise WrongParameters(f"There is no profile {profile!r}; the profiles are: {', '.join(profiles())}.")
    return profile


def profile_values(name: str, profile: str) -> dict[str, Any]:
    """The values that a profile gives to a notebook (none for ``quick``)."""
    if _known(profile) == QUICK:
        return {}
    if not in_profile(name, profile):
        having = [other for other in profiles() if in_profile(name, other)]
        raise WrongParameters(
            f"{name} has no counterpart in the profile {profile!r} (there is no "
            f"{paths.short(paths.PROFILES / profile / name)}.yaml); it has: {', '.join(having)}."
        )
    return read_yaml(paths.PROFILES / profile / f"{name}.yaml")


def read_value(name: str, text: str) -> Any:
    """The value that the text is in YAML; WrongParameters, with the name that it is for, if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise WrongParameters(f"{name} has the value {text!r}, which is not YAML.") from None


def parse_settings(settings: str) -> dict[str, Any]:
    """The values in ``"row=3 learning_rate=0.02"``, each read as YAML."""
    values = {}
    try:
        found = shlex.split(settings)
    except ValueError as error:
        raise WrongParameters(f"SET is {settings!r}: {str(error).lower()}.") from None
    for setting in found:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise WrongParameters(f'SET holds {setting!r}, expected settings like SET="row=3 learning_rate=0.02".')
        if name in values:
            raise WrongParameters(f"SET is {settings!r}, which gives {name} more than one value.")
        values[name] = read_value(f"{name} in SET", text)
    return values


def by_hand(settings: str = "", file: str = "") -> dict[str, Any]:
    """The values of a run by hand: those in a YAML file, and in their place those in ``settings``.

    Raises WrongParameters for a file that gives none, which would make the run one of the profile.
    """
    values = {}
    if file:
        path = Path(file).absolute()
        values = read_yaml(path)
        if not values:
            raise WrongParameters(f"{paths.short(path)} holds no values, expected lines 'name: value'.")
    return values | parse_settings(settings)


# --- Checks before anything runs --------------------------------------------------------------------------------------


def check_types(name: str, values: Mapping[str, Any]) -> None:
    """Raise WrongParameters for a parameter that the notebook does not have, or a value of another type."""
    known = offered(name)
    for parameter, value in values.items():
        if parameter not in known:
            raise WrongParameters(f"{name} has no parameter {parameter!r}; its parameters are: {', '.join(known)}.")
        accepted, called = TYPES[known[parameter].type]
        wrong_bool = isinstance(value, bool) and bool not in accepted
        if not isinstance(value, accepted) or wrong_bool:
            raise WrongParameters(f"{name}: {parameter} is {value!r}, expected {called}.")


def check_values(name: str, values: Mapping[str, Any]) -> None:
    """Run the notebook up to its cell tagged ``config`` in this process, whose dataclass checks ranges and choices.

    Only imports, the parameters (with ``values`` in place of the defaults) and the config run: nothing is computed.
    """
    check_types(name, values)
    cells = code_cells(name)
    config = tagged(cells, "config")
    if not config:
        return
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells[: cells.index(config[-1]) + 1]:
        try:
            exec(compile(code(cell), f"{name}.ipynb", "exec"), namespace)
        except (ValueError, TypeError) as error:
            if cell in config:
                raise WrongParameters(f"{name}: {error}") from error
            raise
        if "parameters" in cell.tags:
            namespace.update(values)


def check_profile(profile: str) -> list[str]:
    """Check all parameters of a profile; returns the figures that have no counterpart in it."""
    if _known(profile) == QUICK:
        having = names()
    else:
        stems = (path.stem for path in (paths.PROFILES / profile).glob("*.yaml"))
        having = sorted(stem for stem in stems if FITTING.fullmatch(stem))
    for name in having:
        check_values(name, profile_values(name, profile))
    return [name for name in figures() if name not in having]
