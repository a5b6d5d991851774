"""A residual network whose layers are copies of one block, each with its own parameters (section 4.3):

    h_0 = x,     h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}),  k = 0, ..., L-1,     F(x) = h_L

f is the ``forward`` of a `torch.nn.Module`. Z_1, ..., Z_L are its parameters, stacked along a first axis.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import checks
from lib.blocks.block import Block, check_block, draw_blocks, find_places, random_state, summarise

INITIALISATIONS = ("weight-tied", "iid")
DTYPES = (torch.float64, torch.float32)

Loss = Callable[[Tensor, Tensor], Tensor]


class BlockNetwork:
    """L layers of one block, with inputs ``x``, targets ``y`` and a loss, ready for gradient descent in place.

    Main arguments: ``block``, a factory (a class or a function without arguments); ``depth`` L; ``x`` (n, ...) and
    ``y`` (see `convert_data`); ``loss``, (F(x), y) -> a tensor without axes. For the weight-tied initialisation the
    factory is called once, and all layers start as copies of that object. For "iid" it is called L times. The block's
    parameters are moved to the dtype and the device of x.

    Other arguments: ``seed`` of the blocks' draws, which are made on the CPU; the first layers of a deep i.i.d. network
    are those of a shallow one. ``chunk`` is the number of layers whose intermediate results are kept for the backward
    pass. Those of the other layers are computed again, so memory grows with L only by the parameters and one hidden
    state for each chunk.

    A block may have a method ``start_at_zero()``, which sets to zero the parameters that start there, as V_k in the
    paper.

    Raises TypeError or ValueError for a block that cannot be used (see `check_block`), MemoryError for a depth whose
    parameters do not fit into memory.
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
        if torch.is_inference_mode_enabled():
            raise ValueError("torch.inference_mode is on, which keeps no gradients to train with: train outside of it.")
        checks.positive_int("depth", depth)
        checks.positive_int("chunk", chunk)
        checks.positive_int("seed", seed, least=0)
        checks.choice("initialisation", initialisation, INITIALISATIONS)
        depth, chunk, seed = checks.plain((depth, chunk, seed))
        x, y = convert_data(x, y, loss)
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError("torch.autocast is on, which rounds more than layers differ: train outside of it.")
        self.depth, self.x, self.y, self.loss = depth, x, y, loss
        modules = draw_blocks(block, depth if initialisation == "iid" else 1, seed, x)
        self.block = modules[0]
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            check_block(self.block, x)
        trained = {name for name, parameter in self.block.named_parameters() if parameter.requires_grad}
        stacked = _stack(modules, depth)
        # (L, ...) each. Buffers and frozen parameters are not part of Z.
        self.weights = {name: tensor for name, tensor in stacked.items() if name in trained}
        # The leaves share the memory of `weights`.
        leaves = [
            {name: tensor[k].detach().requires_grad_(name in trained) for name, tensor in stacked.items()}
            for k in range(depth)
        ]
        self._places = find_places(self.block)
        self._fixed = {name: tensor for name, tensor in stacked.items() if name not in trained}
        self._chunks = [leaves[first : first + chunk] for first in range(0, depth, chunk)]
        self._states: list[Tensor] = []
        self._end: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self) -> Tensor:
        """The loss at the present weights, a tensor without axes. Leaves the states for `descend`."""
        self._states = [self.x]
        with torch.no_grad():
            for chunk in self._chunks[:-1]:
                self._states.append(self._apply_layers(self._states[-1], chunk))
        h, output = self._apply_with_graph(self._states[-1], self._chunks[-1])
        loss = self._loss(output)
        self._end = h, output, loss
        return loss.detach()

    def _loss(self, output: Tensor) -> Tensor:
        before = random_state(output.device)
        try:
            with torch.enable_grad():
                loss = self.loss(output, self.y)
        except Exception as error:
            F, y = (
                f"{tuple(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
                for t in (output, self.y)
            )
            raise ValueError(
                f"loss(F(x), y) raised {summarise(error)}; F(x) is {F} and y is {y}, expected what this loss takes."
            ) from error
        if not torch.equal(before, random_state(output.device)):
            raise ValueError(
                "The loss draws random numbers, and other ones at each depth: take them out, since networks are "
                "compared that differ in nothing but their depth."
            )
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            found = "a tensor without a gradient" if isinstance(loss, Tensor) else f"of the type {type(loss).__name__}"
            raise TypeError(f"The loss is {found}, expected a tensor that operations of PyTorch make of F(x).")
        if loss.is_complex():
            raise TypeError("The loss is a complex number, expected a real one, such as its real part.")
        if loss.ndim:
            raise ValueError(f"The loss has the shape {tuple(loss.shape)}, expected one number: take its mean or sum.")
        return loss

    @property
    def output(self) -> Tensor:
        """F(x) = h_L of the last `forward`, of the shape of x."""
        return self._last_forward()[1].detach()

    def _last_forward(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._end is None:
            raise RuntimeError("The network has no output at its present weights: call forward() first.")
        return self._end

    def descend(self, learning_rate: float) -> None:
        """One step Z_k <- Z_k - L * learning_rate * dl/dZ_k, for the gradient at the weights of the last `forward`.

        The factor L makes it a step of the gradient flow dZ_k/dt = -L dl/dZ_k, since dl/dZ_k itself is O(1/L).
        """
        (h, _, end), slope = self._last_forward(), None
        for state, chunk in zip(reversed(self._states), reversed(self._chunks), strict=True):
            if slope is not None:
                h, end = self._apply_with_graph(state, chunk)
            leaves = [leaf for layer in chunk for leaf in layer.values() if leaf.requires_grad]
            # A parameter that forward does not use has the gradient zero.
            *gradients, slope = torch.autograd.grad(end, [*leaves, h], slope, materialize_grads=True)
            # The later layers are done and the earlier ones do not need these weights, so they may change now.
            with torch.no_grad():
                torch._foreach_add_(leaves, gradients, alpha=-self.depth * learning_rate)
        self._states, self._end = [], None

    @torch.no_grad()
    def output_at(self, weights: Mapping[str, Tensor]) -> Tensor:
        """F(x) for other weights: {parameter: (L, ...)}."""
        stacked = {**weights, **self._fixed}
        layers = ({name: tensor[k] for name, tensor in stacked.items()} for k in range(self.depth))
        return self._apply_layers(self.x, layers)

    def _apply_with_graph(self, state: Tensor, chunk: list) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            h = state.detach().requires_grad_()
            return h, self._apply_layers(h, chunk)

    def _apply_layers(self, h: Tensor, layers: Iterable[Mapping[str, Tensor]]) -> Tensor:
        # torch.func.functional_call would look up the places in each call, a third of the time of small blocks.
        own = [(held, key, held[key]) for _, held, key in self._places]
        try:
            for layer in layers:
                for name, held, key in self._places:
                    held[key] = layer[name]
                h = torch.add(h, self.block(h), alpha=1 / self.depth)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its first call was fine
            raise ValueError(
                f"{type(self.block).__name__} raised {summarise(error)} within a network of depth {self.depth}: make "
                "forward take all weights and h, or lower the learning rate."
            ) from error
        finally:
            for held, key, tensor in own:
                held[key] = tensor
        return h


def convert_data(x: Any, y: Any, loss: Loss) -> tuple[Tensor, Any]:
    """Check inputs and targets, and make them tensors (see `checks.as_tensor`): x (n, ...) of float32 or float64, and
    y in its dtype and on its device. Whole numbers, which may be labels, stay whole unless the loss is the squared
    error. Targets of another kind are passed on to the loss as they are.

    Raises TypeError or ValueError for wrong inputs, targets or losses.
    """
    if not callable(loss) or isinstance(loss, type):
        made = ", such as an object of that class" if isinstance(loss, type) else ""
        raise TypeError(f"loss is {loss!r}, expected a function of F(x) and y that gives one number{made}.")
    x = checks.as_tensor("x", x)
    if x.is_complex() or not x.ndim or not x.numel():
        raise TypeError(
            f"x is {x.dtype} of the shape {tuple(x.shape)}, expected real numbers (n, ...), one sample a row."
        )
    x = _without_graph(x) if x.is_floating_point() else x.double()
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x is {x.dtype}, expected float32 or float64, whose rounding is smaller than the distances of layers: use "
            "x.float()."
        )
    checks.finite_entries("x", x)
    squared = loss is nn.functional.mse_loss or isinstance(loss, nn.MSELoss)
    if squared or isinstance(y, list | tuple) or hasattr(y, "__array__"):
        given, y = y, checks.as_tensor("y", y)
        whole = not squared and not isinstance(given, Tensor) and np.asarray(given).dtype.kind in "biu"
        y = y.long() if whole else y  # labels stay whole numbers
    if isinstance(y, Tensor):
        if squared and y.is_complex():
            raise TypeError(f"y is {y.dtype}, expected real numbers for this loss.")
        y = _without_graph(y).to(x.device, x.dtype if squared or y.is_floating_point() else None)
        checks.finite_entries("y", y)
    if squared and y.shape != x.shape:
        raise ValueError(
            f"y is {tuple(y.shape)}, expected {tuple(x.shape)}, the shape of x and of F(x), for this loss."
        )
    return x, y


def _without_graph(values: Tensor) -> Tensor:
    return (values.clone() if values.is_inference() else values).detach()


def _stack(modules: list[nn.Module], depth: int) -> dict[str, Tensor]:
    """Parameters and buffers, by name: (L, ...)."""
    states = [dict([*module.named_parameters(), *module.named_buffers()]) for module in modules]
    try:
        if len(states) == 1:
            return {name: t.detach().expand(depth, *t.shape).clone() for name, t in states[0].items()}
        return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    except RuntimeError as error:
        raise MemoryError(
            f"depth is {depth}, and the parameters of that many {type(modules[0]).__name__} do not fit into memory: "
            "choose smaller depths."
        ) from error
