"""The laws of the packages: which imports are allowed, how long a module may be, and what an edit makes anew."""

import ast
from importlib.util import resolve_name

import pytest

from lib import paths
from lib.project import dependencies

LIB = paths.ROOT / "lib"
WIDGETS = {"ipywidgets"}
NOTEBOOKS = {"IPython", "nbformat", "papermill", "nbclient", "nbconvert", "jupyterlab"} | WIDGETS
DRAWING = {"matplotlib"}
MOST_LINES = 400
# What trains on CIFAR-10: modules, and the names of it that others may hand on.
TRAINING = ("lib.cifar.training", "lib.cifar.stacked", "lib.cifar.depth_limit")
TRAINS = {"train", "Training", "Stack"}


# The package's own files, without tests, by their dotted names.
MODULES = {
    ".".join(path.relative_to(LIB).with_suffix("").parts): path
    for path in sorted(LIB.rglob("*.py"))
    if path.relative_to(LIB).parts[0] != "tests"
}


def list_imports(path):
    """List what a file imports, as dotted names: "lib.dense.training.train", "matplotlib"."""
    package = ".".join(path.relative_to(paths.ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def select_packages(names, packages):
    return {name for name in names if name.split(".")[0] in packages}


@pytest.mark.parametrize("name", MODULES)
def test_imports_keep_the_laws(name):
    names = set(list_imports(MODULES[name]))
    package = name.split(".")[0]
    other = {"dense": "lib.cifar", "cifar": "lib.dense"}.get(package)
    if other:
        assert not {each for each in names if each.startswith(other)}, f"{package} does not import {other}"
        assert not select_packages(names, DRAWING | NOTEBOOKS), f"{package} neither draws nor knows notebooks"
    if package != "explore":
        assert not select_packages(names, WIDGETS), "only explore knows widgets"
    if package == "figures":
        from_cifar = {each for each in names if each.startswith("lib.cifar")}
        training = {each for each in from_cifar if each.startswith(TRAINING) or each.rpartition(".")[2] in TRAINS}
        assert not training, "figures do not train on CIFAR-10"
        assert not from_cifar & {"lib.cifar", "lib.cifar.*"}, "figures name the modules of cifar that they use"
    if package != "project":
        assert not {each for each in names if each.startswith("lib.project")}, "nothing imports project"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.slow
def test_a_figure_is_made_anew_by_its_own_room_alone():
    """In the rules of make, a figure depends on its own room and on no other."""
    rooms = {path.stem for path in (LIB / "figures").glob("*.py")} - {
        "__init__",
        "claim",
        "experiment",
        "results",
        "style",
    }
    for name in sorted(rooms & {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")} - {"claims", "train_cifar"}):
        found = {path.stem for path in dependencies.find_dependencies(name, "paper") if path.parent == LIB / "figures"}
        assert found & rooms == {name}, name


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (LIB / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names), "pytest imports them by name"
