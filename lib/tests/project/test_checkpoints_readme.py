"""What the README of the trained networks says is true: its numbers against the records, tables and weights."""

import re

import numpy as np
import pytest
import shipped

from lib import paths, tables
from lib.cifar import checkpoints, records
from lib.cifar.choice import NAMES, NetworkChoice
from lib.cifar.course import course, smoothness_in_training
from lib.cifar.records import CONVOLUTIONS, Run
from lib.figures.table_1 import PAPER_TABLE, compare
from lib.measures import SMOOTH_BELOW, fit_slope, ratios_along_depth, straight_line_ratio

README = (paths.CHECKPOINTS / "README.md").read_text(encoding="utf-8")


def section(heading):
    """What it says below a heading, on one line."""
    (text,) = re.findall(rf"^### {re.escape(heading)}\n(.*?)(?=^##)", README, re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def run_of(activation, smooth_init, epochs) -> Run:
    """The run of seed 0 in the paper's setting."""
    (run,) = NetworkChoice(activation, epochs=epochs).select(records.read_runs(), smooth_init=smooth_init, seed=0)
    return run


def eighths(run):
    """The von Neumann ratios of conv1 in the eighths of its layers."""
    return ratios_along_depth(run.load().network.residual_layers.stacked("conv1.weight").detach())


def falls(run):
    """By how many points the training accuracy falls in each epoch but the first."""
    return -np.diff([line["train_accuracy"] for line in run.log()])


def accuracies(run):
    """A run's accuracies beside those of Table 1, as the sections on 180 epochs give them."""
    network = (run.config.activation, run.config.smooth_init)
    (paper,) = [row for row in PAPER_TABLE if (row.activation, row.smooth_init) == network]
    sides = {"test": paper.test, "train": paper.train}
    return ", ".join(f"{side} accuracy {run.values[f'{side}_accuracy']:.2f} % (paper {sides[side]})" for side in sides)


def unsteady(run):
    fallen = falls(run)
    count = int((fallen > 2).sum())
    return f"in {count} of its epochs the training accuracy fell by more than 2 points, once by {fallen.max():.0f}"


def test_five_seeds():
    text, apart = section("Five seeds of 30 epochs"), {}
    for activation in ("gelu", "relu", "identity"):
        choice = NetworkChoice(activation, epochs=30)
        tied, iid = (choice.select(records.read_runs(), smooth_init=smooth) for smooth in (True, False))
        assert [run.config.seed for run in tied] == [run.config.seed for run in iid] == [0, 1, 2, 3, 4]
        assert {run.values["device"] for run in tied + iid} == {"cpu", "cuda (NVIDIA H200)"}
        assert {run.config.seed for run in tied + iid if run.values["device"] == "cpu"} == {0}
        tests = [[run.values["test_accuracy"] for run in runs] for runs in (tied, iid)]
        ratios = [[run.values["von_neumann_conv1"] for run in runs] for runs in (tied, iid)]
        cells = [f"{min(side):.2f} to {max(side):.2f} %" for side in tests]
        cells += [f"{min(ratios[0]):.2g} to {max(ratios[0]):.2g}", f"{min(ratios[1]):.2f} to {max(ratios[1]):.2f}"]
        name = {"gelu": "GELU", "relu": "ReLU"}.get(activation, activation)
        assert f"| with {name} | {' | '.join(cells)} |" in text
        apart[activation] = np.subtract(*tests)
        assert (max(ratios[0]) < SMOOTH_BELOW) == (activation != "relu")
        assert activation != "relu" or min(ratios[0]) > SMOOTH_BELOW
    table = compare(records.read_runs(), NetworkChoice(epochs=30))
    assert table["smooth"] == [row.smooth for row in PAPER_TABLE]
    assert set(table["runs"]) == {5}
    assert max(apart["gelu"].max(), apart["relu"].max()) < 0
    assert f"with identity they are within {abs(apart['identity']).max():.2f} points" in text


def test_runs_that_were_trained_on_two_devices():
    text = section("Five seeds of 30 epochs")
    table = tables.read_csv(paths.CHECKPOINTS / "devices.csv")
    cpu, gpu = (tables.select(table, device=device) for device in ("cpu", "cuda (NVIDIA H200)"))
    assert list(cpu["run"]) == list(gpu["run"])
    assert len(cpu["run"]) == 7
    assert "Seven of these networks were trained on both machines" in text
    differences = np.abs(cpu["test_accuracy"] - gpu["test_accuracy"])
    assert f"test accuracies differ by at most {differences.max():.2f} points" in text
    ratios = gpu["von_neumann_conv1"] / cpu["von_neumann_conv1"]
    assert f"their von Neumann ratios by at most {100 * max(ratios.max() - 1, 1 - ratios.min()):.0f} %" in text
    for run in records.read_runs():  # the rows are those of runs.csv where that has them
        for side in (cpu, gpu):
            if run.config.name in side["run"] and run.values["device"] == side["device"][0]:
                row = tables.rows(tables.select(side, run=run.config.name))[0]
                assert row["test_accuracy"] == run.values["test_accuracy"]
                assert row["von_neumann_conv1"] == run.values["von_neumann_conv1"]


def both_seeds(activation, smooth_init):
    """The runs of 180 epochs in the paper's setting, seed 0 first."""
    runs = NetworkChoice(activation, epochs=180).select(records.read_runs(), smooth_init=smooth_init)
    assert [run.config.seed for run in runs] == [0, 1][: len(runs)]
    return runs


def test_two_seeds_of_180_epochs():
    text, tests, steady = section("Two seeds of 180 epochs"), {}, {}
    for paper in PAPER_TABLE:
        network = paper.activation, paper.smooth_init
        runs = both_seeds(*network)
        by_cpu = [run.config.seed for run in runs if run.values["device"] == "cpu"]
        assert by_cpu == ([] if paper.activation == "identity" else [0])
        tests[network] = [run.values["test_accuracy"] for run in runs]
        unsteady = [int((falls(run) > 2).sum()) for run in runs]
        steady[network] = [count == 0 for count in unsteady]
        name = {"gelu": "GELU", "relu": "ReLU"}.get(paper.activation, paper.activation)
        cells = [", ".join(f"{test:.2f} %" for test in tests[network]), f"{paper.test} ± {paper.test_range} %"]
        cells.append(", ".join(f"{run.values['von_neumann_conv1']:.2g}" for run in runs))
        cells.append(", ".join(map(str, unsteady)))
        assert f"| {name} | {NAMES[paper.smooth_init]} | {' | '.join(cells)} |" in text
        if paper.activation == "identity":
            assert all(abs(test - paper.test) < paper.test_range for test in tests[network])
    tied = smoothness_in_training(run for name in ("gelu", "relu", "identity") for run in both_seeds(name, True))
    lost = [course(tied, run).lost_after for run in dict.fromkeys(tied["run"])]
    said = "after epochs {} and {} with GELU, {} and {} with ReLU, and never with identity"
    assert said.format(*lost[:4]) in text
    assert lost[4:] == [None, None]
    assert lost[1] - lost[0] == 2  # "loses it two epochs later"
    gelu, relu = ([tests[activation, smooth] for smooth in (True, False)] for activation in ("gelu", "relu"))
    assert (np.subtract(*gelu) > 0).all()  # "the weight-tied networks are the better ones in both seeds"
    assert np.subtract(*relu).prod() < 0  # "it depends on the seed"
    published, paper = [row.test for row in PAPER_TABLE if row.activation == "relu"]
    assert f"in the paper they are within {paper - published:.1f} points of each other" in text
    best = {}
    for activation in ("gelu", "relu"):
        ended = {True: [], False: []}
        for smooth in (True, False):
            for test, is_steady in zip(tests[activation, smooth], steady[activation, smooth], strict=True):
                ended[is_steady].append(test)
        best[activation] = sorted(ended[True]), max(ended[False])
        assert min(ended[True]) > max(ended[False])
    ((first, second), other_gelu), ((third,), other_relu) = best["gelu"], best["relu"]
    assert "of the eight runs with GELU and ReLU three trained steadily" in text
    said = f"with GELU at {first:.2f} and {second:.2f} % against at most {other_gelu:.2f} %, "
    assert f"{said}with ReLU at {third:.2f} % against at most {other_relu:.2f} %" in text


def over_180_epochs(name, after):
    """The section on an activation's runs of 180 epochs, and those of seed 0, weight-tied and i.i.d., whose accuracies
    and ratios it has; ``after``: what it says after the ratios."""
    text = section(f"{name} over the paper's 180 epochs")
    tied, iid = (run_of(name.lower(), smooth_init, 180) for smooth_init in (True, False))
    assert accuracies(tied) in text
    assert accuracies(iid) in text
    assert iid.values["von_neumann_conv1"] > 1.9  # "noise"
    ratio, listed = tied.values["von_neumann_conv1"], ", ".join(f"{ratio:.2g}" for ratio in eighths(tied))
    assert f"conv1 is {ratio:.2g}, in its eighths {listed}{after}" in text
    return text, tied, iid


def test_gelu_over_180_epochs():
    text, tied, iid = over_180_epochs("GELU", ", from input to output")
    assert tied.values["von_neumann_conv1"] > SMOOTH_BELOW
    assert f"{unsteady(iid)}; in the weight-tied run it never did" in text
    assert falls(tied).max() < 2


def test_relu_over_180_epochs():
    text, tied, iid = over_180_epochs("ReLU", ".")
    assert min(eighths(tied)) > SMOOTH_BELOW  # "from input to output"
    assert f"{unsteady(tied)}; in the last 30 epochs it never did" in text
    assert falls(tied)[-30:].max() < 2
    assert falls(iid).max() < 2  # "it was steady"
    apart = [np.ptp([run.values["test_accuracy"] for run in both_seeds("relu", smooth)]) for smooth in (True, False)]
    assert f"{apart[0]:.1f} points of test accuracy apart from weight-tied layers and {apart[1]:.1f} from" in text
    spreads = [row.test_range for row in PAPER_TABLE if row.activation == "relu"]
    assert "the paper's spreads over seeds are {} and {}".format(*spreads) in text


def test_identity_over_180_epochs():
    straight = f" (a straight line over an eighth has {straight_line_ratio(256 // 8):.2g})"
    text, tied, _ = over_180_epochs("Identity", straight)
    assert max(eighths(tied)) < SMOOTH_BELOW  # "all along the depth"
    gelu = run_of("gelu", True, 180)
    training = smoothness_in_training([tied, gelu])
    times = [1 / course(training, run.config.name).rate for run in (tied, gelu)]
    assert f"in a training time of {times[0]:.0f} (GELU: {times[1]:.0f})" in text
    short = run_of("identity", True, 30).values["von_neumann_conv1"]
    assert f"after 30 epochs it was {short:.2g}." in text


def path_correlation(networks):
    """The correlation of test accuracies with the logarithms of relative path lengths."""
    return np.corrcoef(np.log10(networks["relative_path_length"]), networks["test_accuracy"])[0, 1]


def test_the_size_of_the_stem():
    text = section("The size of the stem is the length of the ODE")
    networks = tables.read_csv(paths.FIGURES / "stem.csv")
    lengths = networks["relative_path_length"]
    count, correlation = len(lengths), path_correlation(networks)
    assert f"(correlation with its logarithm {correlation:.2f}; {count} networks, an association)" in text
    said = "in the networks of both seeds whose stem was measured, one of them with its stem held"
    assert f"between {min(lengths):.2g} and {max(lengths):.2g} {said}" in text
    places = (networks["epochs"] == 180) & (networks["activation"] != "identity")
    long = {name: column[places] for name, column in networks.items()}
    lengths = long["relative_path_length"]
    assert len(lengths) == 8
    said = (
        f"Among the eight of GELU and ReLU over 180 epochs, between {min(lengths):.2g} and {max(lengths):.2g}, it does"
    )
    assert f"{said} not (correlation {path_correlation(long):.2f})" in text
    assert sum(networks["hold_stem"]) == 1
    free = tables.select(networks, hold_stem=False)
    identity = tables.select(free, activation="identity")["stem_scale"]
    assert f"but for identity, where it ends between {min(identity):.2g} and {max(identity):.2g}" in text
    others = free["stem_scale"][free["activation"] != "identity"]
    assert max(others) < min(identity)
    name = run_of("gelu", True, 180).config.name
    (long,) = tables.rows(tables.select(networks, run=name))
    assert f"they are {long['stem_scale']:.2g} and {long['path_length']:.2g}, after 1 and 0 at the start" in text
    relu = tables.rows(tables.select(networks, activation="relu", epochs=30, smooth_init=True))
    held, free = sorted(relu, key=lambda row: not row["hold_stem"])
    for name in ("relative_path_length", "von_neumann_conv1"):
        assert f"of {held[name]:.2g} in place of {free[name]:.2g}" in text
    assert f"a test accuracy of {held['test_accuracy']:.2f} % in place of {free['test_accuracy']:.2f} %" in text


def small_networks(seed=0):
    """The GELU networks of 32 layers without and with a stem that is held, and those of 64, of one seed."""
    runs = [run for run in records.read_runs() if run.config.epochs == 60 and run.config.seed == seed]
    (held,) = records.select(runs, depth=32, hold_stem=True)
    (free,) = records.select(runs, depth=32, hold_stem=False)
    return free, held, *records.select(runs, depth=64)


def test_what_a_held_stem_costs_and_does_not_keep():
    text = section("The size of the stem is the length of the ODE")
    networks, training = (tables.read_csv(paths.FIGURES / f"{name}.csv") for name in ("stem", "stem_training"))
    line = np.polyfit(np.log10(networks["relative_path_length"]), networks["test_accuracy"], 1)[0]
    seeds = []
    for seed in (0, 1):
        free, held, *_ = small_networks(seed)
        assert vars(held.config) | {"hold_stem": False} == vars(free.config)
        rows = [tables.select(training, run=run.config.name) for run in (free, held)]
        lengths = [row["relative_path_length"][-1] for row in rows]
        tests = [run.values["test_accuracy"] for run in (free, held)]
        seeds.append(
            {
                "lengths": [f"{length:.2g}" for length in lengths],
                "by the line": f"{line * np.log10(lengths[0] / lengths[1]):.1f}",
                "points": f"{tests[0] - tests[1]:.1f}, {tests[0]:.2f} % and {tests[1]:.2f} %",
                "lost": [course(training, run.config.name).lost_after for run in (held, free)],
            }
        )
    first, second = seeds
    ends = "it ends at {} and at {} with the stem held".format(*first["lengths"])
    assert f"{ends} (seed 1: {' and '.join(second['lengths'])})" in text
    said = f"would be {first['by the line']} points of test accuracy by the line through the networks above (seed 1: "
    assert f"{said}{second['by the line']}), and is {first['points']} (seed 1: {second['points']})" in text
    lost = "after epoch {} of 60, without after epoch {}".format(*first["lost"])
    assert f"their ratio is above 0.1 {lost} (seed 1: {' and '.join(map(str, second['lost']))})" in text


def test_how_long_networks_of_few_layers_are_smooth():
    text = section("Shallower networks")
    free, _, deeper = small_networks()
    lost = tables.read_csv(paths.FIGURES / "smoothness_lost.csv")
    assert lost["depth"].tolist() == [32, 64, 256]
    times = [f"{time:.0f}" for time in lost["lost_at"]]
    again = [small_networks(1)[0], both_seeds("gelu", True)[1]]
    training = smoothness_in_training(again)
    other = [course(training, run.config.name).lost_at for run in again]
    said = f"of {times[0]} with 32 layers, {times[1]} with 64 and {times[2]} with 256"
    assert f"{said} (seed 1: {other[0]:.0f} with 32 and {other[1]:.0f} with 256)" in text
    slope = fit_slope(lost["depth"], lost["lost_at"]).slope
    assert f"about as the depth to the power of {slope:.1f}" in text
    assert slope < 1  # "there it is the shallower networks that stay smooth for longer"
    long = run_of("gelu", True, 180).values["test_accuracy"]
    tests = [run.values["test_accuracy"] for run in (free, deeper)]
    assert f"{tests[0]:.2f} % (32 layers) and {tests[1]:.2f} % (64) after 60 epochs" in text
    assert f"as much as 256 layers reach after 180 ({long:.2f} %)" in text
    assert all(abs(test - long) < 1 for test in tests)


def test_the_spike_of_the_loss():
    text = section("The size of the stem is the length of the ODE")
    spike = tables.read_csv(paths.FIGURES / "stem_spike.csv")
    top = int(np.argmax(spike["loss"]))
    loss, length = (np.median(spike[name][:top]) for name in ("loss", "relative_path_length"))
    after, highest = min(spike["relative_path_length"][top:]), spike["loss"][top]
    assert f"falls from {length:.2g} to {after:.2g}, the loss goes from {loss:.2f} to {highest:.2f}" in text
    watched = records.read_spike()
    grown = watched["stem_scale"][1:] / watched["stem_scale"][:-1]
    begins = int(np.argmax(grown))
    assert watched["epoch"][begins + 1] == 104
    assert f"a single step that makes the stem {grown.max():.1f} times as large" in text
    assert f"a batch with a loss of {watched['loss'][begins + 1]:.2f} leads to" in text
    assert min(watched["stem_scale"][:begins]) < watched["stem_scale"][begins]  # "it had been smaller before"


def test_the_watched_epochs_are_those_of_the_run():
    watched, run = records.read_spike(), run_of("gelu", False, 180)
    sizes = np.minimum(50_000 - 64 * (watched["step"] - 1), 64)
    for epoch in dict.fromkeys(watched["epoch"].tolist()):
        of = watched["epoch"] == epoch
        mean = (sizes[of] * watched["loss"][of]).sum() / 50_000
        assert mean == pytest.approx(run.log()[epoch - 1]["train_loss"], rel=1e-9)
    assert "the fall of epoch 104 comes back to the last digit" in README
    assert falls(run)[104 - 2] > 10


def test_what_is_left_of_the_initial_weights():
    text = section("Little of the initial weights is left")
    table = tables.read_csv(paths.FIGURES / "smoothness_initialisation.csv")
    short, long = (tables.select(table, activation="gelu", epochs=epochs) for epochs in (30, 180))
    alone = f"{100 * short['weight_decay_alone'][0]:.1f} %", f"{100 * long['weight_decay_alone'][0]:.0e} %"
    alone = [share.replace("e-0", "e-") for share in alone]
    assert f"leaves {alone[0]} of the initial weights after 30 epochs, and {alone[1]} after 180" in text
    left, share = (np.concatenate([short[f"{what}_{name}"] for name in CONVOLUTIONS]) for what in ("left", "share"))
    assert f"it is {100 * left.min():.1f} to {100 * left.max():.1f} % after 30 epochs of GELU" in text
    assert f"{100 * share.min():.2g} to {100 * share.max():.2g} % of the squared norm" in text
    every = tables.select(table, epochs=180)
    most, of_gelu = (100 * max(of[f"share_{name}"].max() for name in CONVOLUTIONS) for of in (every, long))
    assert f"after 180 at most {most:.2g} % of it (identity), with GELU {of_gelu:.2g} %: next to nothing" in text
    (tied,) = tables.rows(tables.select(long, smooth_init=True))
    times = [tied[f"share_{name}"] / tied[f"chance_{name}"] for name in CONVOLUTIONS]
    assert f"in weight-tied GELU layers {times[0]:.0f} (conv1) and {times[1]:.0f} times (conv2) as much as" in text


def test_what_parts_gelu_layers_from_a_curve():
    text, table = section("Layer by layer"), tables.read_csv(paths.FIGURES / "rounding_depth.csv")
    short, long = (tables.select(table, activation="gelu", epochs=epochs)["noise_conv1"] for epochs in (30, 180))
    least, most, end = (f"{share:.0e}".replace("e-0", "e-") for share in (min(short), max(short), long[-1]))
    assert f"A share of noise ([rounding](../notebooks/rounding.ipynb)) of {least} to {most} is all that parts" in text
    assert f"After 180 epochs it is {long[0]:.2g} at the input, more than" in text
    assert f"and {end} at the output" in text


def test_rounding_was_watched_as_the_recipe_says():
    watched = records.read_rounding()
    for depth, epochs in ((32, 3), (64, 2)):
        steps = tables.select(watched, depth=depth, dtype="float64")["step"].tolist()
        assert steps == [625 * place for place in range(1, 11)] * epochs
    assert "for depth, epochs in ((32, 3), (64, 2)):" in README
    assert set(zip(watched["depth"], watched["dtype"], watched["seed"], strict=True)) == {
        (depth, *run) for depth in (32, 64) for run in (("float32", 0), ("float32", 1), ("float32", 2), ("float64", 0))
    }
    assert 'for dtype, seed in (("float32", 0), ("float32", 1), ("float32", 2), ("float64", 0)):' in README


def test_channels_that_live_without_batch_norm():
    checkpoint = checkpoints.load(paths.CHECKPOINTS / "relu_iid_nobn_depth256_lr0.04_epochs30_seed0.safetensors")
    layers = checkpoint.network.residual_layers
    weight, bias = (layers.stacked(f"conv1.{name}").detach() for name in ("weight", "bias"))
    lives = weight.square().mean((2, 3, 4)).sqrt() > 1e-4  # (L, C)
    told, alive = float((lives == (bias > 0)).double().mean()), float(lives.double().mean())
    text = section("Layer by layer")
    assert f"this tells {100 * told:.1f} % of the i.i.d. layers' channels, {100 * alive:.0f} % of which live" in text


def test_the_networks_are_light_and_those_with_weights_are_named():
    files = [path for path in paths.CHECKPOINTS.rglob("*") if path.is_file()]
    if tracked := [paths.ROOT / file for file in shipped.tracked() if file.startswith("checkpoints/")]:
        files = tracked
    assert sum(path.stat().st_size for path in files) < 60e6
    (sentence,) = re.findall(r"^Weights are here of thirteen runs of seed 0.*", README, re.MULTILINE)
    said = "the six networks of Table 1 over the paper's 180 epochs, the two of GELU over 30, the three ["
    assert said in sentence
    named = set(re.findall(r"`(\w[\w.-]+)`", sentence))
    named |= {run_of(row.activation, row.smooth_init, 180).config.name for row in PAPER_TABLE}
    named |= {run_of("gelu", smooth_init, 30).config.name for smooth_init in (True, False)}
    named |= {run.config.name for run in small_networks()}
    assert {run.config.name for run in records.read_runs() if run.config.seed == 0 and run.has_weights} == named
    assert len(named) == 13
