"""The notebooks' parameters: their names and types, their values, and the checks before anything runs.

A notebook's values are the defaults in its cell tagged ``parameters`` (the profile ``quick``). A profile replaces them
by those of ``notebooks/profiles/<profile>/<notebook>.yaml``, and values set by hand for one run replace both. Every
function raises WrongParameters if something does not exist or is wrong.
"""

import ast
import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib import paths

QUICK, PAPER, CUSTOM = "quick", "paper", "custom"
# Notebooks whose names start like this are for a person to open, and are not figures.
NOT_FIGURES = ("explore_", "train_")
START = "start"  # the page that `make lab` opens, which is no figure either
# Names that make, a shell and a link can use without quotes. The Makefile uses the same rule.
VALID_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
INVALID_NAME = "its name has other characters than letters, digits, _, . and -, so rename it"
# Patterns of numbers by their tags in YAML. A whole number has no leading zero.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
# The Python types that each type in a parameters cell accepts, and its name in messages.
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "True or False"),
    "list": ((list, tuple), "a list"),
}


class WrongParameters(ValueError):
    """A profile, notebook or parameter does not exist, or a value has a wrong type or range."""


@dataclass(frozen=True)
class Parameter:
    """One line ``name: type = default  # words`` of a parameters cell."""

    name: str
    type: str
    default: Any
    words: str = ""


class _Loader(yaml.SafeLoader):
    """YAML of plain values, with numbers as people write them: 4e-2 is a number, as in YAML 1.2, and 010 and 1:30 are
    text (YAML 1.1 reads 8 and 90)."""

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


def list_names() -> list[str]:
    """The names of the project's notebooks: those with a cell tagged ``parameters``."""
    return sorted(path.stem for path in _list_files() if not _explain_exclusion(path, path.stat().st_mtime_ns))


def explain_left_out() -> list[str]:
    """A message for every other notebook in the folder, such as the Untitled.ipynb that JupyterLab makes, and for
    every file of a profile whose name no notebook can have."""
    found = {path: _explain_exclusion(path, path.stat().st_mtime_ns) for path in _list_files()}
    in_profiles = sorted(paths.PROFILES.glob("*/*.yaml"))
    found |= {path: INVALID_NAME for path in in_profiles if not VALID_NAME.fullmatch(path.stem)}
    return [f"{paths.shorten(path)} is left out: {why}." for path, why in found.items() if why]


def _list_files() -> list[Path]:
    return sorted(path for path in paths.NOTEBOOKS.glob("*.ipynb") if path.is_file() and path.name[0] != ".")


@functools.cache
def _explain_exclusion(path: Path, changed: int) -> str:
    # Why the file is not one of the project's notebooks; empty if it is. A file is read again only if it has changed.
    if not VALID_NAME.fullmatch(path.stem):
        return INVALID_NAME
    try:
        cells = json.loads(path.read_bytes())["cells"]
        tags = {tag for cell in cells for tag in cell["metadata"].get("tags", [])}
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        return "it cannot be read as a notebook"
    return "" if "parameters" in tags else "it has no cell tagged 'parameters'"


def list_figures() -> list[str]:
    """The notebooks that ``make figures`` runs: all but explorers, training and the start page."""
    return [name for name in list_names() if name != START and not name.startswith(NOT_FIGURES)]


def list_profiles() -> list[str]:
    """``quick`` (the notebooks' own defaults) and the folders of ``notebooks/profiles``."""
    return [QUICK, *sorted(path.name for path in paths.PROFILES.iterdir() if path.is_dir())]


def _check_name(name: str) -> None:
    if name not in list_names():
        reasons = "".join(f" ({reason})" for reason in explain_left_out() if f"/{name}.ipynb " in reason)
        raise WrongParameters(f"There is no notebook {name!r}{reasons}; the notebooks are: {', '.join(list_names())}.")


@dataclass(frozen=True)
class CodeCell:
    """The source and the tags of a code cell."""

    source: str
    tags: tuple[str, ...]


def code_cells(name: str) -> list[CodeCell]:
    """The code cells of a notebook, in order. Raises WrongParameters if there is no such notebook."""
    _check_name(name)
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_bytes())["cells"]
    return [
        CodeCell("".join(cell["source"]), tuple(cell["metadata"].get("tags", [])))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def select_tagged(cells: Iterable[CodeCell], tag: str) -> list[CodeCell]:
    """The cells with this tag, in order."""
    return [cell for cell in cells if tag in cell.tags]


def extract_python(cell: CodeCell) -> str:
    """The Python code of a cell. Lines of IPython (%magic, !command) become empty lines."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines())


def read_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its only cell tagged ``parameters``.

    Each line of the cell is ``name: type = literal  # plain words``, with a type in ``TYPES``.
    """
    cells = select_tagged(code_cells(name), "parameters")
    if len(cells) != 1:
        raise WrongParameters(f"{name} has {len(cells)} cells tagged 'parameters', expected exactly one.")
    found = {}
    for line in ast.parse(extract_python(cells[0])).body:
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
        words = extract_python(cells[0]).splitlines()[line.end_lineno - 1].partition("  # ")[2]
        found[target.id] = Parameter(target.id, kind, default, words)
    # papermill reads single lines with one '='.
    once = {line.split(":")[0].strip() for line in cells[0].source.splitlines() if line.count("=") == 1}
    if unseen := sorted(set(found) - once):
        raise WrongParameters(
            f"{name}: papermill does not see {', '.join(unseen)} in the parameters cell; "
            "write one '=' in each line, comments included."
        )
    return found


def has_profile(name: str, profile: str) -> bool:
    """Whether the notebook has values for that profile."""
    return profile == QUICK or (paths.PROFILES / profile / f"{name}.yaml").is_file()


def read_yaml(path: Path) -> dict[str, Any]:
    """The values in a YAML file of lines ``name: value``."""
    try:
        values = yaml.load(path.read_bytes(), _Loader)  # bytes: UTF-16 is recognised by its first two
    except FileNotFoundError:
        raise WrongParameters(f"There is no file {paths.shorten(path)} with parameters: check its path.") from None
    except OSError as error:
        raise WrongParameters(f"{paths.shorten(path)} cannot be read: {error.strerror}.") from None
    except yaml.reader.ReaderError:
        raise WrongParameters(f"{paths.shorten(path)} is not text in UTF-8: save it in that encoding.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise WrongParameters(f"{paths.shorten(path)} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WrongParameters(f"{paths.shorten(path)} holds {values!r}, expected lines 'name: value'.")
    return values


def _check_profile_name(profile: str) -> None:
    if profile not in list_profiles():
        raise WrongParameters(f"There is no profile {profile!r}; the profiles are: {', '.join(list_profiles())}.")


def profile_values(name: str, profile: str) -> dict[str, Any]:
    """The values that a profile gives to a notebook (none for ``quick``)."""
    _check_profile_name(profile)
    if profile == QUICK:
        return {}
    if not has_profile(name, profile):
        having = [other for other in list_profiles() if has_profile(name, other)]
        raise WrongParameters(
            f"{name} has no values for the profile {profile!r} (there is no "
            f"{paths.shorten(paths.PROFILES / profile / name)}.yaml); its profiles are: {', '.join(having)}."
        )
    return read_yaml(paths.PROFILES / profile / f"{name}.yaml")


def read_value(name: str, text: str) -> Any:
    """The value of a YAML text for the parameter ``name``. Raises WrongParameters if it is not YAML."""
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


def read_by_hand(settings: str = "", file: str = "") -> dict[str, Any]:
    """The values that are set by hand: those in a YAML file, and those in ``settings``, which replace them.

    Raises WrongParameters if the file has no values, since the run would then be that of the profile.
    """
    values = {}
    if file:
        path = Path(file).absolute()
        values = read_yaml(path)
        if not values:
            raise WrongParameters(f"{paths.shorten(path)} holds no values, expected lines 'name: value'.")
    return values | parse_settings(settings)


# --- Checks before anything runs --------------------------------------------------------------------------------------


def check_types(name: str, values: Mapping[str, Any]) -> None:
    """Raise WrongParameters if the notebook does not have a parameter, or if a value has another type."""
    known = read_parameters(name)
    for parameter, value in values.items():
        if parameter not in known:
            raise WrongParameters(f"{name} has no parameter {parameter!r}; its parameters are: {', '.join(known)}.")
        accepted, called = TYPES[known[parameter].type]
        wrong_bool = isinstance(value, bool) and bool not in accepted
        if not isinstance(value, accepted) or wrong_bool:
            raise WrongParameters(f"{name}: {parameter} is {value!r}, expected {called}.")


def check_values(name: str, values: Mapping[str, Any]) -> None:
    """Check types, then ranges and choices by running the notebook up to its cell tagged ``config`` in this process.

    Only imports, the parameters (with ``values`` in place of the defaults) and the config run. Nothing is computed.
    """
    check_types(name, values)
    cells = code_cells(name)
    config = select_tagged(cells, "config")
    if not config:
        return
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells[: cells.index(config[-1]) + 1]:
        try:
            exec(compile(extract_python(cell), f"{name}.ipynb", "exec"), namespace)
        except (ValueError, TypeError) as error:
            if cell in config:
                raise WrongParameters(f"{name}: {error}") from error
            raise
        if "parameters" in cell.tags:
            namespace.update(values)


def check_profile(profile: str) -> list[str]:
    """Check all parameters of a profile; returns the figures for which it has no values."""
    _check_profile_name(profile)
    if profile == QUICK:
        having = list_names()
    else:
        stems = (path.stem for path in (paths.PROFILES / profile).glob("*.yaml"))
        having = sorted(stem for stem in stems if VALID_NAME.fullmatch(stem))
    for name in having:
        check_values(name, profile_values(name, profile))
    return [name for name in list_figures() if name not in having]
