"""The explorer of residual blocks: those of the catalogue, and a user's own."""

import pytest
import torch
from torch import nn

from lib import parameters
from lib.blocks import DistancesConfig, compare_depths, gaussian_data, make_block
from lib.explore import blocks as explore


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(16, 16))

    def forward(self, h):
        return h @ self.W


class Other(Mine):
    def forward(self, h):
        return (h @ self.W)[:, :1]


class Raising(Mine):
    def forward(self, h):
        return h[:, :, 99] @ self.W


def _finish(explorer):
    while explorer.live.advance(1.0):
        pass


@pytest.mark.slow
def test_the_explorer_trains_a_block_of_the_catalogue():
    explorer = explore.explore_blocks({}, depth=8, iterations=2, block="convolution", normalisation="batch")
    _finish(explorer)
    state = explorer.live.state
    x, y = gaussian_data((8, 8, 4, 4))
    config = DistancesConfig(make_block("convolution", "gelu", "batch"), [4, 8], x, y, 2, 0.4)
    assert state.max_distances() == compare_depths(config).max_distances()
    panel = explore.draw(state, 2, 9).axes[0]
    name, index = explore.find_entry(state, 2, 9)
    assert (name, index) == ("conv2.weight", (0, 1, 0, 0))
    assert list(panel.lines[1].get_ydata()) == state.weights[8][name][(slice(None), *index)].tolist()
    parameters.check_values("blocks", {"blocks": ["convolution, batch norm"]})
    assert "convolution, batch norm" in explorer.parameters.value
    assert explorer.parameters.layout.display is None
    wrong = explore.explore_blocks({}, depth=8, iterations=2, block="perceptron", normalisation="group")
    assert "normalisation of perceptron is &#x27;group&#x27;" in wrong.message.value


def test_what_a_block_does_not_have_is_not_offered():
    explorer = explore.explore_blocks(
        {"MyBlock": Mine}, depth=8, iterations=1, block="convolution", normalisation="batch"
    )

    def list_hidden():
        return {name for name, control in explorer.controls.items() if control.layout.display == "none"}

    assert list_hidden() == set()
    explorer.controls["block"].value = "self-attention"
    norm = explorer.controls["normalisation"]
    assert (norm.value, explorer.message.value) == ("none", "")
    assert {option for _, option in norm.options} == {"none", "layer"}
    assert list_hidden() == {"activation"}
    explorer.controls["block"].value = "MyBlock"
    assert list_hidden() == {"activation", "normalisation"}


def test_the_explorer_offers_a_user_s_block_and_takes_its_new_definition(monkeypatch, tmp_path):
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path))

    class Shell:
        events = property(lambda self: self)

        def register(self, _, look):
            self.look = look

        def unregister(self, _, look):
            assert look is self.look

    shell, namespace = Shell(), {}
    monkeypatch.setattr(explore, "get_ipython", lambda: shell)
    explorer = explore.explore_blocks(namespace, block="MyBlock", depth=8, iterations=3)
    assert "There is no class MyBlock yet" in explorer.message.value
    namespace["MyBlock"] = Mine
    shell.look()
    assert explorer.message.value == ""
    _finish(explorer)
    assert list(explorer.live.state.weights[8]) == ["W"]
    assert explorer.parameters.layout.display == "none"  # no figure has this block
    explorer.save()
    assert "Wrote explore_blocks.pdf, explore_blocks.png, explore_blocks.csv into" in explorer.saved.value
    assert {path.suffix for path in tmp_path.iterdir()} == {".pdf", ".png", ".csv"}
    shell.look()  # the same class: the run stays
    assert explorer.live.state.iteration == 3
    namespace["MyBlock"] = Other
    shell.look()
    assert "Other turns h of the shape (8, 8, 16) into (8, 1, 16)" in explorer.message.value
    namespace["MyBlock"] = Raising
    shell.look()
    assert "Raising cannot take h of the shape (8, 8, 16)" in explorer.message.value
    assert "raised IndexError: " in explorer.message.value
    assert "<b>Start</b>" in explorer.hint.value
    explore.explore_blocks(namespace)
    assert shell.look in explore._registered
