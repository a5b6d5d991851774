"""The explorer of residual blocks: those of the catalogue, and one that the notebook defines."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from IPython.core.getipython import get_ipython
from matplotlib.figure import Figure

from lib import activations, tables
from lib.blocks.catalogue import BLOCKS, TOKENS, make_block
from lib.blocks.distances import DistancesConfig, DistancesState, distance_steps
from lib.blocks.network import INITIALISATIONS
from lib.blocks.training import gaussian_data
from lib.explore import frames
from lib.explore.controls import CONTROLS, menu, scale, whole_number
from lib.explore.depth_training import SMALLEST_DEPTH, fit_above_rounding, list_depths
from lib.explore.explorer import Explorer
from lib.explore.live import Run
from lib.rates import Slope

OWN = "MyBlock"  # the name of the notebook's own block
NORMS = tuple(dict.fromkeys(norm for block in BLOCKS.values() for norm in block.normalisations))
START = {
    "block": "transformer",
    "activation": "gelu",
    "normalisation": "layer",
    "initialisation": "weight-tied",
    "depth": 32,
    "learning_rate": 0.4,
    "iterations": 100,
    "seed": 0,
    "parameter": 0,
    "entry": 0,
}


def explore_blocks(namespace: Mapping[str, Any], **start: Any) -> Explorer:
    """Train networks of one block at several depths, live.

    ``namespace`` is the notebook's ``globals()``. Its class `MyBlock`, for h of the shape `TOKENS`, is offered beside
    the blocks of the catalogue. When a cell defines it again, the run begins anew. ``start`` replaces values at which
    the controls start (see `START`).
    """
    values = START | start
    made: list[Any] = [None]  # the class MyBlock of the present run
    own = {
        "block": menu("block", "f in h + f(h, Z)/L", [*BLOCKS, OWN]),
        "normalisation": menu("norm", "before or between the linear maps", NORMS),
        "activation": menu("activation", "of a block of the catalogue that has one", list(activations.ACTIVATIONS)),
        "initialisation": menu("initialisation", "of the layers", INITIALISATIONS),
        "depth": scale("depth <i>L</i>", "layers of the deepest network", [8, 16, 32, 64]),
        "parameter": whole_number("parameter", "of the block, counted from 0"),
        "entry": whole_number("entry", "of the parameter, counted from 0"),
    }
    controls = {name: (own.get(name) or CONTROLS[name])(value) for name, value in values.items()}

    def get_factory(values: Mapping) -> Callable:
        if values["block"] != OWN:
            return make_block(values["block"], values["activation"], values["normalisation"])
        if OWN not in namespace:
            raise ValueError(f"There is no class {OWN} yet: run the cell that defines it.")
        return namespace[OWN]

    def make(values: Mapping) -> Run:
        made[0] = namespace.get(OWN)
        shape = TOKENS if values["block"] == OWN else BLOCKS[values["block"]].shape
        config = DistancesConfig(
            get_factory(values),
            list_depths(values["depth"]),
            *gaussian_data(shape, values["seed"]),
            iterations=values["iterations"],
            learning_rate=values["learning_rate"],
            initialisation=values["initialisation"],
            seed=values["seed"],
        )
        return Run(distance_steps(config), values["iterations"], lambda state: state.iteration)

    def status(state: DistancesState, values: Mapping) -> list[str]:
        names = [f"{number} {name}" for number, name in enumerate(state.weights[state.config.depths[0]])]
        time = f"t = {state.iteration * state.config.learning_rate:.3g}"
        return [f"iteration {state.iteration:,} of {values['iterations']:,}, {time}", f"parameters: {', '.join(names)}"]

    def reproduce(values: Mapping) -> tuple[str, dict[str, Any], str]:
        if values["block"] == OWN:
            raise ValueError(f"{OWN} is defined in this notebook, and no figure has it: choose another block to save.")
        norm = "" if values["normalisation"] == "none" else f", {values['normalisation']} norm"
        shown = {"blocks": [values["block"] + norm], "activations": [values["activation"]]}
        shown |= {
            "depths": list_depths(values["depth"]),
            "seeds": [values["seed"]],
            "iterations": [values["iterations"]],
        }
        shown |= {"learning_rate": values["learning_rate"], "slope_from": SMALLEST_DEPTH}
        return "blocks", shown, "" if values["initialisation"] == "weight-tied" else "of weight-tied layers"

    def offer_what_the_block_has(*_: object) -> None:
        block, norm = controls["block"].value, controls["normalisation"]
        norms = list_norms(block)
        kept = norm.value if norm.value in norms else "none"
        with explorer.hold_changes():
            norm.options = [(tables.word(each), each) for each in norms]
            norm.value = kept
        norm.layout.display = None if len(norms) > 1 else "none"
        controls["activation"].layout.display = None if block != OWN and BLOCKS[block].activated else "none"

    controls["block"].observe(offer_what_the_block_has, names="value")  # before the explorer looks at the new block

    explorer = Explorer(
        "explore_blocks",
        controls,
        make,
        lambda state, values, figure: draw(state, values["parameter"], values["entry"], figure),
        reproduce=reproduce,
        hint="press <b>Start</b> and watch the slope; then the block <b>convolution</b> with batch norm and ReLU.",
        table=lambda state, values: {"": distance_table(state)},
        status=status,
        view=("parameter", "entry"),
    )

    if values["normalisation"] in list_norms(values["block"]):  # else the explorer shows what is wrong
        offer_what_the_block_has()

    def restart_if_redefined(*_: object) -> None:
        if controls["block"].value == OWN and namespace.get(OWN) is not made[0]:
            running = explorer.live.running
            explorer.reset()
            if running:
                explorer.start()

    _call_after_each_cell(restart_if_redefined)
    return explorer


_registered: list[Callable] = []


def _call_after_each_cell(handler: Callable[..., None]) -> None:
    """Call ``handler`` whenever a cell has run, in place of the handler that was registered before."""
    if shell := get_ipython():
        while _registered:
            shell.events.unregister("post_run_cell", _registered.pop())
        shell.events.register("post_run_cell", handler)
        _registered.append(handler)


def list_norms(block: str) -> tuple[str, ...]:
    """The normalisations of a block of the catalogue; "none" for the notebook's own."""
    return BLOCKS[block].normalisations if block != OWN else ("none",)


def find_entry(state: DistancesState, parameter: int, entry: int) -> tuple[str, tuple[int, ...]]:
    """The name of the parameter of that number, and the index of its entry of that number (both modulo their count)."""
    weights = state.weights[state.config.depths[0]]
    name = list(weights)[parameter % len(weights)]
    shape = tuple(weights[name].shape[1:])
    return name, tuple(int(i) for i in np.unravel_index(entry % weights[name][0].numel(), shape))


def measure_slope(state: DistancesState) -> Slope | None:
    """The rate in L of the largest successive distance so far; None if layers are equal up to rounding."""
    return fit_above_rounding(state.config.depths, state.max_distances())


def distance_table(state: DistancesState) -> tables.Table:
    """The largest successive distance so far, by depth."""
    depths = list(state.config.depths)
    columns = {"depth": depths, "step": [state.iteration] * len(depths)}
    return columns | {"loss": [state.losses[depth][-1] for depth in depths], "max_distance": state.max_distances()}


def draw(state: DistancesState, parameter: int = 0, entry: int = 0, figure: Figure | None = None) -> Figure:
    """Draw one entry of one parameter over s = k/L, a curve for each depth, and dotted the start of the deepest
    network. Below are the loss, and the largest successive distance against the depth with its slope.

    If ``figure``, from an earlier call, differs only in its data, it is updated and returned.
    """
    name, index = find_entry(state, parameter, entry)
    depths = state.config.depths
    what = repr((name, index, depths, state.config.iterations))
    new = figure is None or figure.get_label() != what
    with mpl.rc_context(frames.LIVE_STYLE) if new else contextlib.nullcontext():
        if new:
            figure = _make_axes(state, f"{name}[{', '.join(map(str, index))}]")
            figure.set_label(what)
        axes = {panel.get_label(): panel for panel in figure.axes}
        for depth, color in zip(depths, frames.shades(0, len(depths)), strict=True):
            wide = 1.9 if depth == depths[-1] else 1.1
            dots = {"marker": "o", "markersize": 3} if depth <= 16 else {}
            curve = state.weights[depth][name][(slice(None), *index)]
            s = np.arange(1, depth + 1) / depth
            frames.draw_line(axes["entry"], depth, s, curve.cpu(), color=color, linewidth=wide, **dots)
            losses = state.losses[depth]
            frames.draw_line(axes["loss"], depth, np.arange(len(losses)), losses, color=color, linewidth=wide)
        start = state.measured[depths[-1]].start[name][(slice(None), *index)]
        frames.draw_line(axes["entry"], "start", s, start.cpu(), **frames.DOTTED)
        fit = measure_slope(state)
        frames.draw_distances(axes["distance"], depths, state.max_distances(), fit, number=0, side=1)
        frames.adjust_limits(figure, new)
    return figure


def _make_axes(state: DistancesState, title: str) -> Figure:
    figure = Figure(figsize=(9.6, 6))
    axes = figure.subplot_mosaic([["entry", "entry"], ["loss", "distance"]])
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.085, top=0.93, wspace=0.2, hspace=0.4)
    axes["entry"].set_title(title)
    axes["distance"].set_title(r"$\max_{k,\,t}\,\|Z_{k+1}(t)-Z_k(t)\|_F$")
    frames.prepare_axes(axes, state.config.depths, state.config.iterations)
    return figure
