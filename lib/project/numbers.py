"""The numbers of the READMEs, from the tables: each function returns the text that `lib.project.readme` writes."""

import functools

import numpy as np

from lib import paths, tables
from lib.cifar import records
from lib.cifar.choice import RELEASED, NetworkChoice, run_name
from lib.cifar.course import measure_course, smoothness_in_training
from lib.cifar.depth_table import LAST_BIT
from lib.cifar.network import INITIALISATIONS
from lib.cifar.records import CONVOLUTIONS, PAPER_EPOCHS, Run
from lib.figures import blocks as blocks_room
from lib.figures import bounds, pl_condition
from lib.figures.claim import BEYOND, HOLDS, PROVED
from lib.figures.figure_4 import compare_distances
from lib.figures.rounding import find_loss_times
from lib.figures.stem import relate_accuracy_to_length
from lib.figures.style import format_number
from lib.figures.table_1 import PAPER_TABLE
from lib.measures import ratios_along_depth
from lib.project.cases import Cifar, Dense
from lib.rates import fit_slope
from lib.tables import Table, rows, select, word


@functools.cache
def table(name: str) -> Table:
    """A table of the paper profile."""
    return tables.read_csv(paths.FIGURES / f"{name}.csv")


@functools.cache
def runs() -> tuple[Run, ...]:
    """The finished runs."""
    return tuple(records.read_runs())


def span(values, form: str = ".2f") -> str:
    """The smallest and the largest value; one number if they are written alike."""
    low, high = (format(value, form).replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def power(number: float) -> str:
    """A number in scientific notation, with a true minus sign."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def minutes() -> str:
    """How long the notebooks of `make figures` take one after the other, in whole minutes."""
    return f"{sum(table('figure_seconds')['seconds']) / 60:.0f}"


# --- The gallery ------------------------------------------------------------------------------------------------------


def slopes(figure: str, claimed: str) -> str:
    """All slopes that the claims of a figure measure if this slope is claimed, with three decimals: those of the
    paper's claims if there are any, else all."""
    found = select(table("claims"), figure=figure)
    chosen, ours = found["expected"].astype(float) == float(claimed), found["where"] == BEYOND
    chosen = chosen & ~ours if (chosen & ~ours).any() else chosen
    return span(found["slope"].astype(float)[chosen], "z.3f")


def convergence() -> str:
    """The slopes of both curves of Figure 1 right, at its last iteration."""
    found = table("figure_1_right")
    last = select(found, iteration=max(found["iteration"]))
    return span([fit_slope(last["depth"], last[f"distance_{Z}"], 16).slope for Z in "VW"], ".3f")


def mu_kept() -> str:
    """The least share of the PL constant that networks of m >= n keep in training, whatever the targets."""
    return f"{np.min(pl_condition.find_least_shares(pl_condition.select_wide(table('pl_condition')))):.2f}"


def powers_off(bound: str, kind: str) -> str:
    """How many powers of ten a measured constant is at least below its bound at the last time, over the draws: with the
    norms of the run ("own"), or those known before it ("prior"). Negative if the bound is violated."""
    found = table("bounds")
    return f"{bounds.compute_least_margin(found, bound, kind, max(found['time'])):.2g}"


def loss(figure: str) -> str:
    """The last loss of a figure."""
    return power(table(figure)["loss"][-1])


def fewest(network: str) -> str:
    """The smallest number of layers with which a network (in the words of `run_name`) loses at most half a point of
    test accuracy."""
    return str(select(table("resampling_summary"), run=run_name(network))["fewest"][0])


def points_lost(network: str, layers: str) -> str:
    """How many points of test accuracy a network loses with that number of its layers, kept as they are."""
    found = select(table("resampling"), run=run_name(network), layers=int(layers), **records.KEPT)
    return f"{found['accuracy_all'][0] - found['accuracy'][0]:.0f}"


def order(network: str, method: str) -> str:
    """The measured order of a solver, Euler, Heun or RK4, on the layers of a network."""
    return f"{select(table('solvers_orders'), network=network, method=method)['order'].item():.1f}"


def memory_saved() -> str:
    """How many times less memory a gradient takes if states are computed backwards."""
    found = table("reversible_memory")
    return f"{found['stored'][-1] / found['backwards'][-1]:.1f}"


def last_bit(which: str, compared: str = LAST_BIT) -> str:
    """How far apart the weights of conv1 of 16 layers are after a change of one last bit, or as ``compared``, relative
    to their size: for GELU with batch norm, seed 0, and the activation ``which`` in the stem. "epochs": the last epoch
    that is measured for both stems."""
    found = select(table("conv_limit"), activation="gelu", normalisation="batch", seed=0, depth=16)
    found = select(found, compared_with=compared)
    epoch = max(set.intersection(*(set(select(found, stem_activation=s)["epoch"].tolist()) for s in ("relu", "gelu"))))
    if which == "epochs":
        return str(epoch)
    apart = 100 * select(found, stem_activation=which, epoch=epoch)["weights_conv1"].item()
    return f"{apart:.2g} %" if apart > 0.01 else f"{power(apart)} %"


def block_slopes(time: str) -> str:
    """The slopes of all blocks with smooth activations, at the "first" or the "last" training time."""
    found = blocks_room.fit_slopes(table("blocks"), 8)
    found = select(found, time={"first": min, "last": max}[time](found["time"]))
    return span(found["slope"][found["activation"] != "relu"])


def ratio(network: str) -> str:
    """The von Neumann ratio of conv1 of a network."""
    return f"{_run(network).values['von_neumann_conv1']:.2g}"


def published_ratio(convolution: str = "conv1") -> str:
    """The range of the von Neumann ratio of the authors' network, from their pictures."""
    found = select(table("figure_3_published_ratios"), convolution=convolution)
    return span([*found["low"], *found["high"]])


def as_published() -> str:
    """How many rows of Table 1 agree with the paper on smoothness."""
    found = select(table("table_1"), setting=RELEASED)
    return f"{int((found['smooth'] == found['paper_smooth']).sum())} of {len(found['smooth'])}"


def closer(convolution: str = "conv1") -> str:
    """How many times smaller the successive distance is with weight-tied than with i.i.d. initialisation (GELU, the
    paper's epochs)."""
    return f"{compare_distances(table('figure_4'), RELEASED, PAPER_EPOCHS)[convolution]:.3g}"


def lost_after(activation: str) -> str:
    """The epochs after which weight-tied layers are no longer smooth over the paper's schedule, by seed."""
    found = _longest(activation, initialisation="weight-tied")
    tied = smoothness_in_training(found)
    lost = [measure_course(tied, run.config.name).lost_after for run in found]
    return " and ".join("never" if epoch is None else str(epoch) for epoch in dict.fromkeys(lost))


def front(activation: str, parts: str) -> str:
    """The epochs after which the first eighths of the layers were rough, from the input on: as many as ``parts``;
    "never" alone if none was."""
    found = select(table("roughness_front"), activation=activation)
    if not found["epoch"].any():
        return "never"
    return ", ".join(str(epoch) if epoch else "never" for epoch in found["epoch"][: int(parts)])


def rough_from(dtype: str) -> str:
    """The training time at which 32 layers stop being smooth, in float32 or float64."""
    return span(find_loss_times(table("rounding"), 32, dtype), ".0f")


def stem(which: str) -> str:
    """An entry of `relate_accuracy_to_length`: networks, points, correlation, alike or correlation_alike."""
    value = relate_accuracy_to_length(table("stem"))[which]
    return str(value) if isinstance(value, int) else format_number(value, 1 if which == "points" else 2)


def loss_share() -> str:
    """The largest share of the first loss that is left after long training, over all seeds and depths."""
    found = table("long_time")
    first, last = (select(found, iteration=end(found["iteration"]))["loss"] for end in (min, max))
    return power(float(np.max(last / first)))


def claims(which: str) -> str:
    """How many claims of the paper there are that could fail ("all"), and how many of them hold ("hold")."""
    found = table("claims")
    verdicts = [
        verdict
        for verdict, where in zip(found["verdict"], found["where"], strict=True)
        if where != BEYOND and PROVED not in where
    ]
    return str({"all": len(verdicts), "hold": verdicts.count(HOLDS)}[which])


# --- Networks trained on CIFAR-10 -------------------------------------------------------------------------------------


def _longest(activation: str, **conditions) -> list[Run]:
    return NetworkChoice(activation, epochs=PAPER_EPOCHS).select(runs(), **conditions)


def _run(network: str) -> Run:
    name = run_name(network)
    return next(run for run in runs() if run.config.name == name)


def accuracy(network: str, side: str = "test") -> str:
    """The test or train accuracy of a network, in %."""
    return f"{_run(network).values[f'{side}_accuracy']:.1f}"


def eighths(network: str) -> str:
    """The von Neumann ratios of conv1 in the eighths of the layers of a network, from the input to the output."""
    weights = _run(network).load().network.kernels()["conv1"]
    return ", ".join(f"{value:.2g}" for value in ratios_along_depth(weights))


def unsteady(run: Run) -> int:
    """In how many epochs the training accuracy of a run fell by more than two points."""
    return int((np.diff([line["train_accuracy"] for line in run.log()]) < -2).sum())


def settings_and_seeds() -> str:
    """The table of all runs of the paper's depth and learning rate: one row for each setting, with ranges over
    seeds."""
    paper = {(row.activation, row.initialisation): row for row in PAPER_TABLE}
    head = (
        "network",
        "layers start",
        "epochs",
        "seeds",
        "test accuracy (%)",
        "paper, 180 epochs",
        "ratio, conv1",
        "unsteady",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for activation, batch_norm in (
        ("identity", True),
        ("gelu", True),
        ("relu", True),
        ("gelu", False),
        ("relu", False),
    ):
        for initialisation in INITIALISATIONS:
            for epochs in (30, PAPER_EPOCHS):
                choice = NetworkChoice(activation, batch_norm=batch_norm, epochs=epochs)
                found = choice.select(runs(), initialisation=initialisation)
                if not found:
                    continue
                published = paper[activation, initialisation]
                test = [run.values["test_accuracy"] for run in found]
                ratios = [run.values["von_neumann_conv1"] for run in found]
                cells = [
                    word(activation) + ("" if batch_norm else ", no batch norm"),
                    word(initialisation), str(epochs), str(len(found)),
                    span(test, ".1f"), f"{published.test} ± {published.test_range}" if batch_norm else "",
                    span(ratios, ".2g"), span([unsteady(run) for run in found], "d"),
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n\n" + "\n".join(lines) + "\n\n"


def same_run_twice(which: str) -> str:
    """Runs that were trained on a CPU and on a GPU: how many there are ("runs"), the largest difference of their test
    accuracies in points ("accuracy"), and of their ratios in % ("ratio")."""
    found = tables.read_csv(paths.CHECKPOINTS / "devices.csv")
    cpu, gpu = (select(found, device=device) for device in dict.fromkeys(found["device"]))
    if list(cpu["run"]) != list(gpu["run"]):
        raise ValueError("devices.csv has runs of only one device, expected each run on both.")
    if which == "runs":
        return str(len(cpu["run"]))
    if which == "accuracy":
        return f"{np.abs(cpu['test_accuracy'] - gpu['test_accuracy']).max():.2f}"
    ratios = gpu["von_neumann_conv1"] / cpu["von_neumann_conv1"]
    return f"{100 * max(ratios.max() - 1, 1 - ratios.min()):.0f}"


def lost_at(depth: str) -> str:
    """The training time at which a weight-tied GELU network of that depth stops being smooth."""
    return f"{select(table('smoothness_lost'), depth=int(depth))['lost_at'][0]:.0f}"


def power_of_depth(held: str) -> str:
    """The powers of the depth with which the time of smoothness grows, at several levels of the "ratio" or of the
    "L^2 ratio"."""
    return span(select(table("smoothness_laws"), held=held)["slope"])


def left_of_start(epochs: str) -> str:
    """The largest share of the initial weights in the squared norm of trained layers, in %."""
    found = select(table("smoothness_initialisation"), epochs=int(epochs))
    return f"{100 * max(found[f'share_{name}'].max() for name in CONVOLUTIONS):.2g}"


# --- Speed ------------------------------------------------------------------------------------------------------------


BASELINES = [Dense.baseline, Cifar.baseline]


def speed() -> str:
    """The table of ``bench.csv``: the cost of a training step with the compiled engine, compared with PyTorch."""
    lines = ["| a training step | float32 | float64 | peak memory in float32: here, baseline |", "|---|---|---|---|"]
    found = table("bench")
    for experiment in dict.fromkeys(select(found, engine="compiled")["experiment"].tolist()):
        cells = [experiment]
        for dtype in ("float32", "float64"):
            here = rows(select(found, experiment=experiment, engine="compiled", dtype=dtype))
            cells.append(
                "{ms:.3g} ms, {ratio:.1f} times ({ratio_min:.1f} to {ratio_max:.1f})".format(**here[0]) if here else ""
            )
        measured = select(found, experiment=experiment, dtype="float32")
        here, baseline = measured["engine"] == "compiled", np.isin(measured["engine"], BASELINES)
        cells.append(", ".join(f"{measured['memory_mb'][chosen].item():.0f} MB" for chosen in (here, baseline)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n" + "\n".join(lines) + "\n\n"


def stack_seconds(epochs: str) -> str:
    """The seconds that a stack of networks trained on one GPU, with that number of epochs."""
    taken = {
        r.values["seconds"]
        for r in runs()
        if str(r.values["engine"]).startswith("stacked") and r.config.epochs == int(epochs)
    }
    return span(taken, ".0f")
