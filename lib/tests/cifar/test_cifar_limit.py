"""Networks of growing depth: their distances, their training after an interruption, and the figure of them."""

import math

import numpy as np
import pytest
import torch
from cifar_set import write_set

from lib import paths
from lib.cifar import dataset, depth_limit
from lib.cifar.depth_limit import Family
from lib.cifar.network import ConvResNet
from lib.cifar.schedule import training_time
from lib.cifar.training import Training
from lib.figures import conv_limit
from lib.tables import from_rows, select

TINY = Family("gelu", "group", epochs=2, depths=(2, 4, 8), train_images=40, test_images=20)


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
    for name in depth_limit.MEASURES:
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


@pytest.mark.slow
def test_an_interrupted_family_goes_on_and_measures_the_same(generated_set, tmp_path):
    whole = list(depth_limit.train(TINY, folder=tmp_path / "whole"))
    assert [rows[0]["epoch"] for rows in whole] == [1, 2]
    assert [row["depth"] for row in whole[0]] == [2, 4, 8]
    assert [math.isnan(row["logits"]) for row in whole[0]] == [False, False, True]
    cut = depth_limit.train(TINY, folder=tmp_path / "cut")
    next(cut), cut.close()
    ahead = depth_limit.cifar_training.train(TINY.configs[0], tmp_path / "cut" / TINY.configs[0].name)
    list(ahead)  # one network has trained longer than the others
    (rows,) = depth_limit.train(TINY, folder=tmp_path / "cut")
    for row, expected in zip(rows, whole[1], strict=True):
        assert row == pytest.approx(expected, nan_ok=True)
    again = list(depth_limit.train(TINY, folder=tmp_path / "cut"))
    assert [rows[0]["epoch"] for rows in again] == [2]


@pytest.mark.slow
def test_the_table_has_one_row_an_epoch_and_depth(generated_set, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    for _ in range(2):  # the second time only the last epoch is measured again
        assert depth_limit.train_all([TINY]) == []
    table = depth_limit.read()
    assert table["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    assert table["flow_time"][0] == pytest.approx(table["flow_time"][2])
    assert set(table["normalisation"]) == {"group"}
    figure = conv_limit.draw({"conv_limit": table}, conv_limit.Config([1, 2]))
    logits = figure.axes[2 * 4 + 2]  # GELU with group norm
    expected = select(table, epoch=2)["logits"][:2]
    assert any(list(line.get_ydata()) == pytest.approx(list(expected)) for line in logits.lines)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"normalisation": "layer"}, "normalisation is 'layer', expected one of: batch, none, group"),
        ({"depths": (8, 24)}, r"depths is \[8, 24\], expected two or more, each twice the one before"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_families_check_themselves(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Family(**values)
    assert depth_limit.main(["gelu"]) == 2
    assert len({family.name for family in depth_limit.FAMILIES}) == len(depth_limit.FAMILIES)


# --- The figure ---


@pytest.fixture
def table():
    """Distances that fall as 1/L with group norm, and with batch norm up to epoch 3 only."""
    rows = []
    for normalisation, last in (("batch", 3), ("group", 5)):
        for seed in (0, 1):
            for epoch in range(1, 6):
                for depth in (16, 32, 64, 128):
                    slope = -1.0 if epoch <= last else 0.1
                    distance = (1 + seed) * depth**slope if depth < 128 else math.nan
                    measures = dict.fromkeys(depth_limit.MEASURES, distance)
                    family = {"activation": "gelu", "normalisation": normalisation, "seed": seed, "epochs": 5}
                    rows.append(family | {"depth": depth, "epoch": epoch, "steepness": 2.0} | measures)
    return {name: np.array(column) for name, column in from_rows(rows).items()}


def test_the_last_converging_epoch_of_a_family_is_found(table):
    rates = {name: np.array(column) for name, column in conv_limit.fit_slopes(table).items()}
    assert conv_limit.find_last_converging_epoch(rates, "gelu", "batch", "logits") == 3
    assert conv_limit.find_last_converging_epoch(rates, "gelu", "group", "logits") == 5
    assert conv_limit.find_last_converging_epoch(rates, "gelu", "none", "logits") == 0
    row = select(rates, normalisation="group", epoch=5, measure="weights_conv1")
    assert (row["slope"][0], row["seeds"][0]) == (pytest.approx(-1.0), 2)
    assert select(rates, measure="steepness")["slope"] == pytest.approx(0.0)


@pytest.mark.slow
def test_families_that_are_not_trained_are_open(table):
    axes = conv_limit.draw({"conv_limit": table}, conv_limit.Config([1, 5])).axes
    texts = [[text.get_text() for text in panel.texts] for panel in axes[:4]]
    assert texts == [[], ["not trained yet"], [], ["not trained yet"]]


def test_without_a_table_there_are_no_slopes(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    table = depth_limit.read()
    assert not any(conv_limit.fit_slopes(table).values())
