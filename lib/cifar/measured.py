"""Tables of slow measurements on the trained networks, written once: ``python -m lib.cifar.measured``.

    checkpoints/resampling.csv    every network with fewer layers: accuracy, and distance of its logits
    checkpoints/solvers.csv       some networks as ODEs: errors of solvers against evaluations of the layers
    checkpoints/reversible.csv    the same networks: errors of gradients whose states are computed backwards
    checkpoints/memory.csv        the memory that a gradient takes, with stored states and without

Rows that a table has already are not measured again. To measure them again, delete the file or the rows of a run.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import checks, commands, parallel, paths, tables
from lib.cifar import dataset, records, resampling
from lib.cifar.choice import NetworkChoice
from lib.cifar.dataset import Images
from lib.cifar.network import ConvResNet
from lib.cifar.records import Run
from lib.cifar.resampling import ParallelForm, accuracy, branch, distance, fold_batch_norms, logits, resample
from lib.ode import reversible
from lib.ode import solvers as ode

RESAMPLING, SOLVERS, REVERSIBLE, MEMORY = records.MEASURED
PARALLEL = "parallel"
# Each policy is a rule for the weights and one for the batch norms' statistics.
POLICIES = (
    ("kept", "kept"),
    ("averaged", "averaged"),
    ("interpolated", "interpolated"),
    ("kept", "averaged"),
    ("kept", resampling.RECOMPUTED),
    (PARALLEL, "kept"),
)
STATISTICS_IMAGES = 1000  # training images on which the batch norms' statistics are recomputed
# Activation, initialisation and epochs of networks of the paper's depth, with batch norm and seed 0.
REPRESENTATIVES = (
    ("gelu", "weight-tied", 30),
    ("gelu", "iid", 30),
    ("gelu", "weight-tied", 180),
    ("identity", "weight-tied", 180),
    ("identity", "iid", 180),
    ("relu", "iid", 180),
)
ODE_IMAGES = 4  # test images that solvers start from, in float64
STEPS = [2**power for power in range(1, 11)]
TOLERANCES = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
MEMORY_BATCH = 32
MEMORY_LAYERS = [2**power for power in range(3, 9)]


# ------------------------------------------------------------------------------------------------ fewer layers


def halvings(depth: int) -> list[int]:
    """The numbers of layers that are measured: depth/2, depth/4, ..., 1."""
    return [depth >> power for power in range(1, depth.bit_length())]


def policy_layers(policy: tuple[str, str], depth: int) -> list[int]:
    """The numbers of layers at which a policy is measured: all `halvings`, or every other one in the parallel form,
    which computes all layers each time."""
    return halvings(depth)[:: 2 if policy[0] == PARALLEL else 1]


def apply_policy(
    network: ConvResNet, layers: int, policy: tuple[str, str], training: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """The network, images -> logits, with fewer layers by one of the `POLICIES`. ``training`` are the normalised images
    on which statistics are recomputed."""
    weights, statistics = policy
    if weights == PARALLEL:
        return ParallelForm(network, layers)
    return resample(network, layers, weights, statistics, training)


def resampling_rows(
    run: Run, policies: Sequence[tuple[str, str]], test: Images, training: Tensor
) -> Iterator[dict[str, Any]]:
    """Rows of ``resampling.csv`` of one run: one for each policy and number of layers (`policy_layers`).

    ``accuracy`` (%, on the first ``images`` test images) and ``distance`` (`resampling.distance`, of the logits) are
    those of the network with that number of ``layers``. ``accuracy_all`` is that of all its layers on the same images.
    """
    network = run.load().network
    expected = logits(network, test)
    for policy in policies:
        for layers in policy_layers(policy, run.config.depth):
            found = logits(apply_policy(network, layers, policy, training), test)
            yield {
                "run": run.config.name,
                "layers": layers,
                "weights": policy[0],
                "statistics": policy[1],
                "images": len(test),
                "accuracy": accuracy(found, test.labels),
                "accuracy_all": accuracy(expected, test.labels),
                "distance": distance(found, expected),
            }


def measure_resampling(runs: Sequence[Run], policies: Sequence[tuple[str, str]], images: int) -> None:
    """Measure on that number of test images (0: all). Rows of ``resampling.csv`` on at least as many are kept."""
    test = dataset.load(train=False, limit=images or None)
    training = dataset.normalise(dataset.load(train=True, limit=STATISTICS_IMAGES).pixels)

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["run"], row["weights"], row["statistics"]

    for run in runs:
        # Without batch norm there are no statistics.
        meant = [policy for policy in policies if run.config.batch_norm or policy[0] == PARALLEL or len({*policy}) == 1]
        done = {key(row) for row in tables.rows(records.read_measured(RESAMPLING)) if row["images"] >= len(test)}
        if not (wanted := [policy for policy in meant if (run.config.name, *policy) not in done]):
            continue
        started = time.monotonic()
        rows = list(resampling_rows(run, wanted, test, training))
        new = {key(row) for row in rows}
        _write(
            RESAMPLING, rows + [row for row in tables.rows(records.read_measured(RESAMPLING)) if key(row) not in new]
        )
        _report(run, f"{len(wanted)} policies on {len(test)} images", started)


# ------------------------------------------------------------------------------------------- solvers, and backwards


def representatives(runs: Sequence[Run]) -> list[Run]:
    """The runs of `REPRESENTATIVES` among these, in that order."""
    found = []
    for activation, initialisation, epochs in REPRESENTATIVES:
        choice = NetworkChoice(activation, epochs=epochs)
        found += choice.select(runs, initialisation=initialisation, seed=0)[:1]
    return found


def solver_rows(network: ConvResNet, pixels: Tensor) -> list[dict[str, Any]]:
    """Rows of ``solvers.csv`` of one network: `ode.measure_solver_errors` in float64 from the states h_0 of these
    images."""
    network = network.double()
    with torch.no_grad():
        start = network.stem(dataset.normalise(pixels))
    f, layers = branch(network.config.activation), fold_batch_norms(network)
    return tables.rows(ode.measure_solver_errors(f, layers, start, STEPS, TOLERANCES, STEPS[-1]))


def reversible_rows(network: ConvResNet, images: Images, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of ``reversible.csv`` of one network, with each number of ``layers`` that it is resampled to:
    `reversible.measure_errors` of the gradients of the cross-entropy on these images, in float64 and in evaluation
    mode."""
    rows = []
    for count in layers:
        part = resample(network, count).double()
        f, folded_layers = branch(part.config.activation), fold_batch_norms(part)
        with torch.no_grad():
            start = part.stem(dataset.normalise(images.pixels))
        loss = partial(_cross_entropy, part, images.labels)
        for method in reversible.METHODS:
            errors = reversible.measure_errors(method, f, folded_layers, start, loss)
            rows.append({"method": method, "layers": count, **errors})
    return rows


def _cross_entropy(network: ConvResNet, labels: Tensor, h: Tensor) -> Tensor:
    return F.cross_entropy(network.head(h), labels)


def _send_growth(stored: bool, answer) -> None:
    # From few layers to many, in a process of its own: its peak is then that of the last number.
    unit = 1 if sys.platform == "darwin" else 1024
    start, f = torch.randn(MEMORY_BATCH, 16, 10, 10), branch("gelu")
    gradients = partial(reversible.compute_gradients, "Euler", f, loss=_mean_square, stored=stored)
    grown: list[float] = []
    for depth in [1, *MEMORY_LAYERS]:  # 1 measures the libraries' own buffers
        gradients([0.01 * torch.randn(depth, 16, 16, 3, 3), torch.zeros(depth, 16)] * 2, start)
        grown.append(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    answer.send([peak - grown[0] for peak in grown[1:]])


def _mean_square(h: Tensor) -> Tensor:
    return h.square().mean()


def memory(stored: bool) -> list[float]:
    """Megabytes that the gradients of `MEMORY_BATCH` images in float32 add to a new process, for each number of
    `MEMORY_LAYERS`, with states that are stored or computed backwards."""
    return parallel.ask_process(_send_growth, stored)


def measure_memory() -> None:
    """Write ``memory.csv``, if there is none."""
    if not len(records.read_measured(MEMORY)["layers"]):
        table = {"layers": MEMORY_LAYERS, "stored": memory(True), "backwards": memory(False)}
        tables.write_csv(paths.CHECKPOINTS / f"{MEMORY}.csv", table)


def measure_solvers(runs: Sequence[Run]) -> None:
    """Measure the `representatives` that are not in ``solvers.csv`` yet."""
    pixels = dataset.load(train=False, limit=ODE_IMAGES).pixels
    for run in _select_missing(SOLVERS, representatives(runs)):
        started = time.monotonic()
        rows = [{"run": run.config.name, **row} for row in solver_rows(run.load().network, pixels)]
        _write(SOLVERS, tables.rows(records.read_measured(SOLVERS)) + rows)
        _report(run, SOLVERS, started)


def measure_reversible(runs: Sequence[Run]) -> None:
    """Measure the `representatives` that are not in ``reversible.csv`` yet."""
    images = dataset.load(train=False, limit=ODE_IMAGES)
    for run in _select_missing(REVERSIBLE, representatives(runs)):
        started, depth = time.monotonic(), run.config.depth
        # With fewer than eight layers there is little to run backwards.
        counts = [count for count in (depth, *halvings(depth)) if count >= 8]
        rows = [{"run": run.config.name, **row} for row in reversible_rows(run.load().network, images, counts)]
        _write(REVERSIBLE, tables.rows(records.read_measured(REVERSIBLE)) + rows)
        _report(run, REVERSIBLE, started)


def _select_missing(name: str, runs: Sequence[Run]) -> list[Run]:
    done = set(records.read_measured(name)["run"])
    return [run for run in runs if run.config.name not in done]


def _report(run: Run, what: str, started: float) -> None:
    print(f"{run.config.name}: {what} in {time.monotonic() - started:.0f} s", flush=True)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    order = {policy: place for place, policy in enumerate(POLICIES)}
    # Sorted by run and policy. The sort is stable: the other rows stay in the order in which they were measured.
    rows.sort(key=lambda row: (row["run"], order.get((row.get("weights"), row.get("statistics")), 0)))
    tables.write_csv(paths.CHECKPOINTS / f"{name}.csv", tables.from_rows(rows))


# ---------------------------------------------------------------------------------------------------- command line


def named_rows(name: str) -> list[dict[str, Any]]:
    """The rows of the `representatives` in one of these tables, with network, depth and kind in place of the run."""
    table, rows = records.read_measured(name), []
    for run in representatives(records.read_runs()):
        config = run.config
        words = f"{tables.word(config.activation)}, {tables.word(config.initialisation)}"
        which = {"network": f"{words}, {config.epochs} epochs", "depth": config.depth, "kind": "cifar"}
        found = tables.rows(tables.select(table, run=config.name))
        rows += [which | {key: value for key, value in row.items() if key != "run"} for row in found]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 without the images, 2 for wrong values."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.cifar.measured", description="Measure the networks of checkpoints/."
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(records.MEASURED)} (default: all)")
    parser.add_argument("--images", type=int, default=0, help="test images for resampling (default: all)")
    parser.add_argument("--policies", nargs="*", metavar="WEIGHTS-STATISTICS", help="of resampling (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (default: its own choice)")
    chosen = parser.parse_args(arguments)

    def command() -> None:
        paths.check_clone()
        names = {"-".join(policy): policy for policy in POLICIES}
        for name in chosen.policies or ():
            checks.choice("a policy", name, names)
        for name in chosen.tables:
            checks.choice("a table", name, records.MEASURED)
        checks.positive_int("images", chosen.images, least=0)
        checks.thread_count("threads", chosen.threads)
        if (chosen.images or chosen.policies) and RESAMPLING not in (chosen.tables or records.MEASURED):
            raise ValueError(
                f"--images and --policies are those of {RESAMPLING}, which is not asked for: leave them out."
            )
        paths.check_writable(paths.CHECKPOINTS)
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        runs = [run for run in records.read_runs() if run.has_weights]
        for name in chosen.tables or records.MEASURED:
            if name == RESAMPLING:
                measure_resampling(runs, [names[policy] for policy in chosen.policies or names], chosen.images)
            elif name == MEMORY:
                measure_memory()
            else:
                {SOLVERS: measure_solvers, REVERSIBLE: measure_reversible}[name](runs)

    return commands.exit_code(
        command,
        "Interrupted; what is measured is kept.",
        failures=(paths.NotAClone, OSError, MemoryError),
        misuses=(ValueError, TypeError),
    )


if __name__ == "__main__":
    raise SystemExit(main())
