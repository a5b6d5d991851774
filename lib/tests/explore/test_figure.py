"""The explorer at the end of each figure's notebook."""

import asyncio
import dataclasses
import functools
import io
import re

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from playing import count_threads, finish

from lib import activations, parameters, paths, tables
from lib.dense.network import NetworkConfig
from lib.dense.training import train
from lib.explore.weights import explore_weights
from lib.tests.stored_notebooks import read_notebook

# Values that make each figure in a moment.
FIGURES = {
    "figure_1_left": {"depths": [4, 8, 16], "iterations": [1, 3, 6], "slope_from": 4, "seeds": 2, "repeat_depth": 8},
    "figure_1_right": {"depths": [4, 8, 16], "iterations": 6, "slope_from": 4},
    "figure_2": {"depth": 8, "iterations": 20, "recorded": 5},
    "clipping": {"depths": [4, 8], "clips": [0.0, 0.01], "iterations": 5, "recorded": 3, "seeds": 1},
    "initialisation": {
        "depths": [8, 16],
        "length_scales": [0.5],
        "iterations": 2,
        "tolerance": 1e-2,
        "slope_from": 8,
        "seeds": 1,
    },
    "long_time": {"depths": [4, 8], "iterations": 5, "recorded": 3, "seeds": 1},
    "pl_condition": {"widths": [2, 8], "target_scales": [0.1], "seeds": 1, "iterations": 5, "recorded": 4},
    "bounds": {"depth": 4, "iterations": 5, "recorded": 3, "seeds": 1},
    "neural_ode": {"depths": [4, 8], "compared": [0, 3], "slope_from": 4, "tolerance": 1e-3, "seeds": 1},
    "relu_counterexample": {"half_depths": [4, 8], "factors": [2.0], "iterations": 5, "slope_from": 4},
    "mean_limit": {
        "depths": [4, 8],
        "widths": [2],
        "seeds": 2,
        "iterations": 2,
        "reference_depth": 16,
        "reference_width": 4,
        "most_units": 32,
        "recorded": 2,
        "slope_from": 4,
    },
    "blocks": {"blocks": ["perceptron"], "depths": [2, 4], "seeds": [0], "iterations": [2, 3], "slope_from": 2},
    "solvers": {"depth": 16, "iterations": 5, "steps": [4, 8, 16], "tolerances": [0.1], "order_from": 4},
    "reversible": {"depths": [4, 8], "iterations": 5, "slope_from": 4},
    "overview": {},
    "resampling": {},
    "roughness": {},
    "claims": {},
    "conv_limit": {},
    "figure_3": {},
    "figure_4": {},
    "rounding": {},
    "smoothness": {},
    "stem": {},
    "table_1": {},
}


@functools.cache
def _run(name):
    """Run a notebook with the values of `FIGURES` up to its explorer, without drawing, and return its names."""
    return _run_with(name, FIGURES[name])


def _run_with(name, values):
    namespace = {"__name__": "__main__"}
    for cell in parameters.code_cells(name):
        if "nbval-check-output" in cell.tags:
            continue
        if "explorer" in cell.tags:
            return namespace
        # Nothing is drawn or saved here, since the explorer draws the same figure.
        silent = re.sub(
            rf"(results\.(save|show)|\b{name}\.draw)\(", "(lambda *_: None)(", parameters.extract_python(cell)
        )
        exec(silent, namespace)
        if "parameters" in cell.tags:
            namespace |= values
    raise AssertionError(f"{name} does not end with an explorer.")


def _make_explorer(name, values=None):
    """Make the explorer at the end of a notebook that has run with other values."""
    namespace = dict(_run(name) if values is None else _run_with(name, values))
    functions, call, arguments = parameters.code_cells(name)[-1].source.rpartition("explore_figure(")
    exec(functions, namespace)
    return eval(call + arguments, namespace)


def test_every_figure_has_an_explorer():
    assert set(FIGURES) == set(parameters.list_figures())
    for name in FIGURES:
        last = read_notebook(name).cells[-1]
        assert set(last.metadata.tags) == {"explorer", "nbval-ignore-output"}
        assert last.source.startswith("explore_figure(")


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_a_moved_control_makes_the_figure_anew(name):
    explorer = _make_explorer(name)
    first = explorer.image.value
    assert Image.open(io.BytesIO(first)).format == "PNG"
    assert any(control.replace("_", " ") in explorer.hint.value for control in [*explorer.controls, "Start"])
    shown = yaml.safe_load(explorer.parameters.value)
    parameters.check_values(name, shown)
    assert set(shown) == set(parameters.read_parameters(name))
    counted = [control for control in ("seed", "iterations") if isinstance(shown.get(control), int)]
    moved = [*counted, *explorer.controls][0]
    if counted:
        explorer.controls[moved].value = {"seed": 1 + shown.get("seed", 0), "iterations": 10}[moved]
    else:
        explorer._apply_change([moved])
    finish(explorer)
    assert explorer.message.value == ""
    assert explorer.progress.value == explorer.progress.max
    if counted and not name.startswith(("figure_3", "roughness")):  # their runs may be missing
        assert explorer.image.value != first


def test_the_menu_of_activations_has_those_that_the_figure_takes():
    offered = {name: dict(_make_explorer(name).controls["activation"].options) for name in ("clipping", "figure_2")}
    assert set(offered["figure_2"].values()) == set(activations.ACTIVATIONS)
    smooth = {name for name, activation in activations.ACTIVATIONS.items() if activation.smooth}
    assert set(offered["clipping"].values()) == smooth


def test_parameters_that_change_nothing_have_no_control():
    explorer = _make_explorer("resampling")
    assert set(explorer.controls) == {"shown", "points", "slope_from"}
    assert {"layers", "images"} < set(yaml.safe_load(explorer.parameters.value))


def test_reset_gives_the_figure_of_the_notebook():
    explorer = _make_explorer("figure_2")
    before = explorer.image.value, explorer.parameters.value
    explorer.controls["width"].value = 32
    assert (explorer.image.value, explorer.parameters.value) != before
    explorer.reset_button.click()
    assert (explorer.image.value, explorer.parameters.value) == before


@pytest.mark.slow
def test_a_figure_trained_anew_is_that_of_the_function(output):
    explorer = _make_explorer("figure_2")
    explorer.controls["seed"].value = 4
    finish(explorer)
    _, data, config = explorer.live.state
    loss = data["figure_2"]
    network = dataclasses.replace(NetworkConfig(depth=8, width=64, samples=50, draw_order="W unused X Y"), seed=4)
    records = {record.iteration: record.loss for record in train(network, 0.005, 20)}
    assert config.network.seed == 4
    assert loss["loss"] == pytest.approx([records[t] for t in loss["iteration"]])
    explorer.save()
    assert list(tables.read_csv(output / "figure_2.csv")["loss"]) == pytest.approx(loss["loss"])
    assert set(tables.read_csv(output / "figure_2_weights.csv")["layer"]) == set(range(1, 9))
    assert explorer.controls["row"].tooltip == "of the entry shown, counted from 0"  # the notebook's own words


@pytest.mark.slow
def test_a_picture_of_other_values_is_not_saved(output):
    explorer = _make_explorer("clipping")
    for control, value in (("seed", 7), ("clips", "-1")):  # the first is being computed, the second is impossible
        explorer.controls[control].value = value
        explorer.save()
        assert explorer.saved.value.startswith("Nothing is saved: the picture does not show the controls")
    assert not output.exists()
    explorer.controls["clips"].value = "0.01"
    finish(explorer)
    explorer.save()
    assert {path.suffix for path in output.iterdir()} == {".pdf", ".png", ".csv", ".yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_tables_are_saved_by_the_names_that_the_room_gives(name, output, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.touch())  # other tests check the pictures
    explorer = _make_explorer(name)
    before = set(output.glob("*.csv"))  # of the notebook's own cells
    explorer.save()
    saved = set(output.glob("*.csv")) - before
    written = {re.sub(r"_2$", "", path.stem) if before else path.stem for path in saved}
    assert name in written
    assert written == set(explorer.live.state[1])


def test_small_numbers_of_a_list_are_read_as_they_are_written():
    values = FIGURES["clipping"] | {"clips": [0.0, 0.00005]}
    explorer = _make_explorer("clipping", values)
    assert yaml.safe_load(explorer.parameters.value)["clips"] == [0.0, 0.00005]


def test_numbers_of_a_list_are_read_as_in_a_profile():
    explorer = _make_explorer("clipping")
    explorer.controls["clips"].value = "0.1, 1e-05, 4e-2"
    assert explorer.message.value == ""
    assert yaml.safe_load(explorer.parameters.value)["clips"] == [0.1, 0.00001, 0.04]
    explorer.controls["depths"].value = "4, 010"  # 8 in YAML 1.1
    assert "an entry of depths is &#x27;010&#x27;, expected a whole number" in explorer.message.value


@pytest.mark.parametrize(
    ("control", "value", "sentence"),
    [
        ("depths", "2, 4, x", "an entry of depths is 'x', expected a whole number"),
        ("depths", "2, [4", "depths is '2, [4', expected values separated by commas"),
        ("slope_from", 512, "slope_from is 512, which leaves fewer than two of the depths"),
    ],
)
def test_wrong_values_of_a_figure_are_named(control, value, sentence):
    explorer = _make_explorer("figure_1_left")
    explorer.controls[control].value = value
    assert sentence.replace("'", "&#x27;") in explorer.message.value


@pytest.mark.parametrize("unattended", [True, False])
def test_unattended_explorers_do_not_run_by_themselves(unattended, folder, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_UNATTENDED", "1" if unattended else "")
    assert paths.is_unattended() == unattended

    async def play():
        shown = _make_explorer("clipping")
        assert not shown.live.running
        assert count_threads() == 0
        browsing = explore_weights(folder)
        assert browsing.live.running == (not unattended)
        browsing.live.stop()

    asyncio.run(play())
