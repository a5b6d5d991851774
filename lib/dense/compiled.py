"""The compiled engine for the fully connected network, as a `lib.dense.solver.Solver`.

Up to rounding, the arithmetic is that of the adjoint. Results do not depend on the number of threads, and repeat bit
for bit. ``lib/engine/csrc/dense_stack.cpp`` explains how it works; `lib.engine.build` builds it.
"""

import torch
from torch import Tensor

from lib.dense.network import Data, NetworkConfig, Weights
from lib.engine import build as engine

# The largest number of entries q m of a layer, for each sample up to 12. Larger layers do not stay in the innermost
# caches, for which the engine is made, and the PyTorch adjoint is then as fast or faster.
ENTRIES_PER_SAMPLE = {torch.float64: 2**11, torch.float32: 2**13}


def find_problem(config: NetworkConfig, weights: Weights, data: Data) -> str:
    """Why the compiled engine cannot train this network, in words; empty if it can."""
    module, reason = engine.load()
    if module is None:
        return reason
    if config.activation not in engine.ACTIVATION_CODES:
        return f"the compiled engine has no activation {config.activation!r}"
    layer, samples = config.hidden * config.width, len(data.x)
    if layer > (largest := ENTRIES_PER_SAMPLE.get(config.torch_dtype, 0) * min(samples, 12)):
        bound = f"{largest} (n = {samples}, {config.dtype})"
        return f"a layer has {layer} entries, and beyond {bound} PyTorch's products are faster"
    for name, tensor in {**weights.items(), "x": data.x, "y": data.y}.items():
        if tensor.device.type != "cpu":
            return f"the compiled engine runs on the CPU, and {name} is on {tensor.device}"
        if tensor.dtype != config.torch_dtype:
            return f"{name} is {tensor.dtype}, not {config.torch_dtype}"
        if name in "VW" and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return ""


# The forward pass stores activations and slopes if they and the states take at most this number of bytes. Above it,
# computing them again is faster than fetching them.
KEEP_BYTES = 2**24


class Compiled:
    """The `lib.dense.solver.Solver` in C++. Raises ValueError if it cannot train the network (`find_problem`)."""

    name = "compiled"

    def __init__(self, config: NetworkConfig, weights: Weights, data: Data) -> None:
        if reason := find_problem(config, weights, data):
            raise ValueError(f"The compiled engine cannot be used: {reason}.")
        self.config, self.weights, self.data = config, weights, data
        self.step_factor = config.step_factor
        self.layer_weights = torch.ones(len(weights.V), dtype=weights.V.dtype)
        self._module, _ = engine.load()
        L, m, q = weights.V.shape
        n, lanes = len(data.x), self._module.dense_lanes(weights.V.dtype == torch.float64)
        # Rows are padded with zeros to whole vectors.
        padded, padded_width = -(-q // lanes) * lanes, -(-m // lanes) * lanes
        layer = n * (padded + 2 * padded_width)
        if L * layer * weights.V.element_size() > KEEP_BYTES:
            layer = n * padded
        self._ends = torch.zeros(2, n, padded, dtype=weights.V.dtype)
        self._kept = torch.empty(L, layer, dtype=weights.V.dtype)
        self._top = torch.zeros(n, padded, dtype=weights.V.dtype)
        self._input, self.output = self._ends[:, :, :q]  # H_0 and H_L
        self.residual = torch.empty(len(data.x), config.outputs, dtype=weights.V.dtype)
        self._x, self._targets = data.x.contiguous(), data.y.contiguous()

    @property
    def _constants(self) -> tuple:
        """inner, outer, activation, threads: the last arguments of every operator."""
        code = engine.ACTIVATION_CODES[self.config.activation]
        return self.config.inner_scale, self.config.outer_scale, code, torch.get_num_threads()

    @torch.no_grad()
    def forward(self) -> Tensor:
        """See `lib.dense.solver.Solver.forward`."""
        weights, data = self.weights, self.data
        self._input[:] = data.x if weights.A is None else data.x @ weights.A
        self._module.dense_forward(weights.V, weights.W, self._ends, self._kept, *self._constants)
        output = self.output if weights.B is None else self.output @ weights.B
        torch.sub(output, data.y, out=self.residual)
        return self.residual.square().sum() * self.config.loss_scale

    def _backward(self, targets: Weights, rate: float | None = None, clip: float = 0.0) -> dict[str, Tensor]:
        """Write the gradients into ``targets`` (rate None), or make a step of ``rate``; returns the gradients of A and
        B if they are trained."""
        weights, config = self.weights, self.config
        above = self.residual * (2 * config.loss_scale)
        # dl/dB and dl/dH_L are those of the weights before the step.
        ends = {"B": self.output.mT @ above} if config.train_ends else {}
        self._top[:, : config.hidden] = above if weights.B is None else above @ weights.B.mT
        step = rate is None, rate or 0.0, config.step_factor, clip
        self._module.dense_backward(
            weights.V, weights.W, self._ends, self._kept, self._top, targets.V, targets.W, *step, *self._constants
        )
        if config.train_ends:
            ends["A"] = self.data.x.mT @ self._top[:, : config.hidden]
        return ends

    @torch.no_grad()
    def gradients(self) -> Weights:
        """See `lib.dense.solver.Solver.gradients`."""
        gradient = Weights(torch.empty_like(self.weights.V), torch.empty_like(self.weights.W))
        for name, tensor in self._backward(gradient).items():
            setattr(gradient, name, tensor)
        return gradient

    @torch.no_grad()
    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """See `lib.dense.solver.Solver.descend`."""
        for name, gradient in self._backward(self.weights, learning_rate, clip).items():
            velocity = gradient.clamp_(-clip, clip) if clip > 0 else gradient
            getattr(self.weights, name).sub_(velocity, alpha=learning_rate)

    @torch.no_grad()
    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """See `lib.dense.solver.Solver.run`."""
        weights, config, losses = self.weights, self.config, torch.empty(count, dtype=torch.float64)
        if weights.A is None:
            self._input[:] = self.data.x
        # The engine changes them in place.
        A, B = (None if end is None else end.contiguous() for end in (weights.A, weights.B))
        network = weights.V, weights.W, self._ends, self._kept, self._x, A, B, config.train_ends
        step = learning_rate, config.step_factor, clip
        self._module.dense_run(*network, self._targets, config.loss_scale, *step, losses, *self._constants)
        if config.train_ends:
            weights.A.copy_(A)
            weights.B.copy_(B)
        return losses
