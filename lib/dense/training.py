"""Training the fully connected residual network: a generator of records."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from lib import checks, paths
from lib.checks import Divergence
from lib.dense import compiled
from lib.dense.adjoint import Adjoint
from lib.dense.network import Data, NetworkConfig, Weights, initialise, prepare_start
from lib.dense.solver import Solver

ENGINES = ("auto", "compiled", "adjoint")


@dataclass
class Record:
    """The network at ``iteration`` t, *before* step t: t = 0 is the initialisation.

    The next step changes ``weights`` in place: clone what you want to keep.
    """

    iteration: int
    loss: float
    weights: Weights
    solver: Solver

    def gradients(self) -> Weights:
        """The gradient of the loss at these weights. Call it before the generator's next step."""
        return self.solver.gradients()


def train(
    config: NetworkConfig,
    learning_rate: float,
    iterations: int,
    record_at: Iterable[int] | None = None,
    *,
    clip: float = 0.0,
    start: tuple[Weights, Data] | None = None,
    engine: str = "auto",
) -> Iterator[Record]:
    """Train by full-batch gradient descent: the flow dZ_k/dt = -L dl/dZ_k of section 2 in steps of ``learning_rate``.

    Main arguments: ``config``; ``learning_rate`` eta (the step of A and B; that of Z_k = (V_k, W_k) is eta times the
    config's step factor, which is L for the scaling 1/L); ``iterations`` T; ``record_at``, the iterations t <= T to
    yield (default: all of 0..T).

    Other arguments: ``clip`` C > 0 gives the clipped flow. ``start`` holds weights and data in place of those that
    `initialise` draws, in any dtype and on any device; weights in the dtype and on the device of the config are trained
    in place. For ``engine`` see `make_solver`.

    Yields a `Record` for each of these iterations, in order, and stops at the last one. Raises `Divergence` if the loss
    is not finite, ValueError or TypeError for wrong arguments.
    """
    wanted = check_schedule(learning_rate, iterations, record_at, clip)
    weights, data = initialise(config) if start is None else _check_start(start)
    weights, data = prepare_start(config, weights, data)
    solver = make_solver(config, weights, data, engine)
    return _records(config, solver, checks.plain(learning_rate), wanted, checks.plain(clip))


def _check_start(start: tuple[Weights, Data]) -> tuple[Weights, Data]:
    parts = start if isinstance(start, tuple | list) else (start,)
    if len(parts) != 2 or not isinstance(parts[0], Weights) or not isinstance(parts[1], Data):
        found = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"start holds {found}, expected Weights, Data as in start=(weights, Data(x, y)).")
    return parts


def check_schedule(
    learning_rate: float, iterations: int, record_at: Iterable[int] | None, clip: float
) -> Sequence[int]:
    """The iterations to record, in order (default: all of 0..``iterations``). Raises ValueError or TypeError for wrong
    arguments of `train`."""
    checks.positive_float("learning_rate", learning_rate)
    checks.positive_int("iterations", iterations, least=0)
    checks.positive_float("clip", clip, zero_allowed=True)
    return checks.record_iterations(record_at, iterations)


def make_solver(config: NetworkConfig, weights: Weights, data: Data, engine: str = "auto") -> Solver:
    """The solver by the name of its engine.

    "adjoint" is in PyTorch. "compiled" is in C++; raises ValueError if it cannot be used. "auto" is the compiled one if
    it is built and can be used, else the adjoint.
    """
    checks.choice("engine", engine, ENGINES)
    if engine == "compiled" or (engine == "auto" and not compiled.find_problem(config, weights, data)):
        return compiled.Compiled(config, weights, data)
    return Adjoint(config, weights, data)


def _records(config, solver, learning_rate, wanted, clip) -> Iterator[Record]:
    done = 0  # steps taken
    fresh = False  # whether the states of the last `forward` are those of the present weights
    for iteration in wanted:
        if fresh and iteration > done:
            solver.descend(learning_rate, clip)
            done += 1
        if iteration > done:
            losses = solver.run(learning_rate, iteration - done, clip)
            _check_finite(losses, done, config, learning_rate)
            done = iteration
        loss = solver.forward()
        fresh = True
        _check_finite(loss.reshape(1), done, config, learning_rate)
        yield Record(iteration, float(loss), solver.weights, solver)


def _check_finite(losses: Tensor, first: int, config: NetworkConfig, learning_rate: float) -> None:
    if math.isfinite(float(losses[-1])):  # after a loss that is not finite, no loss is finite
        return
    bad = first + int((~losses.isfinite()).nonzero()[0])
    other = "" if config.initialisation == "weight-tied" else ", or the weight-tied initialisation,"
    cure = f"a smaller learning rate{other} is the usual cure"
    if bad == 0:
        cure = f"no step was made yet, so the data or the initial weights are too large for {config.dtype}"
    raise Divergence(
        f"The loss is {float(losses[bad - first])} at iteration {bad} "
        f"(depth {config.depth}, {config.initialisation}, learning rate {learning_rate}); {cure}."
    )


def run_in_lockstep(trainings: Iterable[Iterator[Record]]) -> Iterator[tuple[Record, ...]]:
    """Run several trainings side by side: at each recorded iteration, yield the tuple of their records."""
    return zip(*trainings, strict=True)


def progress(records: Iterable, total: int | None = None, label: str = "training") -> Iterable:
    """Show a progress bar over the records. There is no bar if no person looks (`paths.is_unattended`)."""
    return tqdm(records, desc=label, total=total, disable=paths.is_unattended(), leave=False)
