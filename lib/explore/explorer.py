"""The base of every explorer: controls, buttons and a picture for the project's functions.

An explorer is given functions that also work without it: one that makes a run (an iterator of states), one that draws a
state, and one that returns the parameters with which ``make`` makes the same. `lib.explore.live` advances the run. The
picture is a matplotlib figure without pyplot, sent as an image. If no person looks (`paths.is_unattended`), an explorer
only draws its first state.
"""

import asyncio
import contextlib
import html
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import yaml
from ipywidgets import Layout
from matplotlib.figure import Figure

from lib import paths, tables
from lib.explore.frames import Frames, encode
from lib.explore.live import SENTENCES, Live, Run
from lib.figures.results import save

FRAME = 0.07  # least seconds from one picture to the next
LIVE, STILL = (100, "jpeg"), (200, "png")  # resolution in dpi, format
QUIET = 0.4  # seconds without a moved control before the still picture is drawn, which takes longer
SLOW = 1.0  # seconds that a live picture takes, from which on a moved control announces the still one alone
ALERT = "border-left: 4px solid #D55E00; background: #FDF1E7; color: #5A2B00; padding: 6px 12px; margin: 4px"

Values = Mapping[str, Any]


class Explorer(widgets.VBox):
    """Controls beside a picture, with Start, Stop and Reset if there is something to train.

    Main arguments: ``name`` of the saved figure; ``controls`` by parameter name; ``make``, the controls' values ->
    `live.Run`; ``draw``, (state, values, figure) -> figure, which may update the given figure (None at first);
    ``reproduce``, values -> (notebook, parameters, remark) with which ``make`` makes the same numbers; ``hint``, what
    to try first, a line of HTML.

    Other arguments: ``panel``, the controls' arrangement; ``above``, widgets over the whole width; ``table``,
    (state, values) -> tables to save beside the figure; ``status``, (state, values) -> lines of text; ``view``, names
    of controls that change only the picture; ``first``, a state to show before the run; ``follow``, whether a moved
    slider starts the run; ``buttons``, whether there are Start, Stop, Reset and a bar.

    The functions raise one of `live.SENTENCES` for wrong values, and the explorer shows its message.
    """

    def __init__(
        self,
        name: str,
        controls: Mapping[str, widgets.ValueWidget],
        make: Callable[[Values], Run],
        draw: Callable[[Any, Values, Figure | None], Figure],
        *,
        reproduce: Callable[[Values], tuple[str, Values, str]],
        hint: str,
        panel: Sequence[widgets.Widget] = (),
        above: Sequence[widgets.Widget] = (),
        table: Callable[[Any, Values], Mapping[str, tables.Table]] | None = None,
        status: Callable[[Any, Values], Sequence[str]] | None = None,
        view: Sequence[str] = (),
        first: Any = None,
        follow: bool = False,
        buttons: bool = True,
    ) -> None:
        self._thread, self._loop = threading.get_ident(), _running_loop()
        Live.stop_all()
        self.controls, self.live = dict(controls), Live(self._show_progress, self._show_stopped, self.show_message)
        self._make, self._draw, self._reproduce, self._table, self._status = make, draw, reproduce, table, status
        self._view, self._first, self._start, self._follows = set(view), first, self.values(), follow
        self._frames: Frames | None = None
        self._next_frame, self._taken, self._held = 0.0, 0.0, False
        self._settling: asyncio.TimerHandle | None = None
        # The controls' values that the run was made with, and those that the state shown belongs to.
        self._run_values, self._state_values, self._state = self._start, self._start, None
        self.hint = widgets.HTML(f"<b>Try first:</b> {hint}")
        super().__init__(
            [
                self.hint,
                *above,
                self._make_body(panel or list(self.controls.values()), buttons),
                self._make_footer(name),
            ]
        )
        for control in self.controls.values():
            control.observe(self.on_kernel_thread(self._handle_change), names="value")
        self._begin_run(first)
        if first is None:
            self._start_if_following()

    # --- The layout ---

    def _make_body(self, panel: Sequence[widgets.Widget], buttons: bool) -> widgets.Box:
        def button(text: str, icon: str, style: str, tooltip: str, click: Callable[[], None]) -> widgets.Button:
            made = widgets.Button(description=text, icon=icon, button_style=style, tooltip=tooltip)
            made.layout = Layout(width="auto", flex="1 1 70px")
            made.on_click(self.on_kernel_thread(lambda _: click()))
            return made

        back = "before the first step, with these values" if self._first is None else "to what was shown first"
        self.start_button = button("Start", "play", "success", "train, or go on", self.start)
        self.stop_button = button("Stop", "pause", "warning", "until Start is pressed", self.live.stop)
        self.reset_button = button("Reset", "undo", "", f"back {back}", self.reset)
        self.progress = widgets.IntProgress(layout=Layout(width="100%", height="10px", margin="6px 0 0 0"))
        self.status, self.message = widgets.HTML(), widgets.HTML()
        run = [arrange_in_row(self.start_button, self.stop_button, self.reset_button), self.progress] if buttons else []
        grid = Layout(flex="1 1 300px", min_width="0", align_items="flex-start", align_content="flex-start")
        # One column beside the picture, or several above it if the window is narrow.
        grid.grid_template_columns, grid.grid_gap = "repeat(auto-fit, minmax(280px, 1fr))", "0 24px"
        left = widgets.GridBox([*panel, widgets.VBox([*run, self.status])], layout=grid)
        self.image = widgets.Image(format="png", layout=Layout(width="100%", max_width="1600px"))
        right = widgets.VBox([self.image, self.message], layout=Layout(flex="999 1 640px", min_width="0"))
        for widget, name in ((self.image, "picture"), (self.status, "status"), (self.message, "message")):
            widget.add_class(f"explorer-{name}")
        return widgets.Box([left, right], layout=Layout(flex_flow="row wrap", width="100%"))

    def _make_footer(self, name: str) -> widgets.VBox:
        self.save_button = widgets.Button(description="Save this figure", icon="download")
        self.save_button.on_click(self.on_kernel_thread(lambda _: self.save()))
        self.save_name = widgets.Text(name, description="as", style={"description_width": "24px"})
        self.save_name.observe(self.on_kernel_thread(lambda _: self._show_parameters()), names="value")
        self.saved = widgets.HTML()
        self.saved.add_class("explorer-saved")
        self.parameters = widgets.Textarea(disabled=True, layout=Layout(width="100%", max_width="900px"))
        self.parameters.add_class("explorer-parameters")
        return widgets.VBox([arrange_in_row(self.save_button, self.save_name, self.saved), self.parameters])

    def on_kernel_thread(self, handler: Callable[..., None]) -> Callable[..., None]:
        """The handler of an event, to be called in the thread in which the explorer was made.

        JupyterLab may deliver events in another thread of the kernel than that of its cells, in which the run advances
        and pictures are drawn. The handler is then queued for that thread.
        """

        def handle(*arguments: Any) -> None:
            if self._loop is None or threading.get_ident() == self._thread:
                handler(*arguments)
            else:
                self._loop.call_soon_threadsafe(handler, *arguments)

        return handle

    def values(self) -> dict[str, Any]:
        """The values of the controls, by parameter name."""
        return {name: control.value for name, control in self.controls.items()}

    def show_message(self, sentence: str) -> None:
        """Show a message below the picture; an empty one removes it."""
        self.message.value = f'<div style="{ALERT}">{html.escape(sentence)}</div>' if sentence else ""

    # --- The run ---

    def start(self) -> None:
        """Let the run advance by itself. A finished run begins anew."""
        if self.live.finished:
            self._begin_run()
        self._next_frame = 0.0
        self.live.start()
        self._enable_buttons()

    def reset(self) -> None:
        """Stop, and go back to the state before the first step, or to the state that was shown ``first``."""
        if self._first is not None:
            self._set_controls(self._start)
        self._begin_run(self._first)

    def set(self, **values: Any) -> None:
        """Move several controls at once. The run begins anew at most once."""
        self._set_controls(values)
        self._apply_change(values)

    @contextlib.contextmanager
    def hold_changes(self) -> Iterator[None]:
        """Within the block, controls move without an effect."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _set_controls(self, values: Values) -> None:
        with self.hold_changes():
            for name, value in values.items():
                self.controls[name].value = value

    def _handle_change(self, change: Mapping) -> None:
        if not self._held:
            self._apply_change(name for name, control in self.controls.items() if control is change["owner"])

    def _apply_change(self, names: Iterable[str]) -> None:
        if self._view.issuperset(names):
            self.show_message("")
            self._show_at_once()
            self._show_parameters()
            return
        running = self.live.running
        self._begin_run(show=self._show_at_once)
        if running:
            self.start()
        else:
            self._start_if_following()

    def _start_if_following(self) -> None:
        if self._follows and not self.live.finished and not paths.is_unattended() and _running_loop():
            self.start()

    def _begin_run(self, first: Any = None, show: Callable[[], None] | None = None) -> None:
        self.show_message("")
        self._run_values = self.values()
        new = self.live.begin(lambda: self._make(self.values()), first)
        self.progress.value, self.progress.max = 0, self.live.run.total
        if new:
            (show or partial(self._show, STILL))()
        self._show_parameters()
        self._enable_buttons()

    def _show_progress(self) -> None:
        if time.perf_counter() >= self._next_frame and not self.live.finished:
            self._show(LIVE)

    def _show_stopped(self) -> None:
        self._enable_buttons()  # before the large picture is drawn, which takes longer
        self._show(STILL)

    def _show_at_once(self) -> None:
        if self._taken > SLOW and not self.live.running:
            before = self.status.value
            self.status.value = f"{before}<br>drawing ..."
            if not self._show(STILL):
                self.status.value = before
            return
        self._show(LIVE)
        if (loop := _running_loop()) is None:
            self._show_final()
        else:
            if self._settling is not None:
                self._settling.cancel()
            self._settling = loop.call_later(QUIET, self._show_final)

    def _show_final(self) -> None:
        if not self.live.running:
            self._show(STILL)

    def _enable_buttons(self) -> None:
        self.start_button.disabled, self.stop_button.disabled = self.live.running, not self.live.running

    # --- The picture ---

    def _show(self, quality: tuple[float, str]) -> bool:
        """Draw the state of the run; returns whether it could be drawn."""
        started, state, values = time.perf_counter(), self.live.state, self.values()
        if state is None:
            return False
        if state is not self._state:
            self._state, self._state_values = state, self._run_values
        try:
            figure = self._draw(state, values, self._frames.figure if self._frames else None)
            self.status.value = "<br>".join(self._status(state, values)) if self._status else ""
        except SENTENCES as error:
            self.show_message(str(error))
            return False
        if self._frames is None or self._frames.figure is not figure:
            self._frames = Frames(figure)
        dpi, form = quality
        with self.image.hold_sync():
            self.image.format, self.image.value = form, encode(self._frames.pixels(dpi), form)
        self.progress.value = self.live.run.done(state)
        if warning := self.live.run.warning(state):
            self.show_message(warning)
        now = time.perf_counter()
        if quality == LIVE:
            self._taken = now - started
        self._next_frame = max(started + FRAME, now + (now - started))  # leaves at least half of the time to the run
        return True

    # --- Saving ---

    def _show_parameters(self, stem: str = "") -> None:
        name = self.save_name.value.strip()
        try:
            stem = stem or _find_free_stem(paths.figures_folder(), name)  # the name that is saved next
        except OSError:  # such as a name that is too long
            stem = name
        lines = self._parameter_lines(stem)
        self.parameters.value, self.parameters.rows = "".join(f"{line}\n" for line in lines), len(lines) + 1
        self.parameters.layout.display = None if lines else "none"

    def _parameter_lines(self, name: str) -> list[str]:
        """The parameters with which make makes the same; none if no figure can, or if the values are wrong."""
        try:
            notebook, values, remark = self._reproduce(self.values())
        except SENTENCES:
            return []
        lines = [f"# make {notebook} PARAMETERS=figures/custom/{name}.yaml"]
        lines += [f"# {remark}"] if remark else []
        for parameter, value in values.items():
            inline = None if isinstance(value, list) else False
            lines.append(yaml.safe_dump({parameter: value}, default_flow_style=inline, width=1000).rstrip())
        return lines

    def save(self) -> None:
        """Save the picture as PDF and PNG, its tables as CSV and the parameters, if a figure has them, as YAML: all of
        them or nothing.

        If a file of the name exists, a number is added. An error is shown beside the button.
        """
        self.saved.value = ""
        name, values = self.save_name.value.strip(), self.values()
        if not re.fullmatch(r"\w[\w.-]*", name):
            self.saved.value = f"{html.escape(repr(name))} is not a file name: use letters, digits, dots and dashes."
        elif self.live.state is None:
            self.saved.value = "There is no picture to save yet."
        elif any(values[each] != self._state_values[each] for each in values.keys() - self._view):
            self.saved.value = "Nothing is saved: the picture does not show the controls' values yet."
        else:
            try:
                written = self._write(name, values)
            except OSError as error:
                place = f" ({paths.shorten(Path(error.filename).parent)})" if error.filename else ""
                self.saved.value = html.escape(f"Nothing is saved: {error.strerror or error}{place}.")
            else:
                self._show_parameters(written[0].stem)
                shown = paths.shorten(written[0].parent)
                self.saved.value = html.escape(f"Wrote {', '.join(path.name for path in written)} into {shown}.")

    def _write(self, name: str, values: Values) -> list[Path]:
        state, run = self.live.state, self.live.run
        folder, kinds = paths.figures_output(), self._table(state, values) if self._table else {}
        stem = _find_free_stem(folder, name, kinds)
        _, _, *tables, parameters = files = _list_files(folder, stem, kinds)
        lines = self._parameter_lines(stem)
        if lines and state is not self._first and run.done(state) < run.total and not self.live.finished:
            lines.insert(1, f"# saved at step {run.done(state)} of {run.total}: these parameters make the whole run")
        try:
            data = dict(zip((path.stem for path in tables), kinds.values(), strict=True))
            save(stem, self._draw(state, values, None), data)
            if lines:
                paths.write_content(parameters, "\n".join(lines) + "\n")
        except OSError:
            for path in files:  # none of them existed before
                path.unlink(missing_ok=True)
            raise
        return [*files[:-1], *([parameters] if lines else [])]


def _list_files(folder: Path, stem: str, kinds: Iterable[str]) -> list[Path]:
    # The picture twice, a table of each kind, the parameters.
    tables = [f"{stem}_{kind}.csv" if kind else f"{stem}.csv" for kind in kinds]
    return [folder / file for file in (f"{stem}.pdf", f"{stem}.png", *tables, f"{stem}.yaml")]


def _find_free_stem(folder: Path, name: str, kinds: Iterable[str] = ()) -> str:
    """The name, with a number if there are files of that name."""
    stems = chain([name], (f"{name}_{count}" for count in count_from(2)))
    return next(stem for stem in stems if not any(path.exists() for path in _list_files(folder, stem, kinds)))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def arrange_in_row(*children: widgets.Widget) -> widgets.Box:
    return widgets.Box(children, layout=Layout(flex_flow="row wrap", align_items="center", width="100%"))
