"""Smoothness of the networks of checkpoints/: in training, along the depth, with the stem, and with precision."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from finished_runs import finish

from lib import measures, paths, rates, tables
from lib.cifar import records
from lib.cifar.choice import select_longest_by_depth
from lib.cifar.config import CifarConfig
from lib.cifar.course import RATIOS, SCALES, measure_course, measure_parts, smoothness_in_training
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.figures import rounding, smoothness, stem
from lib.figures.rounding import (
    NOISES,
    find_loss_times,
    find_meeting_time,
    read_smoothness_by_precision,
)
from lib.figures.smoothness import (
    find_losses_by_depth,
    fit_laws_in_depth,
    measure_left_of_initialisation,
)
from lib.figures.stem import average_spike, measure_path_lengths
from lib.measures import PARTS, noise_along_depth, ratios_along_depth


@pytest.mark.slow
def test_smoothness_in_training_is_a_line_an_epoch(trained):
    runs = trained.select(records.read_runs(), seed=0)
    table = smoothness_in_training(runs)
    long = tables.select(table, initialisation="weight-tied", epochs=180)
    assert long["epoch"].tolist() == list(range(1, 181))
    # The logs say a learning rate of 0.1 at every epoch, of 782 steps.
    np.testing.assert_allclose(long["time"], 78.2 * np.arange(1, 181))
    assert np.isnan(long["von_neumann_conv1"][:-1]).all()
    assert long["von_neumann_conv1"][-1] == pytest.approx((2 * math.pi / 64) ** 2, rel=0.05)
    assert set(long["depth"]) == {64}
    assert not any(long["hold_stem"])
    assert np.isnan(long["relative_path_length"]).all()  # these logs do not have it
    records.record_path(runs[0].config).unlink()
    without = smoothness_in_training(runs)
    assert len(without["run"]) == len(table["run"]) - runs[0].config.epochs


@pytest.mark.slow
def test_smoothness_along_depth_is_that_of_each_part(trained):
    runs = replace(trained, epochs=30).select(records.read_runs(), seed=0)
    table = measure_parts(runs, 4, ratios_along_depth, RATIOS)
    assert table["part"] == [1, 2, 3, 4] * 2
    tied = tables.select(table, initialisation="weight-tied")
    sine = 0.1 * torch.sin(2 * math.pi * torch.arange(64) / 64).float()
    ratios = [measures.von_neumann_ratio(part[:, None]) for part in sine.split(16)]
    np.testing.assert_allclose(tied["von_neumann_conv2"], ratios, rtol=1e-4)
    noise = tables.select(table, initialisation="iid")
    np.testing.assert_allclose(noise["von_neumann_conv1"], 2, atol=0.1)
    runs[0].path.unlink()
    assert len(measure_parts(runs, 4, ratios_along_depth, RATIOS)["part"]) == 4


def test_the_part_left_of_the_initialisation_is_measured(tmp_path):
    config = CifarConfig(depth=8, epochs=30)
    network = ConvResNet(config.network)
    with torch.no_grad():
        network.residual_layers.conv1_weight.mul_(0.25)
        weight = network.residual_layers.conv2_weight
        # As long as the weight and orthogonal to it: the weight has half of the square of their sum.
        partner = torch.stack((weight[1::2], -weight[::2]), dim=1).flatten(0, 1)
        weight.mul_(0.5).add_(0.5 * partner)
    finish(tmp_path, config, network)
    records.gather(tmp_path)
    (run,) = records.read_runs(tmp_path)
    table = measure_left_of_initialisation([run])
    found = {name: values[0] for name, values in table.items()}
    assert (found["left_conv1"], found["share_conv1"]) == pytest.approx((0.25, 1))
    assert (found["left_conv2"], found["share_conv2"]) == pytest.approx((0.5, 0.5))
    # 782 steps an epoch; the cosine's values at 30 epochs, from 1 at the first on, sum up to 1.
    assert found["time"] == pytest.approx(782 * (30 * 0.02 + 0.02))
    assert found["weight_decay_alone"] == pytest.approx(math.exp(-5e-4 * 10 * found["time"]))
    zero = replace(config, batch_norm=False)  # conv2 starts at zero
    finish(tmp_path, zero, ConvResNet(zero.network))
    records.gather(tmp_path)
    table = measure_left_of_initialisation(records.read_runs(tmp_path))
    assert math.isnan(tables.select(table, run=zero.name)["left_conv2"][0])
    run.path.unlink()
    assert measure_left_of_initialisation(records.read_runs(tmp_path))["run"] == [zero.name]


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_the_share_by_chance_is_that_of_unrelated_initial_weights(tmp_path, initialisation):
    config = CifarConfig(depth=6, epochs=1, initialisation=initialisation)
    network = ConvResNet(config.network)
    noise = torch.randn(6, 16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    trained = noise + 0.7 * noise[0]  # layers that are partly alike
    with torch.no_grad():
        network.residual_layers.conv1_weight.copy_(trained)
    finish(tmp_path, config, network)
    records.gather(tmp_path)
    (chance,) = measure_left_of_initialisation(records.read_runs(tmp_path))["chance_conv1"]
    shares = []
    for seed in range(400):
        start = ConvResNet(replace(config, seed=seed).network).residual_layers.stacked("conv1.weight").detach()
        shares.append(float((start * trained).sum() ** 2 / (start.square().sum() * trained.square().sum())))
    assert np.mean(shares) == pytest.approx(chance, rel=0.25)
    assert initialisation == "weight-tied" or chance == pytest.approx(1 / (6 * 2304))


def test_the_course_of_an_exponential_is_its_rate():
    epochs = np.arange(1, 101)
    # Falls first, then grows, and saturates far above what counts as smooth.
    ratio = np.minimum(np.maximum(2e-3 * np.exp(-0.5 * epochs), 1e-4 * np.exp(0.004 * 30 * epochs)), 1.5)
    table = {"run": ["one"] * 100, "epoch": epochs, "time": 30.0 * epochs, "von_neumann_conv1": ratio}
    found = measure_course(table, "one")
    assert found.rate == pytest.approx(0.004)
    assert found.lost_after == math.ceil(math.log(1e3) / 0.12)
    assert found.lost_at == pytest.approx(math.log(1e3) / 0.004)  # between two epochs
    assert (found.ratio, found.time) == (1.5, 3000)
    flat = table | {"von_neumann_conv1": np.full(100, 2e-4)}
    assert measure_course(flat, "one").lost_after is None
    assert math.isnan(measure_course(flat, "one").rate)
    assert math.isnan(measure_course(flat, "one").lost_at)
    assert found.lost == f"above 0.1 after epoch {found.lost_after}"
    assert measure_course(flat, "one").lost == "smooth at every epoch"
    assert math.isnan(measure_course(flat, "another").ratio)


def test_smoothness_is_lost_at_the_time_at_which_a_run_passes_the_bound():
    table = {"run": ["b", "b", "a", "a", "c"], "depth": [64, 64, 32, 32, 128], "epoch": [1, 2, 1, 2, 1]}
    table |= {"time": [10.0, 20.0] * 2 + [10.0], "von_neumann_conv2": [0.01, 1.0, 0.1, 0.2, 0.01]}
    lost = find_losses_by_depth(table, "conv2")
    assert (lost["run"], lost["depth"], lost["lost_after"]) == (["a", "b"], [32, 64], [1, 2])
    assert lost["lost_at"] == pytest.approx([10, 15])  # halfway in the logarithm
    assert not any(find_losses_by_depth(smoothness_in_training([])).values())


def test_the_law_in_depth_depends_on_what_is_held_fixed():
    """L^2 times the ratio grows as 12 exp(t / L). It reaches a given level after a time in proportion to L. The ratio
    itself reaches a given level at L log(level L^2 / 12), which grows faster than L."""
    depths, times = (32, 64, 128, 256), np.linspace(0, 4000, 4001)
    rows = [
        {"run": f"{L}", "depth": L, "epoch": k, "time": t, "von_neumann_conv1": 12 * math.exp(t / L) / L**2}
        for L in depths for k, t in enumerate(times)
    ]  # fmt: skip
    table = tables.from_rows(rows)
    laws = tables.rows(fit_laws_in_depth(table))
    for law in laws:
        assert law["runs"] == 4
        assert law["low"] <= law["slope"] <= law["high"]
        if law["held"] == "L^2 ratio":
            assert law["slope"] == pytest.approx(1, abs=1e-3)
        else:
            expected = rates.fit_slope(depths, [L * math.log(law["level"] * L**2 / 12) for L in depths])
            assert law["slope"] == pytest.approx(expected.slope, rel=1e-3)
            assert law["slope"] > 1.1
    assert find_losses_by_depth(table)["steep_at"] == pytest.approx(
        [L * math.log(smoothness.STEEP / 12) for L in depths], rel=1e-2
    )
    assert all(math.isnan(slope) for slope in fit_laws_in_depth(smoothness_in_training([]))["slope"])


def test_a_rate_is_found_if_some_ratios_are_undefined():
    ratio = [math.nan, 5e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    table = tables.from_rows(
        {"run": "one", "epoch": k, "time": float(k), "von_neumann_conv1": value} for k, value in enumerate(ratio)
    )
    assert measure_course(table, "one").rate == pytest.approx(math.log(2))


@pytest.mark.slow
def test_the_figure_of_smoothness_draws_its_tables(trained):
    runs = trained.select(records.read_runs(), seed=0)
    training = smoothness_in_training(runs)
    depth = measure_parts(
        [run for run in runs if run.config.initialisation == "weight-tied"], PARTS, ratios_along_depth, RATIOS
    )
    deeper = smoothness_in_training(select_longest_by_depth(records.read_runs(), trained))
    lost = {"run": ["a", "b"], "depth": [32, 64], "lost_after": [3, 6], "lost_at": [100.0, 200.0]}
    lost["steep_at"] = [90.0, math.nan]
    names = ("smoothness", "smoothness_depth", "smoothness_depths", "smoothness_lost")
    config = smoothness.Config(trained, "conv2")
    course, parts, depths, times = smoothness.draw(
        dict(zip(names, (training, depth, deeper, lost), strict=True)), config
    ).axes
    assert [line.get_label() for line in depths.lines[:1]] == ["64 layers"]
    np.testing.assert_allclose(depths.lines[0].get_ydata(), deeper["von_neumann_conv2"], rtol=1e-7)
    assert times.lines[1].get_xydata().tolist() == [[32, 100], [64, 200]]
    assert times.get_legend_handles_labels()[1] == ["ratio 0.1: slope 1.00, 2 networks", r"$L^2\times$ratio 100"]
    labels = ["GELU", "180 epochs", "30 epochs", "i.i.d."]
    assert course.get_legend_handles_labels()[1] == labels
    longest = tables.select(training, initialisation="weight-tied", epochs=180)
    np.testing.assert_allclose(course.lines[0].get_ydata(), longest["von_neumann_conv2"], rtol=1e-7)
    np.testing.assert_allclose(course.lines[0].get_xdata(), longest["time"], rtol=1e-7)
    drawn = tables.select(depth, epochs=180)
    np.testing.assert_allclose(parts.lines[0].get_ydata(), drawn["von_neumann_conv2"], rtol=1e-7)
    assert not parts.texts[1:]
    nothing = smoothness_in_training([])
    nowhere = find_losses_by_depth(nothing)
    empty_tables = training, measure_parts([], PARTS, ratios_along_depth, RATIOS), nothing, nowhere
    _, *empty = smoothness.draw(dict(zip(names, empty_tables, strict=True)), smoothness.Config(trained)).axes
    assert [panel.texts[-1].get_text() for panel in empty] == ["their weights are not here", *["none is here"] * 2]


@pytest.mark.slow
def test_relative_path_lengths_are_those_of_the_weights_or_of_the_log(tmp_path, trained):
    held, plain = CifarConfig(depth=64, epochs=30, hold_stem=True), CifarConfig(depth=64, epochs=30, batch_norm=False)
    finish(tmp_path, held, stem_scale=1.0, path_length=0.25)
    finish(tmp_path, plain)
    finish(tmp_path, CifarConfig(depth=64, epochs=31))  # its log has no scales
    records.gather()
    for run in records.select(records.read_runs(), seed=0):
        if run.config in (held, plain, CifarConfig(depth=64, epochs=31)):
            run.path.unlink()
    runs = trained.select(records.read_runs(), hold_stem=None, seed=0)
    checkpoint = trained.select(runs, epochs=180)[0]
    network = checkpoint.load().network
    with torch.no_grad():  # away from the initialisation, at which the path has no length
        network.bn1.weight.fill_(0.3), network.bn1.bias.fill_(0.4)
        network.residual_layers.stacked("bn2.bias")[::2] = 4.0
    records.save(checkpoint.path, replace(checkpoint.load(), network=network))
    table = measure_path_lengths(runs)
    rows = {(row["epochs"], row["initialisation"], row["hold_stem"]): row for row in tables.rows(table)}
    assert set(rows) == {
        (30, "weight-tied", False), (30, "iid", False), (180, "weight-tied", False), (30, "weight-tied", True)
    }  # fmt: skip
    scales = [rows[180, "weight-tied", False][name] for name in SCALES]
    assert scales == pytest.approx([0.5, 2.0, 4.0])
    assert rows[180, "weight-tied", False]["test_accuracy"] == 80.0
    assert rows[30, "weight-tied", True]["relative_path_length"] == 0.25


def test_smoothness_in_training_has_the_scales_of_the_log(tmp_path):
    held = CifarConfig(depth=8, epochs=3, hold_stem=True, seed=1)
    finish(tmp_path, held, stem_scale=0.5, path_length=0.25)
    records.gather(tmp_path)
    table = smoothness_in_training(records.read_runs(tmp_path))
    assert (table["hold_stem"], table["seed"], table["depth"]) == ([True] * 3, [1] * 3, [8] * 3)
    assert table["relative_path_length"][-1] == 0.5
    assert np.isnan(table["relative_path_length"][:-1]).all()  # the other lines of this log have no scales


def test_the_spike_is_averaged_over_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    assert average_spike(2) == {"epochs": [], "loss": [], "relative_path_length": []}
    watched = {"epoch": [8, 8, 8, 8, 9, 9, 9, 9], "step": [1, 2, 3, 4] * 2, "loss": [1.0, 3.0, 2.0, 2.0] * 2}
    watched |= {"stem_scale": [0.5] * 8, "path_length": [1.0] * 4 + [2.0] * 4}
    tables.write_csv(tmp_path / records.SPIKE, watched)
    assert average_spike(2) == {
        "epochs": [7.25, 7.75, 8.25, 8.75], "loss": [2.0] * 4, "relative_path_length": [2.0, 2.0, 4.0, 4.0],
    }  # fmt: skip
    assert len(average_spike(3)["loss"]) == 2  # the last two steps make no whole mean
    with pytest.raises(ValueError, match="every is 0, expected a whole number of at least 1"):
        average_spike(0)


def test_the_spike_in_a_few_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    assert stem.summarise_spike(average_spike(1))["batch_loss"] == []
    loss = [1.0, 1.2, 1.1, 3.0, 2.0]
    watched = {"epoch": [8] * 5, "step": [1, 2, 3, 4, 5], "loss": loss, "stem_scale": [0.5, 0.5, 0.25, 1.0, 0.5]}
    tables.write_csv(tmp_path / records.SPIKE, watched | {"path_length": [1.0] * 5})
    assert stem.summarise_spike(average_spike(1)) == {
        "scale_before": [0.25], "scale_after": [1.0], "batch_loss": [3.0], "loss_before": [1.1], "loss_highest": [3.0],
        "path_before": [2.0], "path_after": [1.0],
    }  # fmt: skip


@pytest.mark.slow
def test_the_figure_of_the_stem_draws_its_tables(tmp_path, trained):
    finish(
        tmp_path, CifarConfig(depth=64, epochs=30, hold_stem=True), test_accuracy=55.0, stem_scale=1.0, path_length=1
    )
    records.gather()
    networks = measure_path_lengths(trained.select(records.read_runs(), hold_stem=None, seed=0))
    networks |= {"relative_path_length": [0.1, 0.2, 0.4, 0.8]}
    spike = {"epochs": [7.5, 8.5], "loss": [2.0, 1.0], "relative_path_length": [0.1, 3.0]}
    training = {"run": ["a", "a", "b", "b"], "hold_stem": [False, False, True, True], "epoch": [1, 2] * 2}
    training |= {"depth": [32] * 4, "activation": ["gelu"] * 4, "von_neumann_conv1": [0.1, 0.2, 0.3, 0.4]}
    training |= {"relative_path_length": [1.0, 2.0, 3.0, 4.0]}
    accuracy, loss, ratio, length, rougher, longer = stem.draw(
        {"stem": networks, "stem_training": training, "stem_spike": spike}, stem.Config(trained, trained)
    ).axes
    assert [line.get_ydata().tolist() for line in longer.lines] == [[1.0, 2.0], [3.0, 4.0]]
    assert longer.get_legend_handles_labels()[1] == ["stem trains", "stem held"]
    assert [line.get_ydata()[1] for line in rougher.lines] == [0.2, 0.4, 0.1]
    assert rougher.get_title() == "32 layers, GELU, weight-tied"
    points = [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in accuracy.lines[:4]]
    assert points == [
        (length, value, "s" if held else "o")
        for length, value, held in zip(
            *(networks[name] for name in ("relative_path_length", "test_accuracy", "hold_stem")), strict=True
        )
    ]
    sizes = {180: 7, 30: 4.5}
    assert [line.get_markersize() for line in accuracy.lines[:4]] == [sizes[epochs] for epochs in networks["epochs"]]
    assert set(networks["epochs"]) == set(sizes)
    labels = ["GELU", "full: weight-tied", "hollow: i.i.d.", "stem held", "180 epochs", "30 epochs"]
    assert ratio.get_legend_handles_labels()[1] == labels
    assert [line.get_ydata()[0] for line in ratio.lines[:4]] == pytest.approx(networks["von_neumann_conv1"])
    assert [line.get_ydata().tolist() for line in (*loss.lines, *length.lines)] == [[2.0, 1.0], [0.1, 3.0]]
    empty_tables = measure_path_lengths([]), smoothness_in_training([]), {name: [] for name in spike}
    nothing = dict(zip(("stem", "stem_training", "stem_spike"), empty_tables, strict=True))
    empty = stem.draw(nothing, stem.Config(trained, trained)).axes
    assert [text.get_text() for panel in empty for text in panel.texts] == ["none is here"] * 3


def make_watched():
    """Make four lines of runs in two precisions, as `records.read_rounding` gives them."""
    columns = {"depth": [32, 32, 64, 64], "batch_size": [8] * 4, "dtype": ["float32", "float64"] * 2}
    columns |= {"seed": [0] * 4, "epoch": [1, 2, 1, 2], "step": [625, 1250, 6250, 625], "loss": [2.0, 1.9, 1.8, 1.7]}
    measured = {name: [2e-3, 2e-4, 2e-5, 2e-6] for name in RATIOS}
    measured |= {name: [1e-3, 1e-4, 1e-5, 1e-6] for name in NOISES}
    return columns | measured | {"stem_scale": [1.0] * 4}


def test_runs_in_two_precisions_have_the_time_of_their_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    empty = read_smoothness_by_precision()
    assert not any(empty.values())
    tables.write_csv(tmp_path / records.ROUNDING, make_watched())
    table = read_smoothness_by_precision()
    assert table.keys() == empty.keys()
    second = 0.04 * (1 + math.cos(math.pi / 180)) / 2  # the learning rate of the second epoch of 180
    # 50,000 images in batches of 8 are 6,250 steps.
    assert table["time"] == pytest.approx([25, 250 + 1250 * second, 250, 250 + 625 * second])
    assert table["dtype"] == ["float32", "float64"] * 2
    assert table["noise_conv2"] == [1e-3, 1e-4, 1e-5, 1e-6]


def test_precisions_meet_at_the_time_from_which_they_stay_together():
    times = [10.0, 20, 30, 40]
    noise = {("float32", 0): [1e-9, 1e-9, 2e-9, 1e-8], ("float32", 1): [1e-9, 3e-9, 1e-8, 1e-7],
             ("float64", 0): [1e-15, 2e-9, 1e-10, 2e-7]}  # fmt: skip
    rows = [
        {"depth": 32, "dtype": dtype, "seed": seed, "time": time, "noise_conv1": value}
        for (dtype, seed), values in noise.items()
        for time, value in zip([*times, 50.0], [*values, 1.0][: 5 if seed else 4], strict=False)
    ]
    table = tables.from_rows(rows)
    assert find_meeting_time(table, 32) == 40  # at 20 too, but not at 30
    assert find_meeting_time(table, 32, within=21) == 20
    assert math.isnan(find_meeting_time(table, 32, within=1.5))
    assert math.isnan(find_meeting_time(table, 64))


def test_smoothness_is_lost_at_the_first_time_of_each_seed_above_the_bound():
    table = {"depth": [32] * 6, "dtype": ["float32"] * 6, "seed": [0, 0, 1, 1, 2, 2], "time": [10.0, 20] * 3}
    table |= {"von_neumann_conv1": [0.05, 0.1, 0.2, 0.3, 0.01, 0.02]}
    assert find_loss_times(table, 32, "float32") == [20, 10]
    assert find_loss_times(table, 32, "float32", above=0.015) == [10, 10, 20]
    assert find_loss_times(table, 32, "float64") == []


@pytest.mark.slow
def test_noise_of_parts_is_that_of_each_part(trained):
    runs = replace(trained, epochs=30).select(records.read_runs(), seed=0)
    table = measure_parts(runs, 4, noise_along_depth, NOISES)
    assert table["part"] == [1, 2, 3, 4] * 2
    sine, noise = (tables.select(table, initialisation=initialisation) for initialisation in INITIALISATIONS)
    assert max(sine["noise_conv1"]) < 1e-10
    np.testing.assert_allclose(noise["noise_conv1"], 1, atol=0.1)
    assert np.isnan(measure_parts(runs, 16, noise_along_depth, NOISES)["noise_conv1"]).all()  # parts of four layers


@pytest.mark.slow
def test_the_figure_of_rounding_draws_its_tables(tmp_path, trained):
    empty = rounding.draw(
        {
            "rounding": read_smoothness_by_precision(),
            "rounding_depth": measure_parts([], PARTS, noise_along_depth, NOISES),
        },
        rounding.Config(trained),
    ).axes
    assert [panel.texts[0].get_text() for panel in empty] == ["none is here"] * 3
    tables.write_csv(tmp_path / records.ROUNDING, make_watched())
    table = read_smoothness_by_precision()
    depth = measure_parts(
        trained.select(records.read_runs(), seed=0, initialisation="weight-tied"), PARTS, noise_along_depth, NOISES
    )
    share, ratio, parts = rounding.draw(
        {"rounding": table, "rounding_depth": depth}, rounding.Config(trained, "conv2")
    ).axes
    labels = [f"{layers} layers, {dtype}" for layers in (32, 64) for dtype in ("float32", "float64")]
    assert share.get_legend_handles_labels()[1] == labels
    assert [line.get_ydata().tolist() for line in share.lines] == [[1e-3], [1e-4], [1e-5], [1e-6]]
    assert [line.get_ydata().tolist() for line in ratio.lines] == [[2e-3], [2e-4], [2e-5], [2e-6]]
    assert parts.get_legend_handles_labels()[1] == ["GELU, 180 epochs", "GELU, 30 epochs"]
    np.testing.assert_allclose(parts.lines[0].get_ydata(), tables.select(depth, epochs=180)["noise_conv2"], rtol=1e-7)
