"""What is measured of a network on CIFAR-10 while it trains."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lib import checks, measures
from lib.cifar import dataset
from lib.cifar.network import ConvResNet

if TYPE_CHECKING:
    from lib.cifar.training import Training


def measure(network: ConvResNet) -> dict[str, float | None]:
    """What a run logs about the weights after each epoch, by the names of `EpochRecord`."""
    return measure_smoothness(network.kernels()) | network.scales()


def measure_smoothness(kernels: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The von Neumann ratio along the depth and the share of noise of both convolutions (L, ...); None if undefined."""
    found = {f"von_neumann_{name}": measures.von_neumann_ratio(tensor) for name, tensor in kernels.items()}
    found |= {f"noise_{name}": measures.noise_share(tensor) for name, tensor in kernels.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def find_not_finite(values: Mapping[str, Tensor | float | None]) -> str:
    """The first of the values that is not finite, in words; empty if all are finite. None is left out."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if not value.isfinite().all():
                return f"{name} holds {value[~value.isfinite()][0].item()}"
        elif value is not None and not math.isfinite(value):
            return f"{name} is {value}"
    return ""


def watch(
    run: "Training",
    images: dataset.Images,
    every: int = 1,
    measure: Callable[[ConvResNet], dict[str, float | None]] = ConvResNet.scales,
) -> Iterator[dict[str, Any]]:
    """Train one more epoch; yield a line after every ``every`` steps and after the last one.

    A line holds the epoch and the step (1, 2, ...), the mean ``loss`` since the line before, and what ``measure`` finds
    in the network. The run is left at the next epoch, and its log is unchanged. Raises ValueError if ``every`` is
    below 1.
    """
    checks.positive_int("every", every)
    before, last = 0.0, 0
    for now in run.train_epoch(images, every):
        if now.batch % every and now.batch < now.batches:
            continue
        seen = min(now.batch * run.config.batch_size, len(images))
        loss = (now.loss * seen - before) / (seen - last)
        before, last = now.loss * seen, seen
        yield {"epoch": run.epoch + 1, "step": now.batch, "loss": loss, **measure(run.network)}
    run.epoch += 1
