"""The explorer of trained weights, and the measures that it shows."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cifar_set import write_set
from playing import find_axes, finish

from lib import parameters, tables
from lib.cifar import checkpoints, dataset
from lib.cifar.checkpoints import Checkpoint
from lib.cifar.config import CifarConfig
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.explore import trained
from lib.explore.weights import draw_weights, explore_weights
from lib.measures import von_neumann_ratio, von_neumann_ratios


def test_the_ratio_of_every_entry_is_that_of_the_entry_alone():
    weights = torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(0))
    weights[:, 1, 1] = 0.5
    ratios = von_neumann_ratios(weights)
    for i in range(3):
        for j in range(2):
            alone = von_neumann_ratio(weights[:, i, j, None])
            assert ratios[i, j].item() == pytest.approx(alone, rel=1e-12, nan_ok=True)
    assert ratios.isnan().sum() == 1
    assert von_neumann_ratios(weights[:1]).isnan().all()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_hidden_states_end_in_the_network_s_output(batch_norm):
    network = ConvResNet(ConvNetConfig(depth=5, channels=4, batch_norm=batch_norm)).eval()
    with torch.no_grad():
        network.residual_layers.conv2_weight.normal_(generator=torch.Generator().manual_seed(0))
        images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        states = network.hidden_states(images)
        assert states.shape == (6, 3, 4, 10, 10)
        torch.testing.assert_close(network.head(states[-1]), network(images))


def test_the_principal_plane_of_a_parabola_is_its_own_plane():
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(30, 2, generator=generator, dtype=torch.float64))
    parabola = torch.stack([2 * t, t**2 - (t**2).mean()], dim=1)
    points, shares = trained.principal_plane(parabola @ axes.mT + 7)
    np.testing.assert_allclose(points[:, 0], 2 * t, atol=1e-12)
    np.testing.assert_allclose(abs(points[:, 1]), abs(parabola[:, 1]), atol=1e-12)
    assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_the_roughest_and_the_smoothest_entry_are_found(folder):
    tied, _ = trained.choose_pair(trained.find_checkpoints(folder))
    network = trained.load(tied)
    assert network.entry(trained.Choice(how="roughest")) == (2, 1, 0, 2)
    smoothest = network.entry(trained.Choice(how="smoothest"))
    assert network.ratios("conv1")[smoothest] == network.ratios("conv1").min()
    with pytest.raises(ValueError, match="All layers are equal"):
        network.entry(trained.Choice("conv2", how="roughest"))
    with pytest.raises(ValueError, match=r"The entry is \(4, 0, 0, 0\), expected indices below the weight's shape"):
        network.entry(trained.Choice(how="index", index=(4, 0, 0, 0)))
    with pytest.raises(ValueError, match="convolution is 'conv3', expected one of: conv1, conv2"):
        trained.Choice("conv3")


def test_the_first_pair_is_of_one_schedule():
    def make_named(**values):
        config = CifarConfig(**values)
        return Path(config.name), config

    alone, short = make_named(epochs=180), make_named(epochs=30)
    iid = make_named(epochs=30, initialisation="iid")
    assert trained.choose_pair(dict([iid, alone, short])) == [short[0], iid[0]]
    assert trained.choose_pair(dict([iid, alone])) == [alone[0], iid[0]]
    assert trained.choose_pair(dict([alone])) == [alone[0]]
    assert trained.choose_pair({}) == []


def test_it_shows_weights_ratios_and_the_path_of_an_image(real_pictures, folder, output, tmp_path, monkeypatch):
    write_set(tmp_path / "images", monkeypatch)
    trained.load_test_images.cache_clear()
    explorer = explore_weights(folder)
    finish(explorer)
    networks = explorer.live.state.networks
    explorer.controls["how"].value = "roughest"
    panels = find_axes(explorer)
    for number, network in enumerate(networks):
        drawn = panels[f"curve{number}"].lines[0].get_ydata()
        assert list(drawn) == network.weights("conv1")[:, 2, 1, 0, 2].tolist()
        picture = panels[f"map{number}"].images[0].get_array()
        assert picture[2 * 3 + 0, 1 * 3 + 2] == network.ratios("conv1")[2, 1, 0, 2]
        counts = panels["histogram"].patches[number].get_data().values
        assert counts.sum() == 4 * 4 * 9
        assert len(panels[f"path{number}"].collections[0].get_segments()) == 12
    assert "144 from the smoothest" in explorer.status.value
    explorer.set(how="index", convolution="conv2", **{"out channel": 3})
    assert "conv2: out channel 3" in explorer._frames.figure._suptitle.get_text()
    explorer.controls["image"].value = 5000
    assert "There is no test image 5000: they end at 89" in explorer.status.value
    explorer.controls["second"].value = ""
    assert explorer.controls["second"].label == "none"
    finish(explorer)
    assert "curve1" not in find_axes(explorer)
    explorer.save()
    table = tables.read_csv(output / "explore_weights.csv")
    assert list(table["value"]) == pytest.approx(networks[0].weights("conv2")[:, 3, 0, 0, 0].tolist())
    trained.load_test_images.cache_clear()


def test_without_images_the_figure_is_smaller_and_a_sentence_says_why(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nothing"))
    trained.load_test_images.cache_clear()
    explorer = explore_weights(folder)
    finish(explorer)
    assert "CIFAR-10 was not found" in explorer.status.value
    assert set(find_axes(explorer)) == {"curve0", "curve1", "map0", "map1", "histogram"}
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    networks, choice = explorer.live.state, trained.Choice()
    views = [
        dataclasses.replace(view, path=trained.ImagePath(np.eye(3, 2), (0.5, 0.5), np.eye(10)[0]))
        for view in networks.views(choice)
    ]
    assert explorer._frames.figure.get_figheight() < 0.8 * draw_weights(views, image).get_figheight()
    assert explorer.controls["image"].layout.display == "none"
    assert explorer.message.value == ""


def test_images_that_take_long_to_read_are_announced(folder, monkeypatch):
    read = threading.Event()

    def load_slowly():
        read.wait(60)
        raise dataset.DataNotFoundError("There are none.")

    monkeypatch.setattr(trained, "load_test_images", load_slowly)
    explorer = explore_weights(folder)
    assert "being read" in explorer.status.value
    read.set()
    finish(explorer)
    assert "There are none." in explorer.status.value


def test_an_entry_that_the_smaller_network_lacks_is_named(folder):
    config = CifarConfig(depth=5, channels=2, initialisation="iid", epochs=1)
    path = checkpoints.save(folder / "small.safetensors", Checkpoint(config, ConvResNet(config.network), {}, {}))
    explorer = explore_weights(folder)
    explorer.set(second=path, how="index", **{"out channel": 3})
    assert "The entry is (3, 0, 0, 0), expected indices below" in explorer.message.value
    explorer.controls["out channel"].value = 1
    assert len(find_axes(explorer)["curve1"].lines[0].get_ydata()) == 5


def test_the_parameters_shown_are_those_of_figure_3(folder):
    explorer = explore_weights(folder, trained.Choice(seed=3))
    shown = yaml.safe_load(explorer.parameters.value)
    parameters.check_values("figure_3", shown)
    assert (shown["entry_seed"], shown["depth"], shown["seed"]) == (3, 12, CifarConfig().seed)


def test_without_checkpoints_a_sentence_says_so(tmp_path):
    assert "no trained network in checkpoints/ yet" in explore_weights(tmp_path).value
