"""The explorer at the end of a figure's notebook: a control for each of the notebook's parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import ipywidgets as widgets
import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from lib import parameters, tables
from lib.experiments import Progress
from lib.explore.controls import for_parameter
from lib.explore.explorer import Explorer, Values
from lib.explore.frames import LIVE_STYLE
from lib.explore.live import Run, in_thread


def explore_figure(
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
    controls = {each.name: for_parameter(each, namespace[each.name]) for each in offered.values()}
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
        hint=_hint(controls),
        first=(0, result, moved_to({key: control.value for key, control in controls.items()})),
        follow=True,
    )


def _hint(controls: Mapping[str, widgets.Widget]) -> str:
    """What to try first: another value of what tells most, as far as the figure has such a parameter."""
    telling = [name for name in ("activation", "initialisation", "seed") if name in controls]
    name = next(iter([*telling, *controls]), None)
    if name is None:
        return "<b>Start</b>, which makes the figure anew."
    return f"another <b>{name.replace('_', ' ')}</b>; Reset brings back the figure of this notebook."


def _tables(result: Any, names: Sequence[str | None]) -> dict[str, tables.Table]:
    """The tables among the parts of a result, by their names."""
    parts = result if isinstance(result, tuple) else (result,)
    return {name: part for name, part in zip(names, parts, strict=False) if name is not None}


def draw_table(readable: Mapping[str, Sequence[str]]) -> Figure:
    """A table of texts as a picture, columns as wide as what they hold."""
    with mpl.rc_context(LIVE_STYLE):
        rows = list(zip(*readable.values(), strict=True))
        wide = [2 + max(map(len, [*name.split(), *column])) for name, column in readable.items()]
        lines = max(len(name.split()) for name in readable)
        figure = Figure(figsize=(max(8.0, 0.085 * sum(wide)), 0.3 * len(rows) + 0.22 * lines))
        axes = figure.add_axes([0.01, 0.01, 0.98, 0.98])
        axes.set_axis_off()
        drawn = axes.table(
            rows,
            colLabels=[name.replace(" ", "\n") for name in readable],
            colWidths=[width / sum(wide) for width in wide],
            cellLoc="center",
            edges="horizontal",
            bbox=[0, 0, 1, 1],
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(9)
        for (row, _), cell in drawn.get_celld().items():
            cell.set_height(0.75 * lines if row == 0 else 1)
            cell.set_linewidth(0.5)
            cell.set_text_props(weight="bold" if row == 0 else "normal")
    return figure


def _list(name: str, text: str) -> list:
    """The list that a text such as "2, 4, 8" means."""
    try:
        return yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError(f"{name} is {text!r}, expected values with commas in between.") from None
