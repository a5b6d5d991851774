"""What the experiments share: progress bars, runs on several processes, networks beside their limit, seeds, inputs,
recorded iterations, sorted tables, the rate of a loss."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.dense import limit
from lib.dense.network import NetworkConfig, Weights
from lib.dense.training import run_in_lockstep, train
from lib.parallel import map_processes
from lib.tables import from_rows

# Wraps an iterable of a known length, for example in a progress bar (`lib.dense.training.progress`).
Progress = Callable[[Iterable, int], Iterable]


def silent(records: Iterable, total: int) -> Iterable:
    """No progress bar."""
    return records


def compute_runs(function: Callable[[Any, Any], Any], config: Any, runs: Sequence, progress: Progress) -> Iterable:
    """function(config, run) for each of the independent ``runs``, in order, on several processes (see
    `lib.parallel.map_processes`)."""
    return progress(map_processes(partial(function, config), runs), len(runs))


def train_beside_limit(
    network: NetworkConfig,
    depths: Sequence[int],
    learning_rate: float,
    record_at: Sequence[int],
    tolerance: float,
    clip: float = 0.0,
) -> Iterator[tuple]:
    """Train the large-depth limit and the network at each of ``depths``. Yields the tuple of their records, the limit's
    first, at each of the iterations ``record_at``, of which the last one ends training."""
    schedule = learning_rate, record_at[-1], record_at
    trainings = [limit.train(network, *schedule, tolerance=tolerance, clip=clip)]
    return run_in_lockstep(trainings + [train(network.at_depth(depth), *schedule, clip=clip) for depth in depths])


def space_evenly(iterations: int, count: int) -> list[int]:
    """At most ``count`` >= 2 evenly spaced iterations from 0 to ``iterations``, with both ends."""
    return sorted({round(t) for t in np.linspace(0, iterations, min(count, iterations + 1))})


def vary_seed(network: NetworkConfig, count: int) -> list[NetworkConfig]:
    """``count`` copies of the network with consecutive seeds, starting at its own seed."""
    return [dataclasses.replace(network, seed=network.seed + k) for k in range(count)]


def draw_inputs(network: NetworkConfig, count: int) -> Tensor:
    """Draw standard Gaussian inputs x: (count, d) that are not in the training set, in float64. The seed is the
    network's plus 1."""
    generator = torch.Generator().manual_seed(network.seed + 1)
    return torch.randn(count, network.dimension, generator=generator, dtype=torch.float64)


def take_last(steps: Iterable):
    """The last state of an experiment."""
    return deque(steps, maxlen=1).pop()


def sort_rows(rows: list[dict], *columns: str) -> dict[str, list]:
    """A table from rows, sorted by these columns."""
    return from_rows(sorted(rows, key=lambda row: [row[column] for column in columns]))


def read_entries(weights: Weights, row: int, column: int) -> tuple[list[float], list[float]]:
    """The entry (``row``, ``column``) of V_k: (m, q) and of W_k: (q, m) across the layers."""
    return weights.V[:, row, column].tolist(), weights.W[:, row, column].tolist()


def fit_loss_rate(times: Sequence[float], losses: Sequence[float], last: float = 0.5) -> float:
    """-d(log loss)/dt in the unit of the ``times``, by least squares over the ``last`` share of training; nan with
    fewer than two positive losses."""
    t, value = np.asarray(times, dtype=float), np.asarray(losses, dtype=float)
    keep = (t >= t[-1] * (1 - last)) & (value > 0)
    if keep.sum() < 2:
        return math.nan
    return float(-np.polyfit(t[keep], np.log(value[keep]), 1)[0])


def largest_norm(rows: Tensor) -> float:
    """The largest Euclidean norm of the vectors rows[..., :], as a supremum over layers and inputs."""
    return float(rows.norm(dim=-1).max())
