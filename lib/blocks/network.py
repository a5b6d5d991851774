"""A residual network whose layers are copies of one block, each with parameters of its own (section 4.3):

    h_0 = x,     h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}),  k = 0, ..., L-1,     F(x) = h_L

f is the ``forward`` of a `torch.nn.Module`, Z_1, ..., Z_L are its parameters, stacked along a first axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lib import checks

INITIALISATIONS = ("weight-tied", "iid")
BLOCK_SEED = 2**31  # added to the seed, so that blocks and the data of the same seed are not the same numbers

Block = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]


class BlockNetwork:
    """L layers of one block, with inputs ``x``, targets ``y`` and a loss, ready for gradient descent in place.

    Main arguments: ``block``, a factory (a class or a function without arguments), called once for the
    weight-tied initialisation, whose layers all start as copies of that one object, and L times for "iid"; ``depth``
    L; ``x`` (n, ...) and ``y``, tensors or arrays; the block's parameters and targets that are no whole numbers follow
    x in dtype and device; ``loss``, (F(x), y) -> a
    tensor without axes.

    Other arguments: ``seed`` of the blocks' draws (on the CPU; equal for all depths, and the first layers of a
    deep i.i.d. network are those of a shallow one); ``chunk``, the number of layers whose intermediate results are
    kept for the backward pass: of the other layers they are computed again, so that memory does not grow with
    L but for the parameters and one hidden state a chunk.

    A block may have a method ``start_at_zero()``, which sets to zero what must start there, as V_k in the paper.

    Raises TypeError or ValueError, one sentence, for a block that does not fit (see `check_block`).
    """

    def __init__(
        self,
        block: Block,
        depth: int,
        x: Tensor,
        y: Tensor,
        loss: Loss = nn.functional.mse_loss,
        *,
        initialisation: str = "weight-tied",
        seed: int = 0,
        chunk: int = 32,
    ) -> None:
        checks.positive_int("depth", depth)
        checks.positive_int("chunk", chunk)
        checks.positive_int("seed", seed, least=0)
        checks.choice("initialisation", initialisation, INITIALISATIONS)
        x, y = _data(x, y)
        if loss is nn.functional.mse_loss and (not isinstance(y, Tensor) or y.shape != x.shape):
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y is {shape}, expected {tuple(x.shape)}, the shape of x and of F(x), for this loss.")
        self.depth, self.x, self.y, self.loss = depth, x, y, loss
        modules = _draw(block, depth if initialisation == "iid" else 1, seed, x)
        self.block = modules[0]
        with torch.random.fork_rng(devices=[]):  # a look at the block leaves the caller's random numbers alone
            check_block(self.block, x)
        trained = {name for name, parameter in self.block.named_parameters() if parameter.requires_grad}
        stacked = _stack(modules, depth)
        # (L, ...) each; what is not trained (buffers, frozen parameters) is no part of Z.
        self.weights = {name: tensor for name, tensor in stacked.items() if name in trained}
        # The leaves share the memory of `weights`.
        leaves = [
            {name: tensor[k].detach().requires_grad_(name in trained) for name, tensor in stacked.items()}
            for k in range(depth)
        ]
        self._fixed = {name: tensor for name, tensor in stacked.items() if name not in trained}
        self._chunks = [leaves[first : first + chunk] for first in range(0, depth, chunk)]
        self._states: list[Tensor] = []
        self._end: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self) -> Tensor:
        """The loss at the present weights, a tensor without axes; leaves what `descend` needs."""
        self._states = [self.x]
        with torch.no_grad():
            for chunk in self._chunks[:-1]:
                self._states.append(self._through(self._states[-1], chunk))
        h, output = self._graph(self._states[-1], self._chunks[-1])
        with torch.enable_grad():
            loss = self.loss(output, self.y)
        if loss.ndim:
            raise ValueError(f"The loss has the shape {tuple(loss.shape)}, expected one number: take its mean or sum.")
        self._end = h, output, loss
        return loss.detach()

    @property
    def output(self) -> Tensor:
        """F(x) = h_L, of the shape of x, as the last `forward` found it."""
        return self._end[1].detach()

    def descend(self, learning_rate: float) -> None:
        """One step Z_k <- Z_k - L * learning_rate * dl/dZ_k, for the gradient at the weights of the last `forward`.

        The factor L makes it a step of the gradient flow dZ_k/dt = -L dl/dZ_k, since dl/dZ_k itself is O(1/L).
        """
        (h, _, end), slope = self._end, None
        for state, chunk in zip(reversed(self._states), reversed(self._chunks), strict=True):
            if slope is not None:
                h, end = self._graph(state, chunk)
            leaves = [leaf for layer in chunk for leaf in layer.values() if leaf.requires_grad]
            # A parameter that forward does not use has the gradient zero.
            *gradients, slope = torch.autograd.grad(end, [*leaves, h], slope, materialize_grads=True)
            # Every later layer is done, and no earlier one needs these weights: they may change now.
            with torch.no_grad():
                torch._foreach_add_(leaves, gradients, alpha=-self.depth * learning_rate)
        self._states, self._end = [], None

    @torch.no_grad()
    def output_at(self, weights: Mapping[str, Tensor]) -> Tensor:
        """F(x) for other weights: {parameter: (L, ...)}."""
        stacked = {**weights, **self._fixed}
        layers = ({name: tensor[k] for name, tensor in stacked.items()} for k in range(self.depth))
        return self._through(self.x, layers)

    def _graph(self, state: Tensor, chunk: list) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            h = state.detach().requires_grad_()
            return h, self._through(h, chunk)

    def _through(self, h: Tensor, layers) -> Tensor:
        for layer in layers:
            h = h + functional_call(self.block, layer, (h,)) / self.depth
        return h


def _data(x: Any, y: Any) -> tuple[Tensor, Any]:
    """Inputs and targets as tensors, checked; targets of another kind, which the loss may take, are passed on."""
    x = checks.as_tensor("x", x)
    if x.is_complex() or not x.ndim:
        raise TypeError(f"x is {x.dtype} of the shape {tuple(x.shape)}, expected real numbers, one sample a row.")
    x = x if x.is_floating_point() else x.double()
    checks.finite_entries("x", x)
    if isinstance(y, np.ndarray | list):
        tensor = checks.as_tensor("y", y)
        y = tensor.long() if np.asarray(y).dtype.kind in "biu" else tensor  # labels stay whole numbers
    if isinstance(y, Tensor):
        y = y.to(x.device, x.dtype if y.is_floating_point() else None)
        checks.finite_entries("y", y)
    return x, y


def _draw(block: Block, count: int, seed: int, x: Tensor) -> list[nn.Module]:
    """``count`` new blocks, each in the dtype and on the device of x."""
    if isinstance(block, nn.Module) or not callable(block):
        name = type(block).__name__
        raise TypeError(
            f"block is {'an object of the class ' if isinstance(block, nn.Module) else ''}{name}, expected what makes "
            f"one, such as the class or `lambda: MyBlock(16)`: each network needs blocks of its own."
        )
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + BLOCK_SEED)
        for _ in range(count):
            module = block()
            if not isinstance(module, nn.Module):
                raise TypeError(f"block() is {module!r}, expected a torch.nn.Module with forward(h).")
            if any(module is other for other in modules):
                raise ValueError(
                    f"block() returns the same {_name(module)} object again, expected a new one at each call: "
                    "make the block inside of the function."
                )
            if callable(getattr(module, "start_at_zero", None)):
                with torch.no_grad():
                    module.start_at_zero()
            modules.append(module)
    return [module.to(dtype=x.dtype, device=x.device) for module in modules]


def _stack(modules: list[nn.Module], depth: int) -> dict[str, Tensor]:
    """Parameters and buffers, by name: (L, ...)."""
    states = [dict([*module.named_parameters(), *module.named_buffers()]) for module in modules]
    if len(states) == 1:
        return {name: t.detach().expand(depth, *t.shape).clone() for name, t in states[0].items()}
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def check_block(block: nn.Module, x: Tensor) -> None:
    """Raise ValueError, one sentence, unless ``block(h)`` can be f of networks that are compared over their depths.

    It has parameters to train, keeps the shape of h, leaves h as it is, is finite at h = x, gives the same for the
    same h (no dropout), and its buffers stay as they are (no running statistics).
    """
    name = _name(block)
    if not any(parameter.requires_grad for parameter in block.parameters()):
        raise ValueError(f"{name} has no parameters to train: give it some, as torch.nn.Parameter or in a module.")
    before = {key: buffer.clone() for key, buffer in block.named_buffers()}
    h = x.clone()
    with torch.no_grad():
        random_state = _random_state(x.device)
        found = block(h)
        drew = not torch.equal(random_state, _random_state(x.device))
    if not isinstance(found, Tensor) or found.shape != x.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} turns h of the shape {tuple(x.shape)} into {shape}, expected the shape of h: a layer adds it to h."
        )
    if found.dtype != x.dtype:
        raise ValueError(
            f"{name} turns h of {x.dtype} into {found.dtype}, expected the dtype of h: make tensors in h.dtype."
        )
    if not torch.equal(h, x):
        raise ValueError(f"{name} changes its input h in place: return a new tensor.")
    for key, buffer in block.named_buffers():
        if not torch.equal(buffer, before[key]):
            raise ValueError(
                f"{name} keeps running statistics ({key} changes in forward), which are no part of the gradient flow: "
                "use track_running_stats=False, or a norm without them."
            )
    if drew:
        raise ValueError(
            f"{name} draws random numbers in forward, as dropout does, and other ones at each depth: take dropout out "
            "(0.0), since networks are compared that differ in nothing but their depth."
        )
    if not found.isfinite().all():
        raise ValueError(f"{name} is not finite (NaN or infinite) at h = x: look at its initial weights and the data.")


def _name(block: nn.Module) -> str:
    return type(block).__name__


def _random_state(device: torch.device) -> Tensor:
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu
