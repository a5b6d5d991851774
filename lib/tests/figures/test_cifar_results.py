"""From the tables and networks of checkpoints/ to Figure 3, Table 1 and Figure 4."""

import math
from dataclasses import replace

import numpy as np
import pytest
from finished_runs import finish

from lib import tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, by_schedule, longest_by_depth, nothing_trained, with_repeats
from lib.cifar.config import CifarConfig
from lib.cifar.course import smoothness_in_training
from lib.figures import figure_3, figure_4, smoothness
from lib.figures.figure_3 import draw_entries, entries_across_layers, networks_by_schedule
from lib.figures.figure_4 import closer_by, schedule_titles, successive_distance_tables
from lib.figures.smoothness import lost_by_depth, smoothness_along_depth
from lib.figures.table_1 import compare, make_readable


def test_figure_3_shows_the_drawn_entries(trained, monkeypatch):
    networks = networks_by_schedule(records.read_runs(), trained)
    assert list(networks) == [(30, "weight-tied"), (30, "iid"), (180, "weight-tied")]
    assert all(
        (run.config.epochs, run.config.initialisation, run.config.seed) == (*of, 0) for of, run in networks.items()
    )
    entries = {"conv1": (1, 2, 0, 2), "conv2": (15, 0, 1, 1)}
    monkeypatch.setattr(figure_3, "draw_entries", lambda seed: entries)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    table = entries_across_layers(layers, entries)
    curve = tables.select(table, epochs=180, initialisation="weight-tied", convolution="conv2")
    assert curve["layer"].tolist() == list(range(1, 65))
    np.testing.assert_allclose(curve["value"], 0.1 * np.sin(2 * np.pi * np.arange(64) / 64), atol=1e-6)
    noise = tables.select(table, initialisation="iid", convolution="conv1")["value"]
    layer = networks[30, "iid"].load().network.state_dict()["residual_layers.7.conv1.weight"]
    assert noise[7] == layer[1, 2, 0, 2].item()
    config = figure_3.Config(trained)
    data = {"figure_3": table, "figure_3_networks": figure_3.describe(networks, layers)}
    titles = {of: figure_3.panel_title(data, config, *of) for of in networks}
    assert titles[30, "weight-tied"] == "GELU, weight-tied: test 50.00 %\nown schedule of 30 epochs (paper: 180)"
    panels = np.reshape(figure_3.draw(data, config).axes, (4, 2))
    assert [panel.get_title() for panel in panels[::2].flat] == [*titles.values(), "GELU, i.i.d."]
    drawn = panels[3, 0]  # conv2 of the weight-tied network of 180 epochs
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), curve["value"], rtol=1e-6)
    assert drawn.get_ylabel() == "conv2 $[15,0,1,1]$"
    assert [panel.texts[0].get_text() for panel in panels[2:, 1]] == ["no such network is here"] * 2
    networks[30, "weight-tied"].path.unlink()
    assert list(networks_by_schedule(records.read_runs(), trained)) == [(30, "iid"), (180, "weight-tied")]


def test_schedules_are_never_mixed(trained):
    networks = by_schedule(records.read_runs(), trained)
    # The 180-epoch run has no i.i.d. counterpart.
    assert {epochs: list(pair) for epochs, pair in networks.items()} == {
        30: ["weight-tied", "iid"],
        180: ["weight-tied"],
    }
    for epochs, pair in networks.items():
        for initialisation, runs in pair.items():
            assert {(run.config.epochs, run.config.initialisation) for run in runs} == {(epochs, initialisation)}
    assert list(by_schedule(records.read_runs(), replace(trained, epochs=180))) == [180]
    assert [len(runs) for runs in by_schedule(records.read_runs(), trained, seed=0)[30].values()] == [
        1,
        1,
    ]


def test_entries_are_drawn_from_all_by_their_seed():
    drawn = [draw_entries(seed) for seed in range(300)]
    assert drawn[3] == draw_entries(3)
    assert len({entries["conv1"] for entries in drawn}) > 250
    assert np.array([entries["conv2"] for entries in drawn]).max(axis=0).tolist() == [15, 15, 2, 2]


def test_the_longest_schedule_of_each_depth(tmp_path):
    configs = [
        CifarConfig(depth=depth, epochs=epochs, initialisation=initialisation, seed=seed)
        for depth, epochs, initialisation, seed in (
            (16, 2, "weight-tied", 0),
            (8, 3, "weight-tied", 0),
            (8, 2, "weight-tied", 0),
            (8, 2, "weight-tied", 1),
            (16, 3, "iid", 0),
        )
    ]
    for config in configs:
        finish(tmp_path, config)
    records.gather(tmp_path)
    runs = longest_by_depth(records.read_runs(tmp_path), NetworkChoice(), seed=0)
    assert [run.config for run in runs] == [configs[1], configs[0]]


def test_repeats_are_the_other_seeds_of_the_longest_schedule(tmp_path):
    configs = [CifarConfig(depth=8, epochs=epochs, seed=seed) for epochs in (2, 3) for seed in (0, 1)]
    for config in configs:
        finish(tmp_path, config)
    records.gather(tmp_path)
    runs = with_repeats(records.read_runs(tmp_path), NetworkChoice(depth=8), seed=0)
    assert {run.config for run in runs[:2]} == {configs[0], configs[2]}
    assert [run.config for run in runs[2:]] == [configs[3]]


def test_table_1_is_median_and_interquartile_range_of_the_longest_schedule(trained):
    table = compare(records.read_runs(), trained)
    row = {name: values[3] for name, values in table.items()}
    assert (row["activation"], row["initialisation"]) == ("gelu", "iid")
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

    readable = make_readable(table)
    assert readable["trained"][2:4] == [
        "180 epochs, 1 of 5 runs",
        "own schedule of 30 epochs (paper: 180), 3 of 5 runs",
    ]
    assert readable["trained"][0] == "not yet"
    assert readable["test %"][3] == "52.0 ± 5.0"
    assert readable["paper test %"][3] == "85.7 ± 0.1"
    without_batch_norm = compare(records.read_runs(), replace(trained, batch_norm=False))
    assert not any("paper" in name for name in make_readable(without_batch_norm))
    short = compare(records.read_runs(), NetworkChoice(depth=64, epochs=30))
    assert (short["epochs"][2], short["runs"][2]) == (30, 3)


def test_figure_4_averages_over_layers_and_runs(trained):
    networks = by_schedule(records.read_runs(), trained)
    layers, averages = successive_distance_tables(networks, records.read_distances())
    s = np.arange(64) / 64
    expected = 48 * np.abs(np.diff(0.1 * np.sin(2 * np.pi * s)))  # 2,304 equal entries: a factor 48
    tied = tables.select(layers, epochs=30, initialisation="weight-tied", convolution="conv1")
    np.testing.assert_allclose(tied["distance"], expected, rtol=1e-4)
    assert tables.select(averages, epochs=30, initialisation="weight-tied", convolution="conv2")["seed"].tolist() == [
        0,
        1,
        2,
    ]
    factors = closer_by(averages, 30)
    noise = np.median(tables.select(averages, initialisation="iid", convolution="conv2")["average"])
    assert factors["conv2"] == pytest.approx(noise / expected.mean(), rel=1e-4)
    assert closer_by(averages, 180) == {}
    titles = schedule_titles(averages, "gelu")
    assert titles == {30: "GELU, own schedule of 30 epochs (paper: 180), 3 runs", 180: "GELU, 180 epochs, 1 run"}
    curves, points, long_curves, _ = figure_4.draw(
        {"figure_4": averages, "figure_4_layers": layers}, figure_4.Config(trained)
    ).axes
    assert [panel.get_title() for panel in (curves, long_curves)] == list(titles.values())
    assert [line.get_label() for line in long_curves.lines] == ["weight-tied, conv1", "weight-tied, conv2"]
    assert curves.lines[0].get_label() == "weight-tied, conv1"
    np.testing.assert_allclose(curves.lines[0].get_ydata(), expected, rtol=1e-4)
    assert len(points.lines[0].get_ydata()) == 3


def test_with_no_checkpoints_there_is_a_sentence_and_empty_tables(tmp_path):
    runs, choice = records.read_runs(tmp_path), NetworkChoice()
    assert runs == []
    assert by_schedule(runs, choice) == {}
    assert set(make_readable(compare(runs, choice))["trained"]) == {"not yet"}
    layers, averages = successive_distance_tables({}, records.read_distances(tmp_path))
    assert layers["distance"] == averages["average"] == []
    config = figure_3.Config(choice)
    empty = {"figure_3": entries_across_layers({}, config.entries), "figure_3_networks": figure_3.describe({}, {})}
    figure = figure_3.draw(empty, config)
    assert [panel.texts[0].get_text() for panel in figure.axes] == ["no such network is here"] * 4
    nothing = smoothness_in_training([])
    lost = lost_by_depth(nothing)
    for figure in (
        figure_4.draw({"figure_4": averages, "figure_4_layers": layers}, figure_4.Config(choice)),
        smoothness.draw(
            {
                "smoothness": nothing,
                "smoothness_depth": smoothness_along_depth([]),
                "smoothness_depths": nothing,
                "smoothness_lost": lost,
            },
            smoothness.Config(choice),
        ),
    ):
        assert figure.axes[0].texts[0].get_text() == "no such network is trained yet"
    assert nothing_trained(NetworkChoice("relu", depth=128, learning_rate=0.1), seed=9) == (
        "checkpoints/ holds no such network (activation ReLU, batch_norm True, depth 128, learning_rate 0.1, seed 9), "
        "or not its weights: `make train ACTIVATION=relu DEPTH=128 LR=0.1 SEED=9` trains one."
    )
    assert nothing_trained(choice, activation=None).endswith("its weights: `make train` trains one.")


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
