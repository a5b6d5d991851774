"""Explorers: sliders, buttons and a picture on the project's own functions. The one module that knows widgets.

An explorer is wired from functions that exist without it: one that makes a run (an iterator of states), one that draws
a state, one that says with which parameters ``make`` makes the same. `lib.live` advances the run; the picture is a
matplotlib figure without pyplot, sent as an image. Where no person looks (`paths.unattended`) an explorer draws its
first state, and that is all.
"""

import asyncio
import html
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets as widgets
import torch
import yaml
from ipywidgets import Layout
from matplotlib.figure import Figure

from lib import activations, conventions, parameters, paths, pictures, plots, tables, trained
from lib.depths import Comparison, DepthsConfig, depths_steps, side_by_side
from lib.experiments import REFERENCES, Progress
from lib.live import SENTENCES, Live, Run, in_thread
from lib.network import DTYPES, INITIAL_V, INITIALISATIONS, NetworkConfig
from lib.records import CONVOLUTIONS

FRAME = 0.08  # seconds at least from one picture to the beginning of the next
LIVE, STILL = (110, "jpeg"), (200, "png")  # resolution in dpi, format
ALERT = "border-left: 4px solid #D55E00; background: #FDF1E7; color: #5A2B00; padding: 6px 12px; margin: 4px"

Values = Mapping[str, Any]


class Explorer(widgets.VBox):
    """Controls beside a picture, with Start, Stop and Reset where there is something to train.

    Main arguments: ``name`` of the saved figure; ``controls`` by parameter name; ``make``, the controls' values ->
    `live.Run`; ``draw``, (state, values, figure) -> figure, where ``figure`` is None or the last one, to be brought up
    to date if the function can; ``reproduce``, values -> (notebook, parameters, remark) with which ``make`` makes the
    same numbers.

    Other arguments: ``panel``, the controls' arrangement; ``above``, widgets over the whole width; ``table``,
    (state, values) -> tables to save beside the figure; ``status``, (state, values) -> lines of text; ``view``, names
    of controls that change the picture and not the run; ``first``, a state to show before anything runs; ``follow``,
    whether a moved slider starts the run by itself; ``buttons``, whether there are Start, Stop, Reset and a bar.

    Functions raise one of `live.SENTENCES` for values that cannot be; the explorer shows the sentence.
    """

    def __init__(
        self,
        name: str,
        controls: Mapping[str, widgets.ValueWidget],
        make: Callable[[Values], Run],
        draw: Callable[[Any, Values, Figure | None], Figure],
        *,
        reproduce: Callable[[Values], tuple[str, Values, str]],
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
        self.controls, self.live = dict(controls), Live(self._news, self._still, self.say)
        self._make, self._draw, self._reproduce, self._table, self._status = make, draw, reproduce, table, status
        self._view, self._first, self._start, self._follows = set(view), first, self.values(), follow
        self._frames: pictures.Frames | None = None
        self._next_frame, self._held = 0.0, False
        # The controls' values that the run was made with, and those that the state shown belongs to.
        self._run_values, self._state_values, self._state = self._start, self._start, None
        super().__init__([*above, self._body(panel or list(self.controls.values()), buttons), self._footer(name)])
        for control in self.controls.values():
            control.observe(self.at_home(self._moved), names="value")
        self._begin(first)
        if first is None:
            self._follow()

    # --- What is on the screen ---

    def _body(self, panel: Sequence[widgets.Widget], buttons: bool) -> widgets.Box:
        def button(text: str, icon: str, style: str, click: Callable[[], None]) -> widgets.Button:
            made = widgets.Button(description=text, icon=icon, button_style=style)
            made.layout = Layout(width="auto", flex="1 1 70px")
            made.on_click(self.at_home(lambda _: click()))
            return made

        self.start_button = button("Start", "play", "success", self.start)
        self.stop_button = button("Stop", "pause", "warning", self.live.stop)
        self.reset_button = button("Reset", "undo", "", self.reset)
        self.progress = widgets.IntProgress(layout=Layout(width="100%", height="10px", margin="6px 0 0 0"))
        self.status, self.message = widgets.HTML(), widgets.HTML()
        run = [_row(self.start_button, self.stop_button, self.reset_button), self.progress] if buttons else []
        grid = Layout(flex="1 1 300px", min_width="0", align_items="flex-start", align_content="flex-start")
        # One column beside the picture; several above it where the window is narrow.
        grid.grid_template_columns, grid.grid_gap = "repeat(auto-fit, minmax(280px, 1fr))", "0 24px"
        left = widgets.GridBox([*panel, widgets.VBox([*run, self.status])], layout=grid)
        self.image = widgets.Image(format="png", layout=Layout(width="100%", max_width="1200px"))
        right = widgets.VBox([self.image, self.message], layout=Layout(flex="999 1 640px", min_width="0"))
        for widget, name in ((self.image, "picture"), (self.status, "status"), (self.message, "message")):
            widget.add_class(f"explorer-{name}")
        return widgets.Box([left, right], layout=Layout(flex_flow="row wrap", width="100%"))

    def _footer(self, name: str) -> widgets.VBox:
        self.save_button = widgets.Button(description="Save this figure", icon="download")
        self.save_button.on_click(self.at_home(lambda _: self.save()))
        self.save_name = widgets.Text(name, description="as", style={"description_width": "24px"})
        self.save_name.observe(self.at_home(lambda _: self._show_parameters()), names="value")
        self.saved = widgets.HTML()
        self.saved.add_class("explorer-saved")
        self.parameters = widgets.Textarea(disabled=True, layout=Layout(width="100%", max_width="900px"))
        self.parameters.add_class("explorer-parameters")
        return widgets.VBox([_row(self.save_button, self.save_name, self.saved), self.parameters])

    def at_home(self, handler: Callable[..., None]) -> Callable[..., None]:
        """The handler of an event, run where the explorer was made.

        JupyterLab may deliver events in a thread of the kernel that is not the one of its cells, in which the run
        advances and pictures are drawn: the handler then waits for its turn there.
        """

        def handle(*arguments: Any) -> None:
            if self._loop is None or threading.get_ident() == self._thread:
                handler(*arguments)
            else:
                self._loop.call_soon_threadsafe(handler, *arguments)

        return handle

    def values(self) -> dict[str, Any]:
        """What the controls say, by parameter name."""
        return {name: control.value for name, control in self.controls.items()}

    def say(self, sentence: str) -> None:
        """Show a sentence below the picture (none: take it away)."""
        self.message.value = f'<div style="{ALERT}">{html.escape(sentence)}</div>' if sentence else ""

    # --- The run ---

    def start(self) -> None:
        """Let the run advance by itself; a finished one begins anew."""
        if self.live.finished:
            self._begin()
        self._next_frame = 0.0
        self.live.start()
        self._able()

    def reset(self) -> None:
        """Stand still, and go back to the state before the first step, or to what was shown ``first``."""
        if self._first is not None:
            self._put(self._start)
        self._begin(self._first)

    def set(self, **values: Any) -> None:
        """Move several controls at once: the run begins anew once, if at all."""
        self._put(values)
        self._changed(values)

    def _put(self, values: Values) -> None:
        self._held = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._held = False

    def _moved(self, change: Mapping) -> None:
        if not self._held:
            self._changed(name for name, control in self.controls.items() if control is change["owner"])

    def _changed(self, names: Iterable[str]) -> None:
        if self._view.issuperset(names):
            self.say("")
            self._frames = None
            self._show(LIVE if self.live.running else STILL)
            return
        running = self.live.running
        self._begin()
        if running:
            self.start()
        else:
            self._follow()

    def _follow(self) -> None:
        if self._follows and not self.live.finished and not paths.unattended() and _running_loop():
            self.start()

    def _begin(self, first: Any = None) -> None:
        self.say("")
        self._run_values = self.values()
        new = self.live.begin(lambda: self._make(self.values()), first)
        self.progress.value, self.progress.max = 0, self.live.run.total
        self._frames = None
        if new:
            self._show(STILL)
        self._show_parameters()
        self._able()

    def _news(self) -> None:
        if time.perf_counter() >= self._next_frame and not self.live.finished:
            self._show(LIVE)

    def _still(self) -> None:
        self._able()  # first, so that the buttons answer before the large picture is drawn
        self._show(STILL)

    def _able(self) -> None:
        self.start_button.disabled, self.stop_button.disabled = self.live.running, not self.live.running

    # --- The picture ---

    def _show(self, quality: tuple[float, str]) -> None:
        started, state, values = time.perf_counter(), self.live.state, self.values()
        if state is None:
            return
        if state is not self._state:
            self._state, self._state_values = state, self._run_values
        try:
            figure = self._draw(state, values, self._frames.figure if self._frames else None)
            self.status.value = "<br>".join(self._status(state, values)) if self._status else ""
        except SENTENCES as error:
            self.say(str(error))
            return
        if self._frames is None or self._frames.figure is not figure:
            self._frames = pictures.Frames(figure)
        dpi, form = quality
        with self.image.hold_sync():
            self.image.format, self.image.value = form, pictures.encode(self._frames.pixels(dpi), form)
        self.progress.value = self.live.run.done(state)
        if warning := self.live.run.warning(state):
            self.say(warning)
        self._show_parameters()
        now = time.perf_counter()
        self._next_frame = now + max(FRAME, now - started)  # half of the time at least is left to the run

    # --- From playing to reproducing ---

    def _show_parameters(self) -> None:
        try:
            notebook, values, remark = self._reproduce(self.values())
        except SENTENCES:  # the message says why
            self.parameters.value = ""
            return
        lines = [f"# make {notebook} PARAMETERS=figures/custom/{self.save_name.value}.yaml"]
        lines += [f"# {remark}"] if remark else []
        for name, value in values.items():
            inline = None if isinstance(value, list) else False
            lines.append(yaml.safe_dump({name: value}, default_flow_style=inline, width=1000).rstrip())
        self.parameters.value, self.parameters.rows = "\n".join(lines) + "\n", len(lines) + 1

    def save(self) -> None:
        """Save the picture as PDF and PNG, its tables as CSV and the parameters as YAML, under the name given."""
        name, values, state = self.save_name.value.strip(), self.values(), self.live.state
        if not re.fullmatch(r"\w[\w.-]*", name):
            self.saved.value = f"{html.escape(repr(name))} is no file name: letters, digits, dots and dashes, please."
            return
        if state is None:
            self.saved.value = "There is no picture to save yet."
            return
        if any(values[each] != self._state_values[each] for each in values.keys() - self._view):
            self.saved.value = "The picture is not that of the controls (yet): nothing is saved."
            return
        data = self._table(state, values) if self._table else {}
        data = {f"{name}_{kind}" if kind else name: table for kind, table in data.items()}
        written = plots.save(name, self._draw(state, values, None), data)
        written.append(paths.figures_output() / f"{name}.yaml")
        written[-1].write_text(self.parameters.value, encoding="utf-8")
        shown = html.escape(paths.short(paths.figures_output()))
        self.saved.value = f"Wrote {', '.join(path.name for path in written)} into {shown}."


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _row(*children: widgets.Widget) -> widgets.Box:
    return widgets.Box(children, layout=Layout(flex_flow="row wrap", align_items="center", width="100%"))


# --- Controls ---------------------------------------------------------------------------------------------------------


def _decades(low: int, high: int) -> list[float]:
    """1, 2, 3 and 5 times the powers of ten from 10^low to 10^high."""
    exact = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 3, 5)][:-3]
    return [int(value) if low >= 0 else value for value in exact]


def _label(text: str) -> dict[str, Any]:
    style, layout = {"description_width": "104px"}, {"width": "auto"}
    return {"description": text, "description_allow_html": True, "style": style, "layout": layout}


def _scale(text: str, tooltip: str, options: Sequence[float]) -> Callable[[Any], widgets.ValueWidget]:
    """A slider over given values, to which the one that it starts from is added."""

    def control(value: Any) -> widgets.ValueWidget:
        stops = [(f"{stop:,}".replace(",", "\u202f"), stop) for stop in sorted({*options, value})]
        return widgets.SelectionSlider(
            options=stops, value=value, tooltip=tooltip, continuous_update=False, **_label(text)
        )

    return control


def _choice(text: str, tooltip: str, options: Sequence[str]) -> Callable[[Any], widgets.ValueWidget]:
    def control(value: Any) -> widgets.ValueWidget:
        listed = [(tables.word(option), option) for option in dict.fromkeys([*options, value])]
        return widgets.Dropdown(options=listed, value=value, tooltip=tooltip, **_label(text))

    return control


def _device(value: Any) -> widgets.ValueWidget:
    # Asked for when there is such a control, not on import: looking for a GPU takes time.
    return _choice("device", "that trains", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])(value)


def _number(text: str, tooltip: str, most: int = 9999) -> Callable[[Any], widgets.ValueWidget]:
    def control(value: Any) -> widgets.ValueWidget:
        return widgets.BoundedIntText(value, min=0, max=max(most, value), tooltip=tooltip, **_label(text))

    return control


CONTROLS: dict[str, Callable[[Any], widgets.ValueWidget]] = {
    "depth": _scale("depth <i>L</i>", "number of layers of the deepest network", [2**k for k in range(3, 11)]),
    "width": _scale("width <i>m</i>", "neurons of each layer", [2**k for k in range(8)]),
    "dimension": _scale("dimension <i>d</i>", "of inputs, hidden states and outputs", [2**k for k in range(7)]),
    "samples": _scale("samples <i>n</i>", "random pairs (x, y) to fit", _decades(0, 3)),
    "learning_rate": _scale("learning rate", "a layer's weights step by L times this", _decades(-4, 1)),
    "iterations": _scale("iterations", "steps of full-batch gradient descent", _decades(1, 5)),
    "activation": _choice("activation", "applied entry by entry", list(activations.ACTIVATIONS)),
    "initialisation": _choice("initialisation", "of W across the layers, V starts at 0", INITIALISATIONS),
    "convention": _choice("convention", "which factors stand before V and W", list(conventions.CONVENTIONS)),
    "initial_V": _choice("initial V", "where it is not 0", INITIAL_V),
    "dtype": _choice("dtype", "of weights and computation", list(DTYPES)),
    "device": _device,
    "draw_order": _choice("draw order", "of the random numbers", conventions.DRAW_ORDERS),
    "reference": _choice("reference", "in the limit's place", list(REFERENCES)),
    "sampling": _choice("sampling", "of the norm over s", conventions.SAMPLING_RULES),
    "accuracy": _choice("accuracy", "of which epoch", ("last", "best")),
    "seed": _number("seed", "draws weights and data"),
    "row": _number("row", "of the entry shown, counted from 0"),
    "column": _number("column", "of the entry shown, counted from 0"),
}


# --- Networks of growing depth ----------------------------------------------------------------------------------------

SMALLEST_DEPTH = 4
# What each story compares: initialisation, activation and convention of the first and of the second network, at which
# learning rate.
STORIES = {
    "weight-tied or i.i.d. layers": ("weight-tied gelu released", "iid gelu released", 0.01),
    "weight-tied or Gaussian process": ("weight-tied gelu released", "gaussian-process gelu released", 0.01),
    "GELU or ReLU": ("weight-tied gelu released", "weight-tied relu released", 0.01),
    "released or eq. (3) scaling": ("weight-tied gelu released", "weight-tied gelu eq3", 0.01),
    "a step that i.i.d. layers do not survive": ("weight-tied gelu released", "iid gelu released", 0.3),
}
KIND = ("initialisation", "activation", "convention")


def explore_depth(config: DepthsConfig, second: NetworkConfig | None = None, row: int = 0, column: int = 0) -> Explorer:
    """Train networks of several depths live, one kind of network or two side by side.

    ``config`` says what the sliders start from (its deepest network is the depth's), ``second`` which activation,
    initialisation and convention the second network has (None: no second network at first).
    """
    network, names = config.network, ("width", "dimension", "samples", "seed", *KIND)
    start = {name: getattr(network, name) for name in names} | {"depth": config.depths[-1], "row": row}
    start |= {"iterations": config.iterations, "learning_rate": config.learning_rate, "column": column}
    controls = {name: CONTROLS[name](value) for name, value in start.items()}
    for name in KIND:
        controls[f"second_{name}"] = CONTROLS[name](getattr(second or replace(network, initialisation="iid"), name))
    controls["compare"] = widgets.Checkbox(
        second is not None, description="compare with a second network", indent=False
    )

    def configs(values: Values) -> list[DepthsConfig]:
        smallest = min(SMALLEST_DEPTH, max(values["depth"] // 2, 1))  # two depths at least
        depths = [2**power for power in range(20) if smallest <= 2**power < values["depth"]] + [values["depth"]]
        first = replace(network, **{name: values[name] for name in names})
        networks = [first, replace(first, **{name: values[f"second_{name}"] for name in KIND})]
        return [
            DepthsConfig(each, depths, values["iterations"], values["learning_rate"])
            for each in networks[: 2 if values["compare"] else 1]
        ]

    def make(values: Values) -> Run:
        states = side_by_side([depths_steps(each) for each in configs(values)])
        return Run(states, values["iterations"], lambda state: state.iteration, lambda comparison: comparison.sentence)

    def draw(comparison: Comparison, values: Values, figure: Figure | None) -> Figure:
        return pictures.explore_depth(comparison.states, values["row"], values["column"], figure)

    def table(comparison: Comparison, values: Values) -> dict[str, tables.Table]:
        named = zip(("first", "second"), comparison.states, strict=False)
        return {
            f"{name}_{kind}": table
            for name, state in named
            for kind, table in state.tables(values["row"], values["column"]).items()
        }

    def status(comparison: Comparison, values: Values) -> list[str]:
        losses = [f"{state.losses[values['depth']][-1]:.3g}" for state in comparison.states]
        return [f"iteration {comparison.iteration:,} of {values['iterations']:,}", f"loss {' and '.join(losses)}"]

    def reproduce(values: Values) -> tuple[str, Values, str]:
        first, *others = configs(values)
        times = sorted({1 + values["iterations"] * quarter // 4 for quarter in (1, 2, 3, 4)})
        shared = {name: values[name] for name in (*names, "learning_rate")}
        differing = [f"{name}: {getattr(other.network, name)}" for other in others for name in KIND]
        remark = f"for the second network: {', '.join(differing)}" if differing else ""
        shared["slope_from"] = min(8, *first.depths[-2:])
        return "figure_1_left", {"depths": first.depths, "iterations": times, **shared}, remark

    def keep_entry_inside(_: object) -> None:
        for name in ("row", "column"):
            controls[name].max = min(controls["width"].value, controls["dimension"].value) - 1

    for name in ("width", "dimension"):
        controls[name].observe(keep_entry_inside, names="value")
    keep_entry_inside(None)
    stories = [widgets.Button(description=title, layout=Layout(width="auto")) for title in STORIES]
    explorer = Explorer(
        "explore_depth",
        controls,
        make,
        draw,
        reproduce=reproduce,
        panel=_depth_panel(controls),
        above=[_row(widgets.HTML("<b>Try</b>&nbsp;"), *stories)],
        table=table,
        status=status,
        view=("row", "column"),
    )
    for button in stories:
        button.on_click(explorer.at_home(partial(_tell, explorer)))
    return explorer


def _tell(explorer: Explorer, button: widgets.Button) -> None:
    *networks, learning_rate = STORIES[button.description]
    values = {"compare": True, "learning_rate": learning_rate}
    for prefix, words in zip(("", "second_"), networks, strict=True):
        values |= {f"{prefix}{name}": word for name, word in zip(KIND, words.split(), strict=True)}
    explorer.live.stop()
    explorer.set(**values)
    explorer.start()


def _depth_panel(controls: Mapping[str, widgets.ValueWidget]) -> list[widgets.Widget]:
    def group(*names: str, title: str = "", color: str = "") -> widgets.VBox:
        heading = [widgets.HTML(f'<b style="color: {color}">{title}</b>')] if title else []
        return widgets.VBox([*heading, *(controls[name] for name in names)])

    first = group(*KIND, title="first network", color=pictures.HUE_COLORS[0])
    second = group(*(f"second_{name}" for name in KIND), title="second network", color=pictures.HUE_COLORS[1])

    def show_second(_: object) -> None:
        second.layout.display = None if controls["compare"].value else "none"

    controls["compare"].observe(show_second, names="value")
    show_second(None)
    return [
        group("depth", "width", "dimension", "samples"),
        group("learning_rate", "iterations", "seed", "row", "column"),
        first,
        widgets.VBox([controls["compare"], second]),
    ]


# --- Entries of trained convolutions ----------------------------------------------------------------------------------


def explore_weights(folder: Path | None = None, choice: trained.Choice | None = None) -> widgets.Widget:
    """Browse the trained networks of a folder (by default ``checkpoints/``), one or two side by side.

    Where the folder holds none, a sentence takes the explorer's place.
    """
    found, start = trained.find(folder), choice or trained.Choice()
    if not found:
        return widgets.HTML(trained.NOTHING_TRAINED)
    first, *others = trained.one_of_each(found)
    named = [(pictures.trained_name(config), path) for path, config in found.items()]
    shape = trained.load(first).weights("conv1").shape[1:]
    places = ("out channel", "in channel", "row", "column")
    controls: dict[str, widgets.ValueWidget] = {
        "run": widgets.Dropdown(options=named, value=first, **_label("network")),
        "second": widgets.Dropdown(
            options=[("none", None), *named], value=others[0] if others else None, **_label("beside it")
        ),
        "convolution": _choice("convolution", "of each layer", CONVOLUTIONS)(start.convolution),
        "how": _choice("entry", "which of the entries to follow through the layers", trained.HOW)(start.how),
        "seed": _number("seed", "draws the entry, as entry_seed of figure_3 does")(start.seed),
    }
    for name, size, place in zip(places, shape, start.index, strict=True):
        controls[name] = widgets.IntSlider(place, 0, size - 1, continuous_update=False, **_label(name))
    controls["image"] = _number("test image", "its number, from 0")(start.image)
    deepest = max(config.depth for config in found.values())
    controls["layers"] = _scale(
        "layers kept",
        "for accuracy and path, the middle ones of as many equal parts",
        [deepest >> power for power in range(deepest.bit_length())],
    )(min(start.layers or deepest, deepest))

    def chosen(values: Values) -> trained.Choice:
        index = tuple(values[name] for name in places)
        chosen = {name: values[name] for name in ("convolution", "how", "seed", "image", "layers")}
        return trained.Choice(**chosen, index=index)

    def make(values: Values) -> Run:
        return Run(trained.browse([path for path in (values["run"], values["second"]) if path]))

    def draw(browsing: trained.Browsing, values: Values, _: Figure | None) -> Figure:
        choice = chosen(values)
        return pictures.explore_weights(browsing.views(choice), *browsing.image(choice))

    def status(browsing: trained.Browsing, values: Values) -> list[str]:
        lines = []
        for view in browsing.views(chosen(values)):
            ratio = view.ratios[view.entry]
            rank = int((view.ratios < ratio).sum()) + 1
            lines.append(f"von Neumann ratio {ratio:.2g}, number {rank:,} of {view.ratios.size:,} from the smoothest")
        return lines + browsing.accuracies(chosen(values))

    def reproduce(values: Values) -> tuple[str, Values, str]:
        names = ("activation", "batch_norm", "seed", "epochs", "depth", "learning_rate")
        shown = {name: getattr(found[values["run"]], name) for name in names}
        if values["how"] == "random":
            return "figure_3", shown | {"entry_seed": values["seed"]}, ""
        return "figure_3", shown, "figure_3 draws its entries: choose 'random' here for the ones that it shows"

    def show_what_counts(_: object) -> None:
        how = controls["how"].value
        for name, counts in ({"seed": how == "random"} | dict.fromkeys(places, how == "index")).items():
            controls[name].layout.display = None if counts else "none"

    controls["how"].observe(show_what_counts, names="value")
    show_what_counts(None)
    view = [name for name in controls if name not in ("run", "second")]
    runs = widgets.VBox([controls["run"], controls["second"]], layout=Layout(max_width="700px"))
    return Explorer(
        "explore_weights",
        controls,
        make,
        draw,
        reproduce=reproduce,
        panel=[controls[name] for name in view],
        above=[runs],
        table=lambda browsing, values: {"": browsing.table(chosen(values))},
        status=status,
        view=view,
        follow=True,
        buttons=False,
    )


# --- Figures ----------------------------------------------------------------------------------------------------------


def figure(
    name: str,
    namespace: Mapping[str, Any],
    *,
    result: Any,
    draw: Callable[[Any, SimpleNamespace], Figure],
    steps: Callable[[SimpleNamespace], Iterator[Any]] | None = None,
    compute: Callable[[SimpleNamespace, Progress], Any] | None = None,
    tables: Sequence[str | None] = ("",),
) -> Explorer:
    """The explorer at the end of a figure's notebook: a control for each parameter of the notebook.

    ``namespace`` is the notebook's ``globals()``. When a control moves, the notebook's cell tagged ``config`` runs
    with the new values, and ``now`` is what the namespace then holds. ``result`` is what the notebook has computed and
    ``draw``, (result, now) -> figure, how it drew that. What computes it anew is either ``steps``, now -> an iterator
    of the results so far, or ``compute``, (now, progress) -> result. ``tables`` says what the parts of a result are
    called when they are saved, after the figure's name: "" for nothing more, None for what is no table.
    """
    offered = parameters.offered(name)
    controls = {each.name: _control(each, namespace[each.name]) for each in offered.values()}
    config = "\n".join(parameters.code(cell) for cell in parameters.tagged(parameters.read(name), "config"))

    def read(values: Values) -> dict[str, Any]:
        return {key: _list(key, value) if offered[key].type == "list" else value for key, value in values.items()}

    def moved_to(values: Values) -> SimpleNamespace:
        now = dict(namespace) | read(values)
        exec(compile(config, f"{name}.ipynb", "exec"), now)
        return SimpleNamespace(**{key: value for key, value in now.items() if not key.startswith("__")})

    def make(values: Values) -> Run:
        now = moved_to(values)
        if steps is not None:
            # An empty table is nothing to draw yet.
            states = (((count, so_far, now) if so_far else None) for count, so_far in enumerate(steps(now), start=1))
            return Run(states, now.config.steps, lambda state: state[0])
        reported = [0.0]
        results = in_thread(partial(compute, now), reported)
        states = (result if result is None else (0, result, now) for result in results)
        return Run(states, 100, lambda _: round(reported[-1]))

    return Explorer(
        name,
        controls,
        make,
        lambda state, values, _: draw(*state[1:]),
        table=lambda state, values: _tables(state[1], tables),
        reproduce=lambda values: (name, read(values), ""),
        first=(0, result, moved_to({key: control.value for key, control in controls.items()})),
        follow=True,
    )


def _tables(result: Any, names: Sequence[str | None]) -> dict[str, tables.Table]:
    """The tables among the parts of a result, by their names."""
    parts = result if isinstance(result, tuple) else (result,)
    return {name: part for name, part in zip(names, parts, strict=False) if name is not None}


def _control(parameter: parameters.Parameter, value: Any) -> widgets.ValueWidget:
    """The control for a parameter of a notebook: that of its name where there is one, else one of its type."""
    label = _label(html.escape(parameter.name.replace("_", " "))) | {"tooltip": parameter.words}
    if parameter.type == "list":
        # As YAML has it, which reads it again: 5.0e-05, where Python's 5e-05 would be text.
        text = yaml.safe_dump(list(value), default_flow_style=True, width=1000).strip()[1:-1]
        return widgets.Text(text, continuous_update=False, **label)
    if parameter.name in CONTROLS:
        control = CONTROLS[parameter.name](value)
        control.tooltip = parameter.words or control.tooltip
        return control
    if parameter.type == "bool":
        return widgets.Checkbox(value, **label)
    if parameter.type == "int":
        return widgets.IntText(value, continuous_update=False, **label)
    if parameter.type == "float":
        return widgets.FloatText(value, continuous_update=False, **label)
    return widgets.Text(value, continuous_update=False, **label)


def _list(name: str, text: str) -> list:
    """The list that a text such as "2, 4, 8" means."""
    try:
        return yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError(f"{name} is {text!r}, expected values with commas in between.") from None
