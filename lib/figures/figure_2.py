"""Figure 2: after long training, the weights are smooth across layers and the loss is near 0 (Thm 6)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lib import checks
from lib.dense.network import NetworkConfig
from lib.dense.training import train
from lib.digits import round_difference, round_significant, round_square
from lib.figures.claim import Claim, Read, combine_margins, factor_below, judge_margin
from lib.figures.experiment import Progress, read_entries, silent, space_evenly, take_last
from lib.figures.results import Data
from lib.figures.style import BLUE, GREEN, VERMILION, draw_color_bar, make_color_scale, make_panels, styled
from lib.measures import SMOOTH_BELOW, von_neumann_ratio

RATIO_DIGITS = 6  # of a ratio of sums of squares


@dataclass(frozen=True)
class Config:
    """Figure 2: one network, trained for long.

    The entry (``row``, ``column``) of V_k and of W_k is recorded ``recorded`` times, at most 100, evenly spaced over
    the states t <= ``iterations``. The loss is recorded every ``loss_every`` iterations. Indices count from 0 in the
    layout of `lib.dense.network`: V_k is (m, q), W_k is (q, m).
    """

    network: NetworkConfig
    iterations: int
    learning_rate: float = 0.005
    recorded: int = 100
    loss_every: int = 1
    row: int = 0
    column: int = 0

    def __post_init__(self) -> None:
        checks.check_fields(self, "iterations", "learning_rate", "loss_every", recorded=2, row=0, column=0)
        if self.recorded > 100:
            raise ValueError(f"recorded is {self.recorded}, expected at most 100 lines in one picture.")
        largest = min(self.network.hidden, self.network.width) - 1
        for name in ("row", "column"):
            if getattr(self, name) > largest:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected at most {largest}, so that both V_k "
                    f"({self.network.width} x {self.network.hidden}) and W_k have that entry."
                )

    @property
    def weight_iterations(self) -> list[int]:
        """The iterations whose weights are recorded, with the first and the last one."""
        return space_evenly(self.iterations, self.recorded)

    @property
    def loss_iterations(self) -> list[int]:
        """The iterations whose loss is recorded, with the first and the last one."""
        return sorted({*range(0, self.iterations + 1, self.loss_every), self.iterations})

    @property
    def all_iterations(self) -> list[int]:
        """The iterations of which anything is recorded."""
        return sorted({*self.weight_iterations, *self.loss_iterations})

    @property
    def steps(self) -> int:
        """How many states are recorded."""
        return len(self.all_iterations)


def compute_steps(config: Config) -> Iterator[Data]:
    """The tables of `compute` so far, after each recorded iteration (the same two dicts, which grow)."""
    weight_iterations, loss_iterations = set(config.weight_iterations), set(config.loss_iterations)
    loss = {"iteration": [], "loss": [], "ratio_V": [], "ratio_W": []}
    columns = ("iteration", "layer", "row", "column", "entry_V", "entry_W")
    weights = {name: [] for name in columns}
    layers = range(1, config.network.depth + 1)
    for record in train(config.network, config.learning_rate, config.iterations, config.all_iterations):
        if record.iteration in loss_iterations:
            loss["iteration"].append(record.iteration)
            loss["loss"].append(round_square(record.loss))
            for name in "VW":
                ratio = von_neumann_ratio(getattr(record.weights, name))
                loss[f"ratio_{name}"].append(round_significant(ratio, RATIO_DIGITS))
        if record.iteration in weight_iterations:
            curves = (map(round_difference, curve) for curve in read_entries(record.weights, config.row, config.column))
            constant = [record.iteration], [config.row], [config.column]
            iteration, row, column = (value * config.network.depth for value in constant)
            for name, values in zip(columns, (iteration, layers, row, column, *curves), strict=True):
                weights[name].extend(values)
        yield {"figure_2": loss, "figure_2_weights": weights}


def compute(config: Config, progress: Progress = silent) -> Data:
    """Two tables. ``figure_2.csv`` has columns iteration, loss, and the von Neumann ratios ``ratio_V`` and ``ratio_W``
    of all entries (nan if all layers are equal). ``figure_2_weights.csv`` has the recorded entry of V and of W."""
    return take_last(progress(compute_steps(config), config.steps))


@styled
def draw(data: Data, config: Config) -> Figure:
    """One entry of V and of W across layers, in lighter colours at later iterations, and the loss."""
    loss, weights = data["figure_2"], data["figure_2_weights"]
    figure, axes = make_panels(3)
    iterations = np.unique(weights["iteration"])
    color, mappable = make_color_scale(iterations)
    layers = np.unique(weights["layer"])
    for panel, Z in zip(axes, "VW", strict=False):
        order = np.lexsort((weights["layer"], weights["iteration"]))
        curves = np.asarray(weights[f"entry_{Z}"])[order].reshape(len(iterations), len(layers))
        for iteration, curve in zip(iterations, curves, strict=True):
            panel.plot(layers, curve, color=color(iteration), linewidth=0.8)
        row, column = weights["row"][0], weights["column"][0]
        panel.set(title=rf"$({Z}_k)_{{{row},{column}}}$", xlabel=r"layer $k$")
    bar = draw_color_bar(figure, mappable, axes[1], "training iteration", pad=0.02, aspect=28)
    if iterations[-1] >= 10_000:
        bar.formatter.set_powerlimits((3, 3))
        bar.formatter.set_useMathText(True)
    axes[2].plot(loss["iteration"], loss["loss"], color=BLUE, label="loss")
    for name, color in (("V", VERMILION), ("W", GREEN)):
        axes[2].plot(loss["iteration"], loss[f"ratio_{name}"], color=color, label=f"ratio, all of ${name}$")
    axes[2].legend(loc="best")
    axes[2].set(yscale="log", xlabel="training iteration", title="loss, von Neumann ratios")
    if iterations[-1] >= 10_000:
        axes[2].ticklabel_format(axis="x", style="sci", scilimits=(3, 3), useMathText=True)
    return figure


LOSS_FALLS = 1e-3  # the share of the first loss below which the last one has to be


def judge_claims(read: Read) -> Iterator[Claim]:
    table = read("figure_2")
    fall = table["loss"][-1] / table["loss"][0]
    # The ratio is nan at the start, at which all layers are equal.
    ratios = [ratio[int(np.isnan(ratio[0])) :] for ratio in (table["ratio_V"], table["ratio_W"])]
    margin = combine_margins(
        factor_below(fall, LOSS_FALLS), *(factor_below(each, SMOOTH_BELOW) for ratio in ratios for each in ratio)
    )
    yield judge_margin(
        "Trained for long, all of V and of W stays smooth across layers while the loss goes to 0",
        "Thm 6, Fig. 2",
        "figure_2",
        margin,
        f"loss {table['loss'][0]:.2f} to {table['loss'][-1]:.1e}; von Neumann ratio at most "
        f"{np.max(ratios[0]):.4f} (V) and {np.max(ratios[1]):.4f} (W) over t, over all entries",
        f"loss below 1/1000 of the first, both ratios below {SMOOTH_BELOW} (independent: 2) at every t",
    )
