"""Sliders, menus and fields: a control for each parameter, by its name or else by its type."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import torch
import yaml

from lib import activations, parameters, tables
from lib.cifar.network import CONVOLUTIONS
from lib.dense import conventions
from lib.dense.network import DTYPES, INITIAL_V, INITIALISATIONS
from lib.figures.figure_1_right import REFERENCES


def _decades(low: int, high: int) -> list[float]:
    """1, 2, 3 and 5 times the powers of ten from 10^low to 10^high."""
    exact = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 3, 5)][:-3]
    return [int(value) if low >= 0 else value for value in exact]


def label(text: str) -> dict[str, Any]:
    style, layout = {"description_width": "118px"}, {"width": "auto"}
    return {"description": text, "description_allow_html": True, "style": style, "layout": layout}


def scale(text: str, tooltip: str, options: Sequence[float]) -> Callable[[Any], widgets.ValueWidget]:
    """A slider over given values and the value at which it starts."""

    def control(value: Any) -> widgets.ValueWidget:
        stops = [(f"{stop:,}".replace(",", "\u202f"), stop) for stop in sorted({*options, value})]
        return widgets.SelectionSlider(
            options=stops, value=value, tooltip=tooltip, continuous_update=False, **label(text)
        )

    return control


def menu(text: str, tooltip: str, options: Sequence[str]) -> Callable[[Any], widgets.ValueWidget]:
    def control(value: Any) -> widgets.ValueWidget:
        listed = [(tables.word(option), option) for option in dict.fromkeys([*options, value])]
        return widgets.Dropdown(options=listed, value=value, tooltip=tooltip, **label(text))

    return control


def _device(value: Any) -> widgets.ValueWidget:
    # Made when it is needed and not on import, since looking for a GPU takes time.
    return menu("device", "that trains", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])(value)


def whole_number(text: str, tooltip: str) -> Callable[[Any], widgets.ValueWidget]:
    def control(value: Any) -> widgets.ValueWidget:
        return widgets.BoundedIntText(value, min=0, max=max(9999, value), tooltip=tooltip, **label(text))

    return control


def _epoch(value: Any) -> widgets.ValueWidget:
    return widgets.IntSlider(value, min=0, max=max(180, value), continuous_update=False, **label("epoch"))


CONTROLS: dict[str, Callable[[Any], widgets.ValueWidget]] = {
    "depth": scale("depth <i>L</i>", "number of layers of the deepest network", [2**k for k in range(3, 11)]),
    "width": scale("width <i>m</i>", "neurons of each layer", [2**k for k in range(8)]),
    "dimension": scale("dimension <i>d</i>", "of inputs, hidden states and outputs", [2**k for k in range(7)]),
    "samples": scale("samples <i>n</i>", "random pairs (x, y) to fit", _decades(0, 3)),
    "learning_rate": scale("learning rate", "a layer's weights step by L times this", _decades(-4, 1)),
    "iterations": scale("iterations", "steps of full-batch gradient descent", _decades(1, 5)),
    "activation": menu("activation", "applied entry by entry", list(activations.ACTIVATIONS)),
    "convolution": menu("convolution", "of each layer", CONVOLUTIONS),
    "initialisation": menu("initialisation", "of W across the layers, V starts at 0", INITIALISATIONS),
    "convention": menu("convention", "which factors stand before V and W", list(conventions.CONVENTIONS)),
    "initial_V": menu("initial V", "where it is not 0", INITIAL_V),
    "dtype": menu("dtype", "of weights and computation", list(DTYPES)),
    "device": _device,
    "draw_order": menu("draw order", "of the random numbers", conventions.DRAW_ORDERS),
    "reference": menu("reference", "in the limit's place", list(REFERENCES)),
    "sampling": menu("sampling", "of the norm over s", conventions.SAMPLING_RULES),
    "accuracy": menu("accuracy", "of which epoch", ("last", "best")),
    "epoch": _epoch,
    "seed": whole_number("seed", "draws weights and data"),
    "row": whole_number("row", "of the entry shown, counted from 0"),
    "column": whole_number("column", "of the entry shown, counted from 0"),
}


def make_control(parameter: parameters.Parameter, value: Any) -> widgets.ValueWidget:
    """The control for a parameter of a notebook: the one for its name if there is one, else the one for its type."""
    labelled = label(html.escape(parameter.name.replace("_", " "))) | {"tooltip": parameter.words}
    if parameter.type == "list":
        text = yaml.safe_dump(list(value), default_flow_style=True, width=1000).strip()[1:-1]
        return widgets.Text(text, continuous_update=False, **labelled)
    if parameter.name in CONTROLS:
        control = CONTROLS[parameter.name](value)
        control.tooltip = parameter.words or control.tooltip
        return control
    if parameter.type == "bool":
        return widgets.Checkbox(value, **labelled)
    if parameter.type == "int":
        return widgets.IntText(value, continuous_update=False, **labelled)
    if parameter.type == "float":
        return widgets.FloatText(value, continuous_update=False, **labelled)
    return widgets.Text(value, continuous_update=False, **labelled)
