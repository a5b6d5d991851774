"""The layers that become rough, and the times: from generated layer logs, and from a tiny run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cifar_set import write_set
from finished_runs import finish

from lib import measures, paths, rates, tables
from lib.cifar import layer_log, records, schedule, states, training
from lib.cifar.choice import NetworkChoice
from lib.cifar.config import CifarConfig
from lib.figures import roughness

DEPTH = 64


@pytest.fixture(autouse=True)
def _checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)


def make_log(epochs, spread, generator):
    """Make a log of a smooth curve. After epoch e, its first ``spread * (e + 1)`` layers have independent noise."""
    s = torch.linspace(0, 1, DEPTH, dtype=torch.float64)[:, None]
    log = {}
    for epoch in epochs:
        kernels = torch.sin(2 * s + torch.arange(30))
        passed = min(DEPTH, spread * (epoch + 1))
        kernels[:passed] += torch.randn(passed, 30, generator=generator)
        log = layer_log.extend(log, epoch, {"conv1": kernels, "conv2": kernels.flip(0)})
    return log


def finish_logged(tmp_path, log=None, **settings):
    config = CifarConfig(depth=DEPTH, epochs=8, **settings)
    finish(tmp_path, config)
    if log is not None:
        layer_log.write(records.layer_log_path(config), log, config.name)
    return config


@pytest.fixture
def logged(tmp_path):
    """Two GELU runs of different settings with a log, the second from its fourth epoch on; a ReLU run without one."""
    generator = torch.Generator().manual_seed(0)
    runs = [
        finish_logged(tmp_path, make_log(range(8), 8, generator)),
        finish_logged(tmp_path, make_log(range(3, 8), 4, generator), batch_size=128),
        finish_logged(tmp_path, activation="relu"),
    ]
    finish_logged(tmp_path, make_log(range(8), 8, generator), initialisation="iid")
    records.gather()
    return runs


def choose(**options):
    return roughness.Config(NetworkChoice(depth=DEPTH, batch_size=0), **options)


def test_local_roughness_tells_lines_walks_and_noise_apart():
    generator = np.random.default_rng(0)
    line = np.arange(50.0)[:, None] * np.ones(2000)
    noise = generator.standard_normal((50, 2000))
    curve = np.sin(2 * np.arange(50)[:, None] / 50 + np.arange(2000))
    zigzag = (-1.0) ** np.arange(50)[:, None] * np.ones(2000)
    expected = {0: line, 1.5: noise, 1: noise.cumsum(axis=0), 2: zigzag}
    for value, layers in [*expected.items(), (0, curve)]:
        steps = np.diff(layers, axis=0)
        norms = (np.linalg.norm(of, axis=1) for of in (steps, np.diff(steps, axis=0)))
        found = measures.local_roughness(*norms)
        assert found.shape == (48,)
        np.testing.assert_allclose(found, value, atol=0.1)
    assert np.isnan(measures.local_roughness(np.zeros(5), np.zeros(4))).all()
    assert measures.local_roughness([1.0, 1.0, 1.0], [1.0, 0.0], 1) == pytest.approx([0.25])
    assert measures.local_roughness([1.0, 1.0], [1.0], 2) == pytest.approx([0.5, math.nan], nan_ok=True)
    assert measures.local_roughness([[3.0, 1.0, 1.0]] * 2, [[1.0, 0.0]] * 2, 2).tolist() == [[0.1, 0.0]] * 2


def test_a_smooth_curve_is_less_rough_in_deeper_networks():
    found = []
    for depth in (50, 100, 200):
        steps = np.diff(np.sin(3 * np.arange(depth)[:, None] / depth + np.arange(40)), axis=0)
        norms = (np.linalg.norm(of, axis=1) for of in (steps, np.diff(steps, axis=0)))
        found.append(measures.local_roughness(*norms).mean())
    assert rates.fit_slope([50, 100, 200], found).slope == pytest.approx(-2, abs=0.05)


@pytest.mark.slow
def test_the_front_is_found_at_its_layers_and_times(logged):
    data = roughness.compute(choose())
    front = data["roughness_front"]
    first = tables.select(front, run=logged[0].name)
    assert first["epoch"].tolist() == list(range(1, 9))  # one more eighth each epoch
    images, steps = 50_000, 782
    times = [schedule.training_time(logged[0], images, epoch) for epoch in first["epoch"]]
    assert first["time"] == pytest.approx(times)
    assert times[0] == pytest.approx(0.04 * steps)
    second = tables.select(front, run=logged[1].name)
    assert set(second["first"]) == {4}
    assert second["epoch"].tolist() == [4, 4, 6, 8, 0, 0, 0, 0]  # two eighths are noisy in its first line
    assert np.isnan(second["time"][4:]).all()
    other = roughness.compute(choose(convolution="conv2"))["roughness_front"]  # its noise starts at the last layer
    assert tables.select(other, run=logged[0].name)["epoch"].tolist() == list(range(8, 0, -1))


@pytest.mark.slow
def test_every_run_with_a_log_is_drawn_and_the_others_are_named(logged):
    data = roughness.compute(choose())
    assert dict(zip(data["roughness_runs"]["run"], data["roughness_runs"]["logged"], strict=True)) == {
        logged[0].name: 8,
        logged[1].name: 5,
        logged[2].name: 0,
    }
    config = choose(epoch=5)
    axes = roughness.draw(data, config).axes
    maps, profiles = np.reshape(axes[:6], (2, 3)), axes[6:9]
    for panel, run in zip(maps[:, 0], logged[:2], strict=True):
        lines = tables.select(data["roughness"], run=run.name)
        (mesh,) = panel.collections
        values = np.stack([lines[f"part_{part}"] for part in range(1, config.parts + 1)], axis=1)
        np.testing.assert_allclose(mesh.get_array().reshape(values.shape), values, rtol=1e-6)
        assert mesh.get_coordinates()[:, 0, 1].tolist() == pytest.approx([lines["begun"][0], *lines["time"]])
        assert mesh.get_coordinates()[0, [0, -1], 0].tolist() == [1.5, DEPTH - 0.5]
    for panel in (*maps[:, 1], *maps[:, 2]):
        assert not panel.collections
        assert panel.texts[0].get_text() == roughness.NO_LOG
    drawn = tables.select(data["roughness"], run=logged[0].name, epoch=5)
    assert profiles[0].lines[0].get_ydata()[:3] == pytest.approx([drawn[f"part_{part}"][0] for part in (1, 2, 3)])
    alone = roughness.Config(NetworkChoice(depth=DEPTH, batch_size=128))
    assert set(roughness.compute(alone)["roughness"]["run"]) == {logged[1].name}


@pytest.mark.slow
def test_the_longest_schedule_with_a_log_is_drawn_of_each_setting(tmp_path, logged):
    longer = CifarConfig(depth=DEPTH, epochs=9)
    finish(tmp_path, longer)  # without a log
    shorter = CifarConfig(depth=DEPTH, epochs=2)
    finish(tmp_path, shorter)
    log = make_log(range(2), 8, torch.Generator().manual_seed(0))
    layer_log.write(records.layer_log_path(shorter), log, shorter.name)
    records.gather()
    data = roughness.compute(choose())
    assert set(data["roughness"]["run"]) == {logged[0].name, logged[1].name}
    assert longer.name in data["roughness_runs"]["run"]


@pytest.mark.slow
def test_without_any_log_there_are_empty_panels(tmp_path):
    for settings in ({}, {"activation": "relu"}):
        finish_logged(tmp_path, **settings)
    records.gather()
    data = roughness.compute(choose())
    assert not data["roughness"]["epoch"]
    assert not data["roughness_front"]["run"]
    axes = roughness.draw(data, choose()).axes
    assert [panel.texts[0].get_text() for panel in axes[:3]] == [roughness.NO_LOG] * 3
    assert roughness.draw(roughness.compute(roughness.Config(NetworkChoice())), choose()).axes


@pytest.mark.slow
def test_a_log_that_is_cut_or_of_another_setting_is_named_in_a_sentence(tmp_path, logged):
    path = records.layer_log_path(logged[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(layer_log.LayerLogError, match=r"is not a complete layer log .* move it aside, and restore it"):
        roughness.compute(choose())
    path.write_bytes(records.layer_log_path(logged[1]).read_bytes())
    with pytest.raises(layer_log.LayerLogError, match=f"{logged[1].name}.*, expected that of {logged[0].name}: it"):
        roughness.compute(choose())
    path.write_bytes(whole)
    assert set(roughness.compute(choose())["roughness"]["run"]) == {config.name for config in logged[:2]}


@pytest.mark.slow
def test_a_tiny_run_is_drawn_from_what_it_leaves(tmp_path, monkeypatch):
    write_set(tmp_path / "set", monkeypatch)
    config = CifarConfig(depth=10, epochs=3, batch_size=32)
    folder = tmp_path / "states" / config.name
    for _ in training.train(config, folder):
        pass
    records.export(config, folder)
    records.publish(config, folder)
    records.gather()
    shown = roughness.Config(NetworkChoice(depth=10, batch_size=0))
    data = roughness.compute(shown)
    assert data["roughness_runs"]["logged"] == [3]
    weights = records.read_runs()[0].load().network.kernels()["conv1"].double().flatten(1)
    steps = weights.diff(dim=0)
    cosines = (steps[1:] * steps[:-1]).sum(dim=1) / (steps[1:].square() + steps[:-1].square()).sum(dim=1)
    (last,) = tables.rows(tables.select(data["roughness"], epoch=3))
    found = [last[f"part_{part}"] for part in range(1, 9)]
    assert found == pytest.approx((1 - 2 * cosines).tolist(), rel=1e-4)
    assert all(math.isfinite(value) for value in found)
    assert roughness.draw(data, shown).axes[0].collections
    assert states.read_state(folder)["epoch"] == 3
    assert replace(shown, epoch=2).parts == 8
