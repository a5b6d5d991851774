"""The explorer at the end of a figure's notebook: a control for each of the notebook's parameters."""

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import ipywidgets as widgets
import yaml

from lib import parameters
from lib.explore.controls import for_parameter
from lib.explore.explorer import Explorer, Values
from lib.explore.live import Run, in_thread
from lib.figures.results import Data

# Parameters whose values tell most, the first of them first.
TELLING = ("activation", "activations", "initialisation", "convolution", "layers", "every", "seed")


def explore_figure(room: ModuleType, namespace: Mapping[str, Any], data: Data) -> Explorer:
    """The explorer at the end of a figure's notebook: a control for each parameter of the notebook.

    ``room`` is the figure's module, ``namespace`` the notebook's ``globals()``, ``data`` what it has computed. When a
    control moves, the notebook's cell tagged ``config`` runs with the new values; the room then computes and draws for
    the ``config`` that this cell leaves, step by step if it has ``steps``.
    """
    name = room.__name__.rpartition(".")[2]
    offered = parameters.offered(name)
    controls = {each.name: for_parameter(each, namespace[each.name]) for each in offered.values()}
    cell = "\n".join(parameters.code(cell) for cell in parameters.tagged(parameters.code_cells(name), "config"))

    def read(values: Values) -> dict[str, Any]:
        return {key: _list(key, value) if offered[key].type == "list" else value for key, value in values.items()}

    def configure(values: Values) -> Any:
        now = dict(namespace) | read(values)
        exec(compile(cell, f"{name}.ipynb", "exec"), now)
        return now["config"]

    def make(values: Values) -> Run:
        config = configure(values)
        if hasattr(room, "steps"):
            # Without a table yet there is nothing to draw.
            states = (
                ((count, so_far, config) if so_far else None)
                for count, so_far in enumerate(room.steps(config), start=1)
            )
            return Run(states, config.steps, lambda state: state[0])
        reported = [0.0]
        results = in_thread(partial(room.compute, config), reported)
        states = (result if result is None else (0, result, config) for result in results)
        return Run(states, 100, lambda _: round(reported[-1]))

    return Explorer(
        name,
        controls,
        make,
        lambda state, values, _: room.draw(*state[1:]),
        table=lambda state, values: {stem.removeprefix(name).lstrip("_"): table for stem, table in state[1].items()},
        reproduce=lambda values: (name, read(values), ""),
        hint=_hint(controls, offered),
        first=(0, data, configure({key: control.value for key, control in controls.items()})),
        follow=True,
    )


def _hint(controls: Mapping[str, widgets.Widget], offered: Mapping[str, parameters.Parameter]) -> str:
    """What to try first: another value of what tells most, as far as the figure has such a parameter."""
    telling = [name for name in TELLING if name in controls]
    name = next(iter([*telling, *controls]), None)
    if name is None:
        return "<b>Start</b>, which makes the figure anew."
    shown = f"<b>{name.replace('_', ' ')}</b>"
    what = f"other {shown}, with commas in between" if offered[name].type == "list" else f"another value of {shown}"
    return f"{what}; Reset brings back the figure of this notebook."


def _list(name: str, text: str) -> list:
    """The list that a text such as "2, 4, 8" means."""
    try:
        return yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError(f"{name} is {text!r}, expected values with commas in between.") from None
