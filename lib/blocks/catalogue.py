"""A catalogue of blocks, each a module of a few lines: f in h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}).

Row vectors: h is (n, tokens, q) or (n, q), and for convolutions (n, channels, height, width). s is an activation, N a
normalisation with a trained scale and shift. The last parameters of a block start at zero, so every network starts as
the identity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lib import activations, checks

SIZE, WIDTH = 16, 32  # q and m
CHANNELS, GROUPS = 8, 4


def _vector_norm(normalisation: str) -> nn.Module:
    return nn.LayerNorm(SIZE) if normalisation == "layer" else nn.Identity()


def _image_norm(normalisation: str) -> nn.Module:
    norms = {
        "none": nn.Identity,
        "layer": partial(nn.GroupNorm, 1, CHANNELS),
        "group": partial(nn.GroupNorm, GROUPS, CHANNELS),
        "batch": partial(nn.BatchNorm2d, CHANNELS, track_running_stats=False),
    }
    return norms[normalisation]()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """h -> h W, the entries of W Gaussian with variance 1/inputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


class Perceptron(nn.Module):
    """f(h) = s(N(h) W) V: without N the paper's block (its 1/sqrt(q) is in the draw of W). V starts at zero."""

    def __init__(self, activation: str = "gelu", normalisation: str = "none") -> None:
        super().__init__()
        self.norm, self.activation = _vector_norm(normalisation), activations.get(activation).function
        self.W, self.V = _linear(SIZE, WIDTH), _linear(WIDTH, SIZE)

    def start_at_zero(self) -> None:
        _zero(self.V)

    def forward(self, h: Tensor) -> Tensor:
        return self.V(self.activation(self.W(self.norm(h))))


class SelfAttention(nn.Module):
    """f(h) = softmax(Q K^T / sqrt(q)) V O, (Q, K, V) = N(h) W, over the tokens of a sample. O starts at zero."""

    def __init__(self, normalisation: str = "none") -> None:
        super().__init__()
        self.norm = _vector_norm(normalisation)
        self.W, self.O = _linear(SIZE, 3 * SIZE), _linear(SIZE, SIZE)

    def start_at_zero(self) -> None:
        _zero(self.O)

    def forward(self, h: Tensor) -> Tensor:
        queries, keys, values = self.W(self.norm(h)).chunk(3, dim=-1)
        return self.O(torch.softmax(queries @ keys.mT / SIZE**0.5, dim=-1) @ values)


class Transformer(nn.Module):
    """f(h) = attention(N(h)) + perceptron(N'(h)): both in one residual, each with its own norm."""

    def __init__(self, activation: str = "gelu", normalisation: str = "layer") -> None:
        super().__init__()
        self.attention, self.perceptron = SelfAttention(normalisation), Perceptron(activation, normalisation)

    def start_at_zero(self) -> None:
        self.attention.start_at_zero()
        self.perceptron.start_at_zero()

    def forward(self, h: Tensor) -> Tensor:
        return self.attention(h) + self.perceptron(h)


class Gated(nn.Module):
    """f(h) = (s(N(h) W) * N(h) U) V: with SiLU the gated unit of language models. V starts at zero."""

    def __init__(self, activation: str = "silu", normalisation: str = "none") -> None:
        super().__init__()
        self.norm, self.activation = _vector_norm(normalisation), activations.get(activation).function
        self.W, self.U, self.V = _linear(SIZE, WIDTH), _linear(SIZE, WIDTH), _linear(WIDTH, SIZE)

    def start_at_zero(self) -> None:
        _zero(self.V)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        return self.V(self.activation(self.W(h)) * self.U(h))


class Convolution(nn.Module):
    """f(h) = N2(conv2(s(N1(conv1(h))))) with 3x3 convolutions: with batch norm, the paper's block for CIFAR-10.

    Scale and shift of N2 start at zero; without a norm, conv2 starts at zero.
    """

    def __init__(self, activation: str = "gelu", normalisation: str = "batch") -> None:
        super().__init__()
        self.activation = activations.get(activation).function
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (_image_norm(normalisation) for _ in range(2))

    def start_at_zero(self) -> None:
        _zero(self.conv2 if isinstance(self.norm2, nn.Identity) else self.norm2)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.activation(self.norm1(self.conv1(h)))))


TOKENS, IMAGES = (8, 8, SIZE), (8, CHANNELS, 4, 4)


@dataclass(frozen=True)
class CatalogueBlock:
    """A block of the catalogue: its ``module``, its ``formula`` in words, the ``normalisations`` that it can have, the
    ``shape`` of data for a trial, and whether it is ``activated``: has an activation."""

    module: Callable[..., nn.Module]
    formula: str
    normalisations: tuple[str, ...] = ("none", "layer")
    shape: tuple[int, ...] = TOKENS
    activated: bool = True


BLOCKS = {
    "perceptron": CatalogueBlock(Perceptron, "s(N(h) W) V"),
    "self-attention": CatalogueBlock(SelfAttention, "softmax(Q K^T / sqrt(q)) V O", activated=False),
    "transformer": CatalogueBlock(Transformer, "attention(N(h)) + perceptron(N'(h))"),
    "gated unit": CatalogueBlock(Gated, "(s(N(h) W) * N(h) U) V"),
    "convolution": CatalogueBlock(
        Convolution, "N2(conv2(s(N1(conv1(h)))))", ("none", "layer", "group", "batch"), IMAGES
    ),
}


def make_block(name: str, activation: str = "gelu", normalisation: str = "none") -> Callable[[], nn.Module]:
    """The factory of a block of the catalogue.

    ``activation`` is ignored if the block has none. Raises ValueError, with the possible names, for an unknown name.
    """
    checks.choice("block", name, BLOCKS)
    checks.choice("activation", activation, activations.ACTIVATIONS)
    block = BLOCKS[name]
    checks.choice(f"normalisation of {name}", normalisation, block.normalisations)
    options = {"activation": activation} if block.activated else {}
    return partial(block.module, normalisation=normalisation, **options)
