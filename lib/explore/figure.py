"""The explorer at the end of a figure's notebook."""

import ast
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import ipywidgets as widgets

from lib import parameters
from lib.explore.controls import make_control
from lib.explore.explorer import Explorer, Values
from lib.explore.live import SENTENCES, Run, run_in_thread
from lib.figures.results import Data

# The most instructive parameters, the best one first.
TELLING = ("epoch", "activation", "activations", "initialisation", "convolution", "every", "iterations", "seed")


def explore_figure(room: ModuleType, namespace: Mapping[str, Any], data: Data) -> Explorer:
    """The explorer at the end of a figure's notebook, with a control for each parameter of the cell tagged ``config``.

    ``room`` is the figure's module, ``namespace`` the notebook's ``globals()``, and ``data`` the results of the
    notebook. When a control moves, the cell runs with the new values. The room then computes and draws for the
    resulting ``config``, step by step if it has ``compute_steps``. The menu of activations has those that the cell
    takes.
    """
    name = room.__name__.rpartition(".")[2]
    cell = "\n".join(
        parameters.extract_python(cell) for cell in parameters.select_tagged(parameters.code_cells(name), "config")
    )
    every = parameters.read_parameters(name)
    used = {each.id for each in ast.walk(ast.parse(cell)) if isinstance(each, ast.Name)}
    offered = {each.name: each for each in every.values() if each.name in used}
    controls = {each.name: make_control(each, namespace[each.name]) for each in offered.values()}
    start = {key: control.value for key, control in controls.items()}

    def read(values: Values) -> dict[str, Any]:
        return {key: _parse_list(key, value) if offered[key].type == "list" else value for key, value in values.items()}

    def configure(values: Values) -> Any:
        now = dict(namespace) | read(values)
        exec(compile(cell, f"{name}.ipynb", "exec"), now)
        return now["config"]

    def is_taken(activation: str) -> bool:
        try:
            configure(start | {"activation": activation})
        except SENTENCES:
            return False
        return True

    if "activation" in controls:
        menu = controls["activation"]
        menu.options = [option for option in menu.options if is_taken(option[1])]
        menu.value = start["activation"]

    def make(values: Values) -> Run:
        config = configure(values)
        if hasattr(room, "compute_steps"):
            # Without a table there is nothing to draw yet.
            states = (
                ((count, so_far, config) if so_far else None)
                for count, so_far in enumerate(room.compute_steps(config), start=1)
            )
            return Run(states, config.steps, lambda state: state[0])
        reported = [0.0]
        results = run_in_thread(partial(room.compute, config), reported)
        states = (result if result is None else (0, result, config) for result in results)
        return Run(states, 100, lambda _: round(reported[-1]))

    return Explorer(
        name,
        controls,
        make,
        lambda state, values, _: room.draw(*state[1:]),
        table=lambda state, values: {stem.removeprefix(name).lstrip("_"): table for stem, table in state[1].items()},
        reproduce=lambda values: (name, {key: namespace[key] for key in every} | read(values), ""),
        hint=_hint(controls, offered),
        first=(0, data, configure(start)),
        follow=True,
    )


def _hint(controls: Mapping[str, widgets.Widget], offered: Mapping[str, parameters.Parameter]) -> str:
    """What to try first: another value of the most instructive parameter that the figure has."""
    telling = [name for name in TELLING if name in controls]
    name = next(iter([*telling, *controls]), None)
    if name is None:
        return "<b>Start</b>, which makes the figure again."
    shown = f"<b>{name.replace('_', ' ')}</b>"
    listed = offered[name].type == "list"
    what = f"other values of {shown}, separated by commas" if listed else f"another value of {shown}"
    return f"{what}; Reset brings back the figure of this notebook."


def _parse_list(name: str, text: str) -> list:
    """The list in a text such as "2, 4, 8", read as in a profile."""
    try:
        return parameters.read_value(name, f"[{text}]")
    except parameters.WrongParameters:
        raise ValueError(f"{name} is {text!r}, expected values separated by commas.") from None
