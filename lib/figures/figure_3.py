"""Figure 3: one entry of the trained weights across the layers (Section 5.2)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import checks, tables
from lib.cifar import records
from lib.cifar.choice import NetworkChoice, Setting, group_by_setting
from lib.cifar.network import ResidualLayers
from lib.cifar.records import CONVOLUTIONS, Run
from lib.figures.claim import Claim, Read, factor_below, judge, tightest
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, GREY, INITIALISATION_COLORS, leave_room_above, panels, styled, write_across
from lib.measures import (
    PARTS,
    SMOOTH_BELOW,
    layer_noise,
    ratios_along_depth,
    smooth_share,
    von_neumann_ratio,
    von_neumann_ratios,
)

# What reading a curve off a picture does to its von Neumann ratio: the true one is so many times as large. Medians over
# entries of our networks, drawn in the style and size of the two pictures and read in the same way; that of a single
# entry scatters by about a factor of 2.
READING = (1.7, 2.0)
PICTURES = ("first", "second")
Key = tuple[Setting, str]  # of a network: setting, initialisation
PARTS_COLUMNS = tuple(f"part_{part}" for part in range(1, PARTS + 1))


@dataclass(frozen=True)
class Config:
    """Which networks (``choice``, of one ``seed``), and the seed that draws the entries shown."""

    choice: NetworkChoice
    seed: int = 0
    entry_seed: int = 0

    def __post_init__(self) -> None:
        checks.positive_int("seed", self.seed, least=0)
        checks.positive_int("entry_seed", self.entry_seed, least=0)

    @property
    def entries(self) -> dict[str, tuple[int, int, int, int]]:
        """The entry (out, in, row, column) of "conv1" and of "conv2"."""
        return draw_entries(self.entry_seed)

    @property
    def as_published(self) -> bool:
        """Whether networks like the one in the published pictures are chosen."""
        return (self.choice.activation, self.choice.batch_norm, self.choice.depth) == ("gelu", True, 256)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `entries_across_layers` and `describe`, of the networks whose weights are here, the published
    curves and their `published_ratios` (no rows if networks of another kind are chosen)."""
    networks = networks_by_setting(records.read_runs(), config.choice, config.seed)
    published = records.read_published()
    if not config.as_published:
        published = {name: column[:0] for name, column in published.items()}
    ratios = published_ratios(published)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    return {
        "figure_3": entries_across_layers(layers, config.entries),
        "figure_3_networks": describe(networks, layers, ratios),
        "figure_3_published": published,
        "figure_3_published_ratios": ratios,
    }


def published_ratios(curves: tables.Table) -> dict[str, list]:
    """A row a published curve: picture, convolution, von_neumann (as read off), low and high (what that makes of the
    true one: `READING`), smooth_share, and the ratio as read in each eighth, part_1 to part_8."""
    columns = ("picture", "convolution", "von_neumann", "low", "high", "smooth_share", *PARTS_COLUMNS)
    rows = []
    for picture, name in dict.fromkeys(zip(curves["picture"], curves["convolution"], strict=True)):
        curve = torch.tensor(tables.select(curves, picture=picture, convolution=name)["entry"])[:, None]
        ratio, parts = von_neumann_ratio(curve), ratios_along_depth(curve)
        true = (factor * ratio for factor in READING)
        rows.append((str(picture), str(name), ratio, *true, smooth_share(curve), *parts))
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


def describe(
    networks: Mapping[Key, Run], layers: Mapping[Key, ResidualLayers], published: tables.Table
) -> dict[str, list]:
    """A row a network and convolution: setting, epochs, initialisation, convolution, test_accuracy (%), von_neumann
    over all layers, smooth_share of the depth, as_published (the share of its entries that have at most the ratio of
    the published ones, the larger ``high`` of `published_ratios`), noise from layer to layer, spread (the mean standard
    deviation of an entry), and the ratio in each eighth, part_1 to part_8."""
    columns = ["setting", "epochs", "initialisation", "convolution", "test_accuracy", "von_neumann", "smooth_share"]
    columns += ["as_published", "noise", "spread", *PARTS_COLUMNS]
    rows = []
    for (setting, initialisation), run in networks.items():
        for name in CONVOLUTIONS:
            weights = layers[setting, initialisation].stacked(f"{name}.weight").detach()
            measured = von_neumann_ratio(weights), smooth_share(weights), _share_of_entries(weights, published, name)
            measured += layer_noise(weights), float(weights.std(dim=0).mean())
            which = setting.words, setting.epochs, initialisation, name, run.values["test_accuracy"]
            rows.append((*which, *measured, *ratios_along_depth(weights)))
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


def _share_of_entries(weights: torch.Tensor, published: tables.Table, convolution: str) -> float:
    # Those at most as rough as the published ones.
    highs = tables.select(published, convolution=convolution)["high"]
    return float((von_neumann_ratios(weights) <= max(highs)).double().mean()) if len(highs) else math.nan


def panel_title(data: Data, config: Config, setting: str, epochs: int, initialisation: str) -> str:
    """What a panel shows: activation, initialisation, test accuracy, schedule, setting."""
    network = f"{tables.word(config.choice.activation)}, {tables.word(initialisation)}"
    rows = tables.select(data["figure_3_networks"], setting=setting, epochs=epochs, initialisation=initialisation)
    if not len(rows["test_accuracy"]):
        return network
    return f"{network}: test {rows['test_accuracy'][0]:.2f} %\n{records.describe_length(epochs)}\n{setting}"


def draw_entries(seed: int, channels: int = 16) -> dict[str, tuple[int, int, int, int]]:
    """An entry (out, in, row, column) of "conv1" and one of "conv2", each drawn from all C x C x 3 x 3 by the seed."""
    checks.positive_int("entry_seed", seed, least=0)
    random = np.random.default_rng(seed)
    shape = (channels, channels, 3, 3)
    return {
        name: tuple(int(i) for i in np.unravel_index(random.integers(math.prod(shape)), shape)) for name in CONVOLUTIONS
    }


def networks_by_setting(runs: Iterable[Run], choice: NetworkChoice, seed: int = 0) -> dict[Key, Run]:
    """The networks of one choice and seed whose weights are here: the shortest schedule first, and in each setting the
    weight-tied network first."""
    settings = group_by_setting((run for run in runs if run.has_weights), choice, seed=seed)
    return {(setting, name): side[-1] for setting, pair in settings.items() for name, side in pair.items()}


def entries_across_layers(
    layers: Mapping[Key, ResidualLayers], entries: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, list]:
    """The table of ``figure_3.csv``: setting, epochs (of the schedule), initialisation, convolution, layer (1..L),
    value."""
    columns: dict[str, list] = {
        name: [] for name in ("setting", "epochs", "initialisation", "convolution", "layer", "value")
    }
    for (setting, initialisation), stacked in layers.items():
        for name, entry in entries.items():
            values = stacked.stacked(f"{name}.weight")[(slice(None), *entry)].tolist()
            for column, value in (
                ("setting", setting.words),
                ("epochs", setting.epochs),
                ("initialisation", initialisation),
                ("convolution", name),
            ):
                columns[column] += [value] * len(values)
            columns["layer"] += range(1, len(values) + 1)
            columns["value"] += values
    return columns


@styled
def draw(data: Data, config: Config) -> Figure:
    """One entry of conv1 and of conv2 across the layers: above, the published curves, if there are any; below, two rows
    for each setting and schedule, weight-tied beside i.i.d.

    ``data``: what `compute` returns.
    """
    table, published = data["figure_3"], data["figure_3_published"]
    blocks = list(dict.fromkeys(zip(table["setting"], table["epochs"], strict=True))) or [("", 0)]
    above = 2 * bool(len(published["layer"]))
    figure, axes = panels(2, rows=above + 2 * len(blocks), height=1.7 * above + 3.8 * len(blocks), sharex=True)
    if above:
        _published(axes[:above], published)
    for row, (setting, epochs) in zip(axes[above::2], blocks, strict=True):
        for panel, initialisation in zip(row, INITIALISATION_COLORS, strict=True):
            panel.set_title(panel_title(data, config, setting, epochs, initialisation))
    shown = [(*block, convolution) for block in blocks for convolution in config.entries]
    for row, (setting, epochs, convolution) in zip(axes[above:], shown, strict=True):
        for panel, (initialisation, color) in zip(row, INITIALISATION_COLORS.items(), strict=True):
            of = {"setting": setting, "epochs": epochs, "initialisation": initialisation, "convolution": convolution}
            curve = tables.select(table, **of)
            if len(curve["layer"]) == 0:
                write_across(panel, "no such network is here")
                panel.set_axis_off()
                continue
            # A scale of its own for each: what matters is whether a curve is smooth, not where it lies.
            panel.plot(curve["layer"], curve["value"], color=color, linewidth=0.8)
            _say_height(panel)
            panel.set_ylabel(f"{convolution} $[{','.join(str(i) for i in config.entries[convolution])}]$")
    for panel in axes[-1]:
        panel.set_xlabel("layer $k$")
    return figure


def _say_height(panel: Axes) -> None:
    # Scales differ by factors of ten and more. The text stands above the curve.
    leave_room_above(panel, 0.15)
    low, high = panel.get_ylim()
    place = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 7, "color": GREY}
    panel.annotate(f"height {high - low:.1g}", (1, 1), **place)


def _published(axes: np.ndarray, curves: tables.Table) -> None:
    # Two rows of two panels: a column a picture.
    column: list[Axes]
    for column, picture in zip(axes.T, PICTURES, strict=True):
        column[0].set_title(f"published: GELU, weight-tied\nread off the {picture} picture")
        for panel, name in zip(column, CONVOLUTIONS, strict=True):
            curve = tables.select(curves, picture=picture, convolution=name)
            panel.plot(curve["layer"], curve["entry"], color=BLACK, linewidth=0.8)
            _say_height(panel)
            panel.set_ylabel(f"{name}, an entry")


def claims(read: Read) -> Iterator[Claim]:
    """That the published network is smooth, by the ratio of its curves as read off and what reading does to that; none
    if there are no such curves."""
    ratios = read("figure_3_published_ratios")
    if not len(ratios["picture"]):
        return
    low, high, shares = {}, {}, {}
    for name in CONVOLUTIONS:
        rows = tables.select(ratios, convolution=name)
        low[name], high[name] = (float(np.mean(rows[bound])) for bound in ("low", "high"))
        counts = sorted({round(PARTS * share) for share in rows["smooth_share"]})
        shares[name] = f"{' or '.join(map(str, counts))} of {PARTS} ({name})"
    true = " and ".join(f"{low[name]:.2g} to {high[name]:.2g} ({name})" for name in CONVOLUTIONS)
    # The end that decides; between the two nothing is.
    least, most = (tightest(*(factor_below(end, SMOOTH_BELOW) for end in ends.values())) for ends in (high, low))
    margin = most if most < 0 else least if least >= 0 <= most else math.nan
    yield Claim(
        "CIFAR-10, the published GELU network, weight-tied: smooth across layers after training",
        "Fig. 3",
        f"von Neumann ratio over all layers most likely {true}, by {len(ratios['picture'])} entries read off; "
        f"smooth eighths of the depth, as read, {', '.join(shares.values())}",
        f"both below {SMOOTH_BELOW} over all layers",
        "",
        judge(margin),
        "figure_3",
        margin,
    )
