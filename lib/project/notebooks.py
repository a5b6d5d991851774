"""Execute notebooks with papermill, and keep their results only if the whole notebook has run.

``make`` calls it as ``python -m lib.project.notebooks``. ``lib.parameters`` holds the checks before a run. Files that a
notebook writes to ``paths.figures_output()`` go to a staging folder first. Once the whole notebook has run, they move
to

    figures/             the profile ``paper`` (tracked by git),
    figures/<profile>/   every other profile,
    figures/custom/      a run with values set by hand.

The executed notebook, ``.build/<profile>/<notebook>.ipynb``, is written last: it is the time stamp for ``make``. Beside
it, ``<notebook>.d`` tells ``make`` which files the result depends on, and ``<notebook>.made`` lists the files that it
made, one in each line. If one of them is missing, the result is out of date.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError, strip_color

from lib import commands, locks, parameters, paths
from lib.project.dependencies import find_dependencies, make_rules

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
TRACEBACK_LINES = 20
SECONDS = "seconds"  # in the metadata of an executed notebook: how long it took
# Errors that are shown without a traceback, since their message says everything.
SENTENCES = (
    "Divergence", "DataNotFoundError", "CheckpointError", "LayerLogError", "TableError", "CannotWrite", "Busy",
    "MemoryError",
)  # fmt: skip


class RunFailed(RuntimeError):
    """A notebook raised an error, or an error is hidden in a widget."""


class Edited(RunFailed):
    """A notebook was saved by somebody while it ran."""


# --- Running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unattended_environment(output: Path) -> Iterator[None]:
    """Set the environment of a kernel that no person looks at: its output folder, and NOTEBOOK_UNATTENDED."""
    before = dict(os.environ)
    os.environ |= {
        "FIGURES_OUTPUT": str(output),
        "NOTEBOOK_UNATTENDED": "1",
        # Use this tree's lib and this interpreter's kernel, whatever else is installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), before.get("PYTHONPATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    # With another backend, the notebooks would not draw inline.
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def normalise(notebook: NotebookNode, output: Path | None = None) -> NotebookNode:
    """Remove from a notebook, in place, everything that differs between runs or machines.

    These are timestamps, papermill's notes, widget state, the kernel's version and absolute paths (also of ``output``,
    the staging folder). A widget's view is removed too, since it shows nothing without a kernel.
    """
    notebook.metadata = {"kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}}
    for cell in notebook.cells:
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        for key in ("papermill", "execution", "ExecuteTime", "collapsed", "jupyter"):
            cell.metadata.pop(key, None)
        if hidden:  # the author's choice
            cell.metadata["jupyter"] = {"source_hidden": True}
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
                    holder[key] = _remove_paths(holder[key], output)
            # A kernel splits a text into messages at random.
            if kept and item.output_type == "stream" == kept[-1].output_type and item.name == kept[-1].name:
                kept[-1].text += item.text
            else:
                kept.append(item)
        cell.outputs = kept
    return notebook


def _remove_paths(text: str, output: Path | None) -> str:
    if output is not None:
        text = text.replace(f"{output}{os.sep}", "").replace(str(output), "figures")
    return text.replace(f"{paths.ROOT}{os.sep}", "").replace(str(paths.ROOT), ".")


def _outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [item for cell in notebook.cells if cell.cell_type == "code" for item in cell.outputs]


def find_hidden_errors(notebook: NotebookNode) -> list[str]:
    """Errors of an executed notebook that papermill does not see: in stored outputs and in the state of its widgets.

    An explorer that raises an error writes it into an Output widget, and its cell counts as run.
    """
    outputs = _outputs(notebook)
    for model in notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}).values():
        outputs += model.get("state", {}).get("outputs") or []
    return [f"{item['ename']}: {strip_color(item['evalue'])}" for item in outputs if item.get("output_type") == "error"]


def collect_stderr(notebook: NotebookNode) -> str:
    """The text that the executed notebook wrote to stderr, such as warnings."""
    return "".join(item.text for item in _outputs(notebook) if item.output_type == "stream" and item.name == "stderr")


def execute_with(name: str, values: Mapping[str, Any], output: Path, unfinished: Path) -> NotebookNode:
    """Run a notebook with these values; returns it executed, with its widget state.

    ``output`` is the folder for its files. ``unfinished`` is the file in which papermill keeps it while it runs. Raises
    parameters.WrongParameters with the message of its config, or RunFailed with a message or a short traceback.
    """
    config = [cell.source for cell in parameters.select_tagged(parameters.code_cells(name), "config")]
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
                # papermill's bar counts cells: it is for a person at a terminal.
                progress_bar=sys.stderr.isatty(),
                # Without this, the kernel writes notes on its transport.
                extra_arguments=["--log-level=CRITICAL"],
            )
    except PapermillExecutionError as error:
        if error.source in config and error.ename in ("ValueError", "TypeError"):
            unfinished.unlink(missing_ok=True)
            raise parameters.WrongParameters(f"{name}: {error.evalue}") from None
        if error.ename in SENTENCES:
            raise RunFailed(f"{name}: {error.evalue}") from None
        lines = strip_color("\n".join(error.traceback)).splitlines()
        raise RunFailed(
            f"{name} stopped in its cell In [{error.exec_count}]; {paths.shorten(unfinished)} shows the cells before.\n"
            + "\n".join(lines[-TRACEBACK_LINES:])
        ) from None
    except DeadKernelError:
        raise RunFailed(f"{name}: its Python process died. A likely reason is that memory ran out.") from None
    if errors := find_hidden_errors(notebook):
        raise RunFailed(f"{name} hides an error in an explorer: {'; '.join(errors)} ({paths.shorten(unfinished)}).")
    unfinished.unlink(missing_ok=True)
    return notebook


@contextlib.contextmanager
def _staging(name: str, kind: str) -> Iterator[Path]:
    """An empty folder for the files of a run. Raises locks.Busy if another process makes the same figure."""
    folder = paths.BUILD / kind
    busy = f"Another process is making {name} in {paths.shorten(folder)}: wait for it, or end it."
    with locks.hold_lock(paths.BUILD / "locks" / f"{kind}_{name}", busy):
        staging = folder / f"{name}.outputs"
        shutil.rmtree(staging, ignore_errors=True)
        yield paths.make_folder(staging)
        shutil.rmtree(staging)


def destination(kind: str) -> Path:
    """The folder for the files of a run: ``figures/`` for the profile ``paper``, else a folder below it."""
    return paths.FIGURES if kind == parameters.PAPER else paths.FIGURES / kind


def run(name: str, profile: str = parameters.PAPER, by_hand: Mapping[str, Any] | None = None) -> list[Path]:
    """Run one notebook with a profile's values, some replaced by those ``by_hand``; returns the files that it made.

    Before anything is computed, raises parameters.WrongParameters, paths.CannotWrite if the result cannot be written,
    or locks.Busy if another process makes the same figure. Raises RunFailed if the notebook fails; nothing is kept
    then."""
    values = parameters.profile_values(name, profile) | dict(by_hand or {})
    kind = parameters.CUSTOM if by_hand else profile
    result = paths.BUILD / kind / f"{name}.ipynb"
    paths.check_writable(destination(kind), result.parent)
    # The result has the time of the start: if a file is edited during the run, the result is out of date.
    started = time.time()
    rules = make_rules(result, find_dependencies(name, profile))
    with _staging(name, kind) as staging:
        clock = time.monotonic()
        notebook = execute_with(name, values, staging, result.with_suffix(".unfinished.ipynb"))
        seconds = time.monotonic() - clock
        if warnings := collect_stderr(notebook):
            print(f"{name} wrote to stderr:\n{warnings}", file=sys.stderr)
        if kind == parameters.CUSTOM:
            _write_values(staging / f"{name}.yaml", name, values)
        # There is no stamp while files move, since an interrupted move leaves new files beside old ones.
        result.unlink(missing_ok=True)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        made = {destination(kind) / path.relative_to(staging): path for path in files}
        if kind != parameters.CUSTOM:
            listed = "".join(f"{paths.shorten(path)}\n" for path in made)
            for ending, text in ((".d", rules), (".made", listed)):
                paths.write_content(result.with_suffix(ending), text)
        _copy(made)
        notebook = normalise(notebook, staging)
        notebook.metadata[SECONDS] = round(seconds, 1)
        _write(notebook, result, modified=started)
    return list(made)


def _copy(files: Mapping[Path, Path]) -> None:
    # Sources by target. A target may be on another file system. All drafts are complete before the first replaces a
    # file.
    with contextlib.ExitStack() as drafts:
        for target, source in files.items():
            paths.make_folder(target.parent)
            if target.parent == paths.FIGURES and target.suffix == ".csv":
                _keep_shipped(target)
            shutil.copyfile(source, drafts.enter_context(paths.draft(target)))


def _write_values(path: Path, name: str, values: Mapping[str, Any]) -> None:
    # All values are written, so that they make the same figure with every profile.
    everything = {each.name: each.default for each in parameters.read_parameters(name).values()} | dict(values)
    head = f"# make {name} PARAMETERS={paths.shorten(paths.FIGURES / parameters.CUSTOM / path.name)}\n"
    text = head + yaml.safe_dump(everything, sort_keys=False, width=1000)
    path.write_text(text, encoding="utf-8")


def _keep_shipped(table: Path) -> None:
    # In a copy without git, `lib.project.verify` compares with the tables that the copy came with.
    kept = paths.FIGURES / ".shipped" / table.name
    if table.exists() and not kept.exists() and not (paths.ROOT / ".git").exists():
        kept.parent.mkdir(exist_ok=True)
        paths.write_content(kept, table.read_bytes())


def _write(notebook: NotebookNode, path: Path, modified: float) -> None:
    with paths.draft(path) as draft:
        nbformat.write(notebook, draft)
        os.utime(draft, (modified, modified))


def execute(name: str) -> bool:
    """Run a notebook with its defaults and store the normalised outputs in it; returns whether they changed.

    Warnings are errors here, since a stored notebook must show none. The file keeps its time of modification: its code
    is the same, so no figure is out of date. If somebody saved the notebook while it ran, raises Edited and keeps the
    file as it is.
    """
    path = paths.NOTEBOOKS / f"{name}.ipynb"
    paths.check_writable(paths.NOTEBOOKS)
    before = path.read_text(encoding="utf-8") if name in parameters.list_names() else ""
    with _staging(name, "stored") as staging:
        notebook = execute_with(name, {}, staging, paths.BUILD / "stored" / f"{name}.unfinished.ipynb")
        if warnings := collect_stderr(notebook):
            raise RunFailed(f"{name} wrote to stderr, which a stored notebook must not show:\n{warnings}")
        after = nbformat.writes(normalise(notebook, staging)).rstrip("\n") + "\n"
        modified = path.stat().st_mtime
        if path.read_text(encoding="utf-8") != before:
            raise Edited(f"{name} was saved by somebody while it ran: it stays as it is now. Run it again to store it.")
        changed = after != before
        if changed:
            _write(notebook, path, modified)
    return changed


# --- Command line -----------------------------------------------------------------------------------------------------


def _run_command(arguments: argparse.Namespace) -> None:
    by_hand = parameters.read_by_hand(arguments.set, arguments.parameters)
    values = parameters.profile_values(arguments.name, arguments.profile) | by_hand
    # The ranges of a profile's values are checked by the config cell of the run.
    check = parameters.check_values if by_hand else parameters.check_types
    check(arguments.name, values)
    label = f"{arguments.name} ({parameters.CUSTOM if by_hand else arguments.profile})"
    print(f"{label}: running", flush=True)
    started = time.monotonic()
    made = run(arguments.name, arguments.profile, by_hand)
    listed = ", ".join(paths.shorten(path) for path in made) or "no files"
    print(f"{label}: {time.monotonic() - started:.0f} s, wrote {listed}", flush=True)


def _check_command(arguments: argparse.Namespace) -> None:
    paths.check_writable(destination(arguments.profile), paths.BUILD / arguments.profile)
    left_out = parameters.check_profile(arguments.profile)
    print(f"The parameters of the profile {arguments.profile} are correct.")
    if left_out:
        print(f"Left out, since the profile has no values for them: {', '.join(left_out)}.")
    for sentence in parameters.explain_left_out():
        print(sentence)


def _execute_command(arguments: argparse.Namespace) -> None:
    edited = []
    for name in arguments.names or parameters.list_names():
        try:
            print(f"{name}: {'stored anew' if execute(name) else 'unchanged'}", flush=True)
        except Edited as error:  # the others go on
            edited.append(str(error))
    if edited:
        raise Edited("\n".join(edited))


def _list_command(_: argparse.Namespace) -> None:
    for name in parameters.list_names():
        having = [profile for profile in parameters.list_profiles() if parameters.has_profile(name, profile)]
        print(f"{name}: {', '.join(having)}")
    for sentence in parameters.explain_left_out():
        print(sentence)


def _command(arguments: argparse.Namespace) -> None:
    paths.check_clone()
    arguments.command(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 2 for wrong parameters, 1 for a notebook that failed."""
    parser = argparse.ArgumentParser(prog="python -m lib.project.notebooks", description="Run the project's notebooks.")
    parsers = parser.add_subparsers(required=True)
    one = parsers.add_parser("run", help="run one notebook and keep its results")
    one.add_argument("name")
    one.add_argument("--profile", default=parameters.PAPER)
    one.add_argument("--set", default="", metavar="'NAME=VALUE ...'", help="values for this run")
    one.add_argument("--parameters", default="", metavar="FILE", help="YAML file with values for this run")
    one.set_defaults(command=_run_command)
    check = parsers.add_parser("check", help="check all parameters of a profile without running anything")
    check.add_argument("--profile", default=parameters.PAPER)
    check.set_defaults(command=_check_command)
    store = parsers.add_parser("execute", help="run notebooks with their defaults and store the outputs in them")
    store.add_argument("names", nargs="*", metavar="name")
    store.set_defaults(command=_execute_command)
    parsers.add_parser("list", help="list the notebooks and their profiles").set_defaults(command=_list_command)
    chosen = parser.parse_args(arguments)
    return commands.exit_code(
        partial(_command, chosen),
        "Interrupted; nothing of this run is kept.",
        failures=(RunFailed, locks.Busy, paths.CannotWrite, paths.NotAClone),
        misuses=(parameters.WrongParameters,),
    )


if __name__ == "__main__":
    sys.exit(main())
