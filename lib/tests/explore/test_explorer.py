"""What every explorer has: controls, buttons, the training loop, and saved figures."""

import asyncio
import errno
import io
import threading

import pytest
import yaml
from PIL import Image
from playing import IID, NETWORK, SMALL, find_axes, finish, read_iteration, wait_until

from lib import paths, tables
from lib.explore import explorer as module
from lib.explore import frames
from lib.explore.depth import explore_depth


def test_buttons_start_stop_and_reset_the_training(explorer, single_steps):
    async def play():
        explorer.start_button.click()
        assert (explorer.start_button.disabled, explorer.stop_button.disabled) == (True, False)
        await wait_until(lambda: read_iteration(explorer) >= 5)
        explorer.stop_button.click()
        stopped = read_iteration(explorer)
        assert (explorer.live.running, explorer.stop_button.disabled) == (False, True)
        await asyncio.sleep(0.1)
        assert read_iteration(explorer) == stopped < 30
        explorer.start_button.click()
        await wait_until(lambda: read_iteration(explorer) > stopped)
        explorer.reset_button.click()
        await asyncio.sleep(0.1)
        assert (read_iteration(explorer), explorer.progress.value, explorer.live.running) == (0, 0, False)
        explorer.start_button.click()
        await wait_until(lambda: not explorer.live.running)
        assert (read_iteration(explorer), explorer.progress.value, explorer.progress.max) == (30, 30, 30)
        explorer.start_button.click()  # a finished run starts anew
        assert read_iteration(explorer) < 30
        explorer.stop_button.click()

    asyncio.run(play())


def test_a_moved_slider_begins_anew_and_goes_on_if_it_was_running(explorer, single_steps):
    async def play():
        explorer.controls["width"].value = 8
        assert (read_iteration(explorer), explorer.live.running) == (0, False)
        assert explorer.live.state.states[0].weights[4].V.shape == (4, 8, 4)
        explorer.start()
        await wait_until(lambda: read_iteration(explorer) >= 3)
        explorer.controls["depth"].value = 8
        assert (explorer.live.state.states[0].config.depths, explorer.live.running) == ([4, 8], True)
        await wait_until(lambda: read_iteration(explorer) >= 3)
        explorer.controls["compare"].value = False
        assert (len(explorer.live.state.states), explorer.live.running) == (1, True)
        await wait_until(lambda: not explorer.live.running)
        assert read_iteration(explorer) == 30

    asyncio.run(play())


def test_another_entry_shows_the_same_training(explorer):
    for _ in range(10):
        next(explorer.live.run.states)
    before = explorer.live.state.states[0].weights[16]
    explorer.controls["row"].value = 3
    assert explorer.live.state.states[0].weights[16] is before
    assert list(find_axes(explorer)["V0"].lines[2].get_ydata()) == before.V[:, 3, 2].tolist()
    explorer.controls["width"].value = 2
    assert (explorer.controls["row"].value, explorer.controls["row"].max) == (1, 1)  # the entry stays within the matrix


def test_at_most_one_explorer_trains(explorer, single_steps):
    other = explore_depth(SMALL)

    async def play():
        explorer.start()
        other.start()
        assert (explorer.live.running, other.live.running) == (False, True)
        explore_depth(SMALL)  # as when a cell runs again
        assert not other.live.running

    asyncio.run(play())


def test_events_from_another_thread_wait_for_their_turn(single_steps, monkeypatch):
    drawing = []
    pixels = frames.Frames.pixels

    def watch(frames, dpi):
        drawing.append(threading.current_thread())
        return pixels(frames, dpi)

    monkeypatch.setattr(frames.Frames, "pixels", watch)

    async def play():
        explorer = explore_depth(SMALL, IID)
        await asyncio.to_thread(explorer.start_button.click)
        await wait_until(lambda: read_iteration(explorer) >= 2)
        await asyncio.to_thread(setattr, explorer.controls["seed"], "value", 7)
        await wait_until(lambda: explorer.live.state.states[0].config.network.seed == 7)
        await asyncio.to_thread(explorer.stop_button.click)
        await wait_until(lambda: not explorer.live.running)

    asyncio.run(play())
    assert set(drawing) == {threading.main_thread()}
    assert len(drawing) >= 3


def test_wrong_values_leave_the_picture_and_a_sentence(explorer, monkeypatch):
    before = explorer.image.value

    def refuse(values):
        raise ValueError("width is 3, expected <another>.")

    monkeypatch.setattr(explorer, "_make", refuse)
    explorer.controls["seed"].value = 5
    assert "width is 3, expected &lt;another&gt;." in explorer.message.value
    assert (explorer.image.value, explorer.live.running) == (before, False)


@pytest.mark.slow
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
    assert list(table["entry_W"]) == pytest.approx(explorer.live.state.states[0].weights[16].W[:, 1, 2].tolist())
    explorer.save_name.value = "../mine"
    explorer.save_button.click()
    assert "is not a file name" in explorer.saved.value


def test_the_command_below_the_picture_names_the_file_that_is_saved(explorer, output):
    def read_command():
        return explorer.parameters.value.splitlines()[0].rpartition("/")[2]

    output.mkdir()
    (output / "explore_depth.png").write_bytes(b"")
    explorer.controls["seed"].value = 5
    assert read_command() == "explore_depth_2.yaml"
    explorer.save()
    assert read_command() == "explore_depth_2.yaml"
    assert (output / "explore_depth_2.yaml").exists()
    explorer.controls["seed"].value = 6
    assert read_command() == "explore_depth_3.yaml"


def test_a_picture_that_takes_long_is_announced_and_drawn_once(explorer, monkeypatch):
    said = []

    def draw(*arguments):
        said.append(explorer.status.value)
        return explorer._frames.figure

    def refuse(*arguments):
        raise ValueError("not drawn")

    explorer._taken, before = 2 * module.SLOW, explorer.status.value
    monkeypatch.setattr(explorer, "_draw", refuse)
    explorer._show_at_once()
    assert (explorer.status.value, "not drawn" in explorer.message.value) == (before, True)
    monkeypatch.setattr(explorer, "_draw", draw)
    explorer._show_at_once()
    (words,) = said
    assert words.endswith("drawing ...")
    assert "drawing" not in explorer.status.value
    assert Image.open(io.BytesIO(explorer.image.value)).format == "PNG"


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_saving_again_counts_the_name_up_and_replaces_nothing(explorer, output):
    finish(explorer)
    explorer.save()
    before = read_files(output)
    explorer.set(seed=8)
    finish(explorer)
    explorer.save()
    after = read_files(output)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        name.replace("explore_depth", "explore_depth_2") for name in before
    }
    assert "explore_depth_2.pdf" in explorer.saved.value
    assert "PARAMETERS=figures/custom/explore_depth_2.yaml" in (output / "explore_depth_2.yaml").read_text()
    seeds = [yaml.safe_load(after[f"{name}.yaml"])["seed"] for name in ("explore_depth", "explore_depth_2")]
    assert seeds == [NETWORK.seed, 8]


@pytest.mark.slow
@pytest.mark.parametrize("taken", ["explore_depth.yaml", "explore_depth_first_loss.csv"])
def test_a_name_is_taken_if_one_of_its_files_is_there(explorer, output, taken):
    output.mkdir()
    (output / taken).write_text("another run's")
    explorer.save()
    assert (output / taken).read_text() == "another run's"
    assert sum(name.startswith("explore_depth_2") for name in read_files(output)) == 9


@pytest.mark.slow
def test_parameters_of_a_stopped_run_say_where_it_stopped(explorer, output):
    for _ in range(10):
        explorer.live.state = next(explorer.live.run.states)
    explorer._show(module.STILL)
    explorer.save()
    done = explorer.live.state.iteration
    assert f"step {done} of 30" in (output / "explore_depth.yaml").read_text()
    loss = tables.read_csv(output / "explore_depth_first_loss.csv")
    assert max(loss["iteration"]) == done


@pytest.mark.slow
def test_what_keeps_a_figure_from_being_saved_is_said_and_nothing_is_left(explorer, output, monkeypatch):
    explorer.save()
    before = read_files(output)
    explorer.save_name.value = "x" * 300
    explorer.save_button.click()
    assert "File name too long" in explorer.saved.value
    explorer.save_name.value = "mine"
    whole = paths.write_atomically

    def fill_disk(path, write):
        if path.suffix == ".yaml":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path, write)

    monkeypatch.setattr(paths, "write_atomically", fill_disk)
    explorer.save_button.click()
    assert "No space left on device" in explorer.saved.value
    assert read_files(output) == before
    (output.parent / "no folder").write_text("")
    monkeypatch.setenv("FIGURES_OUTPUT", str(output.parent / "no folder"))
    explorer.save_button.click()
    assert "File exists" in explorer.saved.value


def test_the_last_success_is_cleared_before_anything_is_saved(explorer, monkeypatch):
    explorer.saved.value = "Wrote it."
    monkeypatch.setattr(explorer, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explorer.save()
    assert explorer.saved.value == ""
