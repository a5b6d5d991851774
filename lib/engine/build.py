"""Find, build and load the compiled engine, report which engine runs, and wrap its operators.

The sources in ``lib/engine/csrc`` are C++ with the compiler's portable vector types. ``make engine``
(``python -m lib.engine.build build``) builds them with torch.utils.cpp_extension. Nothing is built on import or on use.
Everything works without the engine: PyTorch is the reference and the fallback.

The file name holds a key of the sources, their flags, PyTorch, Python and the processor, so an outdated library is
never loaded. A note beside the library holds its digest, so a damaged library, which could end the process, is not
loaded either. A new build replaces the library only after another process has loaded the new one. It also replaces a
library that does not load, or that another compiler made. LIB_ENGINE=off in the environment switches the engine off.
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

from lib import commands, paths

ADVICE = f"`{'make engine' if paths.IS_CLONE else 'python -m lib.engine.build build'}` builds it"
# Positions in ActivationName of csrc/vector.h.
ACTIVATION_CODES = {
    name: code for code, name in enumerate(["gelu", "relu", "tanh", "identity", "softplus", "leaky_relu"])
}
CONV_PARAMETERS = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
BN_PARAMETERS = ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
GN_PARAMETERS = ("gn1.weight", "gn1.bias", "gn2.weight", "gn2.bias")
BN_RUNNING = ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var")
BN_COUNTERS = ("bn1.num_batches_tracked", "bn2.num_batches_tracked")


# ---- Building and loading ----


def _sources() -> list[Path]:
    return sorted(paths.CSRC.glob("*.cpp"))


@functools.cache
def _processor() -> str:
    """The processor's instruction sets, if the system lists them. -march=native depends on them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.processor()


def compiler_flags() -> list[str]:
    """The flags that the sources are compiled with. They depend on the processor."""
    flags = ["-O3", "-march=native", "-fopenmp"]
    # Older compilers take a newer AMD for one without AVX-512, and their code is 5 % slower there.
    return [*flags, "-mtune=icelake-server"] if "avx512f" in _processor().split() else flags


def name() -> str:
    """The extension's name, with a key of all that its machine code depends on, except the compiler."""
    parts = [torch.__version__, sys.version, platform.machine(), _processor(), *compiler_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(path for path in paths.CSRC.iterdir() if path.suffix in (".cpp", ".h")):
        digest.update(source.name.encode() + b"\n" + source.read_bytes())
    return f"engine_{digest.hexdigest()[:16]}"


def path() -> Path:
    """The path of the built engine, whether it exists or not."""
    extension = name()
    return paths.engines_folder() / extension / f"{extension}.so"


def _note_path(library: Path) -> Path:
    return library.with_suffix(".json")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _read_note(library: Path) -> dict[str, str]:
    """The note beside a library, with its digest ``sha256`` and its ``compiler``; empty if there is none."""
    try:
        note = json.loads(_note_path(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _is_intact(library: Path) -> bool:
    """Whether the library has the digest in its note."""
    try:
        return _read_note(library).get("sha256") == _digest(library)
    except OSError:
        return False


def _compiler() -> str:
    """The C++ compiler and its version. Raises RuntimeError if there is none."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(command) is None:
        raise RuntimeError(f"no C++ compiler {command!r} was found: install one, or set CXX to another")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return version.partition("\n")[0].strip() or command


# Each runs in a process of its own, which a damaged library may end.
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
    """Run a script in another process; returns its error output, with the message first, or nothing."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    said = next((line for line in lines if "Error" in line.partition(":")[0]), f"it ended with {done.returncode}")
    return "\n".join([said, *lines])


def _can_load(library: Path) -> bool:
    return _is_intact(library) and not _run(_LOAD, library.stem, str(library))


def build() -> Path:
    """Compile the engine, unless this compiler has made it already and it loads; returns the path of the library.

    Raises RuntimeError if there is no compiler, or if it fails.
    """
    target, compiler = path(), _compiler()
    if _read_note(target).get("compiler") == compiler and _can_load(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=target.parent) as draft:
        flags = " ".join(compiler_flags())
        # This compiles the library and loads it.
        if problem := _run(_COMPILE, target.stem, draft, flags, *(str(source) for source in _sources())):
            raise RuntimeError(problem)
        made = Path(draft) / target.name
        note = {"sha256": _digest(made), "compiler": compiler}
        # A process that reads in between finds another digest, and goes on without the library.
        paths.write_content(_note_path(target), json.dumps(note) + "\n")
        os.replace(made, target)
    _load_library.cache_clear()
    return target


def load() -> tuple[ModuleType | None, str]:
    """The engine's module, or None if it does not run, and the reason in words."""
    if os.environ.get("LIB_ENGINE", "").lower() in ("off", "0", "no"):
        return None, "LIB_ENGINE switches the compiled engine off"
    return _load_library()


@functools.cache
def _load_library() -> tuple[ModuleType | None, str]:
    target = path()
    if not target.exists():
        return None, f"the compiled engine is not built for this machine and these sources; {ADVICE}"
    if not _is_intact(target):
        return None, f"the compiled engine {paths.shorten(target)} is damaged; {ADVICE} anew"
    try:
        spec = importlib.util.spec_from_file_location(target.stem, target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # a library may raise anything, and everything works without it
        return None, f"the compiled engine {paths.shorten(target)} does not load ({error}); {ADVICE} anew"
    return module, f"compiled ({target.stem})"


def explain_missing() -> str:
    """Why the engine does not run here, and what to do about it; empty if it runs."""
    module, reason = load()
    return "" if module else reason


def report() -> str:
    """One line: which engine runs here, and why."""
    module, reason = load()
    return f"engine: {reason}" if module else f"engine: PyTorch, since {reason}"


# ---- The residual layers of the convolutional network ----


def _norm_parameters(tensors: Mapping[str, Tensor], norm_groups: int) -> tuple[str, ...]:
    return BN_PARAMETERS if "bn1.weight" in tensors else GN_PARAMETERS if norm_groups else ()


def find_conv_stack_problem(h: Tensor, tensors: Mapping[str, Tensor], activation: str, norm_groups: int = 0) -> str:
    """Why ``conv_stack`` cannot take these arguments, in words; empty if it can."""
    module, reason = load()
    if module is None:
        return reason
    batch_norm = "bn1.weight" in tensors
    if (norm_groups != 0) != ("gn1.weight" in tensors) or (batch_norm and norm_groups):
        return f"norm_groups is {norm_groups}, and the tensors are of another norm"
    if norm_groups and (norm_groups < 0 or module.CONV_CHANNELS % norm_groups):
        return f"norm_groups is {norm_groups}, and does not divide the {module.CONV_CHANNELS} channels"
    needed = CONV_PARAMETERS + _norm_parameters(tensors, norm_groups) + (BN_RUNNING if batch_norm else ())
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
        return "the compiled engine does not support autocast"
    if activation not in ACTIVATION_CODES:
        return f"the compiled engine has no activation {activation!r}"
    if h.dim() != 4 or h.numel() == 0:
        return f"the compiled convolutions take h of shape (n, C, H, W), and it has {tuple(h.shape)}"
    channels = h.shape[1]
    if channels != module.CONV_CHANNELS:
        return f"the compiled convolutions take {module.CONV_CHANNELS} channels, and h has {channels}"
    if h.numel() == (channels if batch_norm else norm_groups):  # PyTorch raises in training
        return "batch norm has a single value in each channel" if batch_norm else "group norm has one in each group"
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
    norm_groups: int = 0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The residual layers h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k))))), k = 0..L-1, in one operator.

    Arguments: ``h`` (n, C, H, W), float32, on the CPU; ``tensors``, by the released names of one layer's tensors, each
    stacked over the layers: conv1.weight (L, C, C, 3, 3), conv1.bias (L, C), the same for conv2, and with batch norm
    bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var (L, C), the same for bn2; ``activation`` s by name. With
    ``training``, batch norm uses the batch's statistics, and the running ones (and num_batches_tracked (L,), if given)
    are updated in place with ``momentum``. Else it uses the running ones. With ``norm_groups`` > 0, group norms of
    that many groups replace the batch norms: gn1.weight, gn1.bias (L, C), the same for gn2.

    Returns h_L (n, C, H, W), in channels-last memory. It can be differentiated once, with respect to h and the
    parameters. Gradients do not depend on the number of threads, to the last bit. Raises ValueError if
    ``find_conv_stack_problem`` finds a problem; PyTorch can then be used.
    """
    if problem := find_conv_stack_problem(h, tensors, activation, norm_groups):
        raise ValueError(f"The compiled convolutions cannot be used: {problem}.")
    module, _ = load()
    batch_norm = "bn1.weight" in tensors
    parameters = [tensors[key] for key in CONV_PARAMETERS + _norm_parameters(tensors, norm_groups)]
    running = [tensors[key] for key in BN_RUNNING] if batch_norm else []
    options = (eps, ACTIVATION_CODES[activation], norm_groups)
    if batch_norm and training:
        for key in BN_COUNTERS:
            if key in tensors:
                tensors[key].add_(1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (h, *parameters)):
        return _ConvStack.apply(module, running, training, momentum, options, h, *parameters)
    return module.conv_stack_forward(h, parameters, running, training, momentum, *options, False)[0]


class _ConvStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, running, training, momentum, options, h, *parameters):
        out, *kept = module.conv_stack_forward(h, parameters, running, training, momentum, *options, True)
        ctx.module, ctx.options = module, (training, *options)
        ctx.save_for_backward(*kept, *parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        statistics, states, *parameters = ctx.saved_tensors
        gradients = ctx.module.conv_stack_backward(gradient, parameters, statistics, states, *ctx.options)
        return None, None, None, None, None, *gradients


# ---- python -m lib.engine.build build | report ----


def main(arguments: list[str]) -> int:
    """``build`` compiles the engine if a compiler is found; ``report`` prints which engine runs."""
    if arguments not in (["build"], ["report"]):
        print("usage: python -m lib.engine.build build|report", file=sys.stderr)
        return 2
    return commands.exit_code(_build_command if arguments == ["build"] else _report_command, failures=())


def _build_command() -> None:
    before = _read_note(path())
    # torch looks for ninja on the PATH, which lacks the folder of an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        target = build()
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        print(f"The compiled engine was not built: {lines[0]}. Everything works without it, only slower.")
        if len(lines) > 1:
            print(str(error), file=sys.stderr)
        return
    print(f"{'Up to date' if _read_note(target) == before else 'Built'}: {paths.shorten(target)}")
    _report_command()


def _report_command() -> None:
    print(report())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
