"""Explorers: sliders, buttons and a picture on the project's own functions. The one module that knows widgets.

An explorer is wired from functions that exist without it: one that starts a training (an iterator of states), one
that draws a state, one that writes the parameters as the YAML that ``make`` takes. Training advances in slices of the
kernel's event loop, so that every button answers between two slices; the picture is a matplotlib figure without
pyplot, sent as PNG. Where no person looks (`paths.unattended`) an explorer draws its first state and waits for ever.
"""

import asyncio
import html
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ipywidgets as widgets
import yaml
from matplotlib.figure import Figure

from lib import activations, cifar, conventions, parameters, paths, pictures, plots, records, tables, trained
from lib.depths import Comparison, DepthsConfig, depths_steps, side_by_side
from lib.experiments import Progress
from lib.network import INITIALISATIONS, NetworkConfig
from lib.training import one_thread

SLICE = 0.03  # seconds of training between two chances for a button to answer
PAUSE = 0.005  # seconds left to the kernel after each slice
FRAME = 0.07  # seconds at least between two pictures
LIVE_DPI, STILL_DPI = 110, 200

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """What an explorer runs: ``states``, one a step (None: nothing new yet). ``done`` says how many of ``total`` steps
    are behind a state, ``warning`` a sentence where there is one."""

    states: Iterator[Any]
    total: int = 1
    done: Callable[[Any], int] = lambda state: 0
    warning: Callable[[Any], str] = lambda state: ""


class Explorer(widgets.VBox):
    """Controls beside a picture, with Start, Stop and Reset where there is something to train.

    Main arguments: ``name`` of the saved figure; ``controls`` by parameter name; ``train``, the controls' values ->
    `Training`; ``draw``, (state, values, figure) -> figure, where ``figure`` is None or the last one, to be brought
    up to date if the function can; ``reproduce``, values -> (notebook, parameters, remark) with which ``make`` makes
    the same numbers.

    Other arguments: ``panel``, the controls' arrangement; ``table``, (state, values) -> tables to save beside the
    figure; ``status``, (state, values) -> a line of text; ``view``, names of controls that change the picture and not
    the training; ``first``, a state to show before anything runs; ``follow``, whether a moved slider starts the
    training by itself; ``buttons``, whether there are Start, Stop, Reset and a progress bar.

    Functions raise ValueError, TypeError or ArithmeticError with a sentence for values that cannot be; the explorer
    shows the sentence.
    """

    _training_now: ClassVar["Explorer | None"] = None  # at most one, also when a cell is run again

    def __init__(
        self,
        name: str,
        controls: Mapping[str, widgets.ValueWidget],
        train: Callable[[Values], Training],
        draw: Callable[[Any, Values, Figure | None], Figure],
        *,
        reproduce: Callable[[Values], tuple[str, Values, str]],
        panel: Sequence[widgets.Widget] = (),
        table: Callable[[Any, Values], Mapping[str, tables.Table]] | None = None,
        status: Callable[[Any, Values], str] | None = None,
        view: Sequence[str] = (),
        first: Any = None,
        follow: bool = False,
        buttons: bool = True,
    ) -> None:
        if Explorer._training_now is not None:
            Explorer._training_now.stop()
        self.name, self.controls, self.follow, self.buttons = name, dict(controls), follow, buttons
        self._train, self._draw, self._reproduce, self._table = train, draw, reproduce, table
        self._status, self._view, self._first = status, set(view), first
        self._start = self.values()
        self._task: asyncio.Task | None = None
        self._held = False
        self._frames: pictures.Frames | None = None
        self._next_frame = 0.0
        self.state: Any = None
        self._build(panel or list(self.controls.values()))
        super().__init__([self.body, self.footer])
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        self.restart(first)
        if first is None:
            self._follow()

    # --- What is on the screen ---

    def _build(self, panel: Sequence[widgets.Widget]) -> None:
        wide = widgets.Layout(width="auto", flex="1 1 70px")
        self.start_button = widgets.Button(description="Start", icon="play", button_style="success", layout=wide)
        self.stop_button = widgets.Button(description="Stop", icon="pause", button_style="warning", layout=wide)
        self.reset_button = widgets.Button(description="Reset", icon="undo", layout=wide)
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.reset_button.on_click(lambda _: self.reset())
        self.progress = widgets.IntProgress(layout=widgets.Layout(width="100%", height="10px", margin="6px 0 0 0"))
        self.status = widgets.HTML()
        self.status.add_class("explorer-status")
        self.message = widgets.HTML()
        self.message.add_class("explorer-message")
        self.run_panel = widgets.VBox([_row(self.start_button, self.stop_button, self.reset_button), self.progress])
        grid = widgets.Layout(
            flex="1 1 300px", min_width="0", grid_template_columns="repeat(auto-fit, minmax(280px, 1fr))",
            align_content="flex-start", align_items="flex-start", grid_gap="0 24px",
        )  # fmt: skip
        left = widgets.GridBox([*panel, *([self.run_panel] if self.buttons else []), self.status], layout=grid)
        self.image = widgets.Image(format="png", layout=widgets.Layout(width="100%", max_width="1200px"))
        self.image.add_class("explorer-picture")
        picture = widgets.VBox([self.image, self.message], layout=widgets.Layout(flex="999 1 640px", min_width="0"))
        self.body = widgets.Box([left, picture], layout=widgets.Layout(flex_flow="row wrap", width="100%"))
        self.save_button = widgets.Button(description="Save this figure", icon="download")
        self.save_button.on_click(lambda _: self.save())
        self.save_name = widgets.Text(self.name, description="as", layout=widgets.Layout(width="260px"))
        self.save_name.style.description_width = "24px"
        self.saved = widgets.HTML()
        self.parameters = widgets.Textarea(
            disabled=True, layout=widgets.Layout(width="100%", max_width="900px", height="250px")
        )
        self.parameters.add_class("explorer-parameters")
        self.save_name.observe(lambda _: self._show_parameters(), names="value")
        self.footer = widgets.VBox([_row(self.save_button, self.save_name, self.saved), self.parameters])

    def values(self) -> dict[str, Any]:
        """What the controls say, by parameter name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values: Any) -> None:
        """Move several controls at once: the training restarts once."""
        self._held = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._held = False
        self._moved(None)

    # --- Training, slice by slice ---

    @property
    def running(self) -> bool:
        """Whether the training advances by itself."""
        return self._task is not None

    def restart(self, first: Any = None) -> None:
        """Begin anew with the present values, and show the state before the first step (or ``first``)."""
        self.stop(draw=False)
        self.say("")
        try:
            self._training = self._train(self.values())
            self.finished = False
            state = next(self._training.states) if first is None else first
        except (ValueError, TypeError, ArithmeticError) as error:
            self._training, self.finished, state = Training(iter(())), True, None
            self.say(str(error))
        self.progress.value, self.progress.max = 0, self._training.total
        self._frames = None
        if state is None:  # the picture stays until there is another
            self._show_parameters()
            self._able()
        else:
            self.state = state
            self._show(STILL_DPI)

    def start(self) -> None:
        """Let the training advance by itself; a finished one begins anew."""
        if self.running:
            return
        if self.finished:
            self.restart()
        if self.finished:
            return
        if Explorer._training_now is not None:
            Explorer._training_now.stop()
        Explorer._training_now = self
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._able()

    def stop(self, draw: bool = True) -> None:
        """Halt the training where it is; Start goes on from there."""
        if self.running:
            self._task.cancel()
            self._halted(draw)

    def reset(self) -> None:
        """Halt, and go back to the state before the first step, or to the state shown ``first`` and its values."""
        self.stop(draw=False)
        if self._first is not None:
            self._held = True
            for name, value in self._start.items():
                self.controls[name].value = value
            self._held = False
        self.restart(self._first)

    async def _run(self) -> None:
        try:
            while self.advance():
                await asyncio.sleep(PAUSE)
        except Exception as error:  # a fault of the project: say so, rather than stand still
            self.finished = True
            self._halted(draw=False)
            self.say(f"{type(error).__name__}: {error}")
            raise
        self._halted()

    def _halted(self, draw: bool = True) -> None:
        self._task = None
        Explorer._training_now = None
        if draw:
            self._show(STILL_DPI)
        self._able()

    def advance(self, seconds: float = SLICE) -> bool:
        """Train for about ``seconds``, at least a step, and draw if it is time to; returns whether there is more."""
        until = time.perf_counter() + seconds
        try:
            with one_thread():
                while not self.finished:
                    state = next(self._training.states)
                    if state is not None:
                        self.state, self._news = state, True
                    if time.perf_counter() > until:
                        break
        except StopIteration:
            self.finished = True
        except (ValueError, TypeError, ArithmeticError) as error:
            self.finished = True
            self.say(str(error))
        self.progress.value = self._training.done(self.state)
        if self._news and time.perf_counter() >= self._next_frame and not self.finished:
            self._show(LIVE_DPI)
        return not self.finished

    def _moved(self, change: Mapping | None) -> None:
        if self._held:
            return
        if change is not None and self._view.intersection(self._names(change["owner"])):
            self._frames = None
            self._show(LIVE_DPI if self.running else STILL_DPI)
            return
        running = self.running
        self.restart()
        if running:
            self.start()
        else:
            self._follow()

    def _follow(self) -> None:
        if self.follow and not self.finished and not paths.unattended() and _loop_runs():
            self.start()

    def _names(self, control: widgets.Widget) -> list[str]:
        return [name for name, other in self.controls.items() if other is control]

    # --- Showing ---

    def _show(self, dpi: float) -> None:
        started, self._news = time.perf_counter(), False
        values = self.values()
        if self.state is not None:
            try:
                figure = self._draw(self.state, values, self._frames.figure if self._frames else None)
            except (ValueError, TypeError, ArithmeticError) as error:
                self.say(str(error))
            else:
                if self._frames is None or self._frames.figure is not figure:
                    self._frames = pictures.Frames(figure)
                self.image.value = self._frames.png(dpi)
            if warning := self._training.warning(self.state):
                self.say(warning)
            self.progress.value = self._training.done(self.state)
            self.status.value = self._status(self.state, values) if self._status else ""
        self._show_parameters()
        self._able()
        now = time.perf_counter()
        self._next_frame = now + max(FRAME, now - started)  # no more time to pictures than to training

    def _able(self) -> None:
        self.start_button.disabled = self.running
        self.stop_button.disabled = not self.running

    def say(self, sentence: str) -> None:
        """Show a sentence below the picture (none: take it away)."""
        style = "border-left: 4px solid #D55E00; background: #FDF1E7; color: #5A2B00; padding: 6px 12px; margin: 4px"
        text = f'<div style="{style}">{html.escape(sentence)}</div>'
        self.message.value = text if sentence else ""

    # --- From playing to reproducing ---

    def _show_parameters(self) -> None:
        try:
            notebook, values, remark = self._reproduce(self.values())
        except (ValueError, TypeError):
            self.parameters.value = ""  # the message says why
            return
        lines = [f"# make {notebook} PARAMETERS=figures/custom/{self.save_name.value}.yaml"]
        lines += [f"# {remark}"] if remark else []
        for name, value in values.items():
            inline = None if isinstance(value, list) else False
            lines.append(yaml.safe_dump({name: value}, default_flow_style=inline, width=1000).rstrip())
        self.parameters.value = "\n".join(lines) + "\n"

    def save(self) -> None:
        """Save the picture as PDF and PNG, its tables as CSV and the parameters as YAML, under the name given."""
        name, values = self.save_name.value.strip(), self.values()
        if not re.fullmatch(r"\w[\w.-]*", name):
            self.saved.value = f"{html.escape(repr(name))} is no file name: letters, digits, dots and dashes, please."
            return
        if self.state is None:
            self.saved.value = "There is no picture to save yet."
            return
        data = self._table(self.state, values) if self._table else {}
        data = {f"{name}_{kind}" if kind else name: table for kind, table in data.items()}
        written = plots.save(name, self._draw(self.state, values, None), data)
        written.append(paths.figures_output() / f"{name}.yaml")
        written[-1].write_text(self.parameters.value, encoding="utf-8")
        folder = paths.figures_output()
        shown = folder.relative_to(paths.ROOT) if folder.is_relative_to(paths.ROOT) else folder
        self.saved.value = f"Wrote {', '.join(path.name for path in written)} into {html.escape(str(shown))}."


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _row(*children: widgets.Widget) -> widgets.Box:
    return widgets.Box(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", width="100%"))


# --- Controls ---------------------------------------------------------------------------------------------------------

WIDE = {"layout": {"width": "auto"}}


def _decades(low: int, high: int) -> list[float]:
    """1, 2 and 5 times the powers of ten from 10^low to 10^high."""
    exact = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 5)][:-2]
    return [int(value) if low >= 0 else value for value in exact]


def _label(text: str) -> dict[str, Any]:
    return {"description": text, "description_allow_html": True, "style": {"description_width": "104px"}, **WIDE}


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
        listed = [(pictures.WORDS.get(option, option), option) for option in options]
        return widgets.Dropdown(options=listed, value=value, tooltip=tooltip, **_label(text))

    return control


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
    "seed": _number("seed", "draws weights and data"),
    "row": _number("row", "of the entry shown, counted from 0"),
    "column": _number("column", "of the entry shown, counted from 0"),
}


# --- Networks of growing depth ----------------------------------------------------------------------------------------

SMALLEST_DEPTH = 4
# The two networks that a story compares; what it does not name stays as it is.
STORIES: dict[str, dict[str, Any]] = {
    "weight-tied or i.i.d. layers": {
        "compare": True,
        "initialisation": "weight-tied",
        "second_initialisation": "iid",
        "activation": "gelu",
        "second_activation": "gelu",
        "learning_rate": 0.01,
    },
    "a smooth start is enough: Gaussian process": {
        "compare": True,
        "initialisation": "weight-tied",
        "second_initialisation": "gaussian-process",
        "activation": "gelu",
        "second_activation": "gelu",
        "learning_rate": 0.01,
    },
    "GELU or ReLU": {
        "compare": True,
        "initialisation": "weight-tied",
        "second_initialisation": "weight-tied",
        "activation": "gelu",
        "second_activation": "relu",
        "learning_rate": 0.01,
    },
    "released or eq. (3) scaling": {
        "compare": True,
        "initialisation": "weight-tied",
        "second_initialisation": "weight-tied",
        "activation": "gelu",
        "second_activation": "gelu",
        "convention": "released",
        "second_convention": "eq3",
        "learning_rate": 0.01,
    },
    "a step too large": {
        "compare": True,
        "initialisation": "weight-tied",
        "second_initialisation": "iid",
        "activation": "relu",
        "second_activation": "relu",
        "learning_rate": 0.5,
    },
}


def explore_depth(config: DepthsConfig, second: NetworkConfig | None = None, row: int = 0, column: int = 0) -> Explorer:
    """Train networks of several depths live, one kind of network or two side by side.

    ``config`` says what the sliders start from (its deepest network is the depth's), ``second`` which activation,
    initialisation and convention the second network has (None: no second network at first).
    """
    network, kind = config.network, ("initialisation", "activation", "convention")
    names = ("width", "dimension", "samples", "seed", *kind)
    start = {name: getattr(network, name) for name in names} | {"depth": config.depths[-1], "row": row}
    start |= {"iterations": config.iterations, "learning_rate": config.learning_rate, "column": column}
    controls = {name: CONTROLS[name](value) for name, value in start.items()}
    for name in kind:
        controls[f"second_{name}"] = CONTROLS[name](getattr(second or replace(network, initialisation="iid"), name))
    controls["compare"] = widgets.Checkbox(
        second is not None, description="compare with a second network", indent=False
    )

    def configs(values: Values) -> list[DepthsConfig]:
        depths = [2**power for power in range(20) if SMALLEST_DEPTH <= 2**power < values["depth"]] + [values["depth"]]
        first = replace(network, **{name: values[name] for name in names})
        networks = [first, replace(first, **{name: values[f"second_{name}"] for name in kind})]
        return [
            DepthsConfig(each, depths, values["iterations"], values["learning_rate"])
            for each in networks[: 2 if values["compare"] else 1]
        ]

    def train(values: Values) -> Training:
        states = side_by_side([depths_steps(each) for each in configs(values)])
        return Training(
            states, values["iterations"], lambda state: state.iteration, lambda comparison: comparison.sentence
        )

    def draw(comparison: Comparison, values: Values, figure: Figure | None) -> Figure:
        return pictures.explore_depth(comparison.states, values["row"], values["column"], figure)

    def table(comparison: Comparison, values: Values) -> dict[str, tables.Table]:
        named = zip(("first", "second"), comparison.states, strict=False)
        return {
            f"{name}_{kind}": table
            for name, state in named
            for kind, table in state.tables(values["row"], values["column"]).items()
        }

    def status(comparison: Comparison, values: Values) -> str:
        losses = [f"{state.losses[values['depth']][-1]:.3g}" for state in comparison.states]
        return f"iteration {comparison.iteration:,} of {values['iterations']:,}<br>loss {' and '.join(losses)}"

    def reproduce(values: Values) -> tuple[str, Values, str]:
        first, *others = configs(values)
        times = sorted({1 + values["iterations"] * quarter // 4 for quarter in (1, 2, 3, 4)})
        shared = {name: values[name] for name in (*names, "learning_rate")}
        differing = [f"{name}: {getattr(other.network, name)}" for other in others for name in kind]
        remark = f"for the second network: {', '.join(differing)}" if differing else ""
        return "figure_1_left", {"depths": first.depths, "iterations": times, **shared, "slope_from": 8}, remark

    def keep_entry_inside(_: object) -> None:
        for name in ("row", "column"):
            controls[name].max = min(controls["width"].value, controls["dimension"].value) - 1

    for name in ("width", "dimension"):
        controls[name].observe(keep_entry_inside, names="value")
    keep_entry_inside(None)
    explorer = Explorer(
        "explore_depth", controls, train, draw, panel=_depth_panel(controls), reproduce=reproduce, table=table,
        status=status, view=("row", "column"),
    )  # fmt: skip
    explorer.children = [_stories(explorer), *explorer.children]
    return explorer


def _depth_panel(controls: Mapping[str, widgets.ValueWidget]) -> list[widgets.Widget]:
    def group(*names: str, title: str = "", color: str = "") -> widgets.VBox:
        heading = [widgets.HTML(f'<b style="color: {color}">{title}</b>')] if title else []
        return widgets.VBox([*heading, *(controls[name] for name in names)])

    kind = ("initialisation", "activation", "convention")
    first = group(*kind, title="first network", color=pictures.HUE_COLORS[0])
    second = group(*(f"second_{name}" for name in kind), title="second network", color=pictures.HUE_COLORS[1])

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


def _stories(explorer: Explorer) -> widgets.Widget:
    buttons = [widgets.HTML("<b>Try</b>&nbsp;")]
    for title, values in STORIES.items():
        button = widgets.Button(description=title, layout=widgets.Layout(width="auto"))

        def tell(_: widgets.Button, values: Values = values) -> None:
            explorer.stop(draw=False)
            explorer.set(**values)
            explorer.start()

        button.on_click(tell)
        buttons.append(button)
    return _row(*buttons)


# --- Entries of trained convolutions ----------------------------------------------------------------------------------


def explore_weights(folder: Path | None = None) -> widgets.Widget:
    """Browse the trained networks of a folder (by default ``checkpoints/``), one or two side by side.

    Where the folder holds none, a sentence takes the explorer's place.
    """
    found = trained.find(folder)
    if not found:
        sentence = "There is no trained network in checkpoints/ yet: make train trains one, make help says more."
        return widgets.HTML(sentence)
    named = [(pictures.trained_name(config), path) for path, config in found.items()]
    tied = [path for path, config in found.items() if config.smooth_init] or [named[0][1]]
    others = [path for path, config in found.items() if not config.smooth_init and path != tied[0]]
    wide = {"layout": {"width": "auto"}, "style": {"description_width": "104px"}}
    controls: dict[str, widgets.ValueWidget] = {
        "run": widgets.Dropdown(options=named, value=tied[0], description="network", **wide),
        "second": widgets.Dropdown(
            options=[("none", None), *named], value=(others or [None])[0], description="beside it", **wide
        ),
        "convolution": widgets.ToggleButtons(options=list(records.CONVOLUTIONS), style={"button_width": "70px"}),
        "choice": widgets.Dropdown(options=trained.CHOICES, value="random", description="entry", **wide),
        "seed": CONTROLS["seed"](0),
    }
    controls["seed"].tooltip = "draws the entry, as entry_seed of figure_3 does"
    shape = trained.load(tied[0]).weights("conv1").shape[1:]
    for name, size in zip(("out channel", "in channel", "row", "column"), shape, strict=True):
        controls[name] = widgets.IntSlider(0, 0, size - 1, continuous_update=False, **_label(name))
    controls["image"] = CONTROLS["seed"](7)
    controls["image"].description, controls["image"].tooltip = "test image", "its number, 0 to 9999"

    def entry(network: trained.Trained, values: Values) -> trained.Entry:
        index = tuple(values[name] for name in ("out channel", "in channel", "row", "column"))
        return network.entry(values["convolution"], values["choice"], index, values["seed"])

    def views(browsing: trained.Browsing, values: Values) -> list[trained.View]:
        chosen = entry(browsing.networks[0], values)
        images, number = browsing.images, values["image"]
        return [
            network.view(
                values["convolution"],
                network.entry(values["convolution"], "index", chosen),
                network.path(images, number) if images else None,
            )
            for network in browsing.networks
        ]

    def train(values: Values) -> Training:
        return Training(trained.browse([path for path in (values["run"], values["second"]) if path]), 1)

    def draw(browsing: trained.Browsing, values: Values, _: Figure | None) -> Figure:
        number, images = values["image"], browsing.images
        if images is None:
            return pictures.explore_weights(views(browsing, values), None, browsing.sentence)
        label = f"test image {number}: {cifar.CLASSES[int(images.labels[number])]}"
        return pictures.explore_weights(views(browsing, values), images.pixels[number].permute(1, 2, 0).numpy(), label)

    def status(browsing: trained.Browsing, values: Values) -> str:
        lines = []
        for view in views(browsing, values):
            ratio = view.ratios[view.entry]
            rank = int((view.ratios < ratio).sum()) + 1
            lines.append(f"von Neumann ratio {ratio:.2g}, number {rank:,} of {view.ratios.size:,} from the smoothest")
        return "<br>".join(lines)

    def reproduce(values: Values) -> tuple[str, Values, str]:
        config = found[values["run"]]
        names = ("activation", "batch_norm", "seed", "epochs", "depth", "learning_rate")
        shown = {name: getattr(config, name) for name in names}
        if values["choice"] == "random":
            return "figure_3", shown | {"entry_seed": values["seed"]}, ""
        return "figure_3", shown, "figure_3 draws its entries: choose 'random' here for the ones that it shows"

    def table(browsing: trained.Browsing, values: Values) -> dict[str, tables.Table]:
        rows, names = [], ("out", "in", "row", "column")
        for view in views(browsing, values):
            at = dict(zip(names, view.entry, strict=True)) | {"ratio": float(view.ratios[view.entry])}
            run = {"run": view.config.name, "convolution": view.convolution, **at}
            rows += [{**run, "layer": layer, "value": float(w)} for layer, w in enumerate(view.curve, start=1)]
        return {"": tables.from_rows(rows)}

    by_choice = {"seed": ("random",)} | dict.fromkeys(("out channel", "in channel", "row", "column"), ("index",))

    def show_choice(_: object) -> None:
        for name, choices in by_choice.items():
            controls[name].layout.display = None if controls["choice"].value in choices else "none"

    controls["choice"].observe(show_choice, names="value")
    show_choice(None)
    view = [name for name in controls if name not in ("run", "second")]
    explorer = Explorer(
        "explore_weights", controls, train, draw, panel=[controls[name] for name in view], reproduce=reproduce,
        table=table, status=status, view=view, follow=True, buttons=False,
    )  # fmt: skip
    runs = widgets.VBox([controls["run"], controls["second"]], layout=widgets.Layout(max_width="700px"))
    explorer.children = [runs, *explorer.children]
    return explorer


# --- Figures ----------------------------------------------------------------------------------------------------------


def figure(
    name: str,
    namespace: Mapping[str, Any],
    *,
    result: Any,
    draw: Callable[[Any, SimpleNamespace], Figure],
    steps: Callable[[SimpleNamespace], Iterator[Any]] | None = None,
    compute: Callable[[SimpleNamespace, Progress], Any] | None = None,
) -> Explorer:
    """The explorer at the end of a figure's notebook: a control for each parameter of the notebook.

    ``namespace`` is the notebook's ``globals()``. When a control moves, the notebook's cell tagged ``config`` runs
    with the new values, and ``now`` is what the namespace then holds. ``result`` is what the notebook has computed and
    ``draw``, (result, now) -> figure, how it drew that. What computes it anew is either ``steps``, now -> an iterator
    of the results so far, or ``compute``, (now, progress) -> result.
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

    def train(values: Values) -> Training:
        now = moved_to(values)
        if steps is not None:
            # An empty table is nothing to draw yet.
            states = (((count, so_far, now) if so_far else None) for count, so_far in enumerate(steps(now), start=1))
            return Training(states, now.config.steps, lambda state: state[0])
        reported = [0.0]
        results = in_thread(partial(compute, now), reported)
        states = (result if result is None else (0, result, now) for result in results)
        return Training(states, 100, lambda _: round(reported[-1]))

    return Explorer(
        name,
        controls,
        train,
        lambda state, values, _: draw(*state[1:]),
        reproduce=lambda values: (name, read(values), ""),
        first=(0, result, moved_to({key: control.value for key, control in controls.items()})),
        follow=True,
    )


def _control(parameter: parameters.Parameter, value: Any) -> widgets.ValueWidget:
    """The control for a parameter of a notebook: that of its name where there is one, else one of its type."""
    label = _label(html.escape(parameter.name.replace("_", " "))) | {"tooltip": parameter.words}
    if parameter.type == "list":
        return widgets.Text(", ".join(map(str, value)), continuous_update=False, **label)
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


class _Halt(BaseException):
    """Ends the work of a thread that nobody waits for any more."""


def in_thread(run: Callable[[Progress], Any], reported: list[float]) -> Iterator[Any]:
    """A function that reports its progress, as an iterator: None while it works, then its result.

    It works in a thread of its own, which waits wherever it reports (in per cent, to ``reported``) until the iterator
    is asked for more, and which has ended once the iterator is closed.
    """
    waits, go, outcome, closed = threading.Event(), threading.Event(), [], []

    def progress(items: Iterable, total: int) -> Iterator[Any]:
        for count, item in enumerate(items):
            reported.append(100 * count / total)
            waits.set()
            go.wait()
            go.clear()
            if closed:
                raise _Halt
            yield item

    def work() -> None:
        try:
            outcome.append(run(progress))
        except _Halt:
            pass
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if waits.is_set():
                waits.clear()
                go.set()
            thread.join(PAUSE)
            yield None
    finally:
        closed.append(True)
        go.set()
        thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    yield outcome[0]
