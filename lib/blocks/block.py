"""One block, f in h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}): make it, and check whether it can be a layer."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BLOCK_SEED = 2**31  # added to the seed, so that blocks and data of one seed differ

Block = Callable[[], nn.Module]
Place = tuple[str, dict[str, Tensor | None], str]


def draw_blocks(block: Block, count: int, seed: int, x: Tensor) -> list[nn.Module]:
    """``count`` new blocks, each in the dtype and on the device of x.

    Raises TypeError or ValueError if the factory does not make such blocks.
    """
    if isinstance(block, nn.Module) or not callable(block):
        name = type(block).__name__
        raise TypeError(
            f"block is {'an object of the class ' if isinstance(block, nn.Module) else ''}{name}, expected what makes "
            f"one, such as the class or `lambda: MyBlock(16)`: each network needs blocks of its own."
        )
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + BLOCK_SEED)
        start = end = torch.get_rng_state()
        for _ in range(count):
            module = _make(block)
            _check_tensors(module)
            if modules:
                _check_another(module, modules)
            modules.append(module)
            before, end = end, torch.get_rng_state()
            if torch.equal(before, end) and not torch.equal(start, end):
                raise ValueError(
                    f"block() sets torch's random seed, so all layers of {_name(module)} start equal: leave "
                    "torch.manual_seed out of it, and give `seed` instead."
                )
    _check_drawn(modules)
    return [module.to(dtype=x.dtype, device=x.device) for module in modules]


def _make(block: Block) -> nn.Module:
    """One new block, after its ``start_at_zero``."""
    try:
        module = block()
    except Exception as error:
        raise TypeError(
            f"block() raised {summarise(error)}, expected a class or a function without arguments that makes a block, "
            "such as `lambda: MyBlock(16)`."
        ) from error
    if not isinstance(module, nn.Module):
        made = f"the class {module.__name__}" if isinstance(module, type) else f"of the type {type(module).__name__}"
        raise TypeError(f"What block() makes is {made}, expected a torch.nn.Module with forward(h).")
    if callable(getattr(module, "start_at_zero", None)):
        try:
            with torch.no_grad():
                module.start_at_zero()
        except Exception as error:
            raise ValueError(
                f"{_name(module)}.start_at_zero() raised {summarise(error)}, expected a method without arguments that "
                "sets parameters to zero."
            ) from error
    return module


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _check_tensors(block: nn.Module) -> None:
    """Raise ValueError unless all tensors of the block can be stacked over layers and moved to the dtype and device of
    x."""
    name = _name(block)
    if any(isinstance(module, torch.jit.ScriptModule) for module in block.modules()):
        raise ValueError(f"{name} is compiled by torch.jit: give the module that it was compiled from.")
    for key, tensor in _tensors(block):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape for {key} yet: give its sizes instead of a lazy module.")
        if tensor.is_meta:
            raise ValueError(f"{name} has no numbers in {key}, which is on the meta device: make it on the CPU.")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has sparse numbers in {key}, expected dense ones: use to_dense().")
        if tensor.is_complex():
            raise ValueError(f"{name} has complex numbers in {key}, expected real ones: hold both parts as real.")
    registered = {id(each) for each in (*block.modules(), *(tensor for _, tensor in _tensors(block)))}
    for path, module in block.named_modules():
        for key, held in vars(module).items():
            place = f"{path}.{key}".lstrip(".")
            if isinstance(held, Tensor) and _differs_by_layer(held):
                raise ValueError(
                    f"{name} holds the tensor {place} as a plain attribute, which is the same in all layers and not "
                    "trained: make it a torch.nn.Parameter, or a buffer by register_buffer."
                )
            inside = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
            if any(_differs_by_layer(each) and id(each) not in registered for each in inside):
                raise ValueError(
                    f"{name} holds modules or tensors in the {type(held).__name__} {place}, which are the same in all "
                    "layers and not trained: use torch.nn.ModuleList, ParameterList, or register_buffer."
                )


def _differs_by_layer(held: object) -> bool:
    """Whether each layer should have its own: a tensor that is not computed, as by a weight norm, or a module with
    tensors."""
    if isinstance(held, nn.Module):
        return any(True for _ in _tensors(held))
    return isinstance(held, Tensor) and held.ndim > 0 and held.is_leaf


def _check_another(module: nn.Module, modules: list[nn.Module]) -> None:
    """Raise ValueError unless ``module`` is new and has parameters like those of the ``modules`` before it."""
    first, name = modules[0], _name(module)
    shared = {id(parameter) for parameter in first.parameters()}
    if module is first or any(id(parameter) in shared for parameter in module.parameters()):
        raise ValueError(describe_same_block(module))
    shapes, expected = ({key: tuple(t.shape) for key, t in _tensors(each)} for each in (module, first))
    if shapes != expected:
        raise ValueError(
            f"block() makes a {name} with {shapes or 'no parameters'} after one with {expected or 'none'}, expected "
            "the same names and shapes at each call: layers of one network are alike."
        )


def describe_same_block(module: nn.Module) -> str:
    """The sentence for a factory that does not make new blocks."""
    return (
        f"block() returns the same {_name(module)} object again, or one with the same parameters, expected a new one "
        "at each call: make the block, and all that is in it, inside of the function."
    )


def _check_drawn(modules: list[nn.Module]) -> None:
    """Raise ValueError if all of several blocks are equal, though their numbers are more than one constant each."""
    first, *others = ([parameter.detach() for parameter in module.parameters()] for module in modules)
    varied = any(len(parameter.unique()) > 1 for parameter in first)
    if others and varied and all(torch.equal(*pair) for each in others for pair in zip(first, each, strict=True)):
        raise ValueError(
            f"All layers of {_name(modules[0])} start equal: draw each block with torch's own random numbers, or "
            "choose the weight-tied initialisation."
        )


def check_block(block: nn.Module, x: Tensor) -> None:
    """Raise ValueError if ``block(h)`` cannot be f of networks that are compared over their depths.

    It must have parameters to train, keep the shape of h, not change h, be finite at h = x, give the same result for
    the same h (no dropout, no state), depend on its parameters, take them from their attributes alone, also in the
    backward pass, and not change its tensors (no running statistics).
    """
    name = _name(block)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad and parameter.numel()]
    if not trained:
        raise ValueError(f"{name} has no parameters to train: give it some, as torch.nn.Parameter or in a module.")
    before = {key: tensor.detach().clone() for key, tensor in _tensors(block)}
    randomness = _all_random_states(x.device)
    h = x.clone()
    with torch.no_grad():  # as most layers are computed in training
        found = _call(block, h)
    _check_result(name, found, x)
    if not torch.equal(h, x):
        raise ValueError(f"{name} changes its input h in place: return a new tensor.")
    if randomness != _all_random_states(x.device):
        raise ValueError(
            f"{name} draws random numbers in forward, as dropout does, and other ones at each depth: take dropout out "
            "(0.0), since networks are compared that differ in nothing but their depth."
        )
    buffers = {key for key, _ in block.named_buffers()}
    for key, tensor in _tensors(block):
        if key in before and _are_equal(tensor, before[key]):
            continue
        if key in buffers:
            raise ValueError(
                f"{name} keeps running statistics ({key} changes in forward), which are no part of the gradient flow: "
                "use track_running_stats=False, a norm without them, or eval()."
            )
        raise ValueError(f"{name} changes its parameter {key} in forward, which is left to training: compute with it.")
    found = found.detach()
    if not found.isfinite().all():
        raise ValueError(f"{name} is not finite (NaN or infinite) at h = x: look at its initial weights and the data.")
    with torch.enable_grad():
        again = _call(block, x.clone().requires_grad_())
        if not _are_close(again, found, _size(found)):
            raise ValueError(
                f"{name} gives another result when it is called again with the same h: take out what it remembers from "
                "call to call, and random numbers."
            )
        if not _reaches(name, again, trained):
            raise ValueError(
                f"{name} gives no gradient to its parameters: use them in forward, without detach, torch.no_grad, "
                "rounding or comparisons in between."
            )

        _check_places(block, x)


def find_places(block: nn.Module) -> list[Place]:
    """The places of each parameter and buffer, several if modules share it: its name, the dict, and its key there."""
    names = {id(tensor): name for name, tensor in [*block.named_parameters(), *block.named_buffers()]}
    dicts = [held for module in block.modules() for held in (module._parameters, module._buffers)]
    return [(names[id(held[key])], held, key) for held in dicts for key in held if held[key] is not None]


def _check_places(block: nn.Module, x: Tensor) -> None:
    """Raise ValueError if the block, or its backward pass, takes a parameter from another place than its attribute,
    where each layer has its own."""
    own = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
    start = {name: parameter.data for name, parameter in own.items()}
    try:
        # If a parameter is zero, gradients of others vanish and hide what is wrong.
        for parameter in own.values():
            steps = torch.arange(parameter.numel(), dtype=parameter.dtype, device=x.device)
            parameter.data = parameter.data + 0.01 * torch.cos(steps).view(parameter.shape)
        wrong = _find_parameter_elsewhere(block, own, x)
    finally:
        for name, parameter in own.items():
            parameter.data = start[name]
    if wrong:
        raise ValueError(
            f"{_name(block)} takes its parameter {wrong} from elsewhere than the attribute, as from a list, a hook, or "
            "a checkpoint that computes again: use the attribute in forward, and `chunk` in place of checkpoints."
        )


def _find_parameter_elsewhere(block: nn.Module, own: dict[str, nn.Parameter], x: Tensor) -> str | None:
    """The name of a parameter whose gradient is another one if a tensor of the same values takes its place, and leaves
    it before the backward pass."""
    h = x.clone().requires_grad_()
    slope = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
    try:
        expected = torch.autograd.grad(block(h), [*own.values(), h], slope, allow_unused=True)
    except Exception:  # the block may not be defined at these values, which says nothing about places
        return None
    places = [(name, held, key, held[key]) for name, held, key in find_places(block) if name in own]
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in own.items()}
    try:
        for name, held, key, _ in places:
            held[key] = leaves[name]
        result = block(h)
        for name, held, key, _ in places:
            held[key] = torch.zeros_like(leaves[name], requires_grad=True)
        found = torch.autograd.grad(result, [*leaves.values(), h], slope, allow_unused=True)
    except Exception:  # with the same values it worked
        return next(iter(own))
    finally:
        for _, held, key, parameter in places:
            held[key] = parameter
    size = max(_size(each) for each in expected if each is not None)  # gradients that are 0 are rounding alone
    for name, now, then in zip([*own, next(iter(own))], found, expected, strict=True):  # that of h tells no name
        if (now is None) != (then is None) or (now is not None and not _are_close(now, then, size)):
            return name
    return None


def _size(values: Tensor) -> float:
    return float(values.abs().nan_to_num(0).max()) if values.numel() else 0.0


def _are_equal(now: Tensor, then: Tensor) -> bool:
    return torch.equal(now.nan_to_num(), then.nan_to_num()) and torch.equal(now.isnan(), then.isnan())


def _are_close(now: Tensor, then: Tensor, size: float) -> bool:
    # On a GPU they are equal up to the order of additions.
    return torch.allclose(now, then, rtol=0, atol=torch.finfo(then.dtype).eps ** 0.5 * size, equal_nan=True)


def _check_result(name: str, found: object, x: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != x.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} turns h of the shape {tuple(x.shape)} into {shape}, expected the shape of h: a layer adds it to h."
        )
    for what in ("dtype", "device", "layout"):
        now, then = getattr(found, what), getattr(x, what)
        if now != then:
            raise ValueError(
                f"{name} turns h of {then} into {now}, expected the {what} of h: make tensors like h, as "
                "torch.zeros_like(h) does."
            )


def _call(block: nn.Module, h: Tensor) -> object:
    try:
        return block(h)
    except Exception as error:
        raise ValueError(
            f"{_name(block)} cannot take h of the shape {tuple(h.shape)} and {h.dtype}: forward raised "
            f"{summarise(error)}; expected a forward(h) that takes h alone and keeps its shape."
        ) from error


def _reaches(name: str, found: Tensor, trained: list[Tensor]) -> bool:
    """Whether a gradient of the result reaches a parameter."""
    try:
        return found.requires_grad and any(
            gradient is not None for gradient in torch.autograd.grad(found.sum(), trained, allow_unused=True)
        )
    except Exception as error:
        raise ValueError(
            f"{name} has no gradient: its backward pass raised {summarise(error)}; expected operations of PyTorch, "
            "none of them in place on what is needed again."
        ) from error


def summarise(error: Exception) -> str:
    """An error in one line: its type and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200].rstrip('.')}" if first else type(error).__name__


def _name(block: nn.Module) -> str:
    return type(block).__name__


def _all_random_states(device: torch.device) -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return random_state(device).numpy(force=True).tobytes(), random.getstate(), numpy[1].tobytes(), numpy[2:]


def random_state(device: torch.device) -> Tensor:
    """The state of PyTorch's random number generator on the CPU and, if ``device`` is CUDA, on that device: bytes (k,)
    on the CPU. It changes with every draw."""
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu
