"""The picture at the top of the README: entries of trained weights, and the accuracy with fewer layers."""

import numpy as np
import pytest

from lib import paths, tables
from lib.cifar import records
from lib.figures import overview


@pytest.mark.slow
def test_its_tables_hold_weights_of_the_networks_and_their_accuracy_by_layers():
    config = overview.Config(entries=3)
    data = overview.compute(config)
    for network, words in (("smooth", config.smooth), ("rough", config.rough)):
        run = next(run for run in records.read_runs() if run.config.name == overview.run_name(words))
        layers = run.load().network.residual_layers.stacked("conv1.weight").detach().flatten(1)
        shown = tables.select(data["overview_weights"], network=network)
        for entry in np.unique(shown["entry"]):
            np.testing.assert_array_equal(tables.select(shown, entry=entry)["value"], layers[:, entry].double().numpy())
        kept = tables.select(data["overview"], network=network)
        assert len(np.unique(shown["entry"])) == 3
        assert kept["accuracy"][kept["layers"] == len(layers)] == run.values["test_accuracy"]
    assert len(overview.draw(data, config).axes[0].lines) == 3


def test_without_networks_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    data = overview.compute(overview.Config())
    assert not any(data["overview"].values())
    assert [text.get_text() for text in overview.draw(data, overview.Config()).axes[0].texts] == ["not here"]


def test_there_are_no_more_entries_than_a_convolution_has():
    (run,) = (run for run in records.read_runs() if run.config.name == overview.run_name(overview.Config().smooth))
    count = run.config.channels**2 * 9
    assert overview.Config(entries=count).entries == count
    with pytest.raises(ValueError, match=f"entries is {count + 1}, expected a whole number of at most {count}"):
        overview.Config(entries=count + 1)


@pytest.mark.parametrize("words", ["gelu", "gelu tied 30", "gelu iid x", 3])
def test_a_wrong_network_is_named(words):
    with pytest.raises((ValueError, TypeError), match="expected"):
        overview.Config(smooth=words)
