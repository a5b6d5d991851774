"""What the READMEs say exists: links and commands; and what the project's says is true: numbers against the tables."""

import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import numpy as np
import pytest
import torch
import toy_project
from nbformat.v4 import new_code_cell, new_notebook

import lib
from lib import activations, paths, tables
from lib.cifar import checkpoints, records
from lib.cifar.choice import NetworkChoice, by_schedule
from lib.cifar.config import CifarConfig
from lib.cifar.course import course
from lib.cifar.dataset import TRAIN_IMAGES
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.cifar.records import CONVOLUTIONS
from lib.cifar.schedule import steps
from lib.dense.network import NetworkConfig
from lib.dense.training import train
from lib.figures.claim import FAILS, HOLDS, OPEN
from lib.figures.figure_4 import closer_along_depth, closer_by
from lib.figures.rounding import lost_in_precision, precisions_meet
from lib.figures.table_1 import PAPER_TABLE
from lib.measures import SMOOTH_BELOW, fit_slope

READMES = {
    folder / "README.md": (folder / "README.md").read_text("utf-8")
    for folder in (paths.ROOT, paths.ROOT / "checkpoints")
}
README = READMES[paths.ROOT / "README.md"]
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOKS = {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")}


def commands():
    """The blocks of commands of both READMEs."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(READMES.values()), flags=re.DOTALL))


def python_blocks(after, text=README):
    """The blocks of Python that follow these words, up to the next paragraph in bold or heading."""
    (section,) = re.findall(rf"{re.escape(after)}(.*?)\n(?:\*\*|##)", text, flags=re.DOTALL)
    return [block.strip() for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)]


def gallery_row(name):
    """The row of the gallery that shows a figure."""
    (row,) = [line for line in README.splitlines() if line.startswith("| [!") and f"(figures/{name}.png)" in line]
    return row


def test_every_link_leads_to_a_file():
    headings = {}
    for path, text in READMES.items():
        lines = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        headings[path] = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
    for path, text in READMES.items():
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
        assert len(targets) > 5
        for file, _, heading in (target.partition("#") for target in targets):
            led = (path.parent / file).resolve() if file else path
            assert led.exists(), file
            assert not heading or heading in headings[led], heading


def test_every_make_command_has_a_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE)) | NOTEBOOKS
    written = re.findall(r"^make\b([^#\n]*)", commands(), flags=re.MULTILINE)
    written += re.findall(r"`make\b([^`]*)`", "\n".join(READMES.values()))
    named = []
    for command in written:
        # Options and variables aside, what remains are targets.
        command = re.sub(r"\w+=(\"[^\"]*\"|\S+)", "", command)
        named += [word for word in command.split() if not word.startswith("-")]
    assert {"figures", "test", "lab", "train", "checkpoints"} <= set(named)
    assert set(named) - {"my_figure"} <= targets  # the recipe's own name


def test_the_recipe_of_a_figure_makes_it(tmp_path):
    cells = python_blocks("**Add a figure**")
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
    (line,) = re.findall(r"With `(.*)` in `notebooks/profiles/paper/my_figure.yaml`", README)
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


def test_the_recipe_for_own_data_trains():
    (code,) = python_blocks("**Use your own data**")
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.1 * losses[0]


def test_the_recipe_for_a_trained_network_loads_it():
    (code,) = python_blocks("## Use a network", READMES[paths.ROOT / "checkpoints" / "README.md"])
    names = {}
    exec(code, names)
    name, network = names["checkpoint"].config.name, names["checkpoint"].network
    assert f"{name}.safetensors" in code
    assert not network.training
    assert network.residual_layers.stacked("conv1.weight").shape == (256, 16, 16, 3, 3)


def test_the_recipe_of_an_activation_trains_both_networks(monkeypatch):
    (line,) = python_blocks("**Add an activation**")
    (added,) = eval(f"[{line}]", vars(activations))
    monkeypatch.setitem(activations.ACTIVATIONS, added.name, added)
    z = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(added.function(z).sum(), z)
    torch.testing.assert_close(added.derivative(z.detach()), slope)
    config = NetworkConfig(depth=8, width=6, dimension=4, samples=10, activation="silu")
    losses = [record.loss for record in train(config, 0.05, 50, [0, 50])]
    assert losses[1] < 0.9 * losses[0]
    network = ConvResNet(ConvNetConfig(depth=2, activation="silu"))
    assert network(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_every_variable_of_a_command_is_known():
    names = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", commands()))
    assert {"SET", "PARAMETERS", "PROFILE", "ACTIVATION", "LAUNCH"} <= names
    assert all(re.search(rf"\b{name}\b", MAKEFILE) for name in names)


def test_values_of_settings_are_parameters():
    from lib import parameters

    for name, settings in re.findall(r"make (\w+) SET=\"([^\"]*)\"", README):
        values = parameters.parse_settings(settings)
        parameters.check_values(name, values)


def minus(number, digits=3):
    return f"{number:.{digits}f}".replace("-", "−")


def test_slope_of_figure_1_left():
    table = tables.read_csv(paths.FIGURES / "figure_1_left.csv")
    last = tables.select(table, iterations=table["iterations"].max())
    aggregate = np.maximum(last["aggregate_V"], last["aggregate_W"])
    row = gallery_row("figure_1_left")
    assert minus(fit_slope(last["depth"], last["max_distance"], 16).slope) in row
    assert minus(fit_slope(last["depth"], aggregate, 16).slope) in row


def test_slope_of_figure_1_right():
    table = tables.read_csv(paths.FIGURES / "figure_1_right.csv")
    last = tables.select(table, iteration=table["iteration"].max())
    for Z in "VW":
        slope = fit_slope(last["depth"], last[f"distance_{Z}"], 16).slope
        assert minus(slope) in gallery_row("figure_1_right")


def test_loss_of_figure_2():
    table = tables.read_csv(paths.FIGURES / "figure_2.csv")
    assert table["iteration"][-1] == 80_000
    assert f"{table['loss'][-1]:.1e}".replace("e-0", "e−") in gallery_row("figure_2")


@pytest.mark.parametrize("name", ["neural_ode", "initialisation", "clipping", "relu_counterexample"])
def test_slopes_of_the_theory(name):
    claims = tables.select(tables.read_csv(paths.FIGURES / "claims.csv"), figure=name)
    measured = {minus(slope) for slope in claims["slope"].astype(float) if np.isfinite(slope)}
    quoted = re.findall(r"−?\d\.\d{3}\b", gallery_row(name))
    assert quoted
    assert set(quoted) <= measured


def test_verdicts_of_the_claims():
    claims = tables.read_csv(paths.FIGURES / "claims.csv")
    row, verdicts = gallery_row("claims"), list(claims["verdict"])
    counts = [verdicts.count(verdict) for verdict in (HOLDS, FAILS, OPEN)]
    assert sum(counts) == len(verdicts)
    said = "of {} claims {} as claimed, {} not as claimed (both of GELU on CIFAR-10), {} open"
    assert said.format(len(verdicts), *counts) in row
    wrong = tables.select(claims, verdict=FAILS)["statement"]
    assert len(wrong) == 2
    assert all(statement.startswith("CIFAR-10, GELU") for statement in wrong)
    slopes, expected = claims["slope"].astype(float), claims["expected"].astype(float)
    judged = np.isfinite(slopes)
    assert f"all {judged.sum()} slopes within 0.1 of the claimed slope" in row
    assert np.all(np.abs(slopes - expected)[judged] <= 0.1)


def test_long_times_of_the_gallery():
    claims, row = (
        tables.select(tables.read_csv(paths.FIGURES / "claims.csv"), figure="long_time"),
        gallery_row("long_time"),
    )
    measured = dict(zip(claims["statement"], claims["measured"], strict=True))
    (share,) = re.findall(r"falls to ([\d.e-]+) of its start", measured["The loss goes to 0 at a linear rate"])
    assert f"the loss falls to {share.replace('e-', 'e−')} of its start, at rates that" in row
    assert measured["The rate does not depend on L"].removeprefix("rates ") in row
    (least,) = re.findall(r"^\[([\d.]+)", claims["interval"][0])
    assert claims["statement"][0].startswith("The PL ratio stays above")
    ratios = tables.read_csv(paths.FIGURES / "long_time.csv")["ratio"]
    assert f"the PL ratio is at least {least} for $m\\ge n$, {min(ratios):.2g} at any width" in row


def table_row(name):
    """The row of the gallery of a table, which has no picture."""
    (row,) = [line for line in README.splitlines() if f"`make {name}` |" in line]
    return row


def test_trained_networks_of_the_gallery():
    schedules = by_schedule(records.read_runs(), NetworkChoice())
    length = max(schedules)
    assert [len(runs) for runs in schedules[length].values()] == [2, 2]
    assert [len(runs) for runs in schedules[30].values()] == [5, 5]
    for runs in schedules[length].values():
        assert [run.values["device"] for run in runs] == ["cpu", "cuda (NVIDIA H200)"]
    tests = [np.median([run.values["test_accuracy"] for run in runs]) for runs in schedules[length].values()]
    row = table_row("table_1")
    assert f"after the paper's {length} epochs, medians of two runs, one on a CPU and one on a GPU: " in row
    assert "{:.1f} % weight-tied and {:.1f} % i.i.d.".format(*tests) in row
    values = {smooth: records.select(runs, seed=0)[0].values for smooth, runs in schedules[length].items()}
    published = [row.test for row in PAPER_TABLE if row.activation == "gelu"]
    assert "(paper: {} and {})".format(*published) in row
    ratios = values[True]["von_neumann_conv1"], values[False]["von_neumann_conv1"]
    early = [NetworkChoice(epochs=30).select(records.read_runs(), smooth_init=smooth, seed=0)[0] for smooth in values]
    before = [run.values["von_neumann_conv1"] for run in early]
    said = f"{ratios[0]:.2g} and {ratios[1]:.2f} after the paper's {length} epochs, "
    assert f"{said}{before[0]:.1g} and {before[1]:.2f} after 30 (seed 0)" in gallery_row("figure_3")


def test_distances_of_successive_layers_of_the_gallery():
    row, of = gallery_row("figure_4"), {}
    for name in ("figure_4", "figure_4_layers"):
        of[name] = tables.read_csv(paths.FIGURES / f"{name}.csv")
    length = max(of["figure_4"]["epochs"])
    closer, before = (closer_by(of["figure_4"], epochs) for epochs in (length, 30))
    said = f"after {length} epochs, two runs each, {closer['conv1']:.3g} (conv1) and {closer['conv2']:.3g} (conv2)"
    assert f"{said} times closer" in row
    parts = [closer_along_depth(of["figure_4_layers"], length, name) for name in CONVOLUTIONS]
    first, last = ([f"{part[place]:.3g}" for part in parts] for place in (0, -1))
    assert (
        f"in the first quarter of the layers {first[0]} and {first[1]} times, in the last {last[0]} and {last[1]}"
        in row
    )
    assert f"after 30 epochs, five runs each, {before['conv1']:.3g} and {before['conv2']:.3g}" in row


def test_table_of_the_trained_networks():
    runs = [run for run in records.read_runs() if run.config.seed == 0 and run.config.depth == 256]
    sides = {True: set(), False: set()}
    for config in (run.config for run in runs if not run.config.trial):
        sides[config.smooth_init].add((config.activation, config.batch_norm, config.epochs))
    quoted = set()
    for line in re.findall(r"^\| ((?:GELU|ReLU|identity).*) \|$", README, re.MULTILINE):
        network, epochs, accuracies, published, ratios, seen = line.split(" | ")
        activation, _, variant = network.lower().partition(", ")
        choice = NetworkChoice(activation, batch_norm=variant != "no batch norm", epochs=int(epochs))
        quoted.add((activation, choice.batch_norm, choice.epochs))
        pair = [[run.values for run in choice.select(runs, smooth_init=smooth)] for smooth in (True, False)]
        shown = [(f"{side[0]['test_accuracy']:.2f} %", f"{side[0]['von_neumann_conv1']:.2g}") if side else ("-", "-")
                 for side in pair]  # fmt: skip
        assert [accuracies, ratios] == [", ".join(cells) for cells in zip(*shown, strict=True)]
        paper = [f"{row.test} %" for row in PAPER_TABLE if row.activation == activation]
        assert published == (", ".join(paper) if choice.batch_norm else "-")
        smooth, rough = (
            [max(v["von_neumann_conv1"], v["von_neumann_conv2"]) < SMOOTH_BELOW for v in of] for of in pair
        )
        assert set(smooth) <= {seen.startswith(("smooth", "straight"))}
        assert set(rough) <= {False}
    assert quoted == sides[True] | sides[False]


def test_time_of_a_stack():
    stacked = [run for run in records.read_runs() if str(run.values["engine"]).startswith("stacked")]
    assert {run.values["engine"] for run in stacked} == {"stacked (15 runs)", "stacked (7 runs)"}
    taken = {}
    for epochs, count in ((30, 15), (180, 7)):
        runs = [run for run in stacked if run.values["engine"] == f"stacked ({count} runs)"]
        assert {run.config.epochs for run in runs} == {epochs}
        (taken[epochs],) = {f"{run.values['seconds']:.0f}" for run in runs}
    said = f"30 epochs of 15 networks took {taken[30]} s, {int(taken[30]) / 30 / 15:.2f} s a network and epoch, and"
    text = " ".join(README.split())
    assert f"On an NVIDIA H200 {said} the paper's 180 epochs of 7 networks {taken[180]} s." in text
    said = f"took {taken[30]} s for 30 epochs of 15 runs, and {taken[180]} s for 180 epochs of 7."
    assert said in READMES[paths.ROOT / "checkpoints" / "README.md"]


def courses():
    """How the smoothness of the weight-tied runs of 180 epochs goes: {activation: the Courses of seeds 0 and 1}."""
    table = tables.read_csv(paths.FIGURES / "smoothness.csv")
    tied = tables.select(table, smooth_init=True, epochs=180)
    found = {}
    for run, activation in dict(zip(tied["run"], tied["activation"], strict=True)).items():
        found.setdefault(activation, []).append(course(tied, run))
    assert [tables.select(tied, seed=seed)["run"].size > 0 for seed in (0, 1, 2)] == [True, True, False]
    return found


def test_smoothness_of_the_gallery():
    found, row = courses(), gallery_row("smoothness")
    times, lost = {}, {}
    for activation, both in found.items():
        times[activation] = " and ".join(f"{1 / course.rate:.0f}" for course in both)
        lost[activation] = " and ".join(f"{course.lost_after}" for course in both)
    assert f"over 180 epochs, two seeds, GELU: grows by a factor $e$ in times of {times['gelu']} (" in row
    assert f"(an epoch at the full learning rate is {steps(CifarConfig(), TRAIN_IMAGES) * 0.04:.0f})" in row
    assert f"and is above 0.1 after epochs {lost['gelu']}; ReLU: {times['relu']}, and epochs {lost['relu']};" in row
    assert lost["identity"] == "None and None"
    ends = " and ".join(f"{course.ratio:.2g}" for course in found["identity"])
    assert f"identity: {times['identity']}, and smooth at every epoch, with {ends} at the end" in row


def test_how_long_layers_stay_smooth_by_depth():
    lost = tables.read_csv(paths.FIGURES / "smoothness_lost.csv")
    assert lost["depth"].tolist() == [32, 64, 256]
    times = [f"{time:.0f}" for time in lost["lost_at"]]
    said = f"passes 0.1 at $t$ = {times[0]} with 32 layers, {times[1]} with 64, {times[2]} with 256"
    slope = fit_slope(lost["depth"], lost["lost_at"]).slope
    assert f"with GELU it {said} (slope in $L$ {slope:.2f})" in gallery_row("smoothness")
    assert f"{said}, about as $L^{{{slope:.1f}}}$" in README


def test_how_far_off_the_test_accuracies_of_180_epochs_are():
    off, apart, spread, as_in_paper = {}, {}, {}, []
    for paper in PAPER_TABLE:
        choice = NetworkChoice(paper.activation, epochs=180)
        runs = choice.select(records.read_runs(), smooth_init=paper.smooth_init)
        tests = [run.values["test_accuracy"] for run in runs]
        network = paper.activation, paper.smooth_init
        assert len(tests) == (1 if network == ("identity", False) else 2)
        off[network], apart[network] = np.median(tests) - paper.test, max(tests) - min(tests)
        spread[network] = paper.test_range
        ratios = [[run.values[f"von_neumann_{name}"] for name in CONVOLUTIONS] for run in runs]
        assert len({max(of) < SMOOTH_BELOW for of in ratios}) == 1  # seeds agree
        as_in_paper.append((max(ratios[0]) < SMOOTH_BELOW) == paper.smooth)
    assert as_in_paper == [True, True, False, True, True, True]  # "five of the six rows, and not with GELU"
    assert [network for network in off if abs(off[network]) < spread[network]] == [
        ("identity", True),
        ("identity", False),
    ]
    assert max(apart["gelu", smooth] for smooth in (True, False)) < 0.2  # "in both seeds alike"
    (identity, gelu, relu), (_, _, differ) = (
        [[of[activation, smooth] for smooth in (True, False)] for activation in ("identity", "gelu", "relu")]
        for of in (off, apart)
    )
    said = f"is {identity[0]:.1f} (weight-tied) and {identity[1]:.1f} points (i.i.d.) above the paper's, within its"
    assert said in README
    assert f"GELU is {gelu[0]:.1f} above and {-gelu[1]:.1f} below it" in README
    said = (
        f"is {-relu[0]:.1f} and {-relu[1]:.1f} below, and its two seeds are {differ[0]:.1f} and {differ[1]:.1f} points"
    )
    assert said in README


def test_rounding_of_the_gallery():
    table, row = tables.read_csv(paths.FIGURES / "rounding.csv"), gallery_row("rounding")
    (double,) = lost_in_precision(table, 32, "float64")
    single = lost_in_precision(table, 32, "float32")
    assert len(single) == 3
    assert min(single) <= double <= max(single)  # nothing is gained by float64
    said = f"32 layers are above 0.1 from $t={double:.0f}$ on in float64, from {min(single):.0f} to {max(single):.0f}"
    assert f"{said} in float32 (three seeds)" in row
    last = tables.select(table, depth=64, time=tables.select(table, depth=64)["time"].max())
    (double,) = tables.select(last, dtype="float64")["von_neumann_conv1"]
    single = tables.select(last, dtype="float32")["von_neumann_conv1"]
    assert min(single) < double < max(single)
    assert f"64 layers after two epochs {double:.2g}, and {min(single):.2g} to {max(single):.2g}" in row
    first = tables.select(table, time=min(table["time"]))
    less = []
    for layers in (64, 32):
        noise = [tables.select(first, depth=layers, dtype=dtype)["noise_conv1"] for dtype in ("float32", "float64")]
        less.append(np.log10(noise[0].min() / noise[1].min()))
    assert f"less by {min(less):.0f} to {max(less):.0f} powers of ten, then as much" in row
    met = [precisions_meet(table, layers) for layers in (64, 32)]
    assert f"from $t={met[0]:.0f}$ (64 layers) and {met[1]:.0f} (32) on" in row


def test_the_stem_of_the_gallery():
    networks, spike = (tables.read_csv(paths.FIGURES / f"{name}.csv") for name in ("stem", "stem_spike"))
    lengths, row = np.log10(networks["relative_path_length"]), gallery_row("stem")
    longer, _ = np.polyfit(lengths, networks["test_accuracy"], 1)
    correlation = np.corrcoef(lengths, networks["test_accuracy"])[0, 1]
    assert f"over {len(lengths)} networks a path ten times longer" in row
    assert f"goes with {longer:.1f} points of test accuracy more (correlation {correlation:.2f})" in row
    long = (networks["epochs"] == 180) & (networks["activation"] != "identity")
    assert long.sum() == 8  # "the eight of GELU and ReLU over 180 epochs do not show" it
    assert abs(np.corrcoef(lengths[long], networks["test_accuracy"][long])[0, 1]) < 0.1
    training = tables.read_csv(paths.FIGURES / "stem_training.csv")
    shorter, fewer, expected = [], [], []
    for seed in (0, 1):
        held, free = (
            records.select(records.read_runs(), depth=32, activation="gelu", epochs=60, seed=seed, hold_stem=hold)[0]
            for hold in (True, False)
        )
        ends = [tables.select(training, run=run.config.name)["relative_path_length"][-1] for run in (free, held)]
        shorter.append(ends[0] / ends[1])
        fewer.append(free.values["test_accuracy"] - held.values["test_accuracy"])
        expected.append(longer * np.log10(shorter[-1]))
    times, points, by_line = (" and ".join(f"{value:.1f}" for value in both) for both in (shorter, fewer, expected))
    said = f"a path that holding the stem makes {times} times shorter (two seeds) costs {points} points"
    assert f"with 32 layers {said}, where this line says {by_line};" in row
    assert f"a path {times} times shorter (two seeds) costs {points} points where it says {by_line}." in README
    top = int(np.argmax(spike["loss"]))
    loss, length = (np.median(spike[name][:top]) for name in ("loss", "relative_path_length"))
    after = min(spike["relative_path_length"][top:])
    assert f"from {loss:.2f} to {spike['loss'][top]:.2f} it falls from {length:.2g} to {after:.2g}" in row


def test_what_is_said_of_the_initial_weights():
    table = tables.read_csv(paths.FIGURES / "smoothness_initialisation.csv")
    short, long = (tables.select(table, epochs=epochs) for epochs in (30, 180))
    assert set(short["activation"]) == {"gelu"}
    assert len(long["run"]) == 6
    most = [100 * max(of[f"share_{name}"].max() for name in CONVOLUTIONS) for of in (short, long)]
    said = f"which are at most {most[0]:.0f} % of their squared norm after 30 epochs of GELU, and {most[1]:.1f} % after"
    assert f"{said} 180 of any activation" in README


def test_weights_without_batch_norm_are_small():
    run = "gelu_weight-tied_nobn_depth256_lr0.04_epochs30_seed0"
    layers = checkpoints.load(paths.CHECKPOINTS / f"{run}.safetensors").network.residual_layers
    size = f"{float(layers.stacked('conv1.weight').detach().std()):.0e}".replace("e-0", "e-")
    assert f"with GELU (weight-tied) entries are of size {size}" in README


def test_seconds_of_the_gallery():
    table = tables.read_csv(paths.FIGURES / "figure_seconds.csv")
    seconds = dict(zip(table["notebook"], table["seconds"], strict=True))
    found = re.findall(r"`make ([\w ]+)` \| (\d+) s \|", README)
    assert {name for names, _ in found for name in names.split()} == set(seconds)
    assert all(f"{sum(seconds[name] for name in names.split()):.0f}" == quoted for names, quoted in found)


def test_table_of_speed():
    table = tables.read_csv(paths.FIGURES / "bench.csv")
    compiled = tables.select(table, engine="compiled")
    assert set(compiled["dtype"]) == {"float32", "float64"}
    for row in (dict(zip(compiled, values, strict=True)) for values in zip(*compiled.values(), strict=True)):
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {row['experiment']} |")]
        cell = line.split(" | ")[1 if row["dtype"] == "float32" else 2]
        ms = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
        assert cell == f"{ms} ms, {row['ratio']:.1f} times ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"


@pytest.mark.parametrize("words", [["git", "make", "Python 3.11"], ["float64 but for", "float32"], ["MIT"]])
def test_what_a_user_has_to_know_is_said(words):
    assert all(word in README for word in words)


def test_versions_agree():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    (quoted,) = re.findall(r"version = \{(.*?)\}", README)
    assert lib.__version__ == project["version"] == quoted
    least = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert f"PyTorch {least['torch']} and torchvision {least['torchvision']} or later" in README


def test_every_module_has_its_place_in_the_package_docstring():
    words = set(re.findall(r"\w+", lib.__doc__))
    modules = {path.stem for path in (paths.ROOT / "lib").iterdir()} - {"__init__", "__pycache__", "tests"}
    assert modules <= words, sorted(modules - words)


def test_no_machine_is_named():
    for path, text in READMES.items():
        assert not re.search(r"(?<![\w.])/(root|work|home|tmp)/", text), path.name
