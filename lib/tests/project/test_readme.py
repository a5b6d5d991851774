"""Links, commands and recipes of the READMEs work, and their numbers are those of the tables."""

import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest
import torch
import toy_project
from nbformat.v4 import new_code_cell, new_notebook

import lib
from lib import activations, parameters, paths, tables
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.dense.network import NetworkConfig
from lib.dense.training import train
from lib.project import numbers, readme
from lib.rates import fit_slope

READMES = {path: path.read_text("utf-8") for path in readme.files()}
README = READMES[paths.ROOT / "README.md"]
LIB = READMES[paths.ROOT / "lib" / "README.md"]
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOKS = {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")}


def read_commands():
    """Read the blocks of commands of all READMEs."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(READMES.values()), flags=re.DOTALL))


def read_python_blocks(after, text=README):
    """Read the blocks of Python after these words, up to the next heading or paragraph in bold."""
    (section,) = re.findall(rf"{re.escape(after)}(.*?)\n(?:\*\*|##)", text, flags=re.DOTALL)
    return [block.strip() for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)]


def test_what_python_in_the_text_of_notebooks_imports_is_there():
    found = []
    for name in sorted(NOTEBOOKS):
        cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            found += [line for line in block.splitlines() if line.startswith(("from ", "import "))]
    assert found
    for line in found:
        exec(line, {})


def test_every_link_leads_to_a_file():
    headings = {}
    for path, text in READMES.items():
        lines = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        headings[path] = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
    for path, text in READMES.items():
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
        assert targets
        for file, _, heading in (target.partition("#") for target in targets):
            led = (path.parent / file).resolve() if file else path
            assert led.exists(), file
            assert not heading or heading in headings[led], heading


def test_every_make_command_has_a_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE)) | NOTEBOOKS
    written = re.findall(r"^make\b([^#\n]*)", read_commands(), flags=re.MULTILINE)
    written += re.findall(r"`make\b([^`]*)`", "\n".join(READMES.values()))
    named = []
    for command in written:
        # Options and variables aside, what remains are targets.
        command = re.sub(r"\w+=(\"[^\"]*\"|\S+)", "", command)
        named += [word for word in command.split() if not word.startswith("-")]
    assert {"figures", "test", "lab", "train", "checkpoints"} <= set(named)
    assert set(named) - {"my_figure"} <= targets  # the recipe's own name


@pytest.mark.slow
def test_the_recipe_of_a_figure_makes_it(tmp_path):
    cells = read_python_blocks("## Add a figure", LIB)
    assert sum(len(cell.splitlines()) for cell in cells) < 30
    for file in toy_project.KEPT:
        shutil.copy(paths.ROOT / file, tmp_path / file)
    shutil.copytree(paths.ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    profile = tmp_path / "notebooks" / "profiles" / "paper"
    profile.mkdir(parents=True)
    tags = [None, "parameters", "config", None]
    notebook = new_notebook(
        cells=[
            new_code_cell(cell, metadata={"tags": [tag]} if tag else {}) for cell, tag in zip(cells, tags, strict=True)
        ]
    )
    nbformat.write(notebook, tmp_path / "notebooks" / "my_figure.ipynb")
    (line,) = re.findall(r"`([^`\n]*)`[^`\n]*`notebooks/profiles/paper/my_figure.yaml`", LIB)
    (profile / "my_figure.yaml").write_text(line + "\n")
    made = toy_project.make(tmp_path, "my_figure")
    assert made.returncode == 0, made.stderr
    table = tables.read_csv(tmp_path / "figures" / "my_figure.csv")
    # The tests that look at every notebook take it, once its outputs are stored.
    shutil.copytree(paths.ROOT / "lib" / "tests", tmp_path / "lib" / "tests")
    tests = "lib/tests/project/test_notebooks.py"
    for command in ("lib.project.notebooks execute my_figure", f"pytest {tests} -k my_figure"):
        done = subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert list(table["width"]) == [8, 16, 32]
    assert (table["distance"] > 0).all()
    assert (tmp_path / "figures" / "my_figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_recipe_for_own_data_trains():
    (code,) = read_python_blocks("## Use your own data", LIB)
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
def test_the_recipe_for_a_block_gives_a_slope():
    (code,) = read_python_blocks("## Bring your own block")
    assert len(code.splitlines()) <= 16
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    fit = fit_slope(names["table"]["depth"], names["table"]["max_distance"])
    assert -1.1 < fit.slope < -0.9


def test_the_recipe_for_a_trained_network_loads_it():
    (code,) = read_python_blocks("## Use a network", READMES[paths.ROOT / "checkpoints" / "README.md"])
    names = {}
    exec(code, names)
    name, network = names["checkpoint"].config.name, names["checkpoint"].network
    assert f"{name}.safetensors" in code
    assert not network.training
    assert network.residual_layers.stacked("conv1.weight").shape == (256, 16, 16, 3, 3)


def test_the_recipe_of_an_activation_trains_both_networks(monkeypatch):
    (line,) = read_python_blocks("## Add an activation", LIB)
    (added,) = eval(f"[{line}]", vars(activations))
    monkeypatch.setitem(activations.ACTIVATIONS, added.name, added)
    z = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(added.function(z).sum(), z)
    torch.testing.assert_close(added.derivative(z.detach()), slope)
    config = NetworkConfig(depth=8, width=6, dimension=4, samples=10, activation=added.name)
    losses = [record.loss for record in train(config, 0.05, 50, [0, 50])]
    assert losses[1] < 0.9 * losses[0]
    network = ConvResNet(ConvNetConfig(depth=2, activation=added.name))
    assert network(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_every_variable_of_a_command_is_known():
    names = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", read_commands()))
    assert {"SET", "PARAMETERS", "PROFILE", "ACTIVATION", "LAUNCH"} <= names
    assert all(re.search(rf"\b{name}\b", MAKEFILE) for name in names)


def test_values_of_settings_are_parameters():
    for name, settings in re.findall(r"make (\w+) SET=\"([^\"]*)\"", "\n".join(READMES.values())):
        values = parameters.parse_settings(settings)
        parameters.check_values(name, values)


@pytest.mark.slow
def test_the_marked_numbers_are_those_of_the_tables():
    for path, text in READMES.items():
        assert readme.render(text) == text, f"{path}: `make readme` fills the marked places anew"
    assert sum(len(readme.PLACE.findall(text)) for text in READMES.values()) > 40


def test_a_place_is_filled_and_a_wrong_place_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "loss", lambda figure, digits="2": f"{figure} in {digits}")
    monkeypatch.setattr(numbers.loss, "__module__", numbers.__name__)
    filled = readme.render('a <!--loss "my figure" 3-->old\n<!--/--> b')
    assert filled == 'a <!--loss "my figure" 3-->my figure in 3<!--/--> b'
    assert readme.render("<!-- a remark -->") == "<!-- a remark -->"
    wrong = ("nothing", "np", "select a", "ratio", "ratio x", 'fewest "gelu weight-tied 31"', "claims some", 'loss "a')
    for call in wrong:
        with pytest.raises(
            readme.WrongPlace, match=f"^The place <!--{re.escape(call)}--> cannot be filled: .*[^.]\\.$"
        ):
            readme.render(f"<!--{call}--><!--/-->")
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    numbers.table.cache_clear()
    with pytest.raises(readme.WrongPlace, match=r"figure_4.csv is not there: `make figures` makes the tables"):
        readme.render("<!--closer--><!--/-->")
    numbers.table.cache_clear()
    lost = "<!--claims all-->43 and <!--claims hold-->41<!--/-->"
    with pytest.raises(readme.WrongPlace, match=r"<!--claims all--> has no end"):
        readme.render(lost)


@pytest.mark.parametrize(("folder", "most"), [(".", 1000), ("checkpoints", 600)])
def test_a_readme_is_short(folder, most):
    text = READMES[paths.ROOT / folder / "README.md"]
    assert len(re.sub(r"<!--.*?-->", "", text).split()) <= most


def test_the_gallery_shows_every_figure_of_the_paper_profile():
    shown = set(re.findall(r"`make (\w+)` \|", README))
    made = {name for name in parameters.list_figures() if parameters.has_profile(name, "paper")}
    assert made - {"overview"} == shown  # overview is the picture at the top
    for row in re.findall(r"^\| \[.*", README, flags=re.MULTILINE):
        said = row.split(" | ")[1].replace("[", "").partition("](")[0]
        assert len(said.split()) <= 15


def test_every_notebook_is_in_the_list_of_the_notebooks():
    listed = set(re.findall(r"\((\w+)\.ipynb\)", READMES[paths.NOTEBOOKS / "README.md"]))
    assert set(parameters.list_names()) <= listed


def test_versions_agree():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    assert lib.__version__ == project["version"]
    least = dict(requirement.split(">=") for requirement in project["dependencies"])
    section = LIB.partition("\n## Versions\n")[2]
    said = {name.lower(): number for name, number in re.findall(r"(\w+) (\d+\.\d+)\b", section)}
    expected = {"pytorch": least["torch"], "torchvision": least["torchvision"]}
    expected["python"] = project["requires-python"][2:]
    assert said == expected


def test_every_module_has_its_place_in_the_package_docstring():
    words = set(re.findall(r"\w+", lib.__doc__))
    modules = {path.stem for path in (paths.ROOT / "lib").iterdir()} - {"__init__", "__pycache__", "tests", "README"}
    assert modules <= words, sorted(modules - words)


def test_no_path_of_a_machine_is_named():
    for path, text in READMES.items():
        assert not re.search(r"(?<![\w.])/(root|work|home|tmp)/", text), path.name
