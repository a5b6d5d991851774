"""Networks with fewer layers: the rules over the depth, their accuracy and distance, the figure and the explorer."""

import warnings
from dataclasses import replace

import cifar_set
import numpy as np
import pytest
import torch
from finished_runs import finish

from lib import paths, tables
from lib.cifar import checkpoints, dataset, measured, records, resampling
from lib.cifar.choice import NetworkChoice
from lib.cifar.config import CifarConfig
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.cifar.resampling import ParallelForm, fold_batch_norms, logits, resample
from lib.explore import trained
from lib.figures import resampling as room
from lib.figures.table_1 import compare, make_readable, read_resampling_distances
from lib.ode import layers as depth_layers


@pytest.fixture
def network():
    """A network of 8 i.i.d. layers in evaluation mode, with batch norms that are not trivial."""
    made = ConvResNet(ConvNetConfig(depth=8, initialisation="iid")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bn in ("bn1", "bn2"):
            for name, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                tensor = made.residual_layers.stacked(f"{bn}.{name}")
                tensor.copy_(least + torch.rand(tensor.shape, generator=generator))
    return made


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_the_rules_over_the_depth_have_their_matrices():
    assert depth_layers.kept_indices(256, 4).tolist() == [32, 96, 160, 224]
    assert depth_layers.kept_indices(7, 3).tolist() == [1, 3, 5]
    assert depth_layers.matrix(6, 2, "averaged").tolist() == [[1 / 3] * 3 + [0] * 3, [0] * 3 + [1 / 3] * 3]
    # Each of the 2 cells covers one and a half of the 3 layers.
    np.testing.assert_allclose(depth_layers.matrix(3, 2, "averaged"), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    straight = (torch.arange(10) + 0.5) / 10
    for layers in (1, 3, 5, 10):
        middles = (torch.arange(layers) + 0.5) / layers
        found = depth_layers.apply(depth_layers.matrix(10, layers, "interpolated"), straight[:, None])
        torch.testing.assert_close(found[:, 0], middles)
    for rule in depth_layers.RULES:
        for layers in (1, 2, 5, 7):
            torch.testing.assert_close(depth_layers.matrix(7, layers, rule).sum(dim=1), torch.ones(layers).double())
        assert torch.equal(depth_layers.matrix(7, 7, rule), torch.eye(7).double())
    assert depth_layers.matrix(1, 1, "interpolated").tolist() == [[1]]


def test_more_layers_than_there_are_are_interpolated_and_say_so():
    with pytest.warns(UserWarning, match="layers is 4 and the network has 2: the layers are interpolated, not kept"):
        found = depth_layers.matrix(2, 4, "kept")
    assert found.tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]


@pytest.mark.parametrize(("layers", "found"), [(0, "layers is 0"), ("8", "layers is '8'"), (2.0, "layers is 2.0")])
def test_wrong_numbers_of_layers_are_named(network, layers, found):
    with pytest.raises((ValueError, TypeError), match=f"{found}, expected a whole number of at least 1"):
        resample(network, layers)


def test_wrong_rules_are_named(network):
    with pytest.raises(ValueError, match="'middle', expected one of: kept, averaged, interpolated"):
        resample(network, 4, "middle")
    with pytest.raises(ValueError, match="statistics is 'none', expected one of: kept"):
        resample(network, 4, statistics="none")
    with pytest.raises(ValueError, match="images is None"):
        resample(network, 4, statistics="recomputed")


def test_a_resampled_network_has_the_layers_of_its_rule(network, images):
    for rule in depth_layers.RULES:
        assert torch.equal(resample(network, 8, rule)(images), network(images))
    three = resample(network, 3, "kept", "averaged")
    assert three.config == replace(network.config, depth=3)
    for name in ("conv1.weight", "bn2.bias", "bn1.num_batches_tracked"):
        assert torch.equal(
            three.residual_layers.stacked(name), network.residual_layers.stacked(name)[depth_layers.kept_indices(8, 3)]
        )
    means = network.residual_layers.stacked("bn1.running_mean")
    expected = (means[0] + means[1] + means[2] * 2 / 3) * 3 / 8
    torch.testing.assert_close(three.residual_layers.stacked("bn1.running_mean")[0], expected)
    with pytest.warns(UserWarning, match="layers is 16 and the network has 8") as warned:
        assert resample(network, 16).config.depth == 16
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="the layers are interpolated, not kept") as warned:
        kept = resample(network, 16, "interpolated", "kept")
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolated = resample(network, 16, "interpolated")
        recomputed = resample(network, 16, "interpolated", "recomputed", images)
    assert all(map(torch.equal, kept.state_dict().values(), interpolated.state_dict().values()))
    assert torch.equal(recomputed.residual_layers.conv1_weight, interpolated.residual_layers.conv1_weight)


def test_it_keeps_the_dtype_and_wants_a_network(network):
    assert resample(network.double(), 3).linear.weight.dtype == torch.float64
    with pytest.raises(TypeError, match="network is dict, expected a network: of a checkpoint, its `network`"):
        resample({}, 3)
    with pytest.warns(UserWarning, match="are interpolated") as caught:
        resample(network, 99)
    assert caught[0].filename == __file__


def test_a_resampled_network_is_saved_and_loaded(network, images, tmp_path):
    whole = checkpoints.Checkpoint(CifarConfig(depth=8, initialisation="iid"), network, {"test_accuracy": 60.0}, {})
    path = checkpoints.save(tmp_path / "four.safetensors", resampling.resample_checkpoint(whole, 4))
    found = checkpoints.load(path)
    assert torch.equal(found.network(images), resample(network, 4)(images))
    assert (found.config.depth, found.summary) == (4, {})
    assert found.origin == f"resampled from {whole.config.name}"


def test_recomputed_statistics_are_those_of_the_batch(network, images):
    made = resample(network, 2, "averaged", "recomputed", images)
    layers, h = made.residual_layers, made.stem(images)
    z = torch.nn.functional.conv2d(h, layers.conv1_weight[0], layers.conv1_bias[0], padding=1)
    torch.testing.assert_close(layers.bn1_running_mean[0], z.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers.bn1_running_var[0], z.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    batch = made.train()
    torch.testing.assert_close(batch.head(batch.residual_layers(h)), made.eval()(images), rtol=1e-2, atol=1e-2)
    assert torch.equal(made.bn1.running_mean, network.bn1.running_mean)


def test_the_parallel_form_is_the_network_or_one_sum_of_all_branches(network, images):
    torch.testing.assert_close(ParallelForm(network, 8)(images), network(images), rtol=1e-4, atol=1e-4)
    h = network.stem(images)
    f = resampling.branch("gelu")
    at_once = h + sum(f(h, layer) for layer in zip(*fold_batch_norms(network), strict=True)) / 8
    torch.testing.assert_close(ParallelForm(network, 1)(images), network.head(at_once), rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_runs(tmp_path, monkeypatch):
    """Two trained networks of 8 layers, batch norm and none, and a small generated set of images."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "checkpoints")
    cifar_set.write_set(tmp_path / "images", monkeypatch)
    for config in (CifarConfig(depth=8, epochs=2), CifarConfig(depth=8, epochs=2, batch_norm=False)):
        finish(paths.CHECKPOINTS, config)
    records.gather()
    return records.read_runs()


def test_measuring_goes_on_where_it_stopped(small_runs, capsys):
    assert measured.main(["resampling", "--images", "20", "--policies", "kept-kept", "averaged-averaged"]) == 0
    table = records.read_measured("resampling")
    assert table["layers"].tolist() == [4, 2, 1] * 4
    assert set(table["images"]) == {20}
    # Both networks are at their start: every layer is the identity.
    assert table["distance"].max() < 1e-6
    assert table["accuracy"].tolist() == table["accuracy_all"].tolist()
    capsys.readouterr()
    assert measured.main(["resampling", "--images", "10", "--policies", "kept-kept"]) == 0
    assert capsys.readouterr().out == ""
    assert measured.main(["resampling", "--policies", "kept-kept", "kept-recomputed", "parallel-kept"]) == 0
    assert measured.main(["solvers", "--images", "9"]) == 2
    table = records.read_measured("resampling")
    by_policy = {weights: set(tables.select(table, weights=weights)["images"]) for weights in ("kept", "averaged")}
    assert by_policy == {"kept": {cifar_set.TEST_SIZE}, "averaged": {20}}
    recomputed = set(tables.select(table, statistics="recomputed")["run"])
    assert recomputed == {run.config.name for run in small_runs if run.config.batch_norm}
    assert tables.select(table, weights="parallel")["layers"].tolist() == [4, 1] * 2


@pytest.mark.parametrize(
    "arguments",
    [["resample"], ["resampling", "--policies", "kept"], ["resampling", "--images", "-1"]],
)
def test_wrong_arguments_of_measuring_are_named(small_runs, arguments, capsys):
    assert measured.main(arguments) == 2
    assert "expected" in capsys.readouterr().err
    assert not (paths.CHECKPOINTS / "resampling.csv").exists()


def make_rows(run, distances, accuracies, policy=("kept", "kept")):
    weights, statistics = policy
    which = {"run": run, "weights": weights, "statistics": statistics, "images": 1000, "accuracy_all": 60.0}
    return [
        which | {"layers": layers, "accuracy": accuracy, "distance": distance}
        for layers, accuracy, distance in zip(
            measured.halvings(2 * 2 ** (len(distances) - 1)), accuracies, distances, strict=True
        )
    ]


def test_the_figure_and_its_summary_are_those_of_the_table(small_runs):
    run = next(run for run in small_runs if run.config.batch_norm)
    # One layer is within half a point again, but two layers are not, so one does not count.
    rows = make_rows(run.config.name, [0.5, 1.0, 2.0], [59.5, 59.4, 60.0]) + make_rows("unknown", [1.0], [10.0])
    tables.write_csv(paths.CHECKPOINTS / "resampling.csv", tables.from_rows(rows))
    config = room.Config(["gelu weight-tied 30"], slope_from=1)
    table = room.tabulate_curves(small_runs)
    assert set(table["run"]) == {run.config.name}
    (line,) = tables.rows(room.summarise_runs(table, config))
    assert (line["run"], line["fewest"], line["half"]) == (run.config.name, 4, 0.5)
    assert line["slope"] == pytest.approx(-1)
    trained = {"layers": [2], "accuracy": [85.0], "activation": ["gelu"]}
    figure = room.draw({"resampling": table, "resampling_shallow": trained}, config)
    drawn = {tuple(line.get_xdata()): list(line.get_ydata()) for panel in figure.axes for line in panel.lines}
    assert drawn[1, 2, 4, 8] == [60.0, 59.4, 59.5, 60.0]
    assert read_resampling_distances() == {run.config.name: 0.5, "unknown": 1.0}
    table_1 = compare(small_runs, NetworkChoice(depth=8))
    (ours,) = (row for row in tables.rows(table_1) if row["runs"])
    assert ours["resampling"] == 0.5
    assert make_readable(table_1)["resampling distance"].count("0.5") == 1


def test_without_a_table_the_figure_holds_a_sentence(small_runs):
    table = room.tabulate_curves(small_runs)
    assert table == room.summarise_runs(table, room.Config(["gelu iid 30"])) == {}
    data = {"resampling": table, "resampling_shallow": room.select_shallow(small_runs, table)}
    figure = room.draw(data, room.Config(["gelu iid 30"]))
    assert "make measure" in figure.axes[0].texts[0].get_text()
    readable = make_readable(compare(small_runs, NetworkChoice(depth=8)))
    assert set(readable["resampling distance"]) == {"-"}


@pytest.mark.parametrize(
    ("shown", "error"),
    [([], ValueError), (["gelu"], ValueError), (["gelu weight-tied 30"] * 4, ValueError), ([3], TypeError)],
)
def test_wrong_networks_of_the_figure_are_named(shown, error):
    with pytest.raises(error, match="expected"):
        room.Config(shown)


def test_the_explorer_follows_the_layers_that_are_kept(network):
    browsed = trained.Trained(checkpoints.Checkpoint(CifarConfig(depth=8, initialisation="iid"), network, {}, {}))
    pixels = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    browsing = trained.Browsing([browsed], dataset.Images(pixels, torch.arange(5)), "")
    (whole,), (half,) = (browsing.views(trained.Choice(image=1, layers=layers)) for layers in (0, 4))
    assert (len(whole.path.points), whole.kept) == (9, None)
    assert (len(half.path.points), half.kept.tolist()) == (5, [1, 3, 5, 7])
    four = resample(network, 4)
    expected = logits(four, browsing.images)
    np.testing.assert_allclose(half.path.logits, expected[1], rtol=1e-4, atol=1e-4)
    accuracy = resampling.accuracy(expected, browsing.images.labels)
    (line,) = browsing.accuracies(trained.Choice(layers=4))
    assert line.startswith(f"{accuracy:.1f} % with 4 of 8 layers")
    assert browsing.accuracies(trained.Choice(layers=99))[0].count("8 of 8 layers") == 1


def test_numbers_and_images_of_numpy_are_taken(network, images):
    expected = resample(network, 4, statistics="recomputed", images=images)
    for layers, given in ((np.int64(4), images.numpy()), (np.array(4), images.tolist()), (torch.tensor(4), images)):
        found = resample(network, layers, statistics="recomputed", images=given)
        assert found.config.depth == 4
        assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    missing = images.clone()
    missing[2, 1, 0, 3] = torch.nan
    for wrong, sentence in (
        (images[0], r"images is \(3, 32, 32\), expected \(m, 3, 32, 32\)"),
        (missing, r"images holds nan in sample 2 at \(1, 0, 3\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            resample(network, 4, statistics="recomputed", images=wrong)
