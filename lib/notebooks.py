"""The runner: checks a notebook's parameters, executes it with papermill, keeps its results only if all went well.

``make`` calls it as ``python -m lib.notebooks``; a person who prefers Python calls the functions below.

A notebook's values are the defaults of its cell tagged ``parameters`` (the profile ``quick``), replaced by those of
``notebooks/profiles/<profile>/<notebook>.yaml``, replaced by those set by hand for one run. Files that a notebook
writes to ``paths.figures_output()`` land in a staging folder and move to

    figures/             the profile ``paper`` (tracked by git),
    figures/<profile>/   every other profile,
    figures/custom/      a run with values set by hand,

once the whole notebook has run. The executed notebook, ``.build/<profile>/<notebook>.ipynb``, is written last: it is
the stamp that ``make`` goes by. Beside it, ``<notebook>.d`` tells ``make`` which files the result depends on.
"""

import argparse
import ast
import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError, strip_color
from papermill.translators import PythonTranslator

from lib import paths

QUICK, PAPER, CUSTOM = "quick", "paper", "custom"
# Notebooks of these names are opened or trained by a person: they are no figures.
NOT_FIGURES = ("explore_", "train_")
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# What each type of a parameters cell accepts, and how a sentence calls it.
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "True or False"),
    "list": ((list, tuple), "a list"),
}
# The compiled engine computes what the PyTorch engine computes, so a result does not depend on it.
NO_DEPENDENCY = ("engine",)
TRACEBACK_LINES = 20


class WrongParameters(ValueError):
    """A profile, notebook or parameter that does not exist, or a value of a wrong type or range."""


class RunFailed(RuntimeError):
    """A notebook that raised, or hid an error in a widget."""


@dataclass(frozen=True)
class Parameter:
    """One line ``name: type = default`` of a parameters cell."""

    name: str
    type: str
    default: Any


# --- Notebooks, profiles and their parameters -------------------------------------------------------------------------


def names() -> list[str]:
    """Every notebook of the project, without the suffix."""
    return sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb"))


def figures() -> list[str]:
    """The notebooks that ``make figures`` runs: all but explorers and training."""
    return [name for name in names() if not name.startswith(NOT_FIGURES)]


def profiles() -> list[str]:
    """``quick`` (the notebooks' own defaults) and the folders of ``notebooks/profiles``."""
    return [QUICK, *sorted(path.name for path in paths.PROFILES.iterdir() if path.is_dir())]


def read(name: str) -> NotebookNode:
    """The notebook of that name; WrongParameters lists the names where there is none."""
    if name not in names():
        raise WrongParameters(f"There is no notebook {name!r}; the notebooks are: {', '.join(names())}.")
    return nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The code cells that carry ``tag``, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and tag in cell.metadata.get("tags", [])]


def _code(cell: NotebookNode) -> str:
    # IPython's own lines (%magic, !command) are no Python.
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines())


def parameters(name: str) -> dict[str, Parameter]:
    """The parameters that a notebook offers, read from its one cell tagged ``parameters``.

    The cell holds one literal a line, ``name: type = value  # plain words``, with a type of ``TYPES``.
    """
    cells = tagged(read(name), "parameters")
    if len(cells) != 1:
        raise WrongParameters(f"{name} has {len(cells)} cells tagged 'parameters', expected exactly one.")
    found = {}
    for line in ast.parse(_code(cells[0])).body:
        written = ast.unparse(line)
        try:
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            default = ast.literal_eval(line.value)
            kind = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else type(default).__name__
        except (AttributeError, TypeError, ValueError):
            raise WrongParameters(
                f"{name}: the parameters cell holds {written!r}, expected a line 'name: type = literal'."
            ) from None
        kind = kind.partition("[")[0]
        if kind not in TYPES:
            raise WrongParameters(f"{name}: {target.id} has the type {kind}, expected one of: {', '.join(TYPES)}.")
        found[target.id] = Parameter(target.id, kind, default)
    seen = {parameter.name for parameter in PythonTranslator.inspect(cells[0])}
    if unseen := sorted(set(found) - seen):
        raise WrongParameters(
            f"{name}: papermill does not see {', '.join(unseen)} in the parameters cell; "
            "a line takes one '=' only, comments included."
        )
    return found


def in_profile(name: str, profile: str) -> bool:
    """Whether the notebook has values for that profile."""
    return profile == QUICK or (paths.PROFILES / profile / f"{name}.yaml").is_file()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WrongParameters(f"There is no file {_short(path)} to read parameters from.") from None
    except yaml.YAMLError as error:
        raise WrongParameters(f"{_short(path)} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WrongParameters(f"{_short(path)} holds {values!r}, expected lines 'name: value'.")
    return values


def _short(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


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
            f"{_short(paths.PROFILES / profile / name)}.yaml); it has: {', '.join(having)}."
        )
    return _read_yaml(paths.PROFILES / profile / f"{name}.yaml")


def parse_settings(settings: str) -> dict[str, Any]:
    """The values in ``"row=3 learning_rate=0.02"``, each read as YAML."""
    values = {}
    for setting in shlex.split(settings):
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise WrongParameters(f'SET holds {setting!r}, expected settings like SET="row=3 learning_rate=0.02".')
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise WrongParameters(f"SET gives {name} the value {text!r}, which is not YAML.") from None
    return values


# --- Checks before anything runs --------------------------------------------------------------------------------------


def check_types(name: str, values: Mapping[str, Any]) -> None:
    """Raise WrongParameters for a parameter that the notebook does not have, or a value of another type."""
    known = parameters(name)
    for parameter, value in values.items():
        if parameter not in known:
            raise WrongParameters(f"{name} has no parameter {parameter!r}; its parameters are: {', '.join(known)}.")
        accepted, called = TYPES[known[parameter].type]
        wrong_bool = isinstance(value, bool) and bool not in accepted
        if not isinstance(value, accepted) or wrong_bool:
            hint = ""
            if isinstance(value, str) and float in accepted:
                hint = " In YAML write 0.04 or 4.0e-2, since 4e-2 is read as text."
            raise WrongParameters(f"{name}: {parameter} is {value!r}, expected {called}.{hint}")


def check_values(name: str, values: Mapping[str, Any]) -> None:
    """Run the notebook up to its cell tagged ``config`` in this process, whose dataclass checks ranges and choices.

    Only imports, the parameters (with ``values`` in place of the defaults) and the config run: nothing is computed.
    """
    check_types(name, values)
    notebook = read(name)
    config = tagged(notebook, "config")
    if not config:
        return
    last = notebook.cells.index(config[-1])
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook.cells[: last + 1]:
        if cell.cell_type != "code":
            continue
        try:
            exec(compile(_code(cell), f"{name}.ipynb", "exec"), namespace)
        except (ValueError, TypeError) as error:
            if cell in config:
                raise WrongParameters(f"{name}: {error}") from error
            raise
        if "parameters" in cell.metadata.get("tags", []):
            namespace.update(values)


def check_profile(profile: str) -> list[str]:
    """Check all parameters of a profile; returns the figures that have no counterpart in it."""
    if _known(profile) == QUICK:
        having = names()
    else:
        having = sorted(path.stem for path in (paths.PROFILES / profile).glob("*.yaml"))
    for name in having:
        check_values(name, profile_values(name, profile))
    return [name for name in figures() if name not in having]


# --- Dependencies -----------------------------------------------------------------------------------------------------


def _imports(tree: ast.AST) -> set[str]:
    # The modules of lib that a piece of code names, without the "lib." in front.
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lib.") for alias in node.names if alias.name.startswith("lib.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            found.add(node.module.removeprefix("lib."))
    return {name for name in found if (paths.ROOT / "lib" / f"{name}.py").is_file()} - set(NO_DEPENDENCY)


def _reads_checkpoints(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "CHECKPOINTS" for node in ast.walk(tree))


def dependencies(name: str, profile: str) -> list[Path]:
    """The files that a result is made from: the notebook, its profile, the modules of ``lib`` that it imports, those
    that they import in turn, and the trained networks where one of them reads ``paths.CHECKPOINTS``."""
    tree = ast.parse("\n".join(_code(cell) for cell in read(name).cells if cell.cell_type == "code"))
    checkpoints = _reads_checkpoints(tree)
    modules, waiting = {"__init__"}, _imports(tree)
    while waiting:
        module = waiting.pop()
        modules.add(module)
        tree = ast.parse((paths.ROOT / "lib" / f"{module}.py").read_text(encoding="utf-8"))
        checkpoints = checkpoints or _reads_checkpoints(tree)
        waiting |= _imports(tree) - modules
    found = [paths.NOTEBOOKS / f"{name}.ipynb"]
    if profile != QUICK:
        found.append(paths.PROFILES / profile / f"{name}.yaml")
    found += [paths.ROOT / "lib" / f"{module}.py" for module in sorted(modules)]
    if checkpoints:
        found += sorted(path for kind in ("*.csv", "*.safetensors") for path in paths.CHECKPOINTS.glob(kind))
    return found


def _make_rules(target: Path, prerequisites: Sequence[Path]) -> str:
    listed = [_short(path) for path in prerequisites]
    # An empty rule for each file, so that one that is deleted later does not stop make (like gcc -MP).
    return "\n".join([f"{_short(target)}: {' '.join(listed)}", *(f"{path}:" for path in listed)]) + "\n"


# --- Running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unattended_environment(output: Path) -> Iterator[None]:
    """The environment of a kernel that no person looks at: where it writes, and that ``paths.unattended()`` holds."""
    before = dict(os.environ)
    os.environ |= {
        "FIGURES_OUTPUT": str(output),
        "NOTEBOOK_UNATTENDED": "1",
        # This tree's lib, and this interpreter's kernel, whatever else is installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), before.get("PYTHONPATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    # A backend from outside would keep the notebooks from drawing inline.
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def normalise(notebook: NotebookNode, output: Path | None = None) -> NotebookNode:
    """The notebook without what differs from run to run or machine to machine, changed in place.

    Timestamps, papermill's notes, widget state, the kernel's version and absolute paths go (``output``, the staging
    folder, included); a widget's view goes too, since it shows nothing without a kernel.
    """
    notebook.metadata = {"kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}}
    for cell in notebook.cells:
        for key in ("papermill", "execution", "ExecuteTime", "collapsed", "jupyter"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        kept = []
        for item in cell.outputs:
            data = item.get("data", {})
            if data.pop(WIDGET_VIEW, None) is not None:
                data.pop("text/plain", None)
                if not data:
                    continue
            for holder, key in ((item, "text"), (data, "text/plain"), (data, "text/html"), (data, "text/markdown")):
                if key in holder:
                    holder[key] = _without_paths(holder[key], output)
            kept.append(item)
        cell.outputs = kept
    return notebook


def _without_paths(text: str, output: Path | None) -> str:
    if output is not None:
        text = text.replace(f"{output}{os.sep}", "").replace(str(output), "figures")
    return text.replace(f"{paths.ROOT}{os.sep}", "").replace(str(paths.ROOT), ".")


def hidden_errors(notebook: NotebookNode) -> list[str]:
    """Errors of an executed notebook that papermill lets pass: in stored outputs and in the state of its widgets.

    An explorer that raises writes its traceback into an Output widget, and the cell counts as run.
    """
    outputs = [item for cell in notebook.cells if cell.cell_type == "code" for item in cell.outputs]
    for model in notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}).values():
        outputs += model.get("state", {}).get("outputs") or []
    return [f"{item['ename']}: {strip_color(item['evalue'])}" for item in outputs if item.get("output_type") == "error"]


def stderr_text(notebook: NotebookNode) -> str:
    """What the executed notebook wrote to stderr: warnings, mostly."""
    streams = [item for cell in notebook.cells if cell.cell_type == "code" for item in cell.outputs]
    return "".join(item.text for item in streams if item.output_type == "stream" and item.name == "stderr")


def _execute(name: str, values: Mapping[str, Any], output: Path, unfinished: Path) -> NotebookNode:
    # Runs the notebook in its own folder; raises RunFailed with the sentence of the config, or a short traceback.
    config = [cell.source for cell in tagged(read(name), "config")]
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unattended_environment(output):
            notebook = papermill.execute_notebook(
                paths.NOTEBOOKS / f"{name}.ipynb",
                unfinished,
                parameters=dict(values),
                kernel_name="python3",
                language="python",
                cwd=paths.NOTEBOOKS,
                # papermill's own bar counts cells: for a person at a terminal only.
                progress_bar=sys.stderr.isatty(),
                # The kernel's own notes on its transport are none of the reader's business.
                extra_arguments=["--log-level=CRITICAL"],
            )
    except PapermillExecutionError as error:
        if error.source in config and error.ename in ("ValueError", "TypeError"):
            unfinished.unlink(missing_ok=True)
            raise WrongParameters(f"{name}: {error.evalue}") from None
        lines = strip_color("\n".join(error.traceback)).splitlines()
        raise RunFailed(
            f"{name} stopped in its cell In [{error.exec_count}]; {_short(unfinished)} shows how far it came.\n"
            + "\n".join(lines[-TRACEBACK_LINES:])
        ) from None
    if errors := hidden_errors(notebook):
        raise RunFailed(f"{name} hides an error in an explorer: {'; '.join(errors)} ({_short(unfinished)}).")
    unfinished.unlink(missing_ok=True)
    return notebook


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _destination(profile: str) -> Path:
    return paths.FIGURES if profile == PAPER else paths.FIGURES / profile


def run(name: str, profile: str = PAPER, by_hand: Mapping[str, Any] | None = None) -> list[Path]:
    """Run one notebook with a profile's values, and ``by_hand`` in their place; returns the files it made.

    Raises WrongParameters before the notebook runs, or RunFailed; both leave earlier results and no stamp behind.
    """
    values = profile_values(name, profile) | dict(by_hand or {})
    check_types(name, values)
    kind = CUSTOM if by_hand else profile
    folder = paths.BUILD / kind
    result = folder / f"{name}.ipynb"
    # The result carries the time of the start: what is edited during the run makes it out of date.
    started = time.time()
    rules = _make_rules(result, dependencies(name, profile))
    staging = _fresh(folder / f"{name}.outputs")
    notebook = _execute(name, values, staging, folder / f"{name}.unfinished.ipynb")
    if warnings := stderr_text(notebook):
        print(f"{name} wrote to stderr:\n{warnings}", file=sys.stderr)
    destination = _destination(kind)
    # No stamp while files move: an interrupted move leaves new files beside old ones.
    result.unlink(missing_ok=True)
    made = []
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = destination / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
        made.append(target)
    shutil.rmtree(staging)
    if kind != CUSTOM:
        (folder / f"{name}.d").write_text(rules, encoding="utf-8")
    _write(normalise(notebook, staging), result, modified=started)
    return made


def _write(notebook: NotebookNode, path: Path, modified: float) -> None:
    unfinished = path.with_suffix(".unfinished.ipynb")
    nbformat.write(notebook, unfinished)
    os.utime(unfinished, (modified, modified))
    os.replace(unfinished, path)


def execute(name: str) -> bool:
    """Run a notebook with its defaults and store the outputs in it, normalised; returns whether they changed.

    Warnings are errors here, since a stored notebook must show none. The file keeps its time of modification: its
    cells are the same, so no figure that is made from them is out of date.
    """
    path = paths.NOTEBOOKS / f"{name}.ipynb"
    before = path.read_text(encoding="utf-8") if name in names() else ""
    staging = _fresh(paths.BUILD / "stored" / f"{name}.outputs")
    notebook = _execute(name, {}, staging, paths.BUILD / "stored" / f"{name}.unfinished.ipynb")
    shutil.rmtree(staging)
    if warnings := stderr_text(notebook):
        raise RunFailed(f"{name} wrote to stderr, which a stored notebook must not show:\n{warnings}")
    modified = path.stat().st_mtime
    finished = paths.BUILD / "stored" / path.name
    _write(normalise(notebook, staging), finished, modified)
    changed = finished.read_text(encoding="utf-8") != before
    if changed:
        os.replace(finished, path)
    return changed


# --- Command line -----------------------------------------------------------------------------------------------------


def _run_command(arguments: argparse.Namespace) -> None:
    by_hand = _read_yaml(Path(arguments.parameters).absolute()) if arguments.parameters else {}
    by_hand |= parse_settings(arguments.set)
    values = profile_values(arguments.name, arguments.profile) | by_hand
    # A profile has been checked as a whole; its ranges are checked again by the config cell of the run itself.
    (check_values if by_hand else check_types)(arguments.name, values)
    label = f"{arguments.name} ({CUSTOM if by_hand else arguments.profile})"
    print(f"{label}: running", flush=True)
    started = time.monotonic()
    made = run(arguments.name, arguments.profile, by_hand)
    listed = ", ".join(_short(path) for path in made) or "no files"
    print(f"{label}: {time.monotonic() - started:.0f} s, wrote {listed}", flush=True)


def _check_command(arguments: argparse.Namespace) -> None:
    left_out = check_profile(arguments.profile)
    print(f"The parameters of the profile {arguments.profile} are in order.")
    if left_out:
        print(f"Left out, since they have no counterpart in it: {', '.join(left_out)}.")


def _execute_command(arguments: argparse.Namespace) -> None:
    for name in arguments.names or names():
        print(f"{name}: {'stored anew' if execute(name) else 'unchanged'}", flush=True)


def _list_command(_: argparse.Namespace) -> None:
    for name in names():
        print(f"{name}: {', '.join(profile for profile in profiles() if in_profile(name, profile))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 2 for wrong parameters, 1 for a notebook that failed."""
    parser = argparse.ArgumentParser(prog="python -m lib.notebooks", description="Run the project's notebooks.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="run one notebook and keep what it makes")
    one.add_argument("name")
    one.add_argument("--profile", default=PAPER)
    one.add_argument("--set", default="", metavar="'NAME=VALUE ...'", help="values for this run alone")
    one.add_argument("--parameters", default="", metavar="FILE", help="YAML file with values for this run alone")
    one.set_defaults(command=_run_command)
    check = commands.add_parser("check", help="check all parameters of a profile, running nothing")
    check.add_argument("--profile", default=PAPER)
    check.set_defaults(command=_check_command)
    store = commands.add_parser("execute", help="run notebooks with their defaults and store the outputs in them")
    store.add_argument("names", nargs="*", metavar="name")
    store.set_defaults(command=_execute_command)
    commands.add_parser("list", help="list the notebooks and their profiles").set_defaults(command=_list_command)
    chosen = parser.parse_args(arguments)
    try:
        chosen.command(chosen)
    except WrongParameters as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing of this run is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
