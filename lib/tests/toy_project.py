"""A small project with this project's Makefile and runner: two figures, an explorer, two profiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import paths

KEPT = ("Makefile", "pyproject.toml", "environment.yml", ".gitignore")
MODULES = ("__init__", "checks", "commands", "locks", "parameters", "paths", "engine/__init__", "project/__init__")
MODULES += tuple(f"project/{name}" for name in ("clean", "dependencies", "notebooks", "variables"))
# Variables that an outer make or a shell may set. These tests must not inherit them.
OUTSIDE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "PROFILE", "SET", "PARAMETERS", "PYTHONPATH")

IMPORTS = "import os\nimport sys\nimport time\nfrom dataclasses import dataclass\n\nimport ipywidgets"
PARAMETERS = """depth: int = 4  # number of layers
learning_rate: float = 0.1  # step of gradient descent
mode: str = "plain"  # what the notebook does"""
CONFIG = """@dataclass(frozen=True)
class Config:
    depth: int
    learning_rate: float
    mode: str

    def __post_init__(self):
        checks.positive_int("depth", self.depth)
        checks.positive_float("learning_rate", self.learning_rate)
        checks.choice("mode", self.mode, ["plain", "fails", "hides", "warns", "sleeps", "dies"])


config = Config(depth, learning_rate, mode)"""
WORK = """path = paths.figures_output() / "NAME.csv"
path.write_text(f"depth,value\\n{config.depth},{VALUE}\\n")
print(path)
if config.mode == "fails":
    raise RuntimeError("the loss is not finite")
if config.mode == "warns":
    print("a warning", file=sys.stderr)
if config.mode == "sleeps":
    time.sleep(600)
if config.mode == "dies":
    os.kill(os.getpid(), 9)"""
EXPLORER = """shown = ipywidgets.Output()
with shown:
    if config.mode == "hides":
        raise KeyError("slider")
shown"""


def _make_cell(source: str, *tags: str) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def write_notebook(folder: Path, name: str, imports: str, value: str = "1", parameters: str = PARAMETERS) -> None:
    cells = [
        new_markdown_cell(f"# Title of {name}\n\nA claim."),
        _make_cell(f"{IMPORTS}\n\n{imports}"),
        _make_cell(parameters, "parameters"),
        _make_cell(CONFIG, "config"),
        _make_cell(WORK.replace("NAME", name).replace("VALUE", value)),
        _make_cell(EXPLORER, "explorer", "nbval-ignore-output"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")


def write(root: Path) -> Path:
    """Write the project into ``root``. Its figure_a uses lib.tool, which uses lib.helper."""
    for folder in ("lib", "notebooks/profiles/paper", "notebooks/profiles/released", "figures", "checkpoints"):
        (root / folder).mkdir(parents=True)
    for file in KEPT:
        shutil.copy(paths.ROOT / file, root / file)
    for module in MODULES:
        (root / "lib" / module).parent.mkdir(exist_ok=True)
        shutil.copy(paths.ROOT / "lib" / f"{module}.py", root / "lib" / f"{module}.py")
    # make reports the engine; there is none here
    (root / "lib" / "engine" / "build.py").write_text("print('engine: none')\n")
    (root / "lib" / "helper.py").write_text("FACTOR = 10\n")
    (root / "lib" / "tool.py").write_text("from lib.helper import FACTOR\n\n\ndef scaled(n):\n    return FACTOR * n\n")
    (root / "lib" / "unused.py").write_text("")
    notebooks = root / "notebooks"
    write_notebook(notebooks, "figure_a", "from lib import checks, paths, tool", "tool.scaled(config.depth)")
    write_notebook(notebooks, "figure_b", "from lib import checks, paths")
    write_notebook(notebooks, "explore_c", "from lib import checks, paths")
    (notebooks / "profiles" / "paper" / "figure_a.yaml").write_text("depth: 16\n")
    (notebooks / "profiles" / "paper" / "figure_b.yaml").write_text("depth: 17\n")
    (notebooks / "profiles" / "released" / "figure_a.yaml").write_text("learning_rate: 0.5\n")
    return root


def make_environment(**changes: str) -> dict[str, str]:
    """The environment of a process in the project, without the variables of an outer make."""
    return {name: value for name, value in os.environ.items() if name not in OUTSIDE} | changes


def make(root: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """Call make in the project with this interpreter, or with the one that the arguments name."""
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(
        command, cwd=root, env=make_environment(**changes), capture_output=True, text=True, timeout=300
    )
