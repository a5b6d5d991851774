"""Training the fully connected residual network: a generator of records, the same for every use."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib import checks, paths
from lib.checks import Divergence
from lib.dense import compiled
from lib.dense.adjoint import Adjoint
from lib.dense.network import Data, NetworkConfig, Weights, initialise, prepared_start
from lib.dense.solver import Solver

ENGINES = ("auto", "compiled", "adjoint")


@dataclass
class Record:
    """The network at ``iteration`` t, *before* step t: t = 0 is the initialisation.

    ``weights`` are the live ones, which the next step changes: reduce or clone what is to be kept.
    """

    iteration: int
    loss: float
    weights: Weights
    solver: Solver

    def gradients(self) -> Weights:
        """The gradient of the loss at these weights (valid until the generator moves on)."""
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
    """Full-batch gradient descent, dZ_k/dt = -L dl/dZ_k in steps of ``learning_rate`` (gradient flow, section 2).

    Main arguments: ``config``; ``learning_rate`` eta (Z_k = (V_k, W_k) steps by eta times
    the config's step factor, which is L for the scaling 1/L, A and B by eta);
    ``iterations`` T; ``record_at``, the iterations t <= T to yield (default: all of 0..T).

    Other arguments: ``clip`` C, the clipped flow if above 0; ``start``, weights and data other than
    `initialise` draws, in any dtype and on any device (weights that have the config's already are trained in place);
    ``engine`` (see `make_solver`).

    Yields a `Record` for each asked iteration, in order. No training happens beyond the last one.
    Raises `Divergence` when the loss stops being finite, ValueError or TypeError for arguments that cannot be.
    """
    wanted = checked_schedule(learning_rate, iterations, record_at, clip)
    weights, data = initialise(config) if start is None else _checked_start(start)
    weights, data = prepared_start(config, weights, data)
    solver = make_solver(config, weights, data, engine)
    return _records(config, solver, checks.plain(learning_rate), wanted, checks.plain(clip))


def _checked_start(start: tuple[Weights, Data]) -> tuple[Weights, Data]:
    parts = start if isinstance(start, tuple | list) else (start,)
    if len(parts) != 2 or not isinstance(parts[0], Weights) or not isinstance(parts[1], Data):
        found = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"start holds {found}, expected Weights, Data as in start=(weights, Data(x, y)).")
    return parts


def checked_schedule(
    learning_rate: float, iterations: int, record_at: Iterable[int] | None, clip: float
) -> Sequence[int]:
    """The iterations to record, in order (default: all of 0..``iterations``); raises as `train` does."""
    checks.positive_float("learning_rate", learning_rate)
    checks.positive_int("iterations", iterations, least=0)
    checks.positive_float("clip", clip, zero_allowed=True)
    return checks.moments(record_at, iterations)


def make_solver(config: NetworkConfig, weights: Weights, data: Data, engine: str = "auto") -> Solver:
    """The engine that trains: "adjoint" is PyTorch's, "compiled" the C++ one (ValueError if it does not apply),
    "auto" the compiled one if it is built and applies, else the adjoint."""
    checks.choice("engine", engine, ENGINES)
    if engine == "compiled" or (engine == "auto" and not compiled.problem(config, weights, data)):
        return compiled.Compiled(config, weights, data)
    return Adjoint(config, weights, data)


def _records(config, solver, learning_rate, wanted, clip) -> Iterator[Record]:
    done = 0  # steps taken; the states of `forward` belong to the present weights only right after it
    fresh = False
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
    if math.isfinite(float(losses[-1])):  # once a loss is not finite, neither are the later ones
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


def lockstep(trainings: Iterable[Iterator[Record]]) -> Iterator[tuple[Record, ...]]:
    """Several trainings side by side: at each recorded iteration the tuple of their records."""
    return zip(*trainings, strict=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: what suits small networks when other work shares the processor.

    The threads of a product wait for each other; if one of two has no core to itself, a step of milliseconds
    takes a second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(records: Iterable, total: int | None = None, label: str = "training") -> Iterable:
    """The records under a progress bar for a person to see; no bar if nobody looks (`paths.unattended`)."""
    return tqdm(records, desc=label, total=total, disable=paths.unattended(), leave=False)
