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
from lib.figures.claim import Claim, Read, combine_margins, factor_below, judge_margin
from lib.figures.experiment import Progress, silent
from lib.figures.results import Data
from lib.figures.style import BLACK, GREY, INITIALISATION_COLORS, leave_room_above, make_panels, styled, write_across
from lib.measures import (
    PARTS,
    SMOOTH_BELOW,
    layer_noise,
    ratios_along_depth,
    smooth_share,
    von_neumann_ratio,
    von_neumann_ratios,
)

# A curve that is read off a picture has a smaller von Neumann ratio than the true curve. These are the factors between
# the two, for both pictures. They are medians over entries of our networks, which were drawn and read off in the same
# way. The factor of a single entry scatters by about 2.
READING = (1.7, 2.0)
PICTURES = ("first", "second")
Key = tuple[Setting, str]  # of a network: setting, initialisation
PARTS_COLUMNS = tuple(f"part_{part}" for part in range(1, PARTS + 1))


@dataclass(frozen=True)
class Config:
    """The ``choice`` of networks and their ``seed``. ``entry_seed`` draws the entries that are shown."""

    choice: NetworkChoice
    seed: int = 0
    entry_seed: int = 0

    def __post_init__(self) -> None:
        checks.check_fields(self, seed=0, entry_seed=0)

    @property
    def entries(self) -> dict[str, tuple[int, int, int, int]]:
        """The entry (out, in, row, column) of "conv1" and of "conv2"."""
        return draw_entries(self.entry_seed)

    @property
    def as_published(self) -> bool:
        """Whether the choice has the settings of the network in the published pictures."""
        return (self.choice.activation, self.choice.batch_norm, self.choice.depth) == ("gelu", True, 256)


def compute(config: Config, progress: Progress = silent) -> Data:
    """The tables of `tabulate_entries` and `measure_networks`, for the networks whose weights are here. Then the
    published curves, and the table of `measure_published`; these two are empty if the choice has other settings."""
    networks = select_networks(records.read_runs(), config.choice, config.seed)
    published = records.read_published()
    if not config.as_published:
        published = {name: column[:0] for name, column in published.items()}
    ratios = measure_published(published)
    layers = {key: run.load().network.residual_layers for key, run in networks.items()}
    return {
        "figure_3": tabulate_entries(layers, config.entries),
        "figure_3_networks": measure_networks(networks, layers, ratios),
        "figure_3_published": published,
        "figure_3_published_ratios": ratios,
    }


def measure_published(curves: tables.Table) -> dict[str, list]:
    """A row for each published curve: picture, convolution, von_neumann (of the curve as read off), low and high (the
    range of the true ratio, by `READING`), smooth_share, and the ratio in each eighth, part_1 to part_8."""
    columns = ("picture", "convolution", "von_neumann", "low", "high", "smooth_share", *PARTS_COLUMNS)
    rows = []
    for (picture, name), points in tables.group(curves, "picture", "convolution").items():
        curve = torch.tensor(points["entry"])[:, None]
        ratio = von_neumann_ratio(curve)
        true = (factor * ratio for factor in READING)
        rows.append((picture, name, ratio, *true, smooth_share(curve), *ratios_along_depth(curve)))
    return tables.from_rows((dict(zip(columns, row, strict=True)) for row in rows), columns)


def measure_networks(
    networks: Mapping[Key, Run], layers: Mapping[Key, ResidualLayers], published: tables.Table
) -> dict[str, list]:
    """A row for each network and convolution.

    The columns are setting, epochs, initialisation, convolution, test_accuracy (%), von_neumann (over all layers),
    smooth_share (of the depth), as_published (the share of the entries whose ratio is at most the larger ``high`` of
    `measure_published`), noise (from layer to layer), spread (the mean standard deviation of an entry), and the ratio
    in each eighth, part_1 to part_8.
    """
    columns = ["setting", "epochs", "initialisation", "convolution", "test_accuracy", "von_neumann", "smooth_share"]
    columns += ["as_published", "noise", "spread", *PARTS_COLUMNS]
    rows = []
    for (setting, initialisation), run in networks.items():
        for name in CONVOLUTIONS:
            weights = layers[setting, initialisation].stacked(f"{name}.weight").detach()
            highs = tables.select(published, convolution=name)["high"]
            as_smooth = von_neumann_ratios(weights) <= max(highs, default=math.nan)
            share = float(as_smooth.double().mean()) if len(highs) else math.nan
            measured = von_neumann_ratio(weights), smooth_share(weights), share, layer_noise(weights)
            which = setting.words, setting.epochs, initialisation, name, run.values["test_accuracy"]
            values = (*which, *measured, float(weights.std(dim=0).mean()), *ratios_along_depth(weights))
            rows.append(dict(zip(columns, values, strict=True)))
    return tables.from_rows(rows, columns)


def write_panel_title(data: Data, config: Config, setting: str, epochs: int, initialisation: str) -> str:
    """The title of a panel: activation, initialisation, test accuracy, schedule, setting."""
    network = f"{tables.word(config.choice.activation)}, {tables.word(initialisation)}"
    rows = tables.select(data["figure_3_networks"], setting=setting, epochs=epochs, initialisation=initialisation)
    if not len(rows["test_accuracy"]):
        return network
    return f"{network}: test {rows['test_accuracy'][0]:.2f} %\n{records.describe_length(epochs)}\n{setting}"


def draw_entries(seed: int, channels: int = 16) -> dict[str, tuple[int, int, int, int]]:
    """Draw an entry (out, in, row, column) of "conv1" and one of "conv2", each from all C x C x 3 x 3 entries."""
    checks.positive_int("entry_seed", seed, least=0)
    random = np.random.default_rng(seed)
    shape = (channels, channels, 3, 3)
    return {
        name: tuple(int(i) for i in np.unravel_index(random.integers(math.prod(shape)), shape)) for name in CONVOLUTIONS
    }


def select_networks(runs: Iterable[Run], choice: NetworkChoice, seed: int = 0) -> dict[Key, Run]:
    """The networks of one choice and seed whose weights are here. Shorter schedules come first, and in each setting the
    weight-tied network comes first."""
    settings = group_by_setting((run for run in runs if run.has_weights), choice, seed=seed)
    return {(setting, name): side[-1] for setting, pair in settings.items() for name, side in pair.items()}


def tabulate_entries(
    layers: Mapping[Key, ResidualLayers], entries: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, list]:
    """The table of ``figure_3.csv``: setting, epochs (of the schedule), initialisation, convolution, layer (1..L),
    value."""
    rows = []
    for (setting, initialisation), stacked in layers.items():
        for name, entry in entries.items():
            which = {"setting": setting.words, "epochs": setting.epochs}
            which |= {"initialisation": initialisation, "convolution": name}
            values = stacked.stacked(f"{name}.weight")[(slice(None), *entry)].tolist()
            rows += [which | {"layer": layer, "value": value} for layer, value in enumerate(values, start=1)]
    return tables.from_rows(rows, ("setting", "epochs", "initialisation", "convolution", "layer", "value"))


@styled
def draw(data: Data, config: Config) -> Figure:
    """One entry of conv1 and of conv2 across the layers. The published curves are above, if there are any. Below are
    two rows for each setting and schedule, with weight-tied networks on the left and i.i.d. ones on the right."""
    table, published = data["figure_3"], data["figure_3_published"]
    blocks = list(dict.fromkeys(zip(table["setting"], table["epochs"], strict=True))) or [("", 0)]
    above = 2 * bool(len(published["layer"]))
    figure, axes = make_panels(2, rows=above + 2 * len(blocks), height=1.7 * above + 3.8 * len(blocks), sharex=True)
    if above:
        _draw_published(axes[:above], published)
    for row, (setting, epochs) in zip(axes[above::2], blocks, strict=True):
        for panel, initialisation in zip(row, INITIALISATION_COLORS, strict=True):
            panel.set_title(write_panel_title(data, config, setting, epochs, initialisation))
    shown = [(*block, convolution) for block in blocks for convolution in config.entries]
    for row, (setting, epochs, convolution) in zip(axes[above:], shown, strict=True):
        for panel, (initialisation, color) in zip(row, INITIALISATION_COLORS.items(), strict=True):
            chosen = {"setting": setting, "epochs": epochs, "initialisation": initialisation}
            curve = tables.select(table, **chosen, convolution=convolution)
            if len(curve["layer"]) == 0:
                write_across(panel, "no such network is here")
                panel.set_axis_off()
                continue
            # Each panel has its own scale: what matters is whether the curve is smooth.
            panel.plot(curve["layer"], curve["value"], color=color, linewidth=0.8)
            _write_height(panel)
            panel.set_ylabel(f"{convolution} $[{','.join(str(i) for i in config.entries[convolution])}]$")
    for panel in axes[-1]:
        panel.set_xlabel("layer $k$")
    return figure


def _write_height(panel: Axes) -> None:
    # Write the height of the panel above the curve: the scales of panels differ by factors of ten and more.
    leave_room_above(panel, 0.15)
    low, high = panel.get_ylim()
    place = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 7, "color": GREY}
    panel.annotate(f"height {high - low:.1g}", (1, 1), **place)


def _draw_published(axes: np.ndarray, curves: tables.Table) -> None:
    # Two rows of two panels, with a column for each picture.
    column: list[Axes]
    for column, picture in zip(axes.T, PICTURES, strict=True):
        column[0].set_title(f"published: GELU, weight-tied\nread off the {picture} picture")
        for panel, name in zip(column, CONVOLUTIONS, strict=True):
            curve = tables.select(curves, picture=picture, convolution=name)
            panel.plot(curve["layer"], curve["entry"], color=BLACK, linewidth=0.8)
            _write_height(panel)
            panel.set_ylabel(f"{name}, an entry")


def judge_claims(read: Read) -> Iterator[Claim]:
    """The published network is smooth, by the likely range of the true ratio of its curves. There is no claim if the
    curves are missing."""
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
    # Both ends of the range have to be on one side; else the claim is open.
    least, most = (combine_margins(*(factor_below(end, SMOOTH_BELOW) for end in ends.values())) for ends in (high, low))
    margin = most if most < 0 else least if least >= 0 <= most else math.nan
    yield judge_margin(
        "CIFAR-10, the published GELU network, weight-tied: smooth across layers after training",
        "Fig. 3",
        "figure_3",
        margin,
        f"von Neumann ratio over all layers most likely {true}, by {len(ratios['picture'])} entries read off; "
        f"smooth eighths of the depth, as read, {', '.join(shares.values())}",
        f"both below {SMOOTH_BELOW} over all layers",
    )
