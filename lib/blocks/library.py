"""Blocks on board, each a module of a few lines: f in h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}).

Row vectors: h is (n, tokens, q) or (n, q), and for convolutions (n, channels, height, width). s is an activation, N a
normalisation with a trained scale and shift. What comes last starts at zero, so that every block starts as f = 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lib import checks

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}
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


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


class Perceptron(nn.Module):
    """f(h) = s(N(h) W) V, W: (q, m) standard Gaussian, V: (m, q) zero: the paper's block, in the released scaling."""

    def __init__(self, activation: str = "gelu", normalisation: str = "none") -> None:
        super().__init__()
        self.norm, self.activation = _vector_norm(normalisation), ACTIVATIONS[activation]()
        self.W, self.V = nn.Parameter(torch.randn(SIZE, WIDTH)), nn.Parameter(torch.zeros(WIDTH, SIZE))

    def forward(self, h: Tensor) -> Tensor:
        return self.activation(self.norm(h) @ self.W) @ self.V


class SelfAttention(nn.Module):
    """f(h) = softmax(Q K^T / sqrt(q)) V O with (Q, K, V) = N(h) (W_Q, W_K, W_V), over the tokens of a sample; O = 0."""

    def __init__(self, normalisation: str = "none") -> None:
        super().__init__()
        self.norm = _vector_norm(normalisation)
        self.queries, self.keys, self.values, self.out = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def start_at_zero(self) -> None:
        _zero(self.out)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        weights = torch.softmax(self.queries(h) @ self.keys(h).mT / SIZE**0.5, dim=-1)
        return self.out(weights @ self.values(h))


class Transformer(nn.Module):
    """f(h) = attention(N(h)) + perceptron(N'(h)): both in one residual, each with a norm of its own."""

    def __init__(self, activation: str = "gelu", normalisation: str = "layer") -> None:
        super().__init__()
        self.attention, self.perceptron = SelfAttention(normalisation), Perceptron(activation, normalisation)

    def start_at_zero(self) -> None:
        self.attention.start_at_zero()

    def forward(self, h: Tensor) -> Tensor:
        return self.attention(h) + self.perceptron(h)


class Gated(nn.Module):
    """f(h) = (s(N(h) W) * N(h) U) V, W and U: (q, m), V: (m, q) zero: with SiLU, the unit of many language models."""

    def __init__(self, activation: str = "silu", normalisation: str = "none") -> None:
        super().__init__()
        self.norm, self.activation = _vector_norm(normalisation), ACTIVATIONS[activation]()
        self.gate, self.up = (nn.Linear(SIZE, WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(WIDTH, SIZE, bias=False)

    def start_at_zero(self) -> None:
        _zero(self.down)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        return self.down(self.activation(self.gate(h)) * self.up(h))


class Convolution(nn.Module):
    """f(h) = N2(conv2(s(N1(conv1(h))))) with 3x3 convolutions: with batch norm, the paper's block for CIFAR-10.

    Zero at the start: scale and shift of N2, and without a norm conv2.
    """

    def __init__(self, activation: str = "gelu", normalisation: str = "batch") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (_image_norm(normalisation) for _ in range(2))

    def start_at_zero(self) -> None:
        _zero(self.conv2 if isinstance(self.norm2, nn.Identity) else self.norm2)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.activation(self.norm1(self.conv1(h)))))


TOKENS, IMAGES = (16, 8, SIZE), (16, CHANNELS, 4, 4)


@dataclass(frozen=True)
class OnBoard:
    """A block on board: its ``module``, its ``formula`` for people, which normalisations it has, the shape of data that
    it is tried on, and whether it has an activation."""

    module: Callable[..., nn.Module]
    formula: str
    normalisations: tuple[str, ...] = ("none", "layer")
    shape: tuple[int, ...] = TOKENS
    activated: bool = True


BLOCKS = {
    "perceptron": OnBoard(Perceptron, "s(N(h) W) V"),
    "self-attention": OnBoard(SelfAttention, "softmax(Q K^T / sqrt(q)) V O", activated=False),
    "transformer": OnBoard(Transformer, "attention(N(h)) + perceptron(N'(h))"),
    "gated unit": OnBoard(Gated, "(s(N(h) W) * N(h) U) V"),
    "convolution": OnBoard(
        Convolution, "N2(conv2(s(N1(conv1(h)))))", ("none", "layer", "group", "batch"), IMAGES
    ),
}


def make_block(name: str, activation: str = "gelu", normalisation: str = "none") -> Callable[[], nn.Module]:
    """The factory of a block on board.

    ``activation`` does nothing for a block without one. Raises ValueError with the names for one that does not exist.
    """
    checks.choice("block", name, BLOCKS)
    checks.choice("activation", activation, ACTIVATIONS)
    block = BLOCKS[name]
    checks.choice(f"normalisation of {name}", normalisation, block.normalisations)
    options = {"activation": activation} if block.activated else {}
    return partial(block.module, normalisation=normalisation, **options)
