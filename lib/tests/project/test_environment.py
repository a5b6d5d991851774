"""The two ways to an environment: the same dependencies, the right calls, and a sentence if Python is too old."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
import toy_project
import yaml

from lib import parameters, paths

# The names that differ between the package index and conda-forge, and between a package and its import.
CONDA_NAMES = {"torch": "pytorch"}
IMPORT_NAMES = {"yaml": "pyyaml"}
# These come with jupyterlab, papermill, matplotlib and PyTorch's CUDA build.
COMES_ALONG = {"IPython", "PIL", "cuda", "ipykernel", "jinja2", "jupyter_client", "nbclient", "nbconvert", "nbformat"}
COMES_ALONG |= {"jupyterlab_server", "packaging"}
TOOLS = ("sh", "bash", "make", "rm", "cp", "mv", "touch", "mkdir", "sed", "head", "awk", "dirname", "realpath", "env")
TOOLS += ("ls", "grep", "tr", "cksum")


def split_requirement(requirement):
    name, sign, version = requirement.partition(">=")
    return name, sign + version


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


def test_environment_file_and_package_state_the_same_dependencies(project):
    *listed, by_pip = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    assert by_pip == {"pip": ["-e ."]}  # an environment made by hand has the package too
    conda = dict(split_requirement(requirement) for requirement in listed)
    package = dict(split_requirement(requirement) for requirement in project["dependencies"])
    assert conda.pop("python") == project["requires-python"] == ">=3.11"
    assert conda.pop("pip") == ""
    assert conda == {CONDA_NAMES.get(name, name): version for name, version in package.items()}


@pytest.mark.slow
def test_every_import_is_a_declared_dependency(project):
    code = [path.read_text() for path in (paths.ROOT / "lib").rglob("*.py")]
    for name in parameters.list_names():
        code += map(parameters.extract_python, parameters.code_cells(name))
    imported = set()
    for text in code:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    own = {"lib", *(path.stem for path in (paths.ROOT / "lib" / "tests").rglob("*.py"))}
    others = imported - own - set(sys.stdlib_module_names) - COMES_ALONG
    optional = [name for group in project.get("optional-dependencies", {}).values() for name in group]
    declared = {split_requirement(requirement)[0] for requirement in project["dependencies"] + optional}
    assert {IMPORT_NAMES.get(name, name) for name in others} <= declared


# Stand-ins note how they are called. Those of Python, conda and uv make environments with the Python of this folder.
RECORD = '#!/bin/sh\necho "${0##*/} $*" >> "$RECORD"\n'
PYTHON = """case "$*" in
  *version_info*) exit "${TOO_OLD:-0}" ;;
  --version) echo Python 3.9.1 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
"""
CONDA = """mkdir -p .conda/bin
[ -z "$BROKEN" ] || exit 1
cp "$(dirname "$0")/python3" .conda/bin/python
"""
UV = """[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
cp "$(dirname "$0")/python3" .venv/bin/python
"""
SCRIPTS = {"python3": PYTHON, "uv": UV}


class Machine:
    """A project on a machine whose PATH has these tools alone."""

    def __init__(self, folder, *stand_ins):
        self.root = toy_project.write(folder / "project")
        self.record = folder / "record"
        self.tools = folder / "bin"
        self.tools.mkdir()
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool))
        for name in ("python3", *stand_ins):
            script = self.tools / name
            script.write_text(RECORD + SCRIPTS.get(name, CONDA))
            script.chmod(0o755)

    def make(self, *arguments, **changes):
        environment = toy_project.make_environment(PATH=str(self.tools), RECORD=str(self.record), **changes)
        return subprocess.run(["make", *arguments], cwd=self.root, env=environment, capture_output=True, text=True)

    def list_environments(self):
        """List the files of every environment, and of what is left of making one."""
        found = [path for kind in (".conda*", ".venv*") for path in self.root.glob(kind)]
        return {path.name: sorted(inner.name for inner in path.iterdir()) for path in found}

    def take_calls(self):
        called = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [call for call in called if "version" not in call]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (["conda"], "conda env create"),
        (["conda", "mamba"], "mamba env create"),
        (["conda", "mamba", "micromamba"], "micromamba create"),
    ],
)
def test_conda_and_its_kind_make_a_local_environment(tmp_path, installed, expected):
    machine = Machine(tmp_path, *installed)
    result = machine.make("env")
    assert result.returncode == 0, result.stderr
    assert machine.take_calls() == [f"{expected} -p {machine.root}/.conda -f environment.yml"]
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == []
    assert ".conda/bin/python -m lib.project.notebooks run figure_a" in machine.make("-n", "figures").stdout
    (machine.root / ".conda" / "of_the_old_one").touch()
    os.utime(machine.root / "environment.yml", (4e9, 4e9))
    assert machine.make("env").returncode == 0
    assert len(machine.take_calls()) == 1
    assert machine.list_environments() == {".conda": [".up-to-date", "bin"]}


def test_an_environment_that_could_not_be_made_is_not_taken_for_made(tmp_path):
    machine = Machine(tmp_path, "micromamba")
    assert machine.make("env", BROKEN="yes").returncode == 2
    assert len(machine.take_calls()) == 1
    assert machine.list_environments() == {}
    assert machine.make("env").returncode == 0
    assert len(machine.take_calls()) == 1


def test_an_environment_stays_until_its_replacement_is_made(tmp_path):
    machine = Machine(tmp_path, "conda")
    machine.make("env")
    (machine.root / ".conda" / "mine").touch()
    os.utime(machine.root / "pyproject.toml", (4e9, 4e9))
    result = machine.make("env", BROKEN="yes")
    assert result.returncode == 2
    assert ".conda is the one from before." in result.stderr
    assert machine.list_environments() == {".conda": [".up-to-date", "bin", "mine"]}
    # A make that was killed leaves the old environment under another name, and an incomplete one in its place.
    (machine.root / ".conda").rename(machine.root / ".conda.old")
    (machine.root / ".conda").mkdir()
    (machine.root / ".conda" / "half").touch()
    assert machine.make("env", BROKEN="yes").returncode == 2
    assert machine.list_environments() == {".conda": ["bin", "mine"]}  # make itself removes the stamp
    assert machine.make("env").returncode == 0
    assert machine.list_environments() == {".conda": [".up-to-date", "bin"]}


def test_without_conda_python_makes_a_virtual_environment(tmp_path):
    machine = Machine(tmp_path)
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python3 -m venv .venv", "python -m pip install -e ."]
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == []
    os.utime(machine.root / "pyproject.toml", (4e9, 4e9))
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python -m pip install -e ."]
    shutil.rmtree(machine.root / ".venv")
    assert machine.make("env").returncode == 0
    assert machine.take_calls()[0] == "python3 -m venv .venv"


def test_a_virtual_environment_that_does_not_run_is_replaced_by_one_that_does(tmp_path):
    machine = Machine(tmp_path)
    (machine.root / ".venv" / "bin").mkdir(parents=True)
    (machine.root / ".venv" / "bin" / "python").symlink_to(tmp_path / "a python that was uninstalled")
    (machine.root / ".venv" / "mine").touch()
    assert machine.make("env", TOO_OLD="1").returncode == 2
    assert machine.list_environments() == {".venv": ["bin", "mine"]}
    machine.take_calls()
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python3 -m venv .venv", "python -m pip install -e ."]
    assert machine.list_environments() == {".venv": [".up-to-date", "bin"]}


def test_uv_makes_the_virtual_environment_if_it_is_on_the_path(tmp_path):
    machine = Machine(tmp_path, "uv")
    assert machine.make("env").returncode == 0
    install = "uv pip install --python .venv/bin/python -e ."
    assert machine.take_calls() == ["uv venv --seed --python python3 .venv", install]
    os.utime(machine.root / "pyproject.toml", (4e9, 4e9))
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == [install]


def test_python_too_old_is_said_in_a_sentence(tmp_path):
    machine = Machine(tmp_path)
    result = machine.make("figures", TOO_OLD="1")
    assert result.returncode == 2
    assert "No Python >= 3.11 is on the PATH (python3 is: Python 3.9.1)." in result.stderr
    assert machine.take_calls() == []


def test_a_given_interpreter_is_used_as_it_is(tmp_path):
    machine = Machine(tmp_path, "micromamba")
    printed = machine.make("-n", "figures", f"PYTHON={sys.executable}").stdout
    assert f"{sys.executable} -m lib.project.notebooks run figure_a --profile paper" in printed
    assert "micromamba" not in printed
    assert machine.take_calls() == []


def test_the_compiled_engine_comes_with_the_environment_if_there_is_a_compiler(tmp_path):
    machine = Machine(tmp_path)
    (machine.root / "lib" / "engine" / "build.py").write_text("")
    machine.make("env")
    assert "python -m lib.engine.build build" not in machine.take_calls()
    compiler = machine.tools / "c++"
    compiler.write_text("#!/bin/sh\necho c++ 12\n")
    compiler.chmod(0o755)
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python -m lib.engine.build build"]
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == []
    compiler.write_text("#!/bin/sh\necho c++ 13\n")
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python -m lib.engine.build build"]
    (machine.root / ".venv" / "lib" / "python3.12" / "site-packages" / "torch-9.9.dist-info").mkdir(parents=True)
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == ["python -m lib.engine.build build"]
    assert machine.make("env").returncode == 0
    assert machine.take_calls() == []


def test_locked_versions_go_into_a_virtual_environment(tmp_path):
    machine = Machine(tmp_path, "micromamba")
    (machine.root / ".locked").mkdir()
    (machine.root / ".locked" / "constraints.txt").write_text("torch==2.14.1\n")
    assert machine.make("env", "LOCKED=yes").returncode == 0
    assert machine.take_calls() == ["python3 -m venv .venv", "python -m pip install -c .locked/constraints.txt -e ."]
    # From now on every command takes it, also if conda is there.
    for arguments in (["env", "LOCKED=yes"], ["env"]):
        assert machine.make(*arguments).returncode == 0
        assert machine.take_calls() == []
    assert ".venv/bin/python -m lib.project.notebooks run figure_a" in machine.make("-n", "figures").stdout
    os.utime(machine.root / ".locked" / "constraints.txt", (4e9, 4e9))
    assert machine.make("env").returncode == 0
    assert machine.take_calls()[-1] == "python -m pip install -c .locked/constraints.txt -e ."


@pytest.mark.skipif(not (paths.ROOT / ".ci" / "run").exists(), reason="this copy has no .ci")
def test_continuous_integration_calls_the_test_command(tmp_path):
    machine = Machine(tmp_path)
    (machine.root / ".ci").mkdir()
    shutil.copy(paths.ROOT / ".ci" / "run", machine.root / ".ci" / "run")
    (machine.tools / "make").unlink()
    (machine.tools / "make").write_text('#!/bin/sh\necho "make $* CIFAR10_ROOT=$CIFAR10_ROOT"\n')
    (machine.tools / "make").chmod(0o755)
    environment = toy_project.make_environment(PATH=str(machine.tools))
    environment.pop("CIFAR10_ROOT", None)

    def run_ci():
        return subprocess.run(
            ["bash", machine.root / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True
        ).stdout

    assert run_ci() == "make test CIFAR10_ROOT=\n"
    data = tmp_path / "shared" / "cifar10"
    data.mkdir(parents=True)
    assert run_ci() == f"make test CIFAR10_ROOT={data}\n"


def test_git_ignores_what_is_made_and_no_source(tmp_path):
    root = toy_project.write(tmp_path / "project")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    ignored = [".build/paper/figure_a.ipynb", "build/lib/x.py", ".venv/bin/python", ".conda/x", ".conda.old/x",
               ".data/x", "figures/quick/figure_a.pdf", "figures/.1f.draft", "checkpoints/records/.1f.draft",
               "figures/custom/figure_a.csv", "notebooks/.ipynb_checkpoints/x.ipynb"]  # fmt: skip
    kept = ["figures/figure_a.pdf", "lib/paths.py", "notebooks/figure_a.ipynb", "checkpoints/runs.csv"]
    result = subprocess.run(["git", "check-ignore", *ignored, *kept], cwd=root, capture_output=True, text=True)
    assert result.stdout.splitlines() == ignored
