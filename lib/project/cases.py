"""The training steps that `lib.project.bench` times: of the fully connected and the convolutional network, by
engine."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lib import activations
from lib.cifar import dataset, schedule
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.dense import compiled
from lib.dense.adjoint import Adjoint
from lib.dense.network import Data, NetworkConfig, Weights, initialise
from lib.engine import build as engine

Steps = Callable[[int], object]  # takes that many training steps

LEARNING_RATE = 1e-3
CIFAR_BATCH = 64


class Textbook:
    """Gradient descent as in a textbook: one parameter for each matrix, autograd, an optimiser."""

    def __init__(self, config: NetworkConfig, weights: Weights, data: Data) -> None:
        self.config, self.data = config, data
        self.function = activations.get(config.activation).function
        self.layers = [
            (W.clone().requires_grad_(), V.clone().requires_grad_()) for W, V in zip(weights.W, weights.V, strict=True)
        ]
        parameters = [parameter for layer in self.layers for parameter in layer]
        self.optimiser = torch.optim.SGD(parameters, lr=LEARNING_RATE * config.step_factor)

    def loss(self) -> Tensor:
        config, h = self.config, self.data.x
        for W, V in self.layers:
            h = h + config.outer_scale * self.function(config.inner_scale * h @ W) @ V
        return config.loss_scale * (h - self.data.y).square().sum()

    def run(self, count: int) -> None:
        for _ in range(count):
            loss = self.loss()
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()


@dataclass(frozen=True)
class Dense:
    """A training step of the fully connected network, with A and B the identity."""

    config: NetworkConfig
    baseline = "textbook loop"

    @property
    def name(self) -> str:
        c = self.config
        return f"L={c.depth}, m={c.width}, d={c.dimension}, n={c.samples}"

    @property
    def dtype(self) -> torch.dtype:
        return self.config.torch_dtype

    @property
    def operations(self) -> float:
        """In each layer, two products forward and four backward, each of n m d multiply-adds."""
        c = self.config
        return 12.0 * c.samples * c.width * c.dimension * c.depth

    def engines(self) -> dict[str, Callable[[], Steps]]:
        """Functions that prepare each engine, by its name."""
        config = self.config
        engines = {
            "textbook loop": lambda: Textbook(config, *initialise(config)).run,
            "PyTorch adjoint": lambda: partial(Adjoint(config, *initialise(config)).run, LEARNING_RATE),
        }
        if not compiled.find_problem(config, *initialise(config)):
            engines["compiled"] = lambda: partial(compiled.Compiled(config, *initialise(config)).run, LEARNING_RATE)
        return engines


@contextlib.contextmanager
def use_stock_pytorch() -> Iterator[None]:
    """Switch the compiled engine off."""
    before = os.environ.get("LIB_ENGINE")
    os.environ["LIB_ENGINE"] = "off"
    try:
        yield
    finally:
        del os.environ["LIB_ENGINE"]
        if before is not None:
            os.environ["LIB_ENGINE"] = before


@dataclass(frozen=True)
class Cifar:
    """A training step on a batch of CIFAR-10's size: augmentation, forward, backward, optimiser.

    The pixels are random numbers, since the cost of a step does not depend on them.
    """

    config: ConvNetConfig
    baseline = "stock PyTorch"
    dtype = torch.float32

    @property
    def name(self) -> str:
        return f"CIFAR-10, L={self.config.depth}, {'batch norm' if self.config.batch_norm else 'no batch norm'}"

    @property
    def operations(self) -> float:
        """Those of the residual layers: two convolutions each forward, and twice that backward, on 10 x 10 images."""
        weights = 9 * self.config.channels**2
        return 12.0 * CIFAR_BATCH * 10 * 10 * weights * self.config.depth

    def engines(self) -> dict[str, Callable[[], Steps]]:
        """Functions that prepare each engine, by its name."""

        def stock() -> Steps:
            steps = self._steps()

            def run(count: int) -> None:
                with use_stock_pytorch():
                    steps(count)

            return run

        return {"stock PyTorch": stock} | ({"compiled": self._steps} if engine.load()[0] else {})

    def _steps(self) -> Steps:
        network = ConvResNet(self.config).train()
        optimiser = torch.optim.SGD(
            network.parameters(),
            lr=LEARNING_RATE,
            momentum=schedule.MOMENTUM,
            weight_decay=schedule.WEIGHT_DECAY,
            fused=True,
        )
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (CIFAR_BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
        images = dataset.Images(pixels, torch.arange(CIFAR_BATCH) % 10)

        def run(count: int) -> None:
            for _ in range(count):
                epoch = dataset.draw_epoch(CIFAR_BATCH, generator)
                batch, labels = dataset.batch(images, epoch, 0, CIFAR_BATCH)
                loss = F.cross_entropy(network(batch), labels)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()

        return run


Case = Dense | Cifar


def cases() -> list[Case]:
    """The experiments of the table."""
    dense = [
        Dense(NetworkConfig(depth=depth, width=width, samples=samples, dtype=dtype))
        for dtype in ("float32", "float64")
        for depth, width, samples in ((64, 32, 100), (1024, 32, 100), (2**14, 32, 100), (64, 64, 50))
    ]
    return [*dense, Cifar(ConvNetConfig()), Cifar(ConvNetConfig(batch_norm=False))]


def dtype_name(case: Case) -> str:
    """The name of the case's dtype in NumPy."""
    return str(case.dtype).removeprefix("torch.")
