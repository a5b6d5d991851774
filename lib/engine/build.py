"""The compiled engine: finds it, builds it, says which engine runs, and wraps its operators.

The sources are ``lib/engine/csrc``: C++ with the compiler's portable vector types, built once and explicitly by
``make engine`` (``python -m lib.engine.build build``) through torch.utils.cpp_extension. Nothing is ever built on
import or on use, and everything works without it: stock PyTorch is the reference and the fallback. The file
name holds a key of the sources, their flags, PyTorch, Python and the processor, so that a stale one is never loaded;
a note beside the library has its digest, so that neither is a torn one, which could end the process. A build replaces
what is there only once another process has loaded what it made; it also replaces what does not load, and what another
compiler made.
LIB_ENGINE=off in the environment switches it off. (C++ rather than Numba, which is no dependency here.)
"""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lib import checks, paths

ADVICE = f"`{'make engine' if paths.IS_CLONE else 'python -m lib.engine.build build'}` builds it"
# Positions in ActivationName of csrc/vector.h.
ACTIVATION_CODES = {
    name: code for code, name in enumerate(["gelu", "relu", "tanh", "identity", "softplus", "leaky_relu"])
}
CONV_PARAMETERS = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
BN_PARAMETERS = ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
BN_RUNNING = ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var")
BN_COUNTERS = ("bn1.num_batches_tracked", "bn2.num_batches_tracked")


# ---- Building and loading ----


def _sources() -> list[Path]:
    return sorted(paths.CSRC.glob("*.cpp"))


@functools.cache
def _processor() -> str:
    """What -march=native depends on: the processor's instruction sets, if the system lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.processor()


def compiler_flags() -> list[str]:
    """What the sources are compiled with, after the processor."""
    flags = ["-O3", "-march=native", "-fopenmp"]
    # For older compilers a newer AMD with AVX-512 is one without, and their instruction order 5 % slower there.
    return [*flags, "-mtune=icelake-server"] if "avx512f" in _processor().split() else flags


def name() -> str:
    """The extension's name, with the key of what its machine code depends on (the compiler is not looked at)."""
    parts = [torch.__version__, sys.version, platform.machine(), _processor(), *compiler_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(path for path in paths.CSRC.iterdir() if path.suffix in (".cpp", ".h")):
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return f"engine_{digest.hexdigest()[:16]}"


def path() -> Path:
    """Where the built engine lies, or would."""
    extension = name()
    return paths.engines() / extension / f"{extension}.so"


def _note(library: Path) -> Path:
    return library.with_suffix(".json")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _noted(library: Path) -> dict[str, str]:
    """What the note beside a library says of it: the digest ``sha256`` and the ``compiler``; empty without one."""
    try:
        note = json.loads(_note(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _whole(library: Path) -> bool:
    """Whether the library has the digest that its build noted."""
    try:
        return _noted(library).get("sha256") == _digest(library)
    except OSError:
        return False


def _compiler() -> str:
    """The C++ compiler and its version; RuntimeError without one."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(command) is None:
        raise RuntimeError(f"no C++ compiler was found (looked for {command!r}; CXX names another)")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return version.partition("\n")[0].strip() or command


# Each runs in a process of its own, which a library that is no good may end.
_LOAD = """import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
_COMPILE = """import sys
from torch.utils import cpp_extension
name, folder, flags, *sources = sys.argv[1:]
options = {"extra_cflags": flags.split(), "extra_ldflags": ["-fopenmp"], "with_cuda": False}
cpp_extension.load(name, sources, build_directory=folder, verbose=False, **options)
"""


def _run(script: str, *arguments: str) -> str:
    """Run a script in another process; returns what went wrong, the sentence first, or nothing."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    said = next((line for line in lines if "Error" in line.partition(":")[0]), f"it ended with {done.returncode}")
    return "\n".join([said, *lines])


def _loads(library: Path) -> bool:
    return _whole(library) and not _run(_LOAD, library.stem, str(library))


def build() -> Path:
    """Compile the engine unless a sound one by this compiler is there; returns the path of the library.

    Raises RuntimeError if there is no compiler, or if it fails.
    """
    target, compiler = path(), _compiler()
    if _noted(target).get("compiler") == compiler and _loads(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=target.parent) as draft:
        flags = " ".join(compiler_flags())
        # This compiles, and loads what came of it.
        if problem := _run(_COMPILE, target.stem, draft, flags, *(str(source) for source in _sources())):
            raise RuntimeError(problem)
        made = Path(draft) / target.name
        note = {"sha256": _digest(made), "compiler": compiler}
        # A process that reads in between finds a library that is not the noted one, and goes on without it.
        paths.write_content(_note(target), json.dumps(note) + "\n")
        os.replace(made, target)
    _built.cache_clear()
    return target


def load() -> tuple[ModuleType | None, str]:
    """The engine's module, None if it does not run, and the reason in words."""
    if os.environ.get("LIB_ENGINE", "").lower() in ("off", "0", "no"):
        return None, "LIB_ENGINE switches the compiled engine off"
    return _built()


@functools.cache
def _built() -> tuple[ModuleType | None, str]:
    target = path()
    if not target.exists():
        return None, f"the compiled engine is not built for this machine and these sources; {ADVICE}"
    if not _whole(target):
        return None, f"the compiled engine {paths.short(target)} is not what was built; {ADVICE} anew"
    try:
        spec = importlib.util.spec_from_file_location(target.stem, target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a foreign library raises: everything works without it
        return None, f"the compiled engine {paths.short(target)} does not load ({error}); {ADVICE} anew"
    return module, f"compiled ({target.stem})"


def missing() -> str:
    """Why the engine does not run here, and what to do about it; empty if it runs."""
    module, reason = load()
    return "" if module else reason


def report() -> str:
    """One line: which engine runs here, and why."""
    module, reason = load()
    return f"engine: {reason}" if module else f"engine: PyTorch, since {reason}"


# ---- The residual layers of the convolutional network ----


def conv_stack_problem(h: Tensor, tensors: Mapping[str, Tensor], activation: str) -> str:
    """Why ``conv_stack`` does not take these, in words, or nothing if it does; ``tensors`` as there."""
    module, reason = load()
    if module is None:
        return reason
    if "gn1.weight" in tensors:
        return "the compiled engine has no group norm"
    batch_norm = "bn1.weight" in tensors
    needed = CONV_PARAMETERS + (BN_PARAMETERS + BN_RUNNING if batch_norm else ())
    missing = [key for key in needed if key not in tensors]
    if missing:
        return f"the compiled engine needs the tensor {missing[0]}"
    floats = {"h": h} | {key: tensors[key] for key in needed}
    for key, tensor in floats.items():
        if tensor.device.type != "cpu":
            return f"the compiled engine runs on the CPU, and {key} is on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"the compiled convolutions take float32, and {key} is {tensor.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "the compiled engine does not take part in autocast"
    if activation not in ACTIVATION_CODES:
        return f"the compiled engine has no activation {activation!r}"
    if h.dim() != 4 or h.numel() == 0:
        return f"the compiled convolutions take h of shape (n, C, H, W), and it has {tuple(h.shape)}"
    channels = h.shape[1]
    if channels != module.CONV_CHANNELS:
        return f"the compiled convolutions take {module.CONV_CHANNELS} channels, and h has {channels}"
    if h.numel() == channels and batch_norm:
        return "batch norm has a single value a channel"  # stock PyTorch raises in training
    depth = tensors["conv1.weight"].shape[0]
    for key in needed:
        expected = (depth, channels) + ((channels, 3, 3) if key in ("conv1.weight", "conv2.weight") else ())
        if depth == 0 or tensors[key].shape != expected:
            return f"the compiled convolutions take {key} of shape {expected}, and it has {tuple(tensors[key].shape)}"
    return ""


def conv_stack(
    h: Tensor,
    tensors: Mapping[str, Tensor],
    activation: str,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The residual layers h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k))))), k = 0..L-1, in one operator.

    Main arguments: ``h`` (n, C, H, W), float32, on the CPU; ``tensors`` by the released names of one layer's
    tensors, each stacked over the layers: conv1.weight (L, C, C, 3, 3), conv1.bias (L, C), the same for
    conv2, and with batch norm bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var (L, C), the same for
    bn2; ``activation`` s by name; ``training``: normalise by the batch's statistics and update the running
    ones (and num_batches_tracked (L,), if given) in place with ``momentum``, else use the running ones.

    Returns h_L (n, C, H, W), in channels-last memory. Differentiable once, with respect to h and the
    parameters; gradients do not depend on the number of threads, to the last bit. Raises ValueError if
    ``conv_stack_problem`` finds something; the caller then runs stock PyTorch.
    """
    if problem := conv_stack_problem(h, tensors, activation):
        raise ValueError(f"The compiled convolutions do not apply: {problem}.")
    module, _ = load()
    batch_norm = "bn1.weight" in tensors
    parameters = [tensors[key] for key in CONV_PARAMETERS + (BN_PARAMETERS if batch_norm else ())]
    running = [tensors[key] for key in BN_RUNNING] if batch_norm else []
    options = (training, eps, ACTIVATION_CODES[activation])
    if batch_norm and training:
        for key in BN_COUNTERS:
            if key in tensors:
                tensors[key].add_(1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (h, *parameters)):
        return _ConvStack.apply(module, running, momentum, options, h, *parameters)
    return module.conv_stack_forward(h, parameters, running, training, momentum, eps, options[2], False)[0]


class _ConvStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, running, momentum, options, h, *parameters):
        training, eps, activation = options
        out, *kept = module.conv_stack_forward(h, parameters, running, training, momentum, eps, activation, True)
        ctx.module, ctx.options = module, options
        ctx.save_for_backward(*kept, *parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        statistics, states, *parameters = ctx.saved_tensors
        gradients = ctx.module.conv_stack_backward(gradient, parameters, statistics, states, *ctx.options)
        return None, None, None, None, *gradients


# ---- python -m lib.engine.build build | report ----


def main(arguments: list[str]) -> int:
    """``build`` compiles the engine if a compiler is found; ``report`` prints which engine runs."""
    if arguments not in (["build"], ["report"]):
        print("usage: python -m lib.engine.build build|report", file=sys.stderr)
        return 2
    return checks.exit_code(_build_command if arguments == ["build"] else _report_command, failures=())


def _build_command() -> None:
    before = _noted(path())
    # torch looks for ninja on the PATH, where an environment that is not activated has no folder.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        target = build()
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        print(f"The compiled engine was not built: {lines[0]}. Everything works without it, only slower.")
        if len(lines) > 1:
            print(str(error), file=sys.stderr)
        return
    print(f"{'Up to date' if _noted(target) == before else 'Built'}: {paths.short(target)}")
    _report_command()


def _report_command() -> None:
    print(report())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
