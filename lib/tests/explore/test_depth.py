"""The explorer of depth: training, pictures, stories, and the parameters that it shows."""

import asyncio
import dataclasses
import io

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from playing import IID, NETWORK, SMALL, find_axes, finish, read_iteration, wait_until

from lib import parameters
from lib.checks import Divergence
from lib.dense.network import NetworkConfig
from lib.dense.training import train
from lib.explore import explorer as module
from lib.explore import frames
from lib.explore.depth import KIND, STORIES, draw_depths, explore_depth
from lib.explore.depth_training import train_depths


def test_the_first_picture_is_the_initialisation(real_pictures, explorer):
    assert (read_iteration(explorer), explorer.live.running) == (0, False)
    for number, state in enumerate(explorer.live.state.states):
        for Z in "VW":
            *curves, start = find_axes(explorer)[f"{Z}{number}"].lines
            assert [len(line.get_xdata()) for line in curves] == [4, 8, 16]
            for depth, line in zip((4, 8, 16), curves, strict=True):
                assert list(line.get_xdata()) == [k / depth for k in range(1, depth + 1)]
                assert list(line.get_ydata()) == getattr(state.weights[depth], Z)[:, 1, 2].tolist()
            assert list(start.get_ydata()) == list(curves[-1].get_ydata())
    assert Image.open(io.BytesIO(explorer.image.value)).size == (440, 232)


def test_trained_and_drawn_values_are_those_of_the_functions(explorer):
    finish(explorer)
    expected = [train_depths(SMALL), train_depths(dataclasses.replace(SMALL, network=IID))]
    for number, (state, plain) in enumerate(zip(explorer.live.state.states, expected, strict=True)):
        assert state.losses == plain.losses
        assert state.distances == plain.distances
        drawn = find_axes(explorer)[f"W{number}"].lines[2].get_ydata()
        assert list(drawn) == plain.weights[16].W[:, 1, 2].tolist()
    loss = find_axes(explorer)["loss"].lines[2].get_ydata()
    assert list(loss) == [record.loss for record in train(NETWORK.at_depth(16), 0.05, 30)]
    tied, iid = find_axes(explorer)["distance"].lines
    assert list(tied.get_ydata()) == [expected[0].distances[depth]["max_distance"] for depth in (4, 8, 16)]
    assert [note.get_text() for note in find_axes(explorer)["distance"].texts][1].startswith("slope")
    assert iid.get_ydata().min() > tied.get_ydata().max()


@pytest.mark.slow
def test_a_picture_brought_up_to_date_is_the_same_as_one_drawn_in_full(real_pictures, explorer):
    for _ in range(12):
        next(explorer.live.run.states)
        explorer._show(module.LIVE)
    shown = explorer._frames
    np.testing.assert_array_equal(shown.pixels(80), frames.Frames(shown.figure).pixels(80))
    next(explorer.live.run.states)
    before = shown.pixels(80)
    draw_depths(explorer.live.state.states, 1, 2, shown.figure)
    after = shown.pixels(80)
    assert (before != after).any()
    np.testing.assert_array_equal(after, frames.Frames(shown.figure).pixels(80))


def test_a_figure_is_drawn_anew_only_if_more_than_its_data_differs(explorer):
    states = explorer.live.state.states
    figure = draw_depths(states, 1, 2)
    assert draw_depths(states, 1, 2, figure) is figure
    assert draw_depths(states, 1, 3, figure) is not figure
    assert draw_depths(states[:1], 1, 2, figure) is not figure
    explorer.controls["seed"].value = 9
    assert draw_depths(explorer.live.state.states, 1, 2, figure) is figure
    explorer.controls["depth"].value = 8
    assert draw_depths(explorer.live.state.states, 1, 2, figure) is not figure


def test_a_growing_curve_changes_its_axis_seldom():
    figure, changes = draw_depths([train_depths(SMALL)], 1, 2), 0
    panel = figure.axes[0]
    for value in np.geomspace(1, 100, 200):
        before = panel.get_ylim()
        panel.lines[0].set_ydata(np.linspace(0, value, 4))
        if not frames.fills_axis(panel, 0, value):
            frames.set_limits(panel, 0, value, decades=0.2, ahead=True)
        assert panel.get_ylim()[0] <= 0 < value <= panel.get_ylim()[1] < 4 * value or panel.get_ylim() == before
        changes += panel.get_ylim() != before
    assert changes <= 15


@pytest.mark.parametrize("other", ["iid", "weight-tied"])
def test_the_notes_of_the_two_slopes_do_not_touch_the_title(other):
    config = dataclasses.replace(SMALL, iterations=3)
    second = dataclasses.replace(config, network=dataclasses.replace(NETWORK, initialisation=other))
    figure = draw_depths([train_depths(config), train_depths(second)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    notes = {panel.get_label(): panel.texts for panel in figure.axes}["distance"]
    first, second = (note.get_window_extent(renderer) for note in notes)
    formula = next(panel for panel in figure.axes if panel.get_label() == "distance").title.get_window_extent(renderer)
    assert first.x1 + 10 < formula.x0 < formula.x1 < second.x0 - 10


def test_divergence_is_a_sentence_and_the_other_network_goes_on(explorer):
    explorer.set(learning_rate=1.0, depth=64, iterations=50)
    finish(explorer)
    tied, iid = explorer.live.state.states
    assert "The loss is" in explorer.message.value
    assert "iid, learning rate 1.0" in explorer.message.value
    assert iid.iteration < tied.iteration
    explorer.controls["learning_rate"].value = 0.05
    assert explorer.message.value == ""


def test_numbers_of_a_diverging_network_are_not_drawn(real_pictures):
    state = train_depths(dataclasses.replace(SMALL, iterations=2))
    state.weights[16].V[3, 1, 2] = float("inf")
    state.weights[16].W[:, 1, 2] = 1e200
    state.losses[16][-1] = float("inf")
    figure = draw_depths([state], 1, 2)
    assert all(np.isfinite(panel.get_ylim()).all() and panel.get_ylim()[1] < 1e3 for panel in figure.axes)
    frames.Frames(figure).pixels()


def test_every_story_trains_its_two_networks(explorer, single_steps):
    buttons = {
        getattr(child, "description", ""): child for row in explorer.children for child in getattr(row, "children", ())
    }

    async def play():
        for story, (first, second, _) in STORIES.items():
            buttons[story].click()
            assert explorer.live.running
            await wait_until(lambda: read_iteration(explorer) >= 1)
            explorer.stop_button.click()
            kinds = [state.config.network for state in explorer.live.state.states]
            assert [f"{kind.initialisation} {kind.activation} {kind.convention}" for kind in kinds] == [first, second]
            assert explorer.message.value == ""

    asyncio.run(play())


@pytest.mark.slow
def test_the_story_of_a_large_step_ends_as_it_says():
    *kinds, step = STORIES["a step that i.i.d. layers do not survive"]
    survived = []
    for kind in kinds:
        names = dict(zip(KIND, kind.split(), strict=True))
        config = NetworkConfig(depth=64, width=32, dimension=16, samples=100, seed=2, **names)
        try:
            list(train(config, step, 300, [300]))
            survived.append(names["initialisation"])
        except Divergence:
            pass
    assert survived == ["weight-tied"]


def test_the_parameters_shown_are_those_of_the_figure(explorer):
    explorer.set(depth=32, activation="tanh", learning_rate=0.02)
    shown = yaml.safe_load(explorer.parameters.value)
    parameters.check_values("figure_1_left", shown)
    assert shown["depths"] == [4, 8, 16, 32]
    assert (shown["activation"], shown["learning_rate"], shown["iterations"][-1]) == ("tanh", 0.02, 31)
    assert "# for the second network: initialisation: iid" in explorer.parameters.value


@pytest.mark.parametrize("depth", [4, 8])
def test_parameters_of_the_smallest_network_can_be_made(depth):
    explorer = explore_depth(dataclasses.replace(SMALL, depths=[2, depth]))
    parameters.check_values("figure_1_left", yaml.safe_load(explorer.parameters.value))
