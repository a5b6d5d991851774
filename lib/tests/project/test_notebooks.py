"""Parameters of notebooks, the stored notebooks, and how the runner treats a single notebook."""

import ast
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import toy_project
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.translators import PythonTranslator

from lib import parameters, paths
from lib.parameters import WrongParameters
from lib.project import dependencies, notebooks
from lib.tests.stored_notebooks import read_notebook


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy project, in place of this one."""
    root = toy_project.write(tmp_path / "project")
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(paths, "PROFILES", root / "notebooks" / "profiles")
    monkeypatch.setattr(paths, "CHECKPOINTS", root / "checkpoints")
    monkeypatch.setattr(paths, "FIGURES", root / "figures")
    return root


# --- Parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_read_with_their_types(toy):
    offered = parameters.read_parameters("figure_b").values()
    assert [(one.name, one.type, one.default) for one in offered] == [
        ("depth", "int", 4),
        ("learning_rate", "float", 0.1),
        ("mode", "str", "plain"),
    ]
    assert parameters.list_figures() == ["figure_a", "figure_b"]
    assert parameters.list_profiles() == ["quick", "paper", "released"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dpeth": 3}, "figure_b has no parameter 'dpeth'; its parameters are: depth, learning_rate, mode."),
        ({"depth": "4"}, "figure_b: depth is '4', expected a whole number."),
        ({"depth": 4.0}, "figure_b: depth is 4.0, expected a whole number."),
        ({"depth": True}, "figure_b: depth is True, expected a whole number."),
        (
            {"learning_rate": "4e-2"},
            "figure_b: learning_rate is '4e-2', expected a number.",
        ),
        ({"mode": 3}, "figure_b: mode is 3, expected text."),
        ({"depth": 0}, "figure_b: depth is 0, expected a whole number of at least 1."),
        ({"learning_rate": -0.1}, "figure_b: learning_rate is -0.1, expected a number above 0."),
        ({"mode": "fast"}, "figure_b: mode is 'fast', expected one of: plain, fails, hides, warns, sleeps, dies."),
    ],
)
def test_wrong_parameters_are_named_and_the_possible_listed(toy, values, sentence):
    with pytest.raises(WrongParameters, match=f"^{re.escape(sentence)}$"):
        parameters.check_values("figure_b", values)


def test_right_parameters_pass(toy):
    parameters.check_values("figure_b", {"depth": 3, "learning_rate": 1, "mode": "fails"})
    # This process has this project's lib, without the toy's own modules.
    toy_project.write_notebook(toy / "notebooks", "figure_a", "from lib import checks, paths")
    assert parameters.check_profile("paper") == []
    assert parameters.check_profile("quick") == []
    assert parameters.check_profile("released") == ["figure_b"]


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("depth: int = 4  # L = depth", r"papermill does not see depth .* one '=' in each line"),
        ("depth: int = 2 ** 4", r"holds 'depth: int = 2 \*\* 4', expected a line 'name: type = literal'"),
        ("depth: dict = {}", r"depth has the type dict, expected one of: int, float, str, bool, list"),
        ("import math", r"holds 'import math', expected a line"),
    ],
)
def test_a_parameters_cell_that_papermill_would_misread_is_refused(toy, cell, sentence):
    toy_project.write_notebook(toy / "notebooks", "figure_d", "", parameters=cell)
    with pytest.raises(WrongParameters, match=sentence):
        parameters.read_parameters("figure_d")


def test_for_an_unknown_name_the_known_ones_are_listed(toy):
    with pytest.raises(
        WrongParameters, match="no notebook 'figure_z'; the notebooks are: explore_c, figure_a, figure_b"
    ):
        parameters.code_cells("figure_z")
    with pytest.raises(WrongParameters, match="no profile 'fast'; the profiles are: quick, paper, released"):
        parameters.profile_values("figure_a", "fast")
    with pytest.raises(
        WrongParameters, match=r"profile 'released' .*released/figure_b.yaml\); its profiles are: quick, paper"
    ):
        parameters.profile_values("figure_b", "released")
    (toy / "notebooks" / "profiles" / "paper" / "figure_a.yaml").rename(
        toy / "notebooks" / "profiles" / "paper" / "figure_z.yaml"
    )
    with pytest.raises(WrongParameters, match="no notebook 'figure_z'"):
        parameters.check_profile("paper")


def test_settings_are_parsed_and_wrong_ones_are_named(toy):
    assert parameters.parse_settings("row=3 learning_rate=0.02 name='a b' depths=[2,4] smooth=true") == {
        "row": 3, "learning_rate": 0.02, "name": "a b", "depths": [2, 4], "smooth": True,
    }  # fmt: skip
    rates = parameters.parse_settings("a=4e-2 b=1E3 c=-.5e+1 d=1.e2 e=[1e-3] f=e2 g='\"4e-2\"' h=3 i=08")
    assert list(rates.values()) == [0.04, 1000.0, -5.0, 100.0, [0.001], "e2", "4e-2", 3, "08"]
    others = parameters.parse_settings("a=010 b=0x10 c=1:30 d=1:30.5 e=1_000 f=-.inf g=0 h=-7 i=0.10 j=[1,012]")
    assert list(others.values()) == ["010", "0x10", "1:30", "1:30.5", 1000, -math.inf, 0, -7, 0.1, [1, "012"]]
    with pytest.raises(WrongParameters, match=r"SET is 'row=3 row=4', which gives row more than one value\."):
        parameters.parse_settings("row=3 row=4")
    with pytest.raises(WrongParameters, match="row in SET has the value '2024-13-45', which is not YAML"):
        parameters.parse_settings("row=2024-13-45")
    with pytest.raises(WrongParameters, match="SET holds 'row', expected settings like"):
        parameters.parse_settings("row 3")
    with pytest.raises(WrongParameters, match=r"SET is \"name='a\": no closing quotation\."):
        parameters.parse_settings("name='a")
    with pytest.raises(WrongParameters, match="notebooks cannot be read: Is a directory"):
        parameters.read_yaml(toy / "notebooks")
    with pytest.raises(WrongParameters, match=r"no file my\.yaml"):
        parameters.read_yaml(toy / "my.yaml")
    (toy / "my.yaml").write_text("- 3\n")
    with pytest.raises(WrongParameters, match=r"my.yaml holds \[3\], expected lines 'name: value'"):
        parameters.read_yaml(toy / "my.yaml")


def test_a_file_of_parameters_is_read_and_a_wrong_one_is_named(toy):
    file = toy / "my.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("mode: naïve\nlearning_rate: 1e-3\n", encoding=encoding)
        assert parameters.read_by_hand("depth=2", str(file)) == {"mode": "naïve", "learning_rate": 0.001, "depth": 2}
    file.write_text("mode: naïve\n", encoding="latin-1")
    with pytest.raises(WrongParameters, match=r"^my\.yaml is not text in UTF-8: save it in that encoding\.$"):
        parameters.read_by_hand(file=str(file))
    file.write_text("depth: 2\nmode: plain\ndepth: 3\n")
    with pytest.raises(WrongParameters, match=r"^my\.yaml is not YAML: depth has more than one value$"):
        parameters.read_by_hand(file=str(file))
    for nothing in ("", "# depth: 3\n", "{}\n"):
        file.write_text(nothing)
        with pytest.raises(WrongParameters, match=r"^my\.yaml holds no values, expected lines 'name: value'\.$"):
            parameters.read_by_hand(file=str(file))


def test_extra_notebooks_are_left_out_with_a_sentence(toy):
    text = (toy / "notebooks" / "figure_b.ipynb").read_text()
    extra = {"Untitled": text.replace('"parameters"', '"other"'), "my notes": text, "broken": "{", ".hidden": text}
    for name, content in extra.items():
        (toy / "notebooks" / f"{name}.ipynb").write_text(content)
    assert parameters.list_names() == ["explore_c", "figure_a", "figure_b"]
    assert parameters.explain_left_out() == [
        "notebooks/Untitled.ipynb is left out: it has no cell tagged 'parameters'.",
        "notebooks/broken.ipynb is left out: it cannot be read as a notebook.",
        f"notebooks/my notes.ipynb is left out: {parameters.INVALID_NAME}.",
    ]
    with pytest.raises(WrongParameters, match=r"no notebook 'Untitled' \(.* it has no cell tagged 'parameters'\.\);"):
        parameters.code_cells("Untitled")
    (toy / "notebooks" / "profiles" / "paper" / "figure_a (copy).yaml").write_text("depth: 0\n")
    (toy / "notebooks" / "figure_a.ipynb").write_text(text)  # without the toy's own modules
    assert parameters.check_profile("paper") == []
    assert "notebooks/profiles/paper/figure_a (copy).yaml is left out" in parameters.explain_left_out()[-1]


# --- Dependencies, outputs --------------------------------------------------------------------------------------------


def test_dependencies_follow_imports_and_leave_the_engine_out(toy):
    (toy / "lib" / "tool.py").write_text(
        "def scaled(n):\n    from lib import helper\n    from lib.engine import build\n"
    )
    found = [paths.shorten(path) for path in dependencies.find_dependencies("figure_a", "paper")]
    assert found == [
        "notebooks/figure_a.ipynb", "notebooks/profiles/paper/figure_a.yaml",
        "lib/__init__.py", "lib/checks.py", "lib/helper.py", "lib/paths.py", "lib/tool.py",
    ]  # fmt: skip
    assert "notebooks/profiles/paper/figure_a.yaml" not in map(
        paths.shorten, dependencies.find_dependencies("figure_a", "quick")
    )


def test_dependencies_follow_packages(toy):
    for file in ("room/__init__", "room/inner", "room/other", "explore/__init__", "explore/inner"):
        (toy / "lib" / file).parent.mkdir(exist_ok=True)
        (toy / "lib" / f"{file}.py").write_text("")
    (toy / "lib" / "room" / "inner.py").write_text("from lib.explore import inner\nfrom lib import unused\n")
    expected = {"__init__", "checks", "helper", "paths", "tool", "unused", "room/__init__", "room/inner"}
    for imported in ("import lib.room.inner", "from lib.room import inner", "from lib.room.inner import x"):
        (toy / "lib" / "helper.py").write_text(f"{imported}\n")
        found = [paths.shorten(path) for path in dependencies.find_dependencies("figure_a", "quick")]
        assert {file.removeprefix("lib/").removesuffix(".py") for file in found if file.startswith("lib/")} == expected


def test_what_reads_trained_networks_depends_on_them(toy):
    (toy / "checkpoints" / "runs.csv").write_text("")
    (toy / "lib" / "helper.py").write_text("from lib import paths\n\nFOLDER = paths.CHECKPOINTS\n")
    assert toy / "checkpoints" / "runs.csv" in dependencies.find_dependencies("figure_a", "paper")
    assert toy / "checkpoints" / "runs.csv" not in dependencies.find_dependencies("figure_b", "paper")


def test_what_reads_the_figures_depends_on_the_tables_of_the_others(toy):
    paths.FIGURES.mkdir(exist_ok=True)
    for stem in ("figure_a", "figure_a_more", "figure_b"):
        (paths.FIGURES / f"{stem}.csv").write_text("")
    (toy / "lib" / "helper.py").write_text("from lib import paths\n\nFOLDER = paths.FIGURES\n")
    found = dependencies.find_dependencies("figure_a", "paper")
    assert [path.name for path in found if path.suffix == ".csv"] == ["figure_b.csv"]


@pytest.fixture
def executing(toy, monkeypatch):
    """A function that sets what the toy notebooks do when they run: a function of the folder of their outputs."""
    monkeypatch.setattr(paths, "BUILD", toy / ".build")

    def replace_run(during):
        def execute_with(name, values, output, unfinished):
            during(output)
            return read_notebook(name)

        monkeypatch.setattr(notebooks, "execute_with", execute_with)

    return replace_run


def write_results(output):
    (output / "figure_a.csv").write_text("new")
    (output / "more").mkdir()
    (output / "more" / "figure_a.md").write_text("new")


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another file system than the project."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", ["custom", "quick", "paper"])
def test_results_reach_a_folder_on_another_file_system(toy, executing, elsewhere, kind):
    folder = toy / "figures" if kind == "paper" else toy / "figures" / kind
    if folder.exists():
        folder.rmdir()
    folder.symlink_to(elsewhere)
    executing(write_results)
    made = notebooks.run("figure_a", "quick" if kind == "custom" else kind, {"depth": 3} if kind == "custom" else None)
    values = ["figure_a.yaml"] if kind == "custom" else []  # the values that the numbers were made with
    assert made == [folder / name for name in ("figure_a.csv", *values, "more/figure_a.md")]
    assert sorted(path.name for path in elsewhere.rglob("*")) == sorted(
        ["figure_a.csv", "figure_a.md", "more", *values]
    )
    listed = toy / ".build" / kind / "figure_a.made"
    assert kind == "custom" or listed.read_text().splitlines() == [paths.shorten(path) for path in made]


def test_a_folder_that_cannot_take_the_results_is_said_before_the_run(toy, executing):
    executing(lambda output: pytest.fail("the run was started"))
    (toy / "figures" / "quick").symlink_to(toy / "not mounted")
    with pytest.raises(paths.CannotWrite, match=r"^The folder figures/quick cannot be written"):
        notebooks.run("figure_a", "quick")
    (toy / ".build").mkdir()
    (toy / ".build" / "paper").touch()
    with pytest.raises(paths.CannotWrite, match=r"^The folder .build/paper cannot be written"):
        notebooks.run("figure_a", "paper")
    assert list((toy / "figures").iterdir()) == [toy / "figures" / "quick"]


def test_if_one_result_cannot_be_written_no_old_one_is_replaced(toy, executing):
    executing(write_results)
    (toy / "figures" / "figure_a.csv").write_text("old")
    (toy / "figures" / "more").touch()  # in the way of a folder
    with pytest.raises(paths.CannotWrite, match=r"^The folder figures/more cannot be written"):
        notebooks.run("figure_a")
    assert (toy / "figures" / "figure_a.csv").read_text() == "old"
    assert sorted(path.name for path in (toy / "figures").iterdir() if path.name != ".shipped") == [
        "figure_a.csv",
        "more",
    ]
    assert not (toy / ".build" / "paper" / "figure_a.ipynb").exists()


def test_an_edit_that_is_saved_while_a_notebook_runs_is_kept(toy, executing, capsys):
    path = toy / "notebooks" / "figure_a.ipynb"
    edited = path.read_text().replace("A claim.", "A claim, told better.")
    executing(lambda output: path.write_text(edited) if "figure_a" in str(output) else None)
    others = ("figure_b", "explore_c")
    assert notebooks.main(["execute", "figure_a", *others]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{name}: stored anew" for name in others]
    assert told.err.startswith("figure_a was saved by somebody while it ran: it stays as it is now.")
    assert path.read_text() == edited
    assert path.stat().st_mtime > time.time() - 60


def test_errors_hidden_in_widgets_are_found():
    error = {"output_type": "error", "ename": "KeyError", "evalue": "\x1b[31m'slider'\x1b[0m", "traceback": []}
    shown = {"output_type": "stream", "name": "stdout", "text": "well"}
    notebook = new_notebook()
    assert notebooks.find_hidden_errors(notebook) == []
    notebook.metadata["widgets"] = {
        notebooks.WIDGET_STATE: {"state": {"a": {"state": {"outputs": [shown, error]}}, "b": {"state": {"value": 3}}}}
    }
    assert notebooks.find_hidden_errors(notebook) == ["KeyError: 'slider'"]


def test_normalising_removes_what_differs_between_machines(tmp_path):
    view = {notebooks.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "VBox(...)"}
    cell = new_code_cell(
        "1",
        execution_count=1,
        metadata={"tags": ["explorer"], "papermill": {"duration": 1.5}, "execution": {"iopub.status.busy": "2026"}},
        outputs=[
            new_output("display_data", data=view),
            new_output("display_data", data=view | {"image/png": "aa"}),
            new_output("stream", text=f"saved {tmp_path}/a.pdf, "),
            new_output("stream", text=f"read {paths.ROOT}/lib\n"),
        ],
    )
    notebook = new_notebook(
        cells=[cell],
        metadata={"widgets": {}, "papermill": {}, "language_info": {"name": "python", "version": "3.11.1"}},
    )
    notebooks.normalise(notebook, tmp_path)
    assert notebook.metadata == {"kernelspec": notebooks.KERNELSPEC, "language_info": {"name": "python"}}
    assert cell.metadata == {"tags": ["explorer"]}
    assert cell.outputs == [
        new_output("display_data", data={"image/png": "aa"}),
        new_output("stream", text="saved a.pdf, read lib\n"),
    ]


# --- The notebooks of this project ------------------------------------------------------------------------------------

stored = pytest.mark.parametrize("name", parameters.list_names())


@stored
def test_stored_notebooks_are_executed_and_normalised(name):
    notebook = read_notebook(name)
    before = nbformat.writes(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"run: make notebooks ({name})"
    outputs = list(itertools.chain.from_iterable(cell.outputs for cell in cells))
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert nbformat.writes(notebooks.normalise(notebook)) == before, f"run: make notebooks ({name})"


@stored
def test_parameters_cells_are_literals_with_one_equals_sign_a_line(name):
    (cell,) = parameters.select_tagged(parameters.code_cells(name), "parameters")
    assert all(line.count("=") == 1 for line in cell.source.splitlines() if line.strip())
    assert list(parameters.read_parameters(name)) == [
        line.partition(":")[0] for line in cell.source.splitlines() if line
    ]


@stored
def test_papermill_sees_the_parameters_that_are_offered(name):
    cell = next(cell for cell in read_notebook(name).cells if "parameters" in cell.metadata.get("tags", []))
    assert [parameter.name for parameter in PythonTranslator.inspect(cell)] == list(parameters.read_parameters(name))


# Packages that take long to import, and that only some runs use.
HEAVY = ("nbformat", "jsonschema", "papermill", "torchvision", "scipy.stats", "scipy.integrate", "scipy.optimize")


@pytest.mark.slow
def test_imports_of_the_notebooks_pull_in_nothing_that_only_some_runs_use():
    names = set()
    for name in parameters.list_names():
        trees = [ast.parse(parameters.extract_python(cell)) for cell in parameters.code_cells(name)]
        lines = [line for tree in trees for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
        names |= {ast.unparse(line) for line in lines if not ast.unparse(line).startswith("from IPython")}
    code = "\n".join([*sorted(names), "import sys", f"print([name for name in {HEAVY} if name in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("profile", parameters.list_profiles())
def test_every_profile_fits_its_notebooks(profile):
    assert set(parameters.check_profile(profile)) <= set(parameters.list_figures())


def test_notebooks_open_with_what_to_run_if_the_package_is_missing(monkeypatch):
    guards = {}
    for name in parameters.list_names():
        first = next(cell for cell in read_notebook(name).cells if cell.cell_type == "code")
        if first.get("id") == "package":  # a user's own notebook may have no such cell
            guards[name] = first.source
    assert {"figure_2", "table_1", "explore_depth", "train_cifar"} <= guards.keys()
    (source,) = set(guards.values())
    exec(source, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="run `make lab` in the folder above"):
        exec(source, {})
