"""The figures draw the data of their tables, and the same data gives the same bytes."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from lib import tables
from lib.dense.network import NetworkConfig
from lib.figures import figure_1_left, figure_1_right, figure_2
from lib.figures.results import render_png, save

NETWORK = NetworkConfig(depth=6, width=5, dimension=4, samples=8, seed=1)
LEFT = figure_1_left.Config(NETWORK, [2, 4, 8, 16], [1, 3, 6], slope_from=4)
RIGHT = figure_1_right.Config(NETWORK, [2, 4, 8], 6, reference_depth=64, slope_from=2)
LONG = figure_2.Config(NETWORK, 20, recorded=5, loss_every=4, row=2, column=3)


@pytest.fixture(scope="module")
def left():
    return figure_1_left.compute(LEFT)["figure_1_left"]


@pytest.fixture(scope="module")
def right():
    return figure_1_right.compute(RIGHT)["figure_1_right"]


@pytest.fixture(scope="module")
def long():
    return figure_2.compute(LONG)


@pytest.mark.slow
def test_figure_1_left_draws_both_quantities(left):
    figure = figure_1_left.draw({"figure_1_left": left}, LEFT)
    paper, released = figure.axes[:2]
    for time, line in zip((3, 6), paper.lines[:2], strict=True):  # the curve of time 1 is 0 and not drawn
        rows = tables.select(left, iterations=time)
        assert list(line.get_xdata()) == list(rows["depth"])
        assert list(line.get_ydata()) == list(rows["max_distance"])
    rows = tables.select(left, iterations=6)
    assert list(released.lines[1].get_ydata()) == list(np.maximum(rows["aggregate_V"], rows["aggregate_W"]))


def test_rows_that_are_zero_stay_in_the_table(left):
    assert set(tables.select(left, iterations=1)["max_distance"]) == {0.0}


@pytest.mark.slow
def test_figure_1_right_draws_the_images_of_its_table(right):
    figure = figure_1_right.draw({"figure_1_right": right}, RIGHT)
    image = figure.axes[0].collections[0].get_array()
    for row, depth in enumerate((2, 4, 8)):
        expected = tables.select(right, depth=depth)["distance_V"]
        drawn = np.ma.filled(image[row], 0)
        assert list(drawn[expected > 1e-12]) == list(expected[expected > 1e-12])
    final = tables.select(right, iteration=5)["distance_W"]
    curves = [list(line.get_ydata()) for line in figure.axes[2].lines]
    assert list(final) in curves
    for image in (figure.axes[0], figure.axes[1]):  # at t = 0 all depths agree, up to rounding
        mask = np.ma.getmaskarray(image.collections[0].get_array())
        assert mask[:, 0].all()
        assert not mask[:, 2:].any()


def test_figure_2_draws_every_recorded_time(long):
    loss, weights = long["figure_2"], long["figure_2_weights"]
    figure = figure_2.draw(long, LONG)
    assert sorted(set(weights["iteration"])) == [0, 5, 10, 15, 20]
    for axes, name in zip(figure.axes, ("entry_V", "entry_W"), strict=False):
        assert len(axes.lines) == 5
        assert list(axes.lines[-1].get_ydata()) == list(tables.select(weights, iteration=20)[name])
    assert list(figure.axes[2].lines[0].get_ydata()) == loss["loss"]


def test_figure_2_records_the_entry_asked_for():
    from lib.dense.training import train

    config = figure_2.Config(NETWORK, 4, recorded=2, row=2, column=3)
    weights = figure_2.compute(config)["figure_2_weights"]
    *_, last = train(NETWORK, config.learning_rate, 4)
    end = tables.select(weights, iteration=4)
    assert list(end["entry_V"]) == pytest.approx(last.weights.V[:, 2, 3].tolist(), rel=1e-7)
    assert list(end["entry_W"]) == pytest.approx(last.weights.W[:, 2, 3].tolist(), rel=1e-7)


@pytest.mark.slow
def test_the_same_figure_gives_the_same_bytes(long, tmp_path, monkeypatch):
    written = []
    for folder in ("a", "b"):
        monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path / folder))
        with mpl.rc_context({"font.size": 5 if folder == "a" else 20}):  # the caller's style does not matter
            written.append(save("figure_2", figure_2.draw(long, LONG), {"figure_2": long["figure_2"]}))
    for one, two in zip(*written, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.suffix
    assert [path.name for path in written[0]] == ["figure_2.pdf", "figure_2.png", "figure_2.csv"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["figure_2.csv", "figure_2.pdf", "figure_2.png"]


@pytest.mark.slow
def test_no_figure_is_left_in_a_global_list(left):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure_1_left.draw({"figure_1_left": left}, LEFT)
    assert plt.get_fignums() == before


def test_saving_leaves_the_layout_as_it_is(tmp_path, monkeypatch):
    """Also for a figure with a layout of its own, and in both files."""
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path))
    figure = Figure()
    figure.subplots_adjust(left=0.3, bottom=0.4)
    axes = figure.subplots()
    before = axes.get_position().bounds
    save("own", figure)
    render_png(figure)
    assert figure.get_layout_engine() is None
    assert axes.get_position().bounds == before


def test_the_integral_and_the_left_rule_are_different_quantities(right):
    config = figure_1_right.Config(NETWORK, [2, 4, 8], 6, reference_depth=64, slope_from=2, sampling="left")
    left_end = figure_1_right.compute(config)["figure_1_right"]
    integral, left_rule = (np.array(t["distance_V"]) for t in (right, left_end))
    drawn = integral > 1e-12
    assert np.all(left_rule[drawn] / integral[drawn] > 1.05)  # left ends lag behind by half a cell


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"depths": [4, 2]}, r"depths is \[4, 2\], expected increasing numbers"),
        ({"depths": [0, 2]}, "an entry of depths is 0, expected a whole number of at least 2"),
        ({"iterations": []}, "iterations is .*, expected a non-empty list"),
        ({"slope_from": 16}, "slope_from is 16, which leaves fewer than two of the depths"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a number above 0"),
    ],
)
def test_a_wrong_experiment_is_named(change, sentence):
    config = figure_1_left.Config(NETWORK, [2, 4], [3], slope_from=2)
    with pytest.raises((TypeError, ValueError), match=sentence):
        dataclasses.replace(config, **change)


def test_wrong_references_and_entries_are_named():
    with pytest.raises(ValueError, match="reference_depth is 8, expected more than the deepest network's 8 layers"):
        figure_1_right.Config(NETWORK, [2, 8], 3, reference_depth=8, slope_from=2)
    with pytest.raises(ValueError, match=r"slope_from is 4, which leaves fewer than two of the depths \[2, 4\]"):
        figure_1_right.Config(NETWORK, [2, 4], 3, slope_from=4)
    with pytest.raises(ValueError, match="row is 4, expected at most 3"):
        figure_2.Config(NETWORK, 3, row=4)
    with pytest.raises(ValueError, match="recorded is 101, expected at most 100"):
        figure_2.Config(NETWORK, 300, recorded=101)
    with pytest.raises(ValueError, match="recorded is 1, expected a whole number of at least 2"):
        figure_2.Config(NETWORK, 300, recorded=1)  # the first and the last


def test_parameters_of_a_table_that_is_replaced_are_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("depth: 3\n")
    (tmp_path / "other.yaml").write_text("depth: 4\n")
    save("mine", Figure(), {"mine": {"depth": [5]}})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.csv", "mine.pdf", "mine.png", "mine.yaml.old", "other.yaml",
    ]  # fmt: skip
    assert (tmp_path / "mine.yaml.old").read_text() == "depth: 3\n"
