"""The residual layers of several networks at once on a CUDA GPU: the kernels of ``lib/engine/csrc/conv_stack.cu``.

`lib.cifar.network` says what they compute, one network at a time; the source says how they do it.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lib import paths
from lib.cifar.network import BN_EPS, BN_MOMENTUM, CONVOLUTIONS, ConvResNet
from lib.cifar.schedule import MOMENTUM, WEIGHT_DECAY
from lib.engine import build as engine

SOURCE = paths.CSRC / "conv_stack.cu"
ACTIVATIONS = ("gelu", "relu", "identity")
BATCH = 64  # the most images of a run in a step
CHANNELS, SIDE, TAPS = 16, 10, 9
PIXELS = SIDE * SIDE
WARPS = 12  # of a block
SUMS = 33  # that the blocks of a run exchange
UPDATE_BLOCKS = 4096
BATCH_NORMS = ("bn1", "bn2")


# ---- The kernels ----

_Pair = ctypes.c_void_p * 2


class _Arguments(ctypes.Structure):
    """``struct Stack`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "above", "output", "below")),
        ("weight", ctypes.c_void_p),
        *((name, _Pair) for name in ("bias", "gamma", "beta", "running_mean", "running_var")),
        *((name, ctypes.c_void_p) for name in ("kept", "statistics", "activation")),
        ("weight_gradient", ctypes.c_void_p),
        *((name, _Pair) for name in ("gamma_gradient", "beta_gradient")),
        *((name, ctypes.c_int) for name in ("depth", "images")),
        *((name, ctypes.c_float) for name in ("eps", "momentum")),
    ]


class _Update(ctypes.Structure):
    """``struct Update`` of the source."""

    _fields_ = [
        ("weight", _Pair),
        ("momentum", _Pair),
        ("gradient", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("prepared", ctypes.c_void_p),
        ("layers", ctypes.c_longlong),
        ("mu", ctypes.c_float),
        ("decay", ctypes.c_float),
    ]


class Kernels:
    """The kernels of the source, compiled for the present GPU by NVRTC, which comes with PyTorch's CUDA build.

    ``blocks`` is the number of blocks that share the images of a run, at most 64 in a step. Raises RuntimeError if the
    GPU has no clusters of blocks, or if the kernels do not compile.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        try:
            from cuda.bindings import driver, nvrtc
        except ImportError:
            raise RuntimeError(
                "Stacked runs need cuda-bindings: install it with pip install cuda-bindings, or train one run "
                "with make train."
            ) from None
        self._driver, self.device, self.blocks = driver, device, blocks
        torch.zeros(1, device=device)  # PyTorch's context, into which the module is loaded
        capability = torch.cuda.get_device_capability(device)
        if capability < (9, 0):
            card = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            raise RuntimeError(f"Stacked runs need compute capability 9.0, and {card}: train runs alone there.")
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
        options += [f"-DBLOCKS={blocks}", f"-DIMAGES={BATCH // blocks}", f"-DWARPS={WARPS}"]
        options += [f"-DUPDATE_BLOCKS={UPDATE_BLOCKS}"]
        program = _check(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if error:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{SOURCE.name} does not compile for {options[0]}: {log.decode().strip()[:2000]}")
        image = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, image))
        self._module = _check(driver.cuModuleLoadData(image))
        self._functions = {}
        attributes = driver.CUfunction_attribute
        forward, backward = shared_bytes(blocks)
        self._shared = {"stack_forward": forward, "stack_evaluate": forward, "stack_backward": backward}
        self._shared["stack_update"] = self._shared["stack_prepare"] = 2 * CHANNELS * CHANNELS * TAPS * 4
        for name, size in self._shared.items():
            function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
            most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, most, size))
            if blocks > 8:  # beyond what every GPU with clusters has
                larger = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                _check(driver.cuFuncSetAttribute(function, larger, 1))
            self._functions[name] = function

    def launch(self, name: str, arguments: ctypes.Structure, blocks: int) -> None:
        """Launch a kernel on PyTorch's current stream."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        grid = (blocks, 1, 1, 32 * WARPS, 1, 1)
        arguments_at = ctypes.addressof(pointers)
        _check(self._driver.cuLaunchKernel(self._functions[name], *grid, self._shared[name], stream, arguments_at, 0))


def _check(results: tuple):
    error, *values = results
    if error:
        raise RuntimeError(f"The CUDA driver reports {error!s}.")
    return values[0] if values else None


def shared_bytes(blocks: int) -> tuple[int, int]:
    """Bytes of shared memory of each of the ``blocks`` of a run, forward and backward: ``struct Shared`` of the
    source."""
    images, line, pixel = BATCH // blocks, SIDE + 1, 80
    places = (images * line + 1) * line + 1
    weights, sums = TAPS * 2 * 32 * 16, (WARPS * 32 + 2 * blocks * SUMS) * 8 + WARPS * 4
    forward = _round_up(places * pixel + weights + sums + _tiles(images) * WARPS * 16 * 2)
    return forward, forward + _round_up(places * pixel + 2 * TAPS * CHANNELS * (CHANNELS + 4) * 4)


def kept_floats(blocks: int) -> int:
    """How many floats each of the ``blocks`` of a run keeps of one state of one layer."""
    return _tiles(BATCH // blocks) * 2 * 32 * WARPS * 4


def _round_up(size: int) -> int:
    return -(-size // 16) * 16


def _tiles(images: int) -> int:
    return -(-images * PIXELS // (16 * WARPS))


# ---- The residual layers ----


class StackedLayers:
    """The residual layers of R networks: parameters (R, L, ...) under their released names, gradients alike.

    ``kernels`` are `Kernels`, or their stand-in in tests. The gradient of a bias before batch norm is always 0.
    """

    def __init__(self, networks: Sequence[ConvResNet], kernels, device: torch.device) -> None:
        blocks = kernels.blocks
        first = networks[0].residual_layers
        self.kernels, self.blocks, self.runs, self.depth = kernels, blocks, len(networks), first.depth
        layers = [network.residual_layers for network in networks]

        def stacked(name: str) -> Tensor:
            return torch.stack([layer.stacked(name).detach() for layer in layers]).to(device).contiguous()

        names = [f"{part}.{name}" for part in CONVOLUTIONS + BATCH_NORMS for name in ("weight", "bias")]
        self.parameters = {name: stacked(name) for name in names}
        small = {name: tensor for name, tensor in self.parameters.items() if tensor.dim() == 3}
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in small.items()}
        statistics = [f"{bn}.{name}" for bn in BATCH_NORMS for name in ("running_mean", "running_var")]
        self.running = {name: stacked(name) for name in statistics}
        runs, depth = self.runs, self.depth
        codes = [engine.ACTIVATION_CODES[layer.activation] for layer in layers]
        kept = runs * depth * 3 * blocks * kept_floats(blocks)
        self.buffers = {
            "kept": torch.empty(kept, device=device),
            "statistics": torch.empty(runs, depth, 2, 2, CHANNELS, device=device),
            "activation": torch.tensor(codes, dtype=torch.int32, device=device),
            "weight": torch.empty(runs, depth, 2, 2, TAPS * 64, 4, dtype=torch.int32, device=device),
            "weight_gradient": torch.empty(runs, depth, 2, blocks, TAPS, CHANNELS, CHANNELS, device=device),
        }

        self.prepare()

    def prepare(self) -> None:
        """Prepare the weights of the convolutions for `forward`. `update` does it itself."""
        self._launch_update("stack_prepare")

    def forward(self, h: Tensor, training: bool = True) -> Tensor:
        """h_0 (R, n, 100, 16) -> h_L, with n a multiple of ``blocks``. In training the running statistics are
        updated."""
        return self._launch("stack_forward" if training else "stack_evaluate", h, ("input", "output"))

    def backward(self, gradient: Tensor) -> Tensor:
        """dl/dh_L of the last `forward` in training -> dl/dh_0. Sets ``gradients`` and the sums of
        `weight_gradients`."""
        return self._launch("stack_backward", gradient, ("above", "below"))

    def weight_gradients(self) -> dict[str, Tensor]:
        """The gradients of the convolutions' weights, summed over the blocks. `update` sums them itself."""
        sums = self.buffers["weight_gradient"].sum(dim=3).permute(2, 0, 1, 4, 5, 3).unflatten(5, (3, 3))
        return {f"{name}.weight": gradients for name, gradients in zip(CONVOLUTIONS, sums, strict=True)}

    def update(self, momenta: dict[str, Tensor], rate: Tensor) -> None:
        """A step of torch.optim.SGD: m <- mu m + g + lambda w, w <- w - eta m.

        ``momenta``: m, under the released names; ``rate``: eta, one number on the device.
        """
        weights = [f"{name}.weight" for name in CONVOLUTIONS]
        momentum = _Pair(*(momenta[name].data_ptr() for name in weights))
        self._launch_update("stack_update", momentum=momentum, rate=rate.data_ptr())
        others = [name for name in self.parameters if name not in weights]
        descend(
            [self.parameters[name] for name in others],
            [momenta[name] for name in others],
            [self.gradients[name] for name in others],
            rate,
        )

    def _launch_update(self, name: str, **more) -> None:
        weights = _Pair(*(self.parameters[f"{name}.weight"].data_ptr() for name in CONVOLUTIONS))
        arguments = _Update(
            weight=weights,
            gradient=self.buffers["weight_gradient"].data_ptr(),
            prepared=self.buffers["weight"].data_ptr(),
            layers=self.runs * self.depth,
            mu=MOMENTUM,
            decay=WEIGHT_DECAY,
            **more,
        )
        self.kernels.launch(name, arguments, UPDATE_BLOCKS)

    def _launch(self, name: str, given: Tensor, ends: tuple[str, str]) -> Tensor:
        given = given.contiguous()
        result = torch.empty_like(given)
        arguments = _Arguments(depth=self.depth, images=given.shape[1], eps=BN_EPS, momentum=BN_MOMENTUM)
        setattr(arguments, ends[0], given.data_ptr())
        setattr(arguments, ends[1], result.data_ptr())
        for key, tensor in self.buffers.items():
            setattr(arguments, key, tensor.data_ptr())

        def pair(tensors: dict[str, Tensor], parts: tuple[str, str], name: str):
            return _Pair(*(tensors[f"{part}.{name}"].data_ptr() for part in parts))

        arguments.bias = pair(self.parameters, CONVOLUTIONS, "bias")
        arguments.gamma = pair(self.parameters, BATCH_NORMS, "weight")
        arguments.beta = pair(self.parameters, BATCH_NORMS, "bias")
        arguments.gamma_gradient = pair(self.gradients, BATCH_NORMS, "weight")
        arguments.beta_gradient = pair(self.gradients, BATCH_NORMS, "bias")
        arguments.running_mean = pair(self.running, BATCH_NORMS, "running_mean")
        arguments.running_var = pair(self.running, BATCH_NORMS, "running_var")
        self.kernels.launch(name, arguments, self.runs * self.blocks)
        return result


def descend(parameters: list[Tensor], momenta: list[Tensor], gradients: list[Tensor], rate: Tensor) -> None:
    """The step of `StackedLayers.update` for several tensors, in place."""
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_add_(momenta, parameters, alpha=WEIGHT_DECAY)
    torch._foreach_sub_(parameters, torch._foreach_mul(momenta, rate))
