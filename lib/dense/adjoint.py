"""Gradient descent on the fully connected residual network by a hand-written adjoint, in plain PyTorch.

There is no autograd graph. The forward pass stores the states H_k and the pre-activations G_k = inner * H_k W_k in
buffers that are allocated once. The backward pass computes the adjoint P_k = dl/dH_k by the recursion

    P_L = dl/dF B^T,     U_k = (P_{k+1} V_k^T) * s'(G_k),     P_k = P_{k+1} + outer * inner * U_k W_k^T,

and forms the weight gradients

    dl/dV_k = outer * s(G_k)^T P_{k+1},     dl/dW_k = outer * inner * H_k^T U_k

in batched products, one chunk of layers at a time.
"""

import torch
from torch import Tensor

from lib import activations
from lib.dense.network import Data, NetworkConfig, Weights
from lib.dense.solver import take_steps


class Adjoint:
    """The `lib.dense.solver.Solver` in PyTorch, the reference for the others.

    Arguments: ``config``; ``weights`` and ``data``, of its shapes and dtype, on one device; ``chunk``, the number of
    layers whose gradients are formed in one batched product (0: a number that keeps them in the cache).
    """

    name = "PyTorch adjoint"

    def __init__(self, config: NetworkConfig, weights: Weights, data: Data, chunk: int = 0) -> None:
        self.config, self.weights, self.data = config, weights, data
        self.step_factor = config.step_factor
        self.layer_weights = torch.ones(len(weights.V), dtype=weights.V.dtype, device=weights.V.device)
        self.activation = activations.get(config.activation)
        L, m, q = weights.V.shape
        n = len(data.x)
        like = {"dtype": weights.V.dtype, "device": weights.V.device}
        self.chunk = min(L, chunk or max(8, 2**18 // (n * m)))
        self.H = torch.empty(L + 1, n, q, **like)
        self.G = torch.empty(L, n, m, **like)
        self.P = torch.empty(self.chunk + 1, n, q, **like)
        self.U = torch.empty(self.chunk, n, m, **like)
        self.residual = torch.empty(n, config.outputs, **like)
        # The views of single layers are made once: indexing costs as much as the small products themselves.
        self._H, self._G, self._P, self._U = (buffer.unbind() for buffer in (self.H, self.G, self.P, self.U))
        self._V, self._W = weights.V.unbind(), weights.W.unbind()
        self._Vt, self._Wt = weights.V.mT.unbind(), weights.W.mT.unbind()

    @torch.no_grad()
    def forward(self) -> Tensor:
        """See `lib.dense.solver.Solver.forward`."""
        weights, s = self.weights, self.activation.function
        inner, outer = self.config.inner_scale, self.config.outer_scale
        if weights.A is None:
            self._H[0].copy_(self.data.x)
        else:
            torch.mm(self.data.x, weights.A, out=self._H[0])
        for h, h_next, g, V, W in zip(self._H, self._H[1:], self._G, self._V, self._W, strict=False):
            torch.addmm(g, h, W, beta=0, alpha=inner, out=g)  # g = inner h W
            torch.addmm(h, s(g), V, alpha=outer, out=h_next)  # h_next = h + outer s(g) V
        if weights.B is None:
            torch.sub(self._H[-1], self.data.y, out=self.residual)
        else:
            torch.addmm(self.data.y, self._H[-1], weights.B, beta=-1, out=self.residual)
        return self.residual.square().sum() * self.config.loss_scale

    def _chunks(self):
        """The backward recursion: yields (layers, s(G), P after them, U) chunk by chunk, from the top.

        In `P` a chunk of c layers k0..k1-1 uses slots 0..c: slot j holds P_{k0 + j}.
        """
        weights = self.weights
        scale = self.config.outer_scale * self.config.inner_scale
        top = self.residual if weights.B is None else self.residual @ weights.B.mT
        top = top * (2 * self.config.loss_scale)
        stop = len(self._V)
        while stop > 0:
            start = max(0, stop - self.chunk)
            count = stop - start
            G = self.G[start:stop]
            slope = self.activation.derivative(G).unbind()
            self._P[count].copy_(top)
            for j in range(count - 1, -1, -1):
                torch.mm(self._P[j + 1], self._Vt[start + j], out=self._U[j])
                self._U[j].mul_(slope[j])
                torch.addmm(self._P[j + 1], self._U[j], self._Wt[start + j], alpha=scale, out=self._P[j])
            yield slice(start, stop), self.activation.function(G), self.P[1 : count + 1], self.U[:count]
            top = self._P[0].clone()
            stop = start
        self.top = top  # dl/dH_0

    def _end_gradients(self) -> dict[str, Tensor]:
        """dl/dA = X^T P_0 and dl/dB = H_L^T dl/dF, if A and B are trained."""
        if not self.config.train_ends:
            return {}
        above = self.residual * (2 * self.config.loss_scale)
        return {"A": self.data.x.mT @ self.top, "B": self._H[-1].mT @ above}

    @torch.no_grad()
    def gradients(self) -> Weights:
        """See `lib.dense.solver.Solver.gradients`."""
        gradient = Weights(torch.empty_like(self.weights.V), torch.empty_like(self.weights.W))
        outer, inner = self.config.outer_scale, self.config.inner_scale
        for layers, activated, P, U in self._chunks():
            torch.bmm(activated.mT, P, out=gradient.V[layers]).mul_(outer)
            torch.bmm(self.H[layers].mT, U, out=gradient.W[layers]).mul_(outer * inner)
        for name, tensor in self._end_gradients().items():
            setattr(gradient, name, tensor)
        return gradient

    @torch.no_grad()
    def descend(self, learning_rate: float, clip: float = 0.0) -> None:
        """See `lib.dense.solver.Solver.descend`."""
        weights, outer, inner = self.weights, self.config.outer_scale, self.config.inner_scale
        factor = self.config.step_factor
        for layers, activated, P, U in self._chunks():
            updates = (weights.V, activated.mT, P, outer), (weights.W, self.H[layers].mT, U, outer * inner)
            for weight, left, right, scale in updates:
                if clip > 0:
                    velocity = torch.bmm(left, right).mul_(factor * scale).clamp_(-clip, clip)
                    weight[layers].sub_(velocity, alpha=learning_rate)
                else:
                    weight[layers].baddbmm_(left, right, alpha=-learning_rate * factor * scale)
        for name, gradient in self._end_gradients().items():
            velocity = gradient.clamp_(-clip, clip) if clip > 0 else gradient
            getattr(weights, name).sub_(velocity, alpha=learning_rate)

    def run(self, learning_rate: float, count: int, clip: float = 0.0) -> Tensor:
        """See `lib.dense.solver.Solver.run`."""
        return take_steps(self, learning_rate, count, clip)
