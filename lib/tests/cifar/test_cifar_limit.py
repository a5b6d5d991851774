"""Networks of growing depth: their distances, their training after an interruption, and the figure of them."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cifar_set import write_set

from lib import paths
from lib.cifar import dataset, depth_limit, depth_table, states
from lib.cifar.depth_limit import Family
from lib.cifar.network import ConvResNet
from lib.cifar.schedule import training_time
from lib.cifar.training import Training
from lib.figures import conv_limit
from lib.figures.claim import FAILS, HOLDS, OPEN
from lib.tables import TableError, from_rows, select

TINY = Family("gelu", "group", "gelu", epochs=2, depths=(2, 4, 8), train_images=40, test_images=20)


@pytest.fixture
def generated_set(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    return write_set(tmp_path / "set", monkeypatch)


def make_smooth(depth, factor=1.0):
    """A network whose kernels are factor sin(2 pi s) in every entry, s = (k - 1/2)/L."""
    network = ConvResNet(Family(normalisation="none", depths=(depth, 2 * depth)).configs[0].network)
    s = (torch.arange(depth) + 0.5) / depth
    with torch.no_grad():
        for name in ("conv1.weight", "conv2.weight"):
            network.residual_layers.stacked(name).copy_(
                factor * torch.sin(2 * math.pi * s)[:, None, None, None, None].expand(depth, 16, 16, 3, 3)
            )
    return network.eval()


def test_networks_that_sample_one_function_are_of_order_one_over_depth_apart():
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = [depth_limit.distances(make_smooth(L, 0.004), make_smooth(2 * L, 0.004), images) for L in (8, 16, 32)]
    for name in depth_table.MEASURES:
        before, between, after = (distances[name] for distances in found)
        assert 1.6 < before / between < 4.5, name
        assert 1.6 < between / after < 4.5, name
    same = depth_limit.distances(make_smooth(8), make_smooth(8), images)
    assert set(same.values()) == {0.0}


def test_steepness_is_the_largest_slope_of_both_kernels():
    size = math.sqrt(2 * 16 * 16 * 9)
    assert depth_limit.steepness(make_smooth(256)) == pytest.approx(2 * math.pi * size, rel=1e-2)


def test_depths_share_weights_images_and_the_flow_s_time():
    first, *others = TINY.configs
    networks = [Training(config, torch.device("cpu")) for config in TINY.configs]
    orders = [dataset.draw_epoch(40, run.generator).order for run in networks]
    for config, run, order in zip(others, networks[1:], orders[1:], strict=True):
        assert torch.equal(order, orders[0])
        assert torch.equal(run.network.conv1.weight, networks[0].network.conv1.weight)
        kernel = run.network.residual_layers.conv1_weight
        assert torch.equal(kernel, networks[0].network.residual_layers.conv1_weight[:1].expand_as(kernel))
        assert training_time(config, 40) / config.depth == pytest.approx(training_time(first, 40) / first.depth)


def test_one_weight_is_changed_in_its_last_bit(tmp_path):
    config = TINY.configs[0]
    depth_limit.start_from_changed_bit(config, tmp_path)
    state = states.read_state(tmp_path)
    before, after = ConvResNet(config.network).state_dict(), state["network"]
    (name,) = (name for name in before if not torch.equal(before[name], after[name]))
    ((old, new),) = [(a, b) for a, b in zip(before[name].flatten(), after[name].flatten(), strict=True) if a != b]
    assert (float(new - old), state["epoch"]) == (abs(np.spacing(old.numpy())), 0)


@pytest.mark.slow
def test_an_interrupted_family_goes_on_and_measures_the_same(generated_set, tmp_path):
    whole = list(depth_limit.train(TINY, folder=tmp_path / "whole"))
    assert [rows[0]["epoch"] for rows in whole] == [1, 2]
    assert [row["depth"] for row in whole[0]] == [2, 2, 4, 8]
    assert [row["compared_with"] for row in whole[0]] == ["last bit"] + 3 * ["double depth"]
    assert [math.isnan(row["logits"]) for row in whole[0]] == [False, False, False, True]
    copy, shallowest, *_ = (row["hidden_states"] for row in whole[1])
    assert 0 < copy < shallowest  # the change is not lost in rounding
    cut = depth_limit.train(TINY, folder=tmp_path / "cut")
    next(cut), cut.close()
    ahead = depth_limit.cifar_training.train(TINY.configs[0], tmp_path / "cut" / TINY.configs[0].name)
    list(ahead)  # one network has trained longer than the others
    known, rows = depth_limit.train(TINY, folder=tmp_path / "cut")
    assert [(row["epoch"], row["depth"]) for row in known] == [(1, 4), (1, 8)]
    for row, expected in zip(rows, whole[1], strict=True):
        assert row == pytest.approx(expected, nan_ok=True)
    again = list(depth_limit.train(TINY, folder=tmp_path / "cut"))
    assert [rows[0]["epoch"] for rows in again] == [2]


def test_processes_that_write_at_once_keep_each_other_s_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")

    def make_row(seed, loss):
        family = dict(zip(depth_table.FAMILY, ("gelu", "batch", "relu", seed, 15), strict=True))
        values = dict.fromkeys(("flow_time", "test_accuracy", "steepness", *depth_table.MEASURES), 1.0)
        return family | {"depth": 16, "epoch": 1, "compared_with": "last bit", "train_loss": loss} | values

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: depth_table.add([make_row(seed, 2.0)]), range(16)))
    depth_table.add([make_row(3, 1.5)])
    found = depth_table.read()
    assert sorted(found["seed"].tolist()) == list(range(16))
    assert select(found, seed=3)["train_loss"].tolist() == [1.5]
    assert set(select(found, seed=4)["train_loss"]) == {2.0}


@pytest.mark.slow
def test_the_table_has_one_row_an_epoch_and_depth(generated_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    with pytest.raises(ValueError, match="is not in FAMILIES"):
        depth_limit.train_all([TINY])
    monkeypatch.setattr(depth_limit, "FAMILIES", [TINY])
    assert not depth_limit.is_finished(TINY)
    assert depth_limit.train_all([TINY]) == []
    assert "copy, epoch 2" in capsys.readouterr().out
    assert depth_limit.train_all([TINY]) == []  # the second time there is nothing to do
    assert "epoch 2" not in capsys.readouterr().out
    table = depth_table.read()
    assert table["epoch"].tolist() == 4 * [1] + 4 * [2]
    assert depth_limit.is_finished(TINY)
    (paths.CHECKPOINTS / depth_table.TABLE).write_text("activation,seed\ngelu,0\n")
    with pytest.raises(TableError, match="has no column normalisation"):
        depth_table.read()
    assert table["flow_time"][0] == pytest.approx(table["flow_time"][3])
    assert set(table["normalisation"]) == {"group"}
    figure = conv_limit.draw({"conv_limit": table}, conv_limit.Config([1, 2]))
    logits = figure.axes[2]
    expected = select(table, epoch=2, compared_with="double depth")["logits"][:2]
    assert any(list(line.get_ydata()) == pytest.approx(list(expected)) for line in logits.lines)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"normalisation": "layer"}, "normalisation is 'layer', expected one of: batch, none, group"),
        ({"depths": (8, 24)}, r"depths is \[8, 24\], expected two or more, each twice the one before"),
        ({"epochs": 0}, "epochs is 0"),
        ({"stem_activation": "elu"}, "stem_activation is 'elu', expected one of: gelu, relu"),
    ],
)
def test_families_check_themselves(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Family(**values)


def test_families_have_their_names():
    assert depth_limit.main(["gelu"]) == 2
    assert len({family.name for family in depth_limit.FAMILIES}) == len(depth_limit.FAMILIES)


# --- The figure ---


@pytest.fixture
def table():
    """Two seeds, 5 epochs. With a smooth stem, distances fall as 1/L, far above a last bit's. With a ReLU stem they do
    not depend on L, and are twice as large as a last bit's."""
    rows = []
    for kind, slope, rounding in ((("gelu", "group", "gelu"), -1.0, 1e-5), (("gelu", "batch", "relu"), 0.0, 0.5)):
        for seed, epoch in itertools.product((0, 1), range(1, 6)):
            family = depth_limit.Family(*kind, seed, epochs=5).columns | {"epoch": epoch, "steepness": 2.0}
            for depth in (16, 32, 64, 128):
                distance = (1 + seed) * depth**slope if depth < 128 else math.nan
                measures = {name: (1 + k) * distance for k, name in enumerate(depth_table.MEASURES)}
                rows.append(family | {"depth": depth, "compared_with": "double depth"} | measures)
            measures = {name: (1 + k) * (1 + seed) * rounding for k, name in enumerate(depth_table.MEASURES)}
            rows.append(family | {"depth": 16, "compared_with": "last bit"} | measures)
    return {name: np.array(column) for name, column in from_rows(rows).items()}


def fit(table):
    return {name: np.array(column) for name, column in conv_limit.fit_slopes(table).items()}


def test_slopes_and_distances_beside_those_of_a_last_bit(table):
    rates = fit(table)
    row = select(rates, normalisation="group", epoch=5, measure="weights_conv1")
    assert (row["slope"][0], row["seeds"][0]) == (pytest.approx(-1.0), 2)
    assert (row["least"][0], row["most"][0]) == (pytest.approx(1e5 / 64), pytest.approx(1e5 / 16))
    row = select(rates, normalisation="batch", epoch=1, measure="logits")
    assert (row["slope"][0], row["least"][0], row["most"][0]) == (pytest.approx(0.0), *2 * [pytest.approx(2.0)])
    assert select(rates, measure="steepness")["slope"] == pytest.approx(0.0)
    assert np.isnan(select(rates, measure="steepness")["least"]).all()


def test_seeds_count_if_they_have_all_depths_and_are_compared_with_their_own_copies(table):
    def change(seed, depth, compared, factor):
        chosen = (table["seed"] == seed) & (table["depth"] == depth) & (table["compared_with"] == compared)
        return table | {name: np.where(chosen, factor, 1) * table[name] for name in depth_table.MEASURES}

    def find(table, normalisation):
        row = select(fit(table), normalisation=normalisation, epoch=5, measure="logits")
        return [row[name].item() for name in ("seeds", "slope", "least", "most")]

    assert find(change(1, 32, "double depth", math.nan), "group") == pytest.approx([1, -1.0, 1e5 / 64, 1e5 / 16])
    assert find(change(1, 16, "last bit", math.nan), "batch") == pytest.approx([2, 0.0, 2.0, 2.0])
    assert find(change(1, 16, "last bit", 4.0), "batch") == pytest.approx([2, 0.0, 1.0, 1.0])


def test_claims_need_distances_that_are_not_rounding(table):
    of_last_bit = table["compared_with"] == "last bit"

    def find(table, start):
        found = conv_limit.judge_claims({"conv_limit_slopes": fit(table)}.get)
        (claim,) = (claim for claim in found if claim.statement.startswith(f"CIFAR-10, {start}"))
        return claim.verdict

    def scale_last_bit(factor):
        return table | {"logits": np.where(of_last_bit, factor, 1) * table["logits"]}

    smooth, paper = "GELU, group norm, GELU stem: logits", "GELU, batch norm, ReLU stem: logits"
    assert (find(table, smooth), find(table, paper)) == (HOLDS, HOLDS)
    assert find(scale_last_bit(1e5), smooth) == OPEN
    assert find(scale_last_bit(1e-3), paper) == FAILS
    without = {name: column[~of_last_bit] for name, column in table.items()}
    assert (find(without, smooth), find(without, paper)) == (OPEN, OPEN)
    constant = table | {"logits": np.where(of_last_bit, table["logits"], 1.0)}
    assert find(constant, smooth) == FAILS
    assert find({name: column[table["epoch"] < 5] for name, column in table.items()}, smooth) == OPEN
    steeper = table | {"steepness": table["depth"].astype(float)}
    assert find(steeper, "GELU, group norm, GELU stem: L max_k") == FAILS


@pytest.mark.slow
def test_kinds_that_are_trained_are_drawn(table):
    axes = conv_limit.draw({"conv_limit": table}, conv_limit.Config([1, 5])).axes
    assert [panel.get_title() for panel in axes if panel.get_title()] == [
        "GELU\nbatch norm\nReLU stem",
        "GELU\ngroup norm\nGELU stem",
    ]
    rows = select(table, normalisation="group", seed=1, epoch=5)
    drawn = [list(line.get_ydata()) for line in axes[2 * 2 + 1].lines]
    logits = select(rows, compared_with="double depth")["logits"][:3], select(rows, compared_with="last bit")["logits"]
    for expected in logits:
        assert any(len(line) == len(expected) and line == pytest.approx(expected) for line in drawn)
    empty = {name: column[:0] for name, column in table.items()}
    for nothing in (empty, table):
        figure = conv_limit.draw({"conv_limit": nothing}, conv_limit.Config([9]))
        assert [text.get_text() for text in figure.axes[0].texts] == ["no network is measured after these epochs"]


def test_without_a_table_there_are_no_slopes(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    table = depth_table.read()
    assert not any(conv_limit.fit_slopes(table).values())
