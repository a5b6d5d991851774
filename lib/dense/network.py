"""The fully connected residual network of eq. (3): its configuration, its weights, their initialisation.

Row vectors throughout, for n samples at once:

    H_0     = X A                                        X: (n, d)   A: (d, q)
    H_{k+1} = H_k + outer * s(inner * H_k W_k) V_k       W_k: (q, m) V_k: (m, q)     k = 0, ..., L-1
    F(X)    = H_L B                                      B: (q, d')

The paper calls these layers Z_1, ..., Z_L: its eq. (3) has V_{k+1}, W_{k+1}. `lib.dense.conventions` gives outer and
inner.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import activations, checks
from lib.dense import conventions
from lib.dense.gaussian_process import GaussianProcess

INITIALISATIONS = ("weight-tied", "gaussian-process", "iid")
INITIAL_V = ("zero", "drawn")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class NetworkConfig:
    """A residual network, its random data and the seed that draws both.

    Main arguments: ``depth`` L, ``width`` m, ``dimension`` d, ``samples`` n, ``activation``, ``convention``
    ("released", "eq3" or "mean-field"), ``seed``, and ``initialisation`` of the W_k: "weight-tied" (W_k = W for every
    k), "gaussian-process" (W_k = W_0(k/L), whose entries are Gaussian processes of length scale ``length_scale``,
    section 4.3), or "iid" (each W_k has its own draw). In each, V_k = 0.

    Other arguments: ``output_dimension`` d' (0: d) and ``hidden_dimension`` q (0: the larger of d and d');
    ``train_ends``, whether A and B are trained; ``residual_scaling``, "1/L" or "1/sqrt(L)"; ``initial_V``, "zero", or
    "drawn" in the same way as W; ``target_scale``, the factor of the standard Gaussian targets (Thm 6 assumes a small
    one); ``draw_order`` (see `conventions.DRAW_ORDERS`); ``dtype``, "float32" or "float64"; ``device`` of the training,
    "cpu", "cuda", or "auto" for CUDA if there is one. Draws are always made in float32 on the CPU, so a seed gives the
    same numbers for every dtype and device.

    Raises TypeError or ValueError for a wrong value.
    """

    depth: int = 64
    width: int = 32
    dimension: int = 16
    samples: int = 100
    activation: str = "gelu"
    initialisation: str = "weight-tied"
    convention: str = "released"
    seed: int = 0
    output_dimension: int = 0
    hidden_dimension: int = 0
    train_ends: bool = False
    residual_scaling: str = "1/L"
    length_scale: float = 0.5
    initial_V: str = "zero"
    target_scale: float = 1.0
    draw_order: str = "W X Y"
    dtype: str = "float64"
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive = ("depth", "width", "dimension", "samples", "length_scale", "train_ends")
        checks.check_fields(self, *positive, seed=0, output_dimension=0, hidden_dimension=0, target_scale=0)
        activations.get(self.activation)
        conventions.get(self.convention)
        checks.choice("initialisation", self.initialisation, INITIALISATIONS)
        checks.choice("initial_V", self.initial_V, INITIAL_V)
        checks.choice("residual_scaling", self.residual_scaling, conventions.RESIDUAL_EXPONENTS)
        checks.choice("draw_order", self.draw_order, conventions.DRAW_ORDERS)
        checks.choice("dtype", self.dtype, DTYPES)
        checks.usable_device(self.device)
        if 0 < self.hidden_dimension < max(self.dimension, self.outputs):
            raise ValueError(
                f"hidden_dimension q is {self.hidden_dimension}, expected at least "
                f"max(d, d') = {max(self.dimension, self.outputs)}, or 0 for that number."
            )

    @property
    def outputs(self) -> int:
        """d', the dimension of the targets y."""
        return self.output_dimension or self.dimension

    @property
    def hidden(self) -> int:
        """q, the dimension of the hidden states h_k."""
        return self.hidden_dimension or max(self.dimension, self.outputs)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights, data and computation."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device that weights and data are trained on."""
        return checks.usable_device(self.device)

    @property
    def inner_scale(self) -> float:
        """The factor of h_k W_k inside the activation."""
        return conventions.get(self.convention).inner_scale(self.hidden)

    @property
    def outer_scale(self) -> float:
        """The factor of the residual branch."""
        exponent = conventions.RESIDUAL_EXPONENTS[self.residual_scaling]
        return conventions.get(self.convention).outer_scale(self.depth, self.width, exponent)

    @property
    def loss_scale(self) -> float:
        """The factor of the summed squares in the loss."""
        return conventions.get(self.convention).loss_scale(self.samples, self.outputs)

    @property
    def step_factor(self) -> float:
        """The factor of the learning rate for V_k and W_k: L for the residual scaling 1/L, L m in mean-field scaling.

        In general it is L^(2 beta - 1), for the scaling L^-beta, times `Convention.width_step`. The amount by which a
        step moves the network's output then does not depend on L: two factors L^-beta are summed over L layers.
        """
        over_depth = self.depth ** (2 * conventions.RESIDUAL_EXPONENTS[self.residual_scaling] - 1)
        return over_depth * conventions.get(self.convention).width_step(self.width)

    @property
    def ends_are_identity(self) -> bool:
        """Whether A and B are always the identity, and not stored."""
        return not self.train_ends and self.dimension == self.outputs == self.hidden

    def at_depth(self, depth: int) -> "NetworkConfig":
        """The same configuration, with the same draws, at another depth."""
        return dataclasses.replace(self, depth=depth)


@dataclass
class Weights:
    """V: (L, m, q) and W: (L, q, m), layer by layer; A: (d, q) and B: (q, d'), None if they are always the identity.

    Each is a tensor, or anything that `checks.as_tensor` takes.
    """

    V: Tensor
    W: Tensor
    A: Tensor | None = None
    B: Tensor | None = None

    def __post_init__(self) -> None:
        for name, values in self.items().items():
            setattr(self, name, checks.as_tensor(name, values))

    def items(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        return {name: getattr(self, name) for name in "VWAB" if getattr(self, name) is not None}

    def clone(self) -> "Weights":
        """A copy that training does not change."""
        return Weights(**{name: tensor.clone() for name, tensor in self.items().items()})

    def to(self, *args, **kwargs) -> "Weights":
        """The weights on another device or in another dtype (see `torch.Tensor.to`)."""
        return Weights(**{name: tensor.to(*args, **kwargs) for name, tensor in self.items().items()})


@dataclass
class Data:
    """Inputs x: (n, d) and targets y: (n, d'), one sample in each row.

    Each is a tensor, or anything that `checks.as_tensor` takes: a numpy array, nested lists, a table.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        self.x, self.y = checks.as_tensor("x", self.x), checks.as_tensor("y", self.y)

    def to(self, *args, **kwargs) -> "Data":
        """The data on another device or in another dtype (see `torch.Tensor.to`)."""
        return Data(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


def initialise(config: NetworkConfig) -> tuple[Weights, Data]:
    """Draw weights and data: standard Gaussian W, X, Y from one generator, in ``config.draw_order``.

    Draws at different depths agree as far as possible. The data do not depend on the depth or on the initialisation.
    I.i.d. layers beyond the first are drawn after the data (V's after W's). Smooth initialisations evaluate the same
    functions at s = k/L, k = 1, ..., L.
    """
    L = config.depth
    if config.initialisation != "iid":
        weights_at, data = initial_functions(config)
        return weights_at(torch.arange(1, L + 1, dtype=torch.float64) / L), data
    randn, W, data = _first_draws(config)
    W = torch.cat([W[None], randn(L - 1, *W.shape)])
    V = torch.zeros(L, config.width, config.hidden, dtype=config.torch_dtype)
    if config.initial_V == "drawn":
        V = randn(*V.shape)
    return Weights(V, W, *_initial_ends(config)), data


def prepare_start(config: NetworkConfig, weights: Weights, data: Data) -> tuple[Weights, Data]:
    """Check weights and data, and move them to the dtype and the device of ``config``.

    A tensor that is in both already is not copied. x or y may have one axis if it has a single sample or coordinate.
    Raises TypeError or ValueError if a shape does not fit ``config``, or if an entry is not a finite number.
    """
    c = config
    expected = {
        "V": ("(L, m, q)", (c.depth, c.width, c.hidden)),
        "W": ("(L, q, m)", (c.depth, c.hidden, c.width)),
        "A": ("(d, q)", None if c.ends_are_identity else (c.dimension, c.hidden)),
        "B": ("(q, d')", None if c.ends_are_identity else (c.hidden, c.outputs)),
        "x": ("(n, d)", (c.samples, c.dimension)),
        "y": ("(n, d')", (c.samples, c.outputs)),
    }
    found = {name: getattr(weights, name) for name in "VWAB"} | {"x": data.x, "y": data.y}
    for name, (letters, shape) in expected.items():
        tensor = found[name]
        if (tensor is None) != (shape is None):
            words = "is missing" if tensor is None else "is given, but is the identity in this configuration"
            raise ValueError(f"{name} {words}: draw weights with `initialise(config)`.")
        if tensor is None:
            continue
        if name in "xy" and tensor.ndim == 1 and 1 in shape and len(tensor) == max(shape):
            tensor = tensor.reshape(shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {letters} = {shape} by the configuration.")
        if tensor.is_complex():
            raise TypeError(f"{name} is {tensor.dtype}, expected real numbers.")
        tensor = tensor.detach().to_dense().to(c.torch_device, c.torch_dtype).contiguous()
        checks.finite_entries(name, tensor)
        found[name] = tensor
    return Weights(**{name: found[name] for name in "VWAB"}), Data(found["x"], found["y"])


def check_functions(config: NetworkConfig) -> None:
    """Raise ValueError if the initial layers are not functions of s."""
    if config.initialisation == "iid":
        raise ValueError(
            "initialisation is 'iid', whose layers are not functions of s: expected 'weight-tied' or "
            "'gaussian-process' for a limit in the depth."
        )


def initial_functions(config: NetworkConfig) -> tuple[Callable[[Tensor], Weights], Data]:
    """The smooth initialisation as functions of s: returns ``weights_at`` and the data.

    ``weights_at(s)``, s: (k,) in [0, 1], gives the `Weights` whose layers are V_0(s_j): (k, m, q) and
    W_0(s_j): (k, q, m). Raises ValueError for i.i.d. layers, which are not functions of s.
    """
    check_functions(config)
    randn, first, data = _first_draws(config)
    shapes = {"W": (config.hidden, config.width), "V": (config.width, config.hidden)}
    functions = {}
    for name, shape in shapes.items():
        if name == "V" and config.initial_V == "zero":
            functions[name] = _constant(torch.zeros(shape))
        elif config.initialisation == "gaussian-process":
            functions[name] = GaussianProcess(shape, config.length_scale, randn)
        else:
            functions[name] = _constant(first if name == "W" else randn(*shape))

    def weights_at(s: Tensor) -> Weights:
        V, W = (functions[name](s).to(config.torch_dtype) for name in "VW")
        return Weights(V, W, *_initial_ends(config))

    return weights_at, data


def _first_draws(config: NetworkConfig) -> tuple[Callable[..., Tensor], Tensor, Data]:
    """A function for further draws, the first W: (q, m), and the data, drawn in the config's order."""
    generator = torch.Generator().manual_seed(config.seed)

    def randn(*shape: int) -> Tensor:
        # Drawn in float32 for every dtype, as in the released code.
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(config.torch_dtype)

    first = randn(config.hidden, config.width)
    if config.draw_order == "W unused X Y":
        randn(config.dimension, config.dimension)
    x, y = randn(config.samples, config.dimension), randn(config.samples, config.outputs)
    data = Data(x, y if config.target_scale == 1 else config.target_scale * y)
    return randn, first, data


def _constant(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: matrix.repeat(len(s), 1, 1)


def _initial_ends(config: NetworkConfig) -> tuple[Tensor | None, Tensor | None]:
    """A = (I_d ; 0): (d, q) and B = (0 , I_d'): (q, d'), or None twice if they are always the identity."""
    if config.ends_are_identity:
        return None, None
    identity = torch.eye(config.hidden, dtype=config.torch_dtype)
    return identity[: config.dimension].clone(), identity[:, config.hidden - config.outputs :].clone()


def hidden_states(config: NetworkConfig, weights: Weights, x: Tensor) -> Tensor:
    """H: (L+1, n, q), every hidden state of the inputs x: (n, d)."""
    s = activations.get(config.activation).function
    states = torch.empty(len(weights.V) + 1, len(x), config.hidden, dtype=x.dtype, device=x.device)
    states[0] = x if weights.A is None else x @ weights.A
    for k, (V, W) in enumerate(zip(weights.V, weights.W, strict=True)):
        states[k + 1] = states[k] + config.outer_scale * s(config.inner_scale * (states[k] @ W)) @ V
    return states


def outputs(weights: Weights, states: Tensor) -> Tensor:
    """F(X) = H_L B: (n, d'), from the hidden states (L+1, n, q)."""
    return states[-1] if weights.B is None else states[-1] @ weights.B
