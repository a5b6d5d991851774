"""Figure 3, Table 1 and Figure 4, from the tables and networks of checkpoints/."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from finished_runs import finish

from lib import measures, paths, tables
from lib.cifar import records
from lib.cifar.choice import (
    RELEASED,
    NetworkChoice,
    Setting,
    describe_missing,
    group_by_setting,
    select_longest_by_depth,
    select_longest_schedule,
    select_with_repeats,
)
from lib.cifar.config import CifarConfig
from lib.cifar.course import RATIOS, measure_parts, smooth_shares, smoothness_in_training
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.figures import figure_3, figure_4, smoothness
from lib.figures.claim import FAILS, HOLDS
from lib.figures.figure_3 import draw_entries, select_networks, tabulate_entries
from lib.figures.figure_4 import compare_distances, tabulate_distances, write_titles
from lib.figures.smoothness import find_losses_by_depth
from lib.figures.table_1 import compare, make_readable
from lib.measures import PARTS, ratios_along_depth


@pytest.mark.slow
def test_figure_3_shows_the_chosen_entries(trained, monkeypatch):
    networks = select_networks(records.read_runs(), trained)
    assert [(setting.epochs, smooth) for setting, smooth in networks] == [
        (30, "weight-tied"),
        (30, "iid"),
        (180, "weight-tied"),
    ]
    for (setting, initialisation), run in networks.items():
        assert (Setting.from_config(run.config), run.config.initialisation, run.config.seed) == (
            setting,
            initialisation,
            0,
        )
    short = next(setting for setting, _ in networks)
    entries = {"conv1": (1, 2, 0, 2), "conv2": (15, 0, 1, 1)}
    monkeypatch.setattr(figure_3, "draw_entries", lambda seed: entries)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    table = tabulate_entries(layers, entries)
    curve = tables.select(table, epochs=180, initialisation="weight-tied", convolution="conv2")
    assert curve["layer"].tolist() == list(range(1, 65))
    np.testing.assert_allclose(curve["value"], 0.1 * np.sin(2 * np.pi * np.arange(64) / 64), atol=1e-6)
    noise = tables.select(table, initialisation="iid", convolution="conv1")["value"]
    layer = networks[short, "iid"].load().network.state_dict()["residual_layers.7.conv1.weight"]
    assert noise[7] == layer[1, 2, 0, 2].item()
    config = figure_3.Config(trained)
    nothing = {name: [] for name in ("picture", "convolution", "layer", "entry")}
    ratios = figure_3.measure_published(nothing)
    data = {"figure_3": table, "figure_3_networks": figure_3.measure_networks(networks, layers, ratios)}
    data["figure_3_published"] = nothing
    titles = {
        (setting.epochs, smooth): figure_3.write_panel_title(data, config, setting.words, setting.epochs, smooth)
        for setting, smooth in networks
    }
    length = "a schedule of 30 epochs (paper: 180)"
    assert titles[30, "weight-tied"] == f"GELU, weight-tied: test 50.00 %\n{length}\n{RELEASED}"
    panels = np.reshape(figure_3.draw(data, config).axes, (4, 2))
    assert [panel.get_title() for panel in panels[::2].flat] == [*titles.values(), "GELU, i.i.d."]
    drawn = panels[3, 0]  # conv2 of the weight-tied network of 180 epochs
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), curve["value"], rtol=1e-6)
    assert drawn.get_ylabel() == "conv2 $[15,0,1,1]$"
    assert [panel.texts[0].get_text() for panel in panels[2:, 1]] == ["no such network is here"] * 2
    networks[short, "weight-tied"].path.unlink()
    assert list(select_networks(records.read_runs(), trained)) == list(networks)[1:]


@pytest.mark.slow
def test_schedules_are_never_mixed(trained):
    networks = group_by_setting(records.read_runs(), trained)
    # The 180-epoch run has no i.i.d. counterpart.
    assert {setting.epochs: list(pair) for setting, pair in networks.items()} == {
        30: ["weight-tied", "iid"],
        180: ["weight-tied"],
    }
    for setting, pair in networks.items():
        for initialisation, runs in pair.items():
            assert {(Setting.from_config(run.config), run.config.initialisation) for run in runs} == {
                (setting, initialisation)
            }
    assert [setting.epochs for setting in group_by_setting(records.read_runs(), replace(trained, epochs=180))] == [180]
    (short, *_) = group_by_setting(records.read_runs(), trained, seed=0).values()
    assert [len(runs) for runs in short.values()] == [1, 1]


def test_entries_are_drawn_from_all_by_their_seed():
    drawn = [draw_entries(seed) for seed in range(300)]
    assert drawn[3] == draw_entries(3)
    assert len({entries["conv1"] for entries in drawn}) > 250
    assert np.array([entries["conv2"] for entries in drawn]).max(axis=0).tolist() == [15, 15, 2, 2]


def test_the_longest_schedule_of_each_depth_is_selected(tmp_path):
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
    runs = select_longest_by_depth(records.read_runs(tmp_path), NetworkChoice(), seed=0)
    assert [run.config for run in runs] == [configs[1], configs[0]]


def test_repeats_are_the_other_seeds_of_the_longest_schedule(tmp_path):
    configs = [CifarConfig(depth=8, epochs=epochs, seed=seed) for epochs in (2, 3) for seed in (0, 1)]
    for config in configs:
        finish(tmp_path, config)
    records.gather(tmp_path)
    runs = select_with_repeats(records.read_runs(tmp_path), NetworkChoice(depth=8), seed=0)
    assert {run.config for run in runs[:2]} == {configs[0], configs[2]}
    assert [run.config for run in runs[2:]] == [configs[3]]


@pytest.mark.slow
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
        "180 epochs, 1 of 5 runs (seed 0)",
        "a schedule of 30 epochs (paper: 180), 3 of 5 runs (seeds 0, 1, 2)",
    ]
    assert readable["trained"][0] == "not yet"
    assert readable["test %"][3] == "52.0 ± 5.0"
    assert readable["paper test %"][3] == "85.7 ± 0.1"
    without_batch_norm = compare(records.read_runs(), replace(trained, batch_norm=False))
    assert not any("paper" in name for name in make_readable(without_batch_norm))
    short = compare(records.read_runs(), NetworkChoice(depth=64, epochs=30))
    assert (short["epochs"][2], short["runs"][2]) == (30, 3)


@pytest.fixture
def two_settings(tmp_path, monkeypatch):
    """Weight-tied and i.i.d. runs of two batch sizes. The larger one has the longer schedule and better accuracy."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    for batch_size, epochs, test in ((64, 2, 50.0), (64, 3, 60.0), (128, 4, 80.0)):
        for initialisation in INITIALISATIONS:
            for seed in (0, 1):
                config = CifarConfig(
                    depth=16, epochs=epochs, batch_size=batch_size, initialisation=initialisation, seed=seed
                )
                network = ConvResNet(config.network)
                with torch.no_grad():  # half of the layers on a line, half noise; both grow with the batch
                    for name in records.CONVOLUTIONS:
                        weight = network.residual_layers.stacked(f"{name}.weight")
                        line = torch.arange(16.0)[:, None, None, None, None].expand_as(weight)
                        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                        weight.copy_(batch_size * torch.where(torch.arange(16)[:, *[None] * 4] < 8, line, noise))
                finish(tmp_path, config, network, test_accuracy=test + seed)
    records.gather()
    return replace(NetworkChoice(), depth=16, batch_size=0)


@pytest.mark.slow
def test_table_1_has_a_block_for_each_setting(two_settings):
    table = compare(records.read_runs(), two_settings)
    trained = tables.select(table, activation="gelu")
    assert trained["setting"].tolist() == [RELEASED] * 2 + ["batch size 128, learning rate 0.04"] * 2
    assert trained["test"].tolist() == [60.5, 60.5, 80.5, 80.5]  # each setting has its own median
    assert trained["epochs"].tolist() == [3, 3, 4, 4]
    assert trained["seeds"].tolist() == ["0 1"] * 4
    assert len(table["runs"]) == 6 + 2  # the released script's setting has all rows of the paper, trained or not
    readable = make_readable(table)
    assert [word for word in readable["setting"] if word] == list(dict.fromkeys(table["setting"]))
    of_one = compare(records.read_runs(), replace(two_settings, batch_size=128))
    assert set(of_one["setting"]) == {"batch size 128, learning rate 0.04"}
    assert tables.select(of_one, activation="gelu")["test"].tolist() == [80.5, 80.5]


@pytest.mark.slow
def test_the_longest_schedule_is_that_of_each_setting(two_settings):
    found = two_settings.select(records.read_runs())
    longest = select_longest_schedule(found)
    assert {(run.config.batch_size, run.config.epochs) for run in longest} == {(64, 3), (128, 4)}
    assert len(longest) == 8
    repeats = select_with_repeats(records.read_runs(), two_settings, seed=0)
    assert {(run.config.batch_size, run.config.epochs) for run in repeats if run.config.seed} == {(64, 3), (128, 4)}
    assert {run.config.batch_size for run in NetworkChoice(depth=16).select(records.read_runs())} == {64}


@pytest.mark.slow
def test_figures_3_and_4_keep_settings_apart(two_settings):
    networks = select_networks(records.read_runs(), two_settings)
    assert [(setting.batch_size, setting.epochs) for setting, side in networks if side == "weight-tied"] == [
        (64, 2),
        (64, 3),
        (128, 4),
    ]
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    table = tabulate_entries(layers, draw_entries(0))
    assert len(set(zip(table["setting"], table["epochs"], strict=True))) == 3
    layers, averages = tabulate_distances(group_by_setting(records.read_runs(), two_settings), records.read_distances())
    small, large = (
        tables.select(averages, epochs=epochs, initialisation="weight-tied", convolution="conv1") for epochs in (3, 4)
    )
    assert large["average"] == pytest.approx(2 * small["average"])  # like their weights
    assert set(large["setting"]) == {"batch size 128, learning rate 0.04"}
    assert figure_4.list_blocks(averages) == figure_4.list_blocks(layers)
    assert len(write_titles(averages, "gelu")) == 3


def test_the_share_of_smooth_layers_is_that_of_parts_that_are_long_enough():
    line, noise = torch.arange(128.0)[:, None].expand(-1, 50), torch.randn(128, 50)
    assert measures.smooth_share(torch.cat([line, noise])) == 0.5
    assert measures.smooth_share(line[:88]) == 1.0
    assert math.isnan(measures.smooth_share(line[:80]))  # not even a line of ten layers is below the bound
    assert math.isnan(measures.smooth_share(torch.ones(256, 3)))


@pytest.mark.slow
def test_the_share_of_smooth_layers_comes_from_the_record_or_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    choice = NetworkChoice(depth=96)
    for seed in (0, 1):
        config = CifarConfig(depth=96, epochs=1, seed=seed, initialisation="iid")
        network = ConvResNet(config.network)
        with torch.no_grad():  # the second half of the layers on a line
            for name in records.CONVOLUTIONS:
                network.residual_layers.stacked(f"{name}.weight")[48:] = torch.arange(48.0)[:, None, None, None, None]
        finish(tmp_path, config, network)
    records.gather()
    runs = records.read_runs()
    assert [smooth_shares(run) for run in runs] == [dict.fromkeys(records.SHARES, 0.5)] * 2
    old = replace(runs[0], values={name: of for name, of in runs[0].values.items() if name not in records.SHARES})
    assert smooth_shares(old) == smooth_shares(runs[0])  # from its weights
    old.path.unlink()
    assert all(math.isnan(share) for share in smooth_shares(old).values())
    (row,) = tables.rows(tables.select(compare([old, runs[1]], choice), activation="gelu", initialisation="iid"))
    assert (row["runs"], row["smooth_known"], row["smooth_share_conv2"]) == (2, 1, 0.5)
    readable = make_readable(compare([old, runs[1]], choice))
    assert readable["smooth eighths conv1"][3] == "4 of 8 (1 run)"
    assert make_readable(compare([old], choice))["smooth eighths conv1"][3] == "unknown"
    # Tables that are gathered from an older record say that it is unknown.
    path = records.record_path(runs[0].config)
    record = json.loads(path.read_text())
    record["summary"] = {name: of for name, of in record["summary"].items() if name not in records.SHARES}
    path.write_text(json.dumps(record))
    records.gather()
    known = [run.values["smooth_share_conv1"] for run in records.read_runs()]
    assert known == pytest.approx([math.nan, 0.5], nan_ok=True)


@pytest.mark.slow
def test_published_curves_are_shown_as_they_were_read(trained, monkeypatch):
    layer = np.arange(1, 257)
    curves = [
        {"picture": picture, "convolution": name, "layer": int(k), "entry": size * math.sin(k / 20)}
        for picture, size in (("first", 1.0), ("second", 2.0)) for name in records.CONVOLUTIONS for k in layer
    ]  # fmt: skip
    curves = tables.from_rows(curves)
    ratios = figure_3.measure_published(curves)
    assert ratios["picture"] == ["first", "first", "second", "second"]
    # The ratio of a sine that advances by 1/20 radian a layer.
    assert ratios["von_neumann"] == pytest.approx([4 * math.sin(1 / 40) ** 2] * 4, rel=0.05)
    assert ratios["high"] == pytest.approx([2.0 * ratio for ratio in ratios["von_neumann"]])
    assert ratios["smooth_share"] == [1.0] * 4
    networks = select_networks(records.read_runs(), trained)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    described = figure_3.measure_networks(networks, layers, ratios)
    tied = tables.select(described, initialisation="weight-tied")
    assert set(tied["as_published"]) == {0.0}  # 64 layers of a sine: ten times rougher
    assert np.isnan(tied["smooth_share"]).all()  # parts of eight layers are too short
    config = figure_3.Config(trained)
    data = {"figure_3": tabulate_entries(layers, config.entries), "figure_3_networks": described}
    axes = figure_3.draw(data | {"figure_3_published": curves}, config).axes
    assert len(axes) == 4 + 8
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), 2 * np.sin(layer / 20), rtol=1e-6, atol=1e-8)
    assert not config.as_published  # it has 64 layers
    assert figure_3.Config(NetworkChoice()).as_published
    assert not figure_3.Config(NetworkChoice("relu")).as_published
    (claim,) = figure_3.judge_claims(lambda name: {key: np.array(column) for key, column in ratios.items()})
    assert claim.verdict == HOLDS
    rough = figure_3.measure_published(curves | {"entry": np.random.default_rng(0).standard_normal(1024)})
    (claim,) = figure_3.judge_claims(lambda name: {key: np.array(column) for key, column in rough.items()})
    assert claim.verdict == FAILS


@pytest.mark.slow
def test_figure_4_averages_over_layers_and_runs(trained):
    networks = group_by_setting(records.read_runs(), trained)
    layers, averages = tabulate_distances(networks, records.read_distances())
    s = np.arange(64) / 64
    expected = 48 * np.abs(np.diff(0.1 * np.sin(2 * np.pi * s)))  # 2,304 equal entries: a factor 48
    tied = tables.select(layers, epochs=30, initialisation="weight-tied", convolution="conv1")
    np.testing.assert_allclose(tied["distance"], expected, rtol=1e-4)
    assert tables.select(averages, epochs=30, initialisation="weight-tied", convolution="conv2")["seed"].tolist() == [
        0,
        1,
        2,
    ]
    factors = compare_distances(averages, RELEASED, 30)
    noise = np.median(tables.select(averages, initialisation="iid", convolution="conv2")["average"])
    assert factors["conv2"] == pytest.approx(noise / expected.mean(), rel=1e-4)
    assert compare_distances(averages, RELEASED, 180) == {}
    titles = write_titles(averages, "gelu")
    assert titles == {
        (RELEASED, 30): f"GELU, a schedule of 30 epochs (paper: 180), 3 runs\n{RELEASED}",
        (RELEASED, 180): f"GELU, 180 epochs, 1 run\n{RELEASED}",
    }
    curves, points, long_curves, _ = figure_4.draw(
        {"figure_4": averages, "figure_4_layers": layers}, figure_4.Config(trained)
    ).axes
    assert [panel.get_title() for panel in (curves, long_curves)] == list(titles.values())
    assert [line.get_label() for line in long_curves.lines] == ["weight-tied, conv1", "weight-tied, conv2"]
    assert curves.lines[0].get_label() == "weight-tied, conv1"
    np.testing.assert_allclose(curves.lines[0].get_ydata(), expected, rtol=1e-4)
    assert len(points.lines[0].get_ydata()) == 3


def test_with_no_checkpoints_there_is_a_sentence_and_empty_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    runs, choice = records.read_runs(tmp_path), NetworkChoice()
    assert runs == []
    assert group_by_setting(runs, choice) == {}
    assert set(make_readable(compare(runs, choice))["trained"]) == {"not yet"}
    layers, averages = tabulate_distances({}, records.read_distances(tmp_path))
    assert layers["distance"] == averages["average"] == []
    config = figure_3.Config(choice)
    published = records.read_published()
    empty = {"figure_3": tabulate_entries({}, config.entries), "figure_3_published": published}
    empty["figure_3_networks"] = figure_3.measure_networks({}, {}, figure_3.measure_published(published))
    figure = figure_3.draw(empty, config)
    assert [panel.texts[0].get_text() for panel in figure.axes] == ["no such network is here"] * 4
    nothing = smoothness_in_training([])
    lost = find_losses_by_depth(nothing)
    for figure in (
        figure_4.draw({"figure_4": averages, "figure_4_layers": layers}, figure_4.Config(choice)),
        smoothness.draw(
            {
                "smoothness": nothing,
                "smoothness_depth": measure_parts([], PARTS, ratios_along_depth, RATIOS),
                "smoothness_depths": nothing,
                "smoothness_lost": lost,
            },
            smoothness.Config(choice),
        ),
    ):
        assert figure.axes[0].texts[0].get_text() == "no such network is trained yet"
    assert describe_missing(NetworkChoice("relu", depth=128, learning_rate=0.1), seed=9) == (
        "checkpoints/ holds no such network (activation ReLU, batch_norm True, depth 128, learning_rate 0.1, "
        "batch_size 64, seed 9), or not its weights: `make train ACTIVATION=relu DEPTH=128 LR=0.1 SEED=9` trains one."
    )
    assert describe_missing(choice, activation=None).endswith("its weights: `make train` trains one.")


def test_trials_and_other_settings_are_not_selected(tmp_path):
    other = {"train_images": 100, "batch_size": 32, "adaptive": True, "channels": 8, "hold_stem": True}
    for name, value in other.items():
        finish(tmp_path, CifarConfig(**{"depth": 4, "epochs": 1, name: value}))
    records.gather(tmp_path)
    assert len(records.read_runs(tmp_path)) == len(other)
    assert NetworkChoice(depth=4).select(records.read_runs(tmp_path)) == []


def test_a_run_that_was_evaluated_more_often_counts_once(tmp_path):
    often, usual = (CifarConfig(depth=4, epochs=1, test_every=every) for every in (1, 5))
    for config in (often, usual, replace(usual, seed=1)):
        finish(tmp_path, config)
    records.gather(tmp_path)
    assert [run.config.seed for run in NetworkChoice(depth=4).select(records.read_runs(tmp_path))] == [0, 1]
