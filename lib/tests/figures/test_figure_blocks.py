"""The figure of residual blocks, and its explorer."""

import re

import numpy as np
import pytest
from scipy import stats

from lib import parameters, tables
from lib.blocks import fit_slope, gaussian_data, make_block, successive_distances
from lib.explore import frames
from lib.figures import blocks as room

SMALL = {"depths": [2, 4], "seeds": [0, 1], "iterations": [2, 3], "slope_from": 2}


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The folder that figures are saved to. Explorers' pictures are not rendered, since that takes long."""
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path))
    monkeypatch.setenv("NOTEBOOK_UNATTENDED", "1")
    monkeypatch.setattr(frames.Frames, "pixels", lambda frames, dpi: np.zeros((1, 1, 3), dtype=np.uint8))
    return tmp_path


@pytest.fixture(scope="module")
def table():
    return room.compute(room.Config(["perceptron", "self-attention"], ["gelu", "relu"], **SMALL))["blocks"]


def test_rows_are_those_of_the_function(table):
    assert len(table["depth"]) == 3 * 2 * 2 * 2  # cases, seeds, times, depths
    assert set(table["activation"]) == {"gelu", "relu", "none"}
    x, y = gaussian_data((8, 8, 16), 1)
    options = {"iterations": 3, "learning_rate": 0.2, "record_at": [2, 3], "seed": 1}
    alone = successive_distances(make_block("perceptron", "relu"), [2, 4], x, y, **options)
    found = tables.select(table, block="perceptron", activation="relu", seed=1)
    assert list(found["max_distance"]) == alone["max_distance"]
    assert list(found["time"]) == [0.4, 0.4, 0.6, 0.6]


def test_slopes_have_the_interval_over_seeds(table):
    row = tables.rows(tables.select(room.fit_slopes(table, 2), block="perceptron", activation="gelu", time=0.4))[0]
    runs = [tables.select(table, block="perceptron", activation="gelu", time=0.4, seed=seed) for seed in (0, 1)]
    fits = [fit_slope(run["depth"], run["max_distance"]).slope for run in runs]
    assert row["slope"] == pytest.approx(np.mean(fits))
    low, high = stats.t.interval(0.95, 1, np.mean(fits), stats.sem(fits))
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert len(room.format_slopes(table, 2)) == 1 + 3 * 2


def test_the_conclusion_has_the_range_and_count_of_slopes():
    rows = [
        {"block": block, "activation": name, "seed": 0, "depth": depth, "time": time, "max_distance": depth**power,
         "to_double": 1.0, "loss": 1.0, "moved": 1.0, "from_linear": time / 10}
        for block, name, power in (("a", "gelu", -1.0), ("a", "relu", -0.5), ("b", "none", -0.8))
        for time in (1.0, 3.0)
        for depth in (4, 8)
    ]  # fmt: skip
    text = room.conclude(tables.from_rows(rows), 4)
    assert "-1.00 to -0.80 at t = 1 (1 of 2) and -1.00 to -0.80 at t = 3 (1 of 2)" in text
    assert "ReLU -0.50 to -0.50 at t = 1 (0 of 1)" in text
    assert "ReLU" not in room.conclude(tables.from_rows(row for row in rows if row["activation"] != "relu"), 4)


def test_the_picture_draws_its_table(table):
    slope, layers, double = room.draw(
        {"blocks": table}, room.Config(["perceptron", "self-attention"], ["gelu", "relu"], **SMALL)
    ).axes
    fits = room.fit_slopes(table, 2)
    drawn = [line.get_xdata()[0] for line in slope.lines if line.get_marker() == "o"]
    assert sorted(drawn) == pytest.approx(sorted(fits["slope"]))
    rows = tables.select(table, block="perceptron", activation="gelu", time=0.4)
    middle = [np.median(tables.select(rows, depth=depth)["max_distance"]) for depth in (2, 4)]
    assert any(list(line.get_ydata()) == pytest.approx(middle) for line in layers.lines)
    assert [list(line.get_xdata()) for line in double.lines if len(line.get_xdata())] == [[2]] * 3


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        (
            {"blocks": ["perceptron, batch norm"]},
            ValueError,
            "normalisation of perceptron is 'batch', expected one of: none, layer",
        ),
        ({"blocks": [5]}, TypeError, "an entry of blocks is 5"),
        ({"blocks": []}, ValueError, r"blocks is \[\]"),
        ({"activations": [["gelu"]]}, TypeError, r"an entry of activations is \['gelu'\]"),
        ({"activations": ["gelu", "gelu"]}, ValueError, "activations is .* without repeats"),
        (
            {"activations": ["step"]},
            ValueError,
            "activation is 'step', expected one of: gelu, relu, tanh, identity, softplus",
        ),
        ({"seeds": [[1]]}, TypeError, r"an entry of seeds is \[1\]"),
        ({"seeds": [-1]}, ValueError, "an entry of seeds is -1"),
        ({"iterations": [1]}, ValueError, "an entry of iterations is 1, expected a whole number of at least 2"),
        ({"slope_from": 4}, ValueError, "slope_from is 4, which leaves fewer than two"),
    ],
)
def test_wrong_values_are_named(values, error, sentence):
    with pytest.raises(error, match=sentence):
        room.Config(**({"blocks": ["perceptron"], "activations": ["gelu"]} | SMALL | values))


@pytest.mark.slow
def test_a_moved_control_makes_the_figure_anew():
    namespace = {"__name__": "__main__"}
    for cell in parameters.code_cells("blocks"):
        if "nbval-check-output" not in cell.tags and "explorer" not in cell.tags:
            exec(re.sub(r"results\.(save|show)\(", "(lambda *_: None)(", cell.source), namespace)
            if "parameters" in cell.tags:
                namespace |= SMALL | {"blocks": ["perceptron"], "seeds": [0]}
    call = parameters.select_tagged(parameters.code_cells("blocks"), "explorer")[0].source
    explorer = eval(call, namespace)
    explorer.controls["seeds"].value = "3"
    while explorer.live.advance(1.0):
        pass
    assert explorer.message.value == ""
    assert set(explorer.live.state[1]["blocks"]["seed"]) == {3}
