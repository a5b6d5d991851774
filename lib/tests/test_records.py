"""From a finished run to the tables of checkpoints/, and from these to Figure 3, Table 1, Figure 4 and smoothness."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cifar_set import needs_cifar10, write_set

from lib import cifar_results, cifar_training, distances, paths, plots, records, tables
from lib.cifar_results import NetworkChoice
from lib.cifar_training import CifarConfig
from lib.convnet import ConvResNet

SMALL = {"depth": 4, "epochs": 2, "test_every": 2}


def write_state(folder, config, network, **changes):
    """A state as training leaves it after the last epoch, with a network of our choice."""
    folder.mkdir(parents=True)
    line = {"train_loss": 1.0, "train_accuracy": 50.0, "test_loss": None, "test_accuracy": None, "seconds": 2.0}
    line |= {"von_neumann_conv1": None, "von_neumann_conv2": None, "device": "cpu", "engine": "pytorch", "threads": 1}
    log = [dict(line, epoch=epoch, learning_rate=0.1) for epoch in range(config.epochs)]
    log[-1] |= {"test_loss": 1.5, "test_accuracy": 40.0, "von_neumann_conv1": 0.5, "von_neumann_conv2": 2.0} | changes
    state = {"format": 1, "config": vars(config), "epoch": config.epochs, "network": network.state_dict()}
    state |= {"optimizer": {}, "generator": torch.zeros(1), "log": log, "versions": cifar_training.versions()}
    torch.save(state, folder / cifar_training.STATE_FILE)


def finish(tmp_path, config, network=None, **changes):
    folder = tmp_path / "states" / config.name
    write_state(folder, config, network or ConvResNet(config.network), **changes)
    records.export(config, folder)
    return records.publish(config, folder, tmp_path)


def test_a_run_becomes_rows(tmp_path, monkeypatch):
    write_set(tmp_path / "set", monkeypatch)
    config = CifarConfig(**SMALL)
    folder = tmp_path / "run"
    trained = list(cifar_training.train(config, folder))
    records.export(config, folder)
    assert records.publish(config, folder, tmp_path) == records.record_path(config, tmp_path)
    assert records.gather(tmp_path) == 1

    (run,) = records.read_runs(tmp_path)
    assert run.config == config
    assert run.values["train_accuracy"] == trained[-1].train_accuracy
    assert run.values["test_accuracy_best"] == trained[-1].test_accuracy
    assert run.values["von_neumann_conv2"] == trained[-1].von_neumann_conv2
    assert run.values["seconds"] == pytest.approx(sum(record.seconds for record in trained), abs=0.06)
    assert (run.values["device"], run.values["torch"]) == ("cpu", torch.__version__)

    network = run.load().network
    distances = records.read_distances(tmp_path)
    assert distances["layer"].tolist() == [1, 2, 3, 1, 2, 3]
    weight = network.state_dict()["residual_layers.1.conv2.weight"]
    following = network.state_dict()["residual_layers.2.conv2.weight"]
    expected = torch.linalg.vector_norm((following - weight).double())
    assert distances["distance"][4] == pytest.approx(expected.item(), rel=1e-5)


def test_runs_that_are_not_finished_are_not_exported(tmp_path):
    config = CifarConfig(**SMALL)
    with pytest.raises(ValueError, match=r"has 0 of 2 epochs in .*: train it to the end first"):
        records.export(config, tmp_path)


def test_a_state_is_exported_as_the_run_that_it_is(tmp_path):
    config = CifarConfig(**SMALL)
    finish(tmp_path, config)
    with pytest.raises(ValueError, match="holds a run with seed 0, expected 5"):
        records.export(replace(config, seed=5), tmp_path / "states" / config.name)


def test_tables_keep_rows_whose_record_is_gone(tmp_path):
    first, second = CifarConfig(**SMALL), CifarConfig(**SMALL, seed=1)
    record = finish(tmp_path, first)
    records.gather(tmp_path)
    before = (tmp_path / "runs.csv").read_text().splitlines()
    record.unlink()
    finish(tmp_path, second, von_neumann_conv1=None)
    assert records.finished(tmp_path) == {first.name, second.name}  # by its row, by its record
    assert records.gather(tmp_path) == 2
    after = (tmp_path / "runs.csv").read_text().splitlines()
    assert after[:2] == before
    assert [run.config for run in records.read_runs(tmp_path)] == [first, second]
    assert math.isnan(records.read_runs(tmp_path)[1].values["von_neumann_conv1"])
    assert len(records.read_distances(tmp_path)["run"]) == 2 * 2 * 3
    assert records.gather(tmp_path) == 2  # gathering again changes nothing
    assert (tmp_path / "runs.csv").read_text().splitlines() == after


def test_broken_records_get_a_sentence(tmp_path):
    record = finish(tmp_path, CifarConfig(**SMALL))
    record.write_text(record.read_text()[:500])
    with pytest.raises(records.CheckpointError, match=r"seed0_testevery2.json is not a whole record of a run"):
        records.gather(tmp_path)


def test_the_sweep_holds_the_runs_of_table_1():
    configs = records.sweep()
    assert len({config.name for config in configs}) == len(configs)
    listed = {(c.activation, c.smooth_init, c.seed) for c in configs if c.batch_norm}
    rows = {(row.activation, row.smooth_init) for row in cifar_results.PAPER_TABLE}
    assert listed == {(*row, seed) for row in rows for seed in range(5)}
    paper = CifarConfig()
    for config in configs:
        for name in ("depth", "channels", "learning_rate", "epochs", "batch_size", "adaptive"):
            assert getattr(config, name) == getattr(paper, name)
    assert {config.epochs for config in records.sweep(30)} == {30}


def test_a_sweep_with_unknown_columns_gets_a_sentence(tmp_path):
    (tmp_path / "sweep.csv").write_text("activation,width\ngelu,3\n")
    with pytest.raises(ValueError, match=r"sweep.csv has a column width, expected some of: activation"):
        records.sweep(folder=tmp_path)


# ------------------------------------------------------------------------------------------- what figures show


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs whose weights are known functions of depth: weight-tied ones a sine, i.i.d. ones noise."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    depth = 64
    s = torch.arange(depth) / depth
    for smooth in (True, False):
        for seed, epochs, test in ((0, 30, 50.0), (1, 30, 52.0), (2, 30, 60.0), (0, 180, 80.0)):
            if epochs == 180 and not smooth:
                continue
            config = CifarConfig(depth=depth, smooth_init=smooth, seed=seed, epochs=epochs)
            network = ConvResNet(config.network)
            with torch.no_grad():
                for name in records.CONVOLUTIONS:
                    weight = network.residual_layers.stacked(f"{name}.weight")
                    if smooth:
                        weight.copy_(0.1 * torch.sin(2 * math.pi * s)[:, None, None, None, None].expand_as(weight))
            measured = cifar_training.measured(network)
            ratios = {name: measured[name] for name in cifar_results.RATIOS}
            finish(tmp_path, config, network, test_accuracy=test, train_accuracy=test + 1, **ratios)
    records.gather()
    return NetworkChoice(depth=depth)


def test_figure_3_shows_the_drawn_entries(trained):
    networks = cifar_results.networks_by_schedule(records.read_runs(), trained)
    assert list(networks) == [(30, True), (30, False), (180, True)]
    assert all((run.config.epochs, run.config.smooth_init, run.config.seed) == (*of, 0) for of, run in networks.items())
    entries = {"conv1": (1, 2, 0, 2), "conv2": (15, 0, 1, 1)}
    table = cifar_results.entries_across_layers(networks, entries)
    curve = tables.select(table, epochs=180, smooth_init=True, convolution="conv2")
    assert curve["layer"].tolist() == list(range(1, 65))
    np.testing.assert_allclose(curve["value"], 0.1 * np.sin(2 * np.pi * np.arange(64) / 64), atol=1e-6)
    noise = tables.select(table, smooth_init=False, convolution="conv1")["value"]
    layer = networks[30, False].load().network.state_dict()["residual_layers.7.conv1.weight"]
    assert noise[7] == layer[1, 2, 0, 2].item()
    titles = {of: cifar_results.panel_title(run) for of, run in networks.items()}
    assert titles[30, True] == "GELU, weight-tied: test 50.00 %\nown schedule of 30 epochs (paper: 180)"
    panels = np.reshape(plots.figure_3(table, titles, entries).axes, (4, 2))
    assert [panel.get_title() for panel in panels[::2].flat] == [*titles.values(), "i.i.d."]
    drawn = panels[3, 0]  # conv2 of the weight-tied network of 180 epochs
    np.testing.assert_array_equal(drawn.lines[0].get_ydata(), curve["value"])
    assert drawn.get_ylabel() == "conv2 $[15,0,1,1]$"
    assert [panel.texts[0].get_text() for panel in panels[2:, 1]] == ["no such network is here"] * 2
    networks[30, True].path.unlink()
    assert list(cifar_results.networks_by_schedule(records.read_runs(), trained)) == [(30, False), (180, True)]


def test_schedules_are_never_mixed(trained):
    networks = cifar_results.by_schedule(records.read_runs(), trained)
    # The 180-epoch run has no i.i.d. counterpart.
    assert {epochs: list(pair) for epochs, pair in networks.items()} == {30: [True, False], 180: [True]}
    for epochs, pair in networks.items():
        for smooth, runs in pair.items():
            assert {(run.config.epochs, run.config.smooth_init) for run in runs} == {(epochs, smooth)}
    assert list(cifar_results.by_schedule(records.read_runs(), replace(trained, epochs=180))) == [180]
    assert [len(runs) for runs in cifar_results.by_schedule(records.read_runs(), trained, seed=0)[30].values()] == [
        1,
        1,
    ]


def test_entries_are_drawn_from_all_by_their_seed():
    drawn = [cifar_results.draw_entries(seed) for seed in range(300)]
    assert drawn[3] == cifar_results.draw_entries(3)
    assert len({entries["conv1"] for entries in drawn}) > 250
    assert np.array([entries["conv2"] for entries in drawn]).max(axis=0).tolist() == [15, 15, 2, 2]


def test_table_1_is_median_and_interquartile_range_of_the_longest_schedule(trained):
    table = cifar_results.table_1(records.read_runs(), trained)
    row = {name: values[3] for name, values in table.items()}
    assert (row["activation"], row["initialisation"]) == ("gelu", "i.i.d.")
    # 50, 52, 60: quartiles 51 and 56.
    assert (row["test"], row["test_range"]) == (52.0, 5.0)
    assert (row["train"], row["runs"], row["epochs"]) == (53.0, 3, 30)
    assert row["von_neumann_conv1"] == pytest.approx(2, abs=0.1)
    assert not row["smooth"]
    tied = {name: values[2] for name, values in table.items()}
    assert (tied["test"], tied["runs"], tied["epochs"], tied["smooth"]) == (80.0, 1, 180, True)
    # Mean squared difference of a sine over its variance: (2 pi / L)^2.
    assert tied["von_neumann_conv1"] == pytest.approx((2 * math.pi / 64) ** 2, rel=0.05)
    assert table["runs"][0] == 0

    readable = cifar_results.readable_table_1(table)
    assert readable["trained"][2:4] == [
        "180 epochs, 1 of 5 runs",
        "own schedule of 30 epochs (paper: 180), 3 of 5 runs",
    ]
    assert readable["trained"][0] == "not yet"
    assert readable["test %"][3] == "52.0 ± 5.0"
    assert readable["paper test %"][3] == "85.7 ± 0.1"
    without_batch_norm = cifar_results.table_1(records.read_runs(), replace(trained, batch_norm=False))
    assert not any("paper" in name for name in cifar_results.readable_table_1(without_batch_norm))
    short = cifar_results.table_1(records.read_runs(), NetworkChoice(depth=64, epochs=30))
    assert (short["epochs"][2], short["runs"][2]) == (30, 3)


def test_figure_4_averages_over_layers_and_runs(trained):
    networks = cifar_results.by_schedule(records.read_runs(), trained)
    layers, averages = cifar_results.successive_distance_tables(networks, records.read_distances())
    s = np.arange(64) / 64
    expected = 48 * np.abs(np.diff(0.1 * np.sin(2 * np.pi * s)))  # 2,304 equal entries: a factor 48
    tied = tables.select(layers, epochs=30, smooth_init=True, convolution="conv1")
    np.testing.assert_allclose(tied["distance"], expected, rtol=1e-4)
    assert tables.select(averages, epochs=30, smooth_init=True, convolution="conv2")["seed"].tolist() == [0, 1, 2]
    factors = cifar_results.closer_by(averages, 30)
    noise = np.median(tables.select(averages, smooth_init=False, convolution="conv2")["average"])
    assert factors["conv2"] == pytest.approx(noise / expected.mean(), rel=1e-4)
    assert cifar_results.closer_by(averages, 180) == {}
    titles = cifar_results.schedule_titles(networks)
    assert titles == {30: "GELU, own schedule of 30 epochs (paper: 180), 3 runs", 180: "GELU, 180 epochs, 1 run"}
    curves, points, long_curves, _ = plots.figure_4(layers, averages, titles).axes
    assert [panel.get_title() for panel in (curves, long_curves)] == list(titles.values())
    assert [line.get_label() for line in long_curves.lines] == ["weight-tied, conv1", "weight-tied, conv2"]
    assert curves.lines[0].get_label() == "weight-tied, conv1"
    np.testing.assert_allclose(curves.lines[0].get_ydata(), expected, rtol=1e-4)
    assert len(points.lines[0].get_ydata()) == 3


def test_smoothness_in_training_is_a_line_an_epoch(trained):
    runs = trained.select(records.read_runs(), seed=0)
    table = cifar_results.smoothness_in_training(runs)
    long = tables.select(table, smooth_init=True, epochs=180)
    assert long["epoch"].tolist() == list(range(1, 181))
    # The logs say a learning rate of 0.1 at every epoch, of 782 steps.
    np.testing.assert_allclose(long["time"], 78.2 * np.arange(1, 181))
    assert np.isnan(long["von_neumann_conv1"][:-1]).all()
    assert long["von_neumann_conv1"][-1] == pytest.approx((2 * math.pi / 64) ** 2, rel=0.05)
    records.record_path(runs[0].config).unlink()
    without = cifar_results.smoothness_in_training(runs)
    assert len(without["run"]) == len(table["run"]) - runs[0].config.epochs


def test_smoothness_along_depth_is_that_of_each_part(trained):
    runs = replace(trained, epochs=30).select(records.read_runs(), seed=0)
    table = cifar_results.smoothness_along_depth(runs, parts=4)
    assert table["part"] == [1, 2, 3, 4] * 2
    tied = tables.select(table, smooth_init=True)
    sine = 0.1 * torch.sin(2 * math.pi * torch.arange(64) / 64).float()
    ratios = [distances.von_neumann_ratio(part[:, None]) for part in sine.split(16)]
    np.testing.assert_allclose(tied["von_neumann_conv2"], ratios, rtol=1e-4)
    noise = tables.select(table, smooth_init=False)
    np.testing.assert_allclose(noise["von_neumann_conv1"], 2, atol=0.1)
    runs[0].path.unlink()
    assert len(cifar_results.smoothness_along_depth(runs, parts=4)["part"]) == 4


def test_what_is_left_of_the_initialisation_is_what_was_put_in(tmp_path):
    config = CifarConfig(depth=8, epochs=30)
    network = ConvResNet(config.network)
    with torch.no_grad():
        network.residual_layers.conv1_weight.mul_(0.25)
        weight = network.residual_layers.conv2_weight
        # As long as the weight and orthogonal to it: half of the square of their sum.
        partner = torch.stack((weight[1::2], -weight[::2]), dim=1).flatten(0, 1)
        weight.mul_(0.5).add_(0.5 * partner)
    finish(tmp_path, config, network)
    records.gather(tmp_path)
    (run,) = records.read_runs(tmp_path)
    table = cifar_results.left_of_initialisation([run])
    found = {name: values[0] for name, values in table.items()}
    assert (found["left_conv1"], found["share_conv1"]) == pytest.approx((0.25, 1))
    assert (found["left_conv2"], found["share_conv2"]) == pytest.approx((0.5, 0.5))
    # 782 steps an epoch; the cosine's values at 30 epochs, from 1 at the first on, sum up to 1.
    assert found["time"] == pytest.approx(782 * (30 * 0.02 + 0.02))
    assert found["weight_decay_alone"] == pytest.approx(math.exp(-5e-4 * 10 * found["time"]))
    zero = replace(config, batch_norm=False)  # conv2 starts at zero
    finish(tmp_path, zero, ConvResNet(zero.network))
    records.gather(tmp_path)
    table = cifar_results.left_of_initialisation(records.read_runs(tmp_path))
    assert math.isnan(tables.select(table, run=zero.name)["left_conv2"][0])
    run.path.unlink()
    assert cifar_results.left_of_initialisation(records.read_runs(tmp_path))["run"] == [zero.name]


@pytest.mark.parametrize("smooth_init", [True, False])
def test_what_unrelated_initial_weights_share_is_by_chance(tmp_path, smooth_init):
    config = CifarConfig(depth=6, epochs=1, smooth_init=smooth_init)
    network = ConvResNet(config.network)
    noise = torch.randn(6, 16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    trained = noise + 0.7 * noise[0]  # layers that are partly alike
    with torch.no_grad():
        network.residual_layers.conv1_weight.copy_(trained)
    finish(tmp_path, config, network)
    records.gather(tmp_path)
    (chance,) = cifar_results.left_of_initialisation(records.read_runs(tmp_path))["chance_conv1"]
    shares = []
    for seed in range(400):
        start = ConvResNet(replace(config, seed=seed).network).residual_layers.stacked("conv1.weight").detach()
        shares.append(float((start * trained).sum() ** 2 / (start.square().sum() * trained.square().sum())))
    assert np.mean(shares) == pytest.approx(chance, rel=0.25)
    assert smooth_init or chance == pytest.approx(1 / (6 * 2304))


def test_the_course_of_an_exponential_is_its_rate():
    epochs = np.arange(1, 101)
    # Falls first, then grows, and saturates far above what counts as smooth.
    ratio = np.minimum(np.maximum(2e-3 * np.exp(-0.5 * epochs), 1e-4 * np.exp(0.004 * 30 * epochs)), 1.5)
    table = {"run": ["one"] * 100, "epoch": epochs, "time": 30.0 * epochs, "von_neumann_conv1": ratio}
    course = cifar_results.course(table, "one")
    assert course.rate == pytest.approx(0.004)
    assert course.lost_after == math.ceil(math.log(1e3) / 0.12)
    assert (course.ratio, course.time) == (1.5, 3000)
    flat = table | {"von_neumann_conv1": np.full(100, 2e-4)}
    assert cifar_results.course(flat, "one").lost_after is None
    assert math.isnan(cifar_results.course(flat, "one").rate)
    assert math.isnan(cifar_results.course(flat, "another").ratio)


def test_smoothness_is_drawn_as_it_is_tabled(trained):
    runs = trained.select(records.read_runs(), seed=0)
    training = cifar_results.smoothness_in_training(runs)
    depth = cifar_results.smoothness_along_depth([run for run in runs if run.config.smooth_init])
    course, parts = plots.smoothness(training, depth, "conv2", 0.1, 0.05).axes
    labels = ["GELU, 180 epochs", "GELU, 30 epochs", "i.i.d. initialisation"]
    assert course.get_legend_handles_labels()[1] == labels
    longest = tables.select(training, smooth_init=True, epochs=180)
    np.testing.assert_array_equal(course.lines[0].get_ydata(), longest["von_neumann_conv2"])
    np.testing.assert_array_equal(course.lines[0].get_xdata(), longest["time"])
    drawn = tables.select(depth, epochs=180)
    np.testing.assert_array_equal(parts.lines[0].get_ydata(), drawn["von_neumann_conv2"])
    assert not parts.texts[1:]
    _, empty = plots.smoothness(training, cifar_results.smoothness_along_depth([])).axes
    assert empty.texts[-1].get_text() == "their weights are not here"


def test_relative_path_lengths_are_those_of_the_weights_or_of_the_log(tmp_path, trained):
    held, plain = CifarConfig(depth=64, epochs=30, hold_stem=True), CifarConfig(depth=64, epochs=30, batch_norm=False)
    finish(tmp_path, held, stem_scale=1.0, path_length=0.25)
    finish(tmp_path, plain)
    finish(tmp_path, CifarConfig(depth=64, epochs=31))  # of an older log
    records.gather()
    for run in records.select(records.read_runs(), seed=0):
        if run.config in (held, plain, CifarConfig(depth=64, epochs=31)):
            run.path.unlink()
    runs = trained.select(records.read_runs(), hold_stem=None, seed=0)
    checkpoint = trained.select(runs, epochs=180)[0]
    network = checkpoint.load().network
    with torch.no_grad():  # away from the initialisation, where the path has no length
        network.bn1.weight.fill_(0.3), network.bn1.bias.fill_(0.4)
        network.residual_layers.stacked("bn2.bias")[::2] = 4.0
    records.save(checkpoint.path, replace(checkpoint.load(), network=network))
    table = cifar_results.relative_path_lengths(runs)
    rows = {(row["epochs"], row["smooth_init"], row["hold_stem"]): row for row in tables.rows(table)}
    assert set(rows) == {(30, True, False), (30, False, False), (180, True, False), (30, True, True)}
    scales = [rows[180, True, False][name] for name in cifar_results.SCALES]
    assert scales == pytest.approx([0.5, 2.0, 4.0])
    assert rows[180, True, False]["test_accuracy"] == 80.0
    assert rows[30, True, True]["relative_path_length"] == 0.25


def test_the_spike_is_averaged_over_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    assert cifar_results.loss_spike(2) == {"epochs": [], "loss": [], "relative_path_length": []}
    watched = {"epoch": [8, 8, 8, 8, 9, 9, 9, 9], "step": [1, 2, 3, 4] * 2, "loss": [1.0, 3.0, 2.0, 2.0] * 2}
    watched |= {"stem_scale": [0.5] * 8, "path_length": [1.0] * 4 + [2.0] * 4}
    tables.write_csv(tmp_path / records.SPIKE, watched)
    assert cifar_results.loss_spike(2) == {
        "epochs": [7.25, 7.75, 8.25, 8.75], "loss": [2.0] * 4, "relative_path_length": [2.0, 2.0, 4.0, 4.0],
    }  # fmt: skip
    assert len(cifar_results.loss_spike(3)["loss"]) == 2  # whole means alone
    with pytest.raises(ValueError, match="every is 0, expected a whole number of at least 1"):
        cifar_results.loss_spike(0)


def test_the_stem_is_drawn_as_it_is_tabled(tmp_path, trained):
    finish(
        tmp_path, CifarConfig(depth=64, epochs=30, hold_stem=True), test_accuracy=55.0, stem_scale=1.0, path_length=1
    )
    records.gather()
    networks = cifar_results.relative_path_lengths(trained.select(records.read_runs(), hold_stem=None, seed=0))
    networks |= {"relative_path_length": [0.1, 0.2, 0.4, 0.8]}
    spike = {"epochs": [7.5, 8.5], "loss": [2.0, 1.0], "relative_path_length": [0.1, 3.0]}
    accuracy, loss, ratio, length = plots.stem(networks, spike).axes
    points = [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in accuracy.lines[:4]]
    assert points == [
        (length, value, "s" if held else "o")
        for length, value, held in zip(
            *(networks[name] for name in ("relative_path_length", "test_accuracy", "hold_stem")), strict=True
        )
    ]
    labels = ["GELU", "full: weight-tied", "hollow: i.i.d.", "stem held", "numbers: epochs"]
    assert accuracy.get_legend_handles_labels()[1] == labels
    assert [line.get_ydata()[0] for line in ratio.lines] == networks["von_neumann_conv1"]
    assert [line.get_ydata().tolist() for line in (*loss.lines, *length.lines)] == [[2.0, 1.0], [0.1, 3.0]]
    empty = plots.stem(cifar_results.relative_path_lengths([]), {name: [] for name in spike}).axes
    assert [text.get_text() for panel in empty for text in panel.texts] == ["none is here"] * 2


def test_with_no_checkpoints_there_is_a_sentence_and_empty_tables(tmp_path):
    runs, choice = records.read_runs(tmp_path), NetworkChoice()
    assert runs == []
    assert cifar_results.by_schedule(runs, choice) == cifar_results.schedule_titles({}) == {}
    assert set(cifar_results.readable_table_1(cifar_results.table_1(runs, choice))["trained"]) == {"not yet"}
    layers, averages = cifar_results.successive_distance_tables({}, records.read_distances(tmp_path))
    assert layers["distance"] == averages["average"] == []
    entries = {"conv1": (0,) * 4, "conv2": (0,) * 4}
    figure = plots.figure_3(cifar_results.entries_across_layers({}, {}), {}, entries)
    assert [panel.texts[0].get_text() for panel in figure.axes] == ["no such network is here"] * 4
    for figure in (
        plots.figure_4(layers, averages, {}),
        plots.smoothness(cifar_results.smoothness_in_training([]), cifar_results.smoothness_along_depth([])),
    ):
        assert figure.axes[0].texts[0].get_text() == "no such network is trained yet"
    assert cifar_results.nothing_trained(NetworkChoice("relu", depth=128, learning_rate=0.1), seed=9) == (
        "checkpoints/ holds no such network (activation ReLU, batch_norm True, depth 128, learning_rate 0.1, seed 9), "
        "or not its weights: `make train ACTIVATION=relu DEPTH=128 LR=0.1 SEED=9` trains one."
    )
    assert cifar_results.nothing_trained(choice, activation=None).endswith("its weights: `make train` trains one.")


def test_trials_and_other_settings_stay_out(tmp_path):
    other = {"train_images": 100, "batch_size": 32, "adaptive": True, "channels": 8, "hold_stem": True}
    for name, value in other.items():
        finish(tmp_path, CifarConfig(**{"depth": 4, "epochs": 1, name: value}))
    records.gather(tmp_path)
    assert len(records.read_runs(tmp_path)) == len(other)
    assert NetworkChoice(depth=4).select(records.read_runs(tmp_path)) == []


def test_a_run_that_was_evaluated_more_often_is_no_other_run(tmp_path):
    often, usual = (CifarConfig(depth=4, epochs=1, test_every=every) for every in (1, 5))
    for config in (often, usual, replace(usual, seed=1)):
        finish(tmp_path, config)
    records.gather(tmp_path)
    assert [run.config.seed for run in NetworkChoice(depth=4).select(records.read_runs(tmp_path))] == [0, 1]


def test_a_rate_is_found_where_some_ratios_are_undefined():
    ratio = [math.nan, 5e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    table = tables.from_rows(
        {"run": "one", "epoch": k, "time": float(k), "von_neumann_conv1": value} for k, value in enumerate(ratio)
    )
    assert cifar_results.course(table, "one").rate == pytest.approx(math.log(2))


# ------------------------------------------------------------------------------------------ shipped networks


@needs_cifar10
def test_a_shipped_network_reproduces_its_record():
    shipped = [run for run in records.read_runs() if run.has_weights]
    if not shipped:
        pytest.skip("checkpoints/ holds no trained network yet")
    run = shipped[0]
    checkpoint = run.load()
    measured = cifar_training.measured(checkpoint.network)
    for name in cifar_results.RATIOS:
        assert measured[name] == pytest.approx(run.values[name], rel=1e-9)
    from lib import cifar

    _, accuracy = cifar_training.evaluate(checkpoint.network, cifar.load(train=False, download=False))
    # On the machine and engine that logged it the two are equal; rounding elsewhere may turn an image or five.
    assert accuracy == pytest.approx(run.values["test_accuracy"], abs=0.05)
