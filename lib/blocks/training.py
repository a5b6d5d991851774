"""Training a residual network of any block by gradient flow: a generator of records, as `lib.dense.training.train`."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib import checks
from lib.blocks.block import Block
from lib.blocks.network import DTYPES, BlockNetwork, Loss
from lib.checks import Divergence

OPTIMIZERS = ("sgd",)


@dataclass
class Record:
    """The network at ``iteration`` t, *before* step t: t = 0 is the initialisation.

    The next step changes ``weights`` {parameter: (L, ...)} in place: clone what you want to keep. ``network`` gives the
    output and, with other weights, `BlockNetwork.output_at`.
    """

    iteration: int
    loss: float
    weights: dict[str, Tensor]
    network: BlockNetwork


def gaussian_data(
    shape: Iterable[int], seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Independent standard Gaussian inputs x and targets y of one ``shape``, samples along the first axis.

    Raises TypeError or ValueError, one sentence, for values that cannot be.
    """
    shape = checks.plain(shape)
    if not isinstance(shape, Iterable) or not shape:
        raise TypeError(f"shape is {shape!r}, expected the sizes of all axes, samples first, as in (50, 16).")
    shape = tuple(checks.plain(size) for size in shape)
    for size in shape:
        checks.positive_int("an entry of shape", size)
    checks.positive_int("seed", seed, least=0)
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype!r}, expected torch.float64 or torch.float32.")
    device = checks.usable_device(device)
    generator = torch.Generator().manual_seed(checks.plain(seed))
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(device, dtype), y.to(device, dtype)


def check_optimizer(optimizer: str) -> None:
    """Raise ValueError unless the optimizer makes steps along the gradient."""
    if optimizer not in OPTIMIZERS:
        shown = (
            repr(optimizer) if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)
        )
        raise ValueError(
            f"optimizer is {shown}, expected 'sgd': the flow multiplies the gradient of a layer by the depth L, "
            "and an optimizer that divides by the gradient's size, as Adam does, undoes that."
        )


def train(
    block: Block,
    depth: int,
    x: Tensor,
    y: Tensor,
    learning_rate: float = 0.1,
    iterations: int = 60,
    record_at: Iterable[int] | None = None,
    *,
    loss: Loss = nn.functional.mse_loss,
    initialisation: str = "weight-tied",
    seed: int = 0,
    optimizer: str = "sgd",
    chunk: int = 32,
) -> Iterator[Record]:
    """Train by full-batch gradient descent: dZ_k/dt = -L dl/dZ_k in steps of ``learning_rate`` (the multiplier is L).

    Arguments: see `BlockNetwork`; ``iterations`` T; ``record_at``, the iterations t <= T to yield (default: all of
    0..T); ``optimizer``, only "sgd", since Adam would undo the multiplier.

    Yields a `Record` for each of these iterations, in order, and stops at the last one. Raises `Divergence` if the loss
    is not finite, TypeError or ValueError for wrong arguments.
    """
    checks.positive_float("learning_rate", learning_rate)
    checks.positive_int("iterations", iterations, least=0)
    check_optimizer(optimizer)
    wanted = set(checks.record_iterations(record_at, iterations))
    network = BlockNetwork(block, depth, x, y, loss, initialisation=initialisation, seed=seed, chunk=chunk)
    return _records(network, checks.plain(learning_rate), wanted)


def _records(network: BlockNetwork, learning_rate: float, wanted: set[int]) -> Iterator[Record]:
    last = max(wanted, default=-1)
    for iteration in range(last + 1):
        loss = float(network.forward())
        if not math.isfinite(loss):
            cure = "a smaller learning rate is the usual cure"
            if iteration == 0:
                cure = "no step was made yet, so look at the data, the initial weights and the loss function"
            raise Divergence(
                f"The loss of {type(network.block).__name__} is {loss} at iteration {iteration} (depth "
                f"{network.depth}, learning rate {learning_rate}); {cure}."
            )
        if iteration in wanted:
            yield Record(iteration, loss, network.weights, network)
        if iteration < last:
            network.descend(learning_rate)
