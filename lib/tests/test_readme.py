"""What the README says exists and is true: links, commands, and numbers against the tracked tables."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import toy_project
from nbformat.v4 import new_code_cell, new_notebook

import lib
from lib import activations, checkpoints, paths, records, tables
from lib.cifar import TRAIN_IMAGES
from lib.cifar_results import (
    PAPER_TABLE,
    SMOOTH_BELOW,
    NetworkChoice,
    by_schedule,
    closer_along_depth,
    closer_by,
    course,
    table_1,
)
from lib.cifar_training import CifarConfig, steps
from lib.claims import FAILS, HOLDS, OPEN
from lib.convnet import ConvNetConfig, ConvResNet
from lib.distances import fit_slope, ratios_along_depth
from lib.network import NetworkConfig
from lib.records import CONVOLUTIONS
from lib.training import train

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
NETWORKS = (paths.CHECKPOINTS / "README.md").read_text(encoding="utf-8")
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOKS = {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")}


def code_blocks():
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def python_blocks(after):
    """The blocks of Python that follow these words, up to the next paragraph in bold."""
    (section,) = re.findall(rf"{re.escape(after)}(.*?)\n\*\*", README, flags=re.DOTALL)
    return [block.strip() for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)]


def gallery_row(name):
    """The row of the gallery that shows a figure."""
    (row,) = [line for line in README.splitlines() if line.startswith("| [!") and f"(figures/{name}.png)" in line]
    return row


def test_every_link_leads_to_a_file():
    headings = {}
    for name, text in (("README.md", README), ("checkpoints/README.md", NETWORKS)):
        lines = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        headings[name] = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert len(targets) > 10
    for file, _, heading in (target.partition("#") for target in targets):
        assert (paths.ROOT / file).exists(), file
        assert not heading or heading in headings[file or "README.md"], heading


def test_every_make_command_has_a_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE)) | NOTEBOOKS
    commands = re.findall(r"^make\b([^#\n]*)", "\n".join(code_blocks()), flags=re.MULTILINE)
    commands += re.findall(r"`make\b([^`]*)`", README)
    named = []
    for command in commands:
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
    for command in ("lib.notebooks execute my_figure", "pytest lib/tests/test_notebooks.py -k my_figure"):
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
    names = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", "\n".join(code_blocks())))
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
    assert [len(runs) for runs in schedules[length].values()] == [1, 1]
    assert [len(runs) for runs in schedules[30].values()] == [5, 5]
    values = {smooth: runs[0].values for smooth, runs in schedules[length].items()}
    row = table_row("table_1")
    assert f"after the paper's {length} epochs, one run each" in row
    assert f"{values[True]['test_accuracy']:.2f} % weight-tied and {values[False]['test_accuracy']:.2f} % i.i.d." in row
    published = [row.test for row in PAPER_TABLE if row.activation == "gelu"]
    assert "(paper: {} and {})".format(*published) in row
    ratios = values[True]["von_neumann_conv1"], values[False]["von_neumann_conv1"]
    early = [NetworkChoice(epochs=30).select(records.read_runs(), smooth_init=smooth, seed=0)[0] for smooth in values]
    before = [run.values["von_neumann_conv1"] for run in early]
    said = f"{ratios[0]:.2g} and {ratios[1]:.2f} after the paper's {length} epochs, one run each; "
    assert f"{said}{before[0]:.1g} and {before[1]:.2f} after 30" in gallery_row("figure_3")


def test_distances_of_successive_layers_of_the_gallery():
    row, of = gallery_row("figure_4"), {}
    for name in ("figure_4", "figure_4_layers"):
        of[name] = tables.read_csv(paths.FIGURES / f"{name}.csv")
    length = max(of["figure_4"]["epochs"])
    closer, before = (closer_by(of["figure_4"], epochs) for epochs in (length, 30))
    assert f"after {length} epochs {closer['conv1']:.3g} (conv1) and {closer['conv2']:.3g} (conv2) times closer" in row
    parts = [closer_along_depth(of["figure_4_layers"], length, name) for name in CONVOLUTIONS]
    first, last = ([f"{part[place]:.3g}" for part in parts] for place in (0, -1))
    assert (
        f"in the first quarter of the layers {first[0]} and {first[1]} times, in the last {last[0]} and {last[1]}"
        in row
    )
    assert f"after 30 epochs, five runs each, {before['conv1']:.3g} and {before['conv2']:.3g}" in row


def test_table_of_the_trained_networks():
    runs = [run for run in records.read_runs() if run.config.seed == 0]
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


def test_table_of_the_five_seeds():
    (section,) = re.findall(r"\*\*Five seeds of 30 epochs\.\*\*(.*?)\*\*GELU over", README, re.DOTALL)
    apart = {}
    for activation in ("gelu", "relu", "identity"):
        choice = NetworkChoice(activation, epochs=30)
        tied, iid = (choice.select(records.read_runs(), smooth_init=smooth) for smooth in (True, False))
        assert [run.config.seed for run in tied] == [run.config.seed for run in iid] == [0, 1, 2, 3, 4]
        assert {run.values["device"] for run in tied + iid} == {"cpu", "cuda (NVIDIA H200)"}
        assert {run.config.seed for run in tied + iid if run.values["device"] == "cpu"} == {0}
        accuracies = [[run.values["test_accuracy"] for run in runs] for runs in (tied, iid)]
        ratios = [[run.values["von_neumann_conv1"] for run in runs] for runs in (tied, iid)]
        cells = [f"{min(side):.2f} to {max(side):.2f} %" for side in accuracies]
        cells += [f"{min(ratios[0]):.2g} to {max(ratios[0]):.2g}", f"{min(ratios[1]):.2f} to {max(ratios[1]):.2f}"]
        name = {"gelu": "GELU", "relu": "ReLU"}.get(activation, activation)
        assert f"| with {name} | {' | '.join(cells)} |" in section
        apart[activation] = np.subtract(*accuracies)
        assert (max(ratios[0]) < SMOOTH_BELOW) == (activation != "relu")
        assert activation != "relu" or min(ratios[0]) > SMOOTH_BELOW
    table = table_1(records.read_runs(), NetworkChoice(epochs=30))
    assert table["smooth"] == [row.smooth for row in PAPER_TABLE]
    assert set(table["runs"]) == {5}
    assert max(apart["gelu"].max(), apart["relu"].max()) < 0
    assert f"with identity they are within {abs(apart['identity']).max():.2f} points" in section


def test_networks_that_were_trained_on_two_devices():
    table = tables.read_csv(paths.CHECKPOINTS / "devices.csv")
    cpu, gpu = (tables.select(table, device=device) for device in ("cpu", "cuda (NVIDIA H200)"))
    assert list(cpu["run"]) == list(gpu["run"])
    assert len(cpu["run"]) == 7
    assert "Seven of these networks were trained on both machines" in README
    differences = np.abs(cpu["test_accuracy"] - gpu["test_accuracy"])
    assert f"test accuracies differ by at most {differences.max():.2f} points" in README
    ratios = gpu["von_neumann_conv1"] / cpu["von_neumann_conv1"]
    assert f"their von Neumann ratios by at most {100 * max(ratios.max() - 1, 1 - ratios.min()):.0f} %" in README
    for run in records.read_runs():  # the rows are those of runs.csv where that has them
        for side in (cpu, gpu):
            if run.config.name in side["run"] and run.values["device"] == side["device"][0]:
                row = tables.rows(tables.select(side, run=run.config.name))[0]
                assert row["test_accuracy"] == run.values["test_accuracy"]
                assert row["von_neumann_conv1"] == run.values["von_neumann_conv1"]


def test_time_of_a_stack():
    stacked = [run.values for run in records.read_runs() if str(run.values["engine"]).startswith("stacked")]
    assert {values["engine"] for values in stacked} == {"stacked (15 runs)"}
    (seconds,) = {f"{values['seconds']:.0f}" for values in stacked}
    said = f"30 epochs of 15 networks took {seconds} s, {int(seconds) / 30 / 15:.2f} s a network and epoch"
    assert said in " ".join(README.split())


def courses():
    """How the smoothness of the weight-tied runs of the gallery goes: {(activation, epochs): Course}."""
    table = tables.read_csv(paths.FIGURES / "smoothness.csv")
    tied = tables.select(table, smooth_init=True)
    runs = dict(zip(tied["run"], zip(tied["activation"], tied["epochs"], strict=True), strict=True))
    return {of: course(tied, run) for run, of in runs.items()}


def test_smoothness_of_the_gallery():
    found, row = courses(), gallery_row("smoothness")
    gelu, relu, identity = found["gelu", 180], found["relu", 180], found["identity", 30]
    assert f"GELU: grows by a factor $e$ in a time of {1 / gelu.rate:.0f} (" in row
    assert f"(an epoch at the full learning rate is {steps(CifarConfig(), TRAIN_IMAGES) * 0.04:.0f})" in row
    assert f"and is above 0.1 after epoch {gelu.lost_after} of 180" in row
    assert f"ReLU: {1 / relu.rate:.0f}, and epoch {relu.lost_after} of 180" in row
    assert identity.lost_after is None
    assert f"identity: {identity.ratio:.2g} after 30 epochs" in row


def test_the_gelu_networks_of_180_epochs():
    (section,) = re.findall(r"\*\*GELU over the paper's 180 epochs\.\*\*(.*?)\n\n", README, re.DOTALL)
    section = " ".join(section.split())
    runs = records.read_runs()
    tied, iid = (NetworkChoice(epochs=180).select(runs, smooth_init=smooth, seed=0)[0] for smooth in (True, False))
    for run in (tied, iid):
        (paper,) = [row for row in PAPER_TABLE if (row.activation, row.smooth_init) == ("gelu", run.config.smooth_init)]
        for name, published in (("test", paper.test), ("train", paper.train)):
            assert f"{name} accuracy {run.values[f'{name}_accuracy']:.2f} % (paper {published})" in section
    eighths = ratios_along_depth(tied.load().network.residual_layers.stacked("conv1.weight").detach())
    assert (
        f"conv1 is {tied.values['von_neumann_conv1']:.2g}, in its eighths {', '.join(f'{x:.2g}' for x in eighths)}"
        in section
    )
    assert tied.values["von_neumann_conv1"] > SMOOTH_BELOW
    falls = {run.config.smooth_init: -np.diff([line["train_accuracy"] for line in run.log()]) for run in (tied, iid)}
    fallen = int((falls[False] > 2).sum())
    assert f"in {fallen} of its epochs the training accuracy fell by more than 2 points" in section
    assert f"once by {falls[False].max():.0f}; in the weight-tied run it never did" in section
    assert falls[True].max() < 2


def test_the_relu_network_of_180_epochs():
    (section,) = re.findall(r"\*\*ReLU over the paper's 180 epochs\.\*\*(.*?)\n\n", README, re.DOTALL)
    section = " ".join(section.split())
    (run,) = NetworkChoice("relu", epochs=180).select(records.read_runs(), smooth_init=True, seed=0)
    (paper,) = [row for row in PAPER_TABLE if (row.activation, row.smooth_init) == ("relu", True)]
    for name, published in (("test", paper.test), ("train", paper.train)):
        assert f"{name} accuracy {run.values[f'{name}_accuracy']:.2f} % (paper {published})" in section
    eighths = ratios_along_depth(run.load().network.residual_layers.stacked("conv1.weight").detach())
    listed = ", ".join(f"{ratio:.2g}" for ratio in eighths)
    assert f"conv1 is {run.values['von_neumann_conv1']:.2g}, in its eighths {listed}." in section
    assert min(eighths) > SMOOTH_BELOW  # "from input to output"
    falls = -np.diff([line["train_accuracy"] for line in run.log()])
    assert f"in {int((falls > 2).sum())} of its epochs the training accuracy fell by more than 2 points" in section
    assert f"once by {falls.max():.0f}; in the last 30 epochs it never did" in section
    assert falls[-30:].max() < 2


def test_how_far_off_the_test_accuracies_of_180_epochs_are():
    off = {}
    for paper in PAPER_TABLE:
        choice = NetworkChoice(paper.activation, epochs=180)
        for run in choice.select(records.read_runs(), smooth_init=paper.smooth_init):
            off[paper.activation, paper.smooth_init] = run.values["test_accuracy"] - paper.test
    tied, iid, relu = (off.pop(network) for network in (("gelu", True), ("gelu", False), ("relu", True)))
    assert not off
    said = f"GELU by {tied:.1f} points above (weight-tied) and {-iid:.1f} below (i.i.d.), ReLU by {-relu:.1f} below."
    assert f"All three test accuracies are off the paper's: {said}" in README


def test_the_size_of_the_stem():
    networks, spike = (tables.read_csv(paths.FIGURES / f"{name}.csv") for name in ("stem", "stem_spike"))
    (section,) = re.findall(r"\*\*The size of the stem is the length of the ODE\.\*\*(.*?)\n\n", README, re.DOTALL)
    section, row = " ".join(section.split()), gallery_row("stem")
    lengths = networks["relative_path_length"]
    longer, _ = np.polyfit(np.log10(lengths), networks["test_accuracy"], 1)
    correlation = np.corrcoef(np.log10(lengths), networks["test_accuracy"])[0, 1]
    numbers = {9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}
    assert f"; {numbers[len(lengths)]} networks, an association)" in section
    assert f"over {numbers[len(lengths)]} networks a path ten times longer" in row
    assert f"goes with {longer:.1f} points of test accuracy more (correlation {correlation:.2f})" in row
    assert f"(correlation with its logarithm {correlation:.2f};" in section
    said = "in the networks of seed 0 with batch norm, one of them with its stem held"
    assert f"between {min(lengths):.2g} and {max(lengths):.2g} {said}" in section
    assert sum(networks["hold_stem"]) == 1
    grown = {row["activation"] for row in tables.rows(networks) if row["stem_scale"] > 1}
    assert grown == {"identity"}
    assert "makes the stem smaller, but for identity" in section
    (long,) = tables.rows(tables.select(networks, activation="gelu", epochs=180, smooth_init=True))
    assert f"they are {long['stem_scale']:.2g} and {long['path_length']:.2g}, after 1 and 0 at the start" in section
    top = int(np.argmax(spike["loss"]))
    loss, length = (np.median(spike[name][:top]) for name in ("loss", "relative_path_length"))
    after = min(spike["relative_path_length"][top:])
    top_loss = spike["loss"][top]
    assert f"from {loss:.2f} to {top_loss:.2f} it falls from {length:.2g} to {after:.2g}" in row
    assert f"falls from {length:.2g} to {after:.2g}, the loss goes from {loss:.2f} to {top_loss:.2f}" in section
    relu = tables.rows(tables.select(networks, activation="relu", epochs=30, smooth_init=True))
    held, trained = sorted(relu, key=lambda row: not row["hold_stem"])
    for name, how in (("relative_path_length", ".2g"), ("von_neumann_conv1", ".2g")):
        assert f"of {held[name]:{how}} in place of {trained[name]:{how}}" in section
    accuracies = f"{held['test_accuracy']:.2f} % in place of {trained['test_accuracy']:.2f} %"
    assert f"a test accuracy of {accuracies}" in section


def test_the_watched_epochs_are_those_of_the_run():
    watched = records.read_spike()
    (run,) = NetworkChoice(epochs=180).select(records.read_runs(), smooth_init=False, seed=0)
    sizes = np.minimum(50_000 - 64 * (watched["step"] - 1), 64)
    for epoch in dict.fromkeys(watched["epoch"].tolist()):
        of = watched["epoch"] == epoch
        mean = (sizes[of] * watched["loss"][of]).sum() / 50_000
        assert mean == pytest.approx(run.log()[epoch - 1]["train_loss"], rel=1e-9)
    assert "the fall of epoch 104 comes back to the last digit" in README
    falls = -np.diff([line["train_accuracy"] for line in run.log()])
    assert falls[104 - 2] > 10
    grown = watched["stem_scale"][1:] / watched["stem_scale"][:-1]
    assert watched["epoch"][1:][np.argmax(grown)] == 104
    assert f"a single step that makes the stem {grown.max():.1f} times as large" in README
    begins = int(np.argmax(grown))
    assert f"a batch with a loss of {watched['loss'][begins + 1]:.2f} leads to" in README
    assert min(watched["stem_scale"][:begins]) < watched["stem_scale"][begins]  # "it had been smaller before"


def test_what_is_left_of_the_initial_weights():
    table = tables.read_csv(paths.FIGURES / "smoothness_initialisation.csv")
    short, long = tables.select(table, epochs=30), tables.select(table, activation="gelu", epochs=180)
    (section,) = re.findall(r"\*\*Little of the initial weights is left\.\*\*(.*?)\n\n", README, re.DOTALL)
    section = " ".join(section.split())
    alone = f"{100 * short['weight_decay_alone'][0]:.1f} %", f"{100 * long['weight_decay_alone'][0]:.0e} %"
    alone = [share.replace("e-0", "e-") for share in alone]
    assert f"leaves {alone[0]} of them after 30 epochs, and {alone[1]} after 180" in section
    left, share = (np.concatenate([short[f"{what}_{name}"] for name in CONVOLUTIONS]) for what in ("left", "share"))
    assert f"it is {100 * left.min():.1f} to {100 * left.max():.1f} % after 30 epochs" in section
    assert f"{100 * share.min():.2g} to {100 * share.max():.2g} % of the squared norm" in section
    most = max(long[f"share_{name}"].max() for name in CONVOLUTIONS)
    assert f"at most {100 * most:.2g} % of it after 180: next to nothing" in section
    (tied,) = tables.rows(tables.select(long, smooth_init=True))
    times = [tied[f"share_{name}"] / tied[f"chance_{name}"] for name in CONVOLUTIONS]
    assert f"in weight-tied layers {times[0]:.0f} (conv1) and {times[1]:.0f} times (conv2) as much as" in section
    assert f"which are at most {100 * share.max():.2g} % of their squared norm after 30 epochs" in README


def test_the_networks_are_light_and_their_readme_says_which_are_not_here():
    assert sum(path.stat().st_size for path in paths.CHECKPOINTS.rglob("*") if path.is_file()) < 60e6
    (sentence,) = re.findall(r"^Every run of seed 0 has its weights here.*", NETWORKS, re.MULTILINE)
    without = {run.config.name for run in records.read_runs() if run.config.seed == 0 and not run.has_weights}
    assert set(re.findall(r"`(\w[\w.-]+)`", sentence)) == without


def test_where_weight_tied_relu_layers_are_rough():
    checkpoint = checkpoints.load(paths.CHECKPOINTS / "relu_weight-tied_bn_depth256_lr0.04_epochs30_seed0.safetensors")
    weights = checkpoint.network.residual_layers.stacked("conv1.weight").detach()
    eighths = ratios_along_depth(weights)
    first, second = (f"{min(half):.2g} to {max(half):.2g}" for half in (eighths[:4], eighths[4:]))
    assert f"(ratios of its eighths {first}, of the second half's {second})" in NETWORKS


def test_layers_without_batch_norm():
    def layers(run: str):
        return checkpoints.load(
            paths.CHECKPOINTS / f"{run}_nobn_depth256_lr0.04_epochs30_seed0.safetensors"
        ).network.residual_layers

    size = f"{float(layers('gelu_weight-tied').stacked('conv1.weight').detach().std()):.0e}".replace("e-0", "e-")
    assert f"with GELU (weight-tied) entries are of size {size}" in README
    weight, bias = (layers("relu_iid").stacked(f"conv1.{name}").detach() for name in ("weight", "bias"))
    lives = weight.square().mean((2, 3, 4)).sqrt() > 1e-4  # (L, C)
    told = float((lives == (bias > 0)).double().mean())
    assert f"this tells {100 * told:.1f} % of" in NETWORKS
    assert f"channels, {100 * float(lives.double().mean()):.0f} % of which live" in NETWORKS


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
    listed = re.sub(r"\(.*?\)", "", lib.__doc__.split("outwards:")[1].split("Reference:")[0], flags=re.DOTALL)
    words = set(re.findall(r"\w+", listed))
    modules = {path.stem for path in (paths.ROOT / "lib").glob("*.py")} - {"__init__"}
    assert modules <= words, sorted(modules - words)


def test_no_machine_is_named():
    for path in [paths.ROOT / "README.md", *sorted(paths.CHECKPOINTS.glob("*.md"))]:
        text = Path(path).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(root|work|home|tmp)/", text), path.name
