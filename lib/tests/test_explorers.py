"""The explorers, driven from Python: controls moved, buttons pressed, the loop stepped, the plotted data looked at."""

import asyncio
import dataclasses
import io
import re
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cifar_set import write_set
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from lib import checkpoints, cifar_training, explorers, live, parameters, paths, pictures, tables, trained
from lib.checkpoints import Checkpoint
from lib.cifar_training import CifarConfig
from lib.convnet import ConvNetConfig, ConvResNet
from lib.depths import DepthsConfig, growing_depths
from lib.distances import von_neumann_ratio, von_neumann_ratios
from lib.network import NetworkConfig
from lib.training import Divergence, train

NETWORK = NetworkConfig(width=4, dimension=4, samples=10, seed=3)
SMALL = DepthsConfig(NETWORK, [4, 8, 16], iterations=30, learning_rate=0.05)
IID = dataclasses.replace(NETWORK, initialisation="iid")
PIXELS = pictures.Frames.pixels


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The folder that figures are saved to; where no test looks at a picture itself, `sketch` takes its place."""
    monkeypatch.setenv("FIGURES_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setattr(explorers, "STILL", (40, "png"))
    monkeypatch.setattr(explorers, "LIVE", (30, "jpeg"))
    monkeypatch.setattr(explorers, "FRAME", 1.0)
    monkeypatch.setattr(pictures.Frames, "pixels", sketch)
    return tmp_path / "output"


@pytest.fixture
def real_pictures(output, monkeypatch):
    monkeypatch.setattr(pictures.Frames, "pixels", PIXELS)


def sketch(frames, dpi=100):
    """One pixel that depends on all the data that a figure draws: most of a picture's time goes into tick labels."""
    data = [line.get_xydata() for panel in frames.figure.axes for line in panel.lines]
    data += [np.ma.filled(image.get_array(), 0) for panel in frames.figure.axes for image in panel.collections]
    checksum = zlib.crc32(b"".join(np.asarray(each, dtype=float).tobytes() for each in data))
    return np.frombuffer(checksum.to_bytes(4)[:3], dtype=np.uint8).reshape(1, 1, 3)


@pytest.fixture
def single_steps(monkeypatch):
    """The loop takes one step at a time, so that a small network is not trained before a button is pressed."""
    monkeypatch.setattr(live, "SLICE", 0.0)


@pytest.fixture
def explorer():
    return explorers.explore_depth(SMALL, IID, row=1, column=2)


def axes(explorer):
    return {panel.get_label(): panel for panel in explorer._frames.figure.axes}


def finish(explorer):
    while explorer.live.advance(1.0):
        pass
    explorer._show(explorers.STILL)


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def _threads():
    return sum(thread.name == "explorer" for thread in threading.enumerate())


def iteration(explorer):
    return explorer.live.state.iteration


# --- Networks of growing depth ----------------------------------------------------------------------------------------


def test_the_first_picture_is_the_initialisation(real_pictures, explorer):
    assert (iteration(explorer), explorer.live.running) == (0, False)
    for number, state in enumerate(explorer.live.state.states):
        for Z in "VW":
            *curves, start = axes(explorer)[f"{Z}{number}"].lines
            assert [len(line.get_xdata()) for line in curves] == [4, 8, 16]
            for depth, line in zip((4, 8, 16), curves, strict=True):
                assert list(line.get_xdata()) == [k / depth for k in range(1, depth + 1)]
                assert list(line.get_ydata()) == getattr(state.weights[depth], Z)[:, 1, 2].tolist()
            assert list(start.get_ydata()) == list(curves[-1].get_ydata())
    assert Image.open(io.BytesIO(explorer.image.value)).size == (384, 240)


def test_what_is_trained_and_drawn_is_what_the_functions_return(explorer):
    finish(explorer)
    expected = [growing_depths(SMALL), growing_depths(dataclasses.replace(SMALL, network=IID))]
    for number, (state, plain) in enumerate(zip(explorer.live.state.states, expected, strict=True)):
        assert state.losses == plain.losses
        assert state.distances == plain.distances
        drawn = axes(explorer)[f"W{number}"].lines[2].get_ydata()
        assert list(drawn) == plain.weights[16].W[:, 1, 2].tolist()
    loss = axes(explorer)["loss"].lines[2].get_ydata()
    assert list(loss) == [record.loss for record in train(NETWORK.at_depth(16), 0.05, 30)]
    tied, iid = axes(explorer)["distance"].lines
    assert list(tied.get_ydata()) == [expected[0].distances[depth]["max_distance"] for depth in (4, 8, 16)]
    assert [note.get_text() for note in axes(explorer)["distance"].texts][1].startswith("slope")
    assert iid.get_ydata().min() > tied.get_ydata().max()


def test_a_picture_brought_up_to_date_is_the_same_as_one_drawn_in_full(real_pictures, explorer):
    for _ in range(12):
        next(explorer.live.run.states)
        explorer._show(explorers.LIVE)
    frames = explorer._frames
    np.testing.assert_array_equal(frames.pixels(80), pictures.Frames(frames.figure).pixels(80))
    next(explorer.live.run.states)
    before = frames.pixels(80)
    pictures.explore_depth(explorer.live.state.states, 1, 2, frames.figure)
    after = frames.pixels(80)
    assert (before != after).any()
    np.testing.assert_array_equal(after, pictures.Frames(frames.figure).pixels(80))


def test_start_stop_and_reset(explorer, single_steps):
    async def play():
        explorer.start_button.click()
        assert (explorer.start_button.disabled, explorer.stop_button.disabled) == (True, False)
        await until(lambda: iteration(explorer) >= 5)
        explorer.stop_button.click()
        stopped = iteration(explorer)
        assert (explorer.live.running, explorer.stop_button.disabled) == (False, True)
        await asyncio.sleep(0.1)
        assert iteration(explorer) == stopped < 30
        explorer.start_button.click()
        await until(lambda: iteration(explorer) > stopped)
        explorer.reset_button.click()
        await asyncio.sleep(0.1)
        assert (iteration(explorer), explorer.progress.value, explorer.live.running) == (0, 0, False)
        explorer.start_button.click()
        await until(lambda: not explorer.live.running)
        assert (iteration(explorer), explorer.progress.value, explorer.progress.max) == (30, 30, 30)
        explorer.start_button.click()  # of a finished run: anew
        assert iteration(explorer) < 30
        explorer.stop_button.click()

    asyncio.run(play())


def test_a_slider_that_moves_begins_anew_and_goes_on_where_it_was_running(explorer, single_steps):
    async def play():
        explorer.controls["width"].value = 8
        assert (iteration(explorer), explorer.live.running) == (0, False)
        assert explorer.live.state.states[0].weights[4].V.shape == (4, 8, 4)
        explorer.start()
        await until(lambda: iteration(explorer) >= 3)
        explorer.controls["depth"].value = 8
        assert (explorer.live.state.states[0].config.depths, explorer.live.running) == ([4, 8], True)
        await until(lambda: iteration(explorer) >= 3)
        explorer.controls["compare"].value = False
        assert (len(explorer.live.state.states), explorer.live.running) == (1, True)
        await until(lambda: not explorer.live.running)
        assert iteration(explorer) == 30

    asyncio.run(play())


def test_another_entry_is_another_look_at_the_same_training(explorer):
    for _ in range(10):
        next(explorer.live.run.states)
    before = explorer.live.state.states[0].weights[16]
    explorer.controls["row"].value = 3
    assert explorer.live.state.states[0].weights[16] is before
    assert list(axes(explorer)["V0"].lines[2].get_ydata()) == before.V[:, 3, 2].tolist()
    explorer.controls["width"].value = 2
    assert (explorer.controls["row"].value, explorer.controls["row"].max) == (1, 1)  # the entry stays inside


def test_at_most_one_explorer_trains(explorer, single_steps):
    other = explorers.explore_depth(SMALL)

    async def play():
        explorer.start()
        other.start()
        assert (explorer.live.running, other.live.running) == (False, True)
        explorers.explore_depth(SMALL)  # as when a cell runs again
        assert not other.live.running

    asyncio.run(play())


def test_events_from_another_thread_wait_for_their_turn(single_steps, monkeypatch):
    drawing = []
    pixels = pictures.Frames.pixels

    def watched(frames, dpi):
        drawing.append(threading.current_thread())
        return pixels(frames, dpi)

    monkeypatch.setattr(pictures.Frames, "pixels", watched)

    async def play():
        explorer = explorers.explore_depth(SMALL, IID)
        await asyncio.to_thread(explorer.start_button.click)
        await until(lambda: iteration(explorer) >= 2)
        await asyncio.to_thread(setattr, explorer.controls["seed"], "value", 7)
        await until(lambda: explorer.live.state.states[0].config.network.seed == 7)
        await asyncio.to_thread(explorer.stop_button.click)
        await until(lambda: not explorer.live.running)

    asyncio.run(play())
    assert set(drawing) == {threading.main_thread()}
    assert len(drawing) >= 3


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
    state = growing_depths(dataclasses.replace(SMALL, iterations=2))
    state.weights[16].V[3, 1, 2] = float("inf")
    state.weights[16].W[:, 1, 2] = 1e200
    state.losses[16][-1] = float("inf")
    figure = pictures.explore_depth([state], 1, 2)
    assert all(np.isfinite(panel.get_ylim()).all() and panel.get_ylim()[1] < 1e3 for panel in figure.axes)
    pictures.Frames(figure).pixels()


def test_values_that_cannot_be_leave_the_picture_and_a_sentence(explorer, monkeypatch):
    before = explorer.image.value

    def refuse(values):
        raise ValueError("width is 3, expected <another>.")

    monkeypatch.setattr(explorer, "_make", refuse)
    explorer.controls["seed"].value = 5
    assert "width is 3, expected &lt;another&gt;." in explorer.message.value
    assert (explorer.image.value, explorer.live.running) == (before, False)


def test_every_story_can_be_told(explorer, single_steps):
    buttons = {getattr(child, "description", ""): child for child in explorer.children[0].children}

    async def play():
        for story, (first, second, _) in explorers.STORIES.items():
            buttons[story].click()
            assert explorer.live.running
            await until(lambda: iteration(explorer) >= 1)
            explorer.stop_button.click()
            kinds = [state.config.network for state in explorer.live.state.states]
            assert [f"{kind.initialisation} {kind.activation} {kind.convention}" for kind in kinds] == [first, second]
            assert explorer.message.value == ""

    asyncio.run(play())


def test_the_story_of_a_large_step_ends_as_it_says():
    *kinds, step = explorers.STORIES["a step that i.i.d. layers do not survive"]
    survived = []
    for kind in kinds:
        names = dict(zip(explorers.KIND, kind.split(), strict=True))
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
    explorer = explorers.explore_depth(dataclasses.replace(SMALL, depths=[2, depth]))
    parameters.check_values("figure_1_left", yaml.safe_load(explorer.parameters.value))


def test_saving_writes_the_picture_its_tables_and_its_parameters(explorer, output):
    finish(explorer)
    explorer.save_name.value = "mine"
    explorer.save_button.click()
    expected = {"mine.pdf", "mine.png", "mine.yaml"}
    kinds = "loss", "weights", "distance"
    expected |= {f"mine_{which}_{kind}.csv" for which in ("first", "second") for kind in kinds}
    assert {path.name for path in output.iterdir()} == expected
    assert "mine.pdf" in explorer.saved.value
    assert (output / "mine.yaml").read_text() == explorer.parameters.value
    assert "PARAMETERS=figures/custom/mine.yaml" in explorer.parameters.value
    table = tables.select(tables.read_csv(output / "mine_first_weights.csv"), depth=16)
    assert list(table["entry_W"]) == explorer.live.state.states[0].weights[16].W[:, 1, 2].tolist()
    explorer.save_name.value = "../mine"
    explorer.save_button.click()
    assert "is no file name" in explorer.saved.value


@pytest.mark.parametrize("nobody", [True, False])
def test_where_nobody_looks_nothing_runs_by_itself(nobody, folder, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_UNATTENDED", "1" if nobody else "")
    assert paths.unattended() == nobody

    async def play():
        shown = _figure_explorer("clipping", FIGURES["clipping"])
        assert not shown.live.running
        assert _threads() == 0
        browsing = explorers.explore_weights(folder)
        assert browsing.live.running == (not nobody)
        browsing.live.stop()

    asyncio.run(play())


# --- Figures ----------------------------------------------------------------------------------------------------------

# Values that make each figure in a moment.
FIGURES = {
    "figure_1_left": {"depths": [4, 8, 16], "iterations": [1, 3, 6], "slope_from": 4},
    "figure_1_right": {"depths": [4, 8, 16], "iterations": 6, "slope_from": 4},
    "figure_2": {"depth": 8, "iterations": 20, "recorded": 5},
    "clipping": {"depths": [4, 8], "clips": [0.0, 0.01], "iterations": 5, "recorded": 3},
    "initialisation": {"depths": [8, 16], "length_scales": [0.5], "iterations": 2, "tolerance": 1e-2},
    "long_time": {"widths": [4], "seeds": [0], "depths": [4], "width_iterations": 5, "iterations": 5, "recorded": 3},
    "neural_ode": {"depths": [4, 8], "compared": [0, 3], "slope_from": 4, "tolerance": 1e-3},
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
    "claims": {},
    "conv_limit": {},
    "figure_3": {},
    "figure_4": {},
    "rounding": {},
    "smoothness": {},
    "stem": {},
    "table_1": {},
}


def _figure_explorer(name, values):
    """The explorer at the end of a notebook that has run with other values, nothing saved or checked."""
    namespace = {"__name__": "__main__"}
    notebook = parameters.read(name)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "nbval-check-output" in tags:
            continue
        if "explorer" in tags:
            functions, call, arguments = cell.source.rpartition("explorers.figure(")
            exec(functions, namespace)
            return eval(call + arguments, namespace)
        exec(re.sub(r"plots\.(save|show)\(", "(lambda *_: None)(", parameters.code(cell)), namespace)
        if "parameters" in tags:
            namespace |= values
    raise AssertionError(f"{name} does not end with an explorer.")


def test_every_figure_has_an_explorer():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(FIGURES) == {name for name in parameters.figures() if f"`make {name}`" in readme}
    for name in FIGURES:
        last = parameters.read(name).cells[-1]
        assert set(last.metadata.tags) == {"explorer", "nbval-ignore-output"}
        assert f'"{name}"' in last.source


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_a_moved_control_makes_the_figure_anew(name):
    explorer = _figure_explorer(name, FIGURES[name])
    first = explorer.image.value
    assert Image.open(io.BytesIO(first)).format == "PNG"
    shown = yaml.safe_load(explorer.parameters.value)
    parameters.check_values(name, shown)
    assert set(shown) == set(parameters.offered(name))
    counted = [control for control in ("seed", "iterations") if control in explorer.controls]
    moved = [*counted, *explorer.controls][0]
    if counted:
        explorer.controls[moved].value = {"seed": 1 + shown.get("seed", 0), "iterations": 10}[moved]
    else:
        explorer._changed([moved])
    finish(explorer)
    assert explorer.message.value == ""
    assert explorer.progress.value == explorer.progress.max
    if counted and not name.startswith("figure_3"):  # whose runs need not be there
        assert explorer.image.value != first


def test_reset_of_a_figure_is_the_notebook_s_own():
    explorer = _figure_explorer("figure_2", FIGURES["figure_2"])
    before = explorer.image.value, explorer.parameters.value
    explorer.controls["width"].value = 32
    assert (explorer.image.value, explorer.parameters.value) != before
    explorer.reset_button.click()
    assert (explorer.image.value, explorer.parameters.value) == before


def test_a_figure_trained_anew_is_the_function_s(output):
    explorer = _figure_explorer("figure_2", FIGURES["figure_2"])
    explorer.controls["seed"].value = 4
    finish(explorer)
    _, (loss, _), now = explorer.live.state
    network = dataclasses.replace(NetworkConfig(depth=8, width=64, samples=50, draw_order="W unused X Y"), seed=4)
    records = {record.iteration: record.loss for record in train(network, 0.005, 20)}
    assert now.seed == 4
    assert loss["loss"] == [records[t] for t in loss["iteration"]]
    explorer.save()
    assert list(tables.read_csv(output / "figure_2.csv")["loss"]) == loss["loss"]
    assert set(tables.read_csv(output / "figure_2_weights.csv")["layer"]) == set(range(1, 9))
    assert explorer.controls["row"].tooltip == "of the entry shown, counted from 0"  # the notebook's own words


def test_a_picture_of_other_values_is_not_saved(output):
    explorer = _figure_explorer("clipping", FIGURES["clipping"])
    for control, value in (("seed", 7), ("clips", "-1")):  # being computed, impossible
        explorer.controls[control].value = value
        explorer.save()
        assert explorer.saved.value.startswith("The picture is not that of the controls")
    assert not output.exists()
    explorer.controls["clips"].value = "0.01"
    finish(explorer)
    explorer.save()
    assert {path.suffix for path in output.iterdir()} == {".pdf", ".png", ".csv", ".yaml"}


@pytest.mark.parametrize("name", FIGURES)
def test_tables_are_saved_by_the_names_that_the_notebook_gives(name, output):
    explorer = _figure_explorer(name, FIGURES[name])
    explorer.save()
    written = {path.stem for path in output.glob("*.csv")}
    named = re.findall(rf'"({name}\w*)"', "".join(cell.source for cell in parameters.read(name).cells))
    assert name in written
    assert written <= set(named)


def test_small_numbers_of_a_list_are_read_as_they_are_written():
    values = FIGURES["clipping"] | {"clips": [0.0, 0.00005]}
    explorer = _figure_explorer("clipping", values)
    assert yaml.safe_load(explorer.parameters.value)["clips"] == [0.0, 0.00005]


@pytest.mark.parametrize(
    ("control", "value", "sentence"),
    [
        ("depths", "2, 4, x", "an entry of depths is 'x', expected a whole number"),
        ("depths", "2, [4", "depths is '2, [4', expected values with commas in between"),
        ("slope_from", 512, "slope_from is 512, which leaves fewer than two of the depths"),
    ],
)
def test_values_that_a_figure_cannot_have_are_named(control, value, sentence):
    explorer = _figure_explorer("figure_1_left", FIGURES["figure_1_left"])
    explorer.controls[control].value = value
    assert sentence.replace("'", "&#x27;") in explorer.message.value


# --- Functions in threads ---------------------------------------------------------------------------------------------


def test_a_function_in_a_thread_gives_its_result_and_reports():
    reported = []
    items = list(live.in_thread(lambda progress: sum(progress(range(5), 5)), reported))
    assert items[-1] == 10
    assert set(items[:-1]) == {None}
    assert reported == [0, 20, 40, 60, 80, 100]


def test_a_run_has_one_thread_from_its_first_step_on():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def work(progress):
        for _ in progress(range(3), 3):
            seen.append(torch.get_num_threads())

    try:
        running = live.Live(lambda: None, lambda: None, lambda sentence: None)
        running.begin(lambda: live.Run(live.in_thread(work, [0.0])))
        while running.advance(1.0):
            pass
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_function_in_a_thread_waits_and_ends_when_it_is_closed():
    steps = []

    def work(progress):
        for number in progress(range(1000), 1000):
            steps.append(number)

    running = live.in_thread(work, [0.0])
    while len(steps) < 2:
        next(running)
    assert _threads() == 1
    running.close()
    assert _threads() == 0
    assert len(steps) < 10


def test_an_error_in_a_thread_is_raised_where_the_result_would_be():
    def work(progress):
        raise ValueError("depth is 0")

    with pytest.raises(ValueError, match="depth is 0"):
        list(live.in_thread(work, [0.0]))


# --- Trained networks -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two small networks: weight-tied with weights that drift smoothly through the layers, and i.i.d. as drawn."""
    for smooth in (True, False):
        config = CifarConfig(depth=12, channels=4, smooth_init=smooth, epochs=1)
        network = ConvResNet(config.network)
        layers = network.residual_layers
        with torch.no_grad():
            layers.bn2_weight.fill_(1.0)
            if smooth:
                s = torch.linspace(0, 1, 12)[:, None, None, None, None]
                generator = torch.Generator().manual_seed(1)
                layers.conv1_weight += s**2 * torch.rand(4, 4, 3, 3, generator=generator)
                layers.conv1_weight[:, 2, 1, 0, 2] += 0.1 * (-1.0) ** torch.arange(12)  # one rough entry
        checkpoints.save(tmp_path / f"{config.name}.safetensors", Checkpoint(config, network, {}, {}))
    return tmp_path


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


def test_the_principal_plane_of_a_bent_line():
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(30, 2, generator=generator, dtype=torch.float64))
    parabola = torch.stack([2 * t, t**2 - (t**2).mean()], dim=1)
    points, shares = trained.principal_plane(parabola @ axes.mT + 7)
    np.testing.assert_allclose(points[:, 0], 2 * t, atol=1e-12)
    np.testing.assert_allclose(abs(points[:, 1]), abs(parabola[:, 1]), atol=1e-12)
    assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_roughest_and_smoothest_entries(folder):
    tied, _ = trained.one_of_each(trained.find(folder))
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
    def named(**values):
        config = CifarConfig(**values)
        return Path(config.name), config

    alone, short = named(epochs=180), named(epochs=30)
    iid = named(epochs=30, smooth_init=False)
    assert trained.one_of_each(dict([iid, alone, short])) == [short[0], iid[0]]
    assert trained.one_of_each(dict([iid, alone])) == [alone[0], iid[0]]
    assert trained.one_of_each(dict([alone])) == [alone[0]]
    assert trained.one_of_each({}) == []


def test_weights_are_browsed(real_pictures, folder, output, tmp_path, monkeypatch):
    write_set(tmp_path / "images", monkeypatch)
    trained.test_images.cache_clear()
    explorer = explorers.explore_weights(folder)
    finish(explorer)
    networks = explorer.live.state.networks
    panels = axes(explorer)
    explorer.controls["how"].value = "roughest"
    panels = axes(explorer)
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
    assert "There is no test image 5000: they end at 89" in axes(explorer)["image"].texts[0].get_text()
    explorer.controls["second"].value = None
    finish(explorer)
    assert "curve1" not in axes(explorer)
    explorer.save()
    table = tables.read_csv(output / "explore_weights.csv")
    assert list(table["value"]) == networks[0].weights("conv2")[:, 3, 0, 0, 0].tolist()
    trained.test_images.cache_clear()


def test_without_images_a_sentence_takes_the_path_s_place(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nothing"))
    trained.test_images.cache_clear()
    explorer = explorers.explore_weights(folder)
    assert "being read" in axes(explorer)["image"].texts[0].get_text()
    finish(explorer)
    panels = axes(explorer)
    (sentence,) = panels["image"].texts
    assert "CIFAR-10 was not found" in sentence.get_text()
    canvas = FigureCanvasAgg(explorer._frames.figure)
    canvas.draw()
    boxes = [panel.get_tightbbox(canvas.get_renderer()) for name, panel in panels.items() if name != "image"]
    assert not any(sentence.get_window_extent().overlaps(box) for box in boxes)
    assert explorer.message.value == ""


def test_a_smaller_network_beside_a_larger_one(folder):
    config = CifarConfig(depth=5, channels=2, smooth_init=False, epochs=1)
    path = checkpoints.save(folder / "small.safetensors", Checkpoint(config, ConvResNet(config.network), {}, {}))
    explorer = explorers.explore_weights(folder)
    explorer.set(second=path, how="index", **{"out channel": 3})
    assert "The entry is (3, 0, 0, 0), expected indices below" in explorer.message.value
    explorer.controls["out channel"].value = 1
    assert len(axes(explorer)["curve1"].lines[0].get_ydata()) == 5


def test_the_entry_that_figure_3_shows_and_its_parameters(folder):
    explorer = explorers.explore_weights(folder, trained.Choice(seed=3))
    shown = yaml.safe_load(explorer.parameters.value)
    parameters.check_values("figure_3", shown)
    assert (shown["entry_seed"], shown["depth"], shown["seed"]) == (3, 12, cifar_training.CifarConfig().seed)


def test_without_checkpoints_a_sentence(tmp_path):
    assert "no trained network in checkpoints/ yet" in explorers.explore_weights(tmp_path).value
