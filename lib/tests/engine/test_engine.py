"""The compiled engine: its build, and the residual layers of the convolutional network against float64 autograd."""

import copy
import json
import os
import resource
import shutil
import signal
import sysconfig
from pathlib import Path

import pytest
import torch
from cifar_set import needs_cifar10

from lib import paths
from lib.activations import ACTIVATIONS
from lib.cifar import dataset, records
from lib.cifar.choice import NetworkChoice
from lib.cifar.network import ConvNetConfig, ConvResNet, ResidualLayers
from lib.engine import build as engine
from lib.measures import layer_noise

module, reason = engine.load()
needs_engine = pytest.mark.skipif(module is None, reason=reason)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is here")
VARIANTS = {  # batch norm, groups of a group norm, training
    "training": (True, 0, True),
    "evaluation": (True, 0, False),
    "no norm": (False, 0, True),
    "group norm": (False, 4, True),
    "layer norm": (False, 1, False),
}


def make_layers(variant: str, activation: str = "gelu", depth: int = 8) -> ResidualLayers:
    """Make layers in float32 with all parameters and running statistics away from their initial values."""
    batch_norm, norm_groups, training = VARIANTS[variant]
    norm = {"batch_norm": batch_norm, "norm_groups": norm_groups}
    config = ConvNetConfig(depth=depth, activation=activation, initialisation="iid", **norm)
    layers = ConvResNet(config).residual_layers.train(training)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in layers.named_buffers():
            if name.endswith("mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return layers


def draw_images(n: int = 5, height: int = 10, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw h_0, and the weights of a scalar function of h_L."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(n, 16, height, width, generator=generator) for _ in range(2))


def run_compiled(layers: ResidualLayers, h: torch.Tensor) -> torch.Tensor:
    tensors = {name: layers.stacked(name) for name in layers.names()}
    options = {"norm_groups": layers.norm_groups, "training": layers.training}
    return engine.conv_stack(h, tensors, layers.activation, **options)


def compute_results(layers: ResidualLayers, run, h: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the output, the gradients of the sum of w h_L, and the running statistics."""
    h = h.clone().requires_grad_()
    out = run(layers, h)
    (w * out).sum().backward()
    gradients = {f"d {name}": parameter.grad for name, parameter in layers.named_parameters()}
    return {"h_L": out.detach(), "d h_0": h.grad, **gradients, **dict(layers.named_buffers())}


def run_stock(layers: ResidualLayers, h: torch.Tensor) -> torch.Tensor:
    return list(layers.states(h))[-1]


def assert_close(found: dict, expected: dict, variant: str, tolerance: float = 2e-6) -> None:
    # In training the loss does not depend on a bias before batch norm, so its gradient is rounding.
    scale = {f"d {c}_bias": expected[f"d {c}_weight"].norm() for c in ("conv1", "conv2") if variant == "training"}
    for name, value in expected.items():
        error = (found[name] - value).double().norm() / scale.get(name, value.double().norm()).clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e}"


@needs_engine
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", list(engine.ACTIVATION_CODES))
def test_results_and_gradients_are_those_of_float64_autograd(activation, variant):
    layers = make_layers(variant, activation)
    h, w = draw_images()
    expected = compute_results(copy.deepcopy(layers).double(), run_stock, h.double(), w.double())
    assert_close(compute_results(layers, run_compiled, h, w), expected, variant)


@pytest.mark.slow
@needs_engine
def test_rounding_leaves_as_little_noise_from_layer_to_layer_as_in_stock_pytorch():
    """Gradients of weight-tied layers are a smooth function of the layer, but for rounding."""
    layers = make_layers("training", depth=64)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    h, w = draw_images(16)
    exact = compute_results(copy.deepcopy(layers).double(), run_stock, h.double(), w.double())
    reference = compute_results(copy.deepcopy(layers), run_stock, h, w)
    found = compute_results(layers, run_compiled, h, w)
    for name in ("d conv1_weight", "d conv2_weight"):
        noise = layer_noise(reference[name])
        assert layer_noise(exact[name]) < 1e-3 * noise  # it is rounding that is measured
        assert layer_noise(found[name]) < 1.5 * noise


@pytest.mark.slow
@needs_cifar10
@needs_engine
def test_gradients_of_a_trained_network_are_as_exact_as_in_stock_pytorch():
    """After 180 epochs the layers of this network are not smooth. The engine's gradients are not the reason."""
    (run,) = NetworkChoice(epochs=180).select(records.read_runs(), initialisation="weight-tied", seed=0)
    network = run.load().network.train()
    layers = network.residual_layers
    pixels = dataset.normalise(dataset.load(train=True).pixels[:8])
    h, w = network.stem(pixels).detach(), draw_images(8)[1]  # h_0 as in training: small and correlated
    exact = compute_results(copy.deepcopy(layers).double(), run_stock, h.double(), w.double())
    reference = compute_results(copy.deepcopy(layers), run_stock, h, w)
    found = compute_results(layers, run_compiled, h, w)
    for name in ("d conv1_weight", "d conv2_weight"):
        norms = exact[name].flatten(1).norm(dim=1)
        errors = [(of[name] - exact[name]).flatten(1).norm(dim=1) / norms for of in (found, reference)]
        assert errors[0].max() < 2 * errors[1].max() < 1e-4


@needs_engine
@pytest.mark.parametrize("shape", [(16, 10, 10), (1, 3, 2), (2, 1, 13), (3, 5, 1), (1, 9, 31)])
def test_images_of_any_number_and_size_give_the_results_of_autograd(shape):
    for variant in VARIANTS:
        layers = make_layers(variant, depth=3)
        h, w = draw_images(*shape)
        expected = compute_results(copy.deepcopy(layers).double(), run_stock, h.double(), w.double())
        assert_close(compute_results(layers, run_compiled, h, w), expected, variant, 4e-6)


@needs_engine
@pytest.mark.parametrize("activation", list(engine.ACTIVATION_CODES))
def test_an_activation_is_exact_over_its_whole_range(activation):
    """One layer whose convolutions pass the centre pixel on: h_1 = h_0 + s(h_0), and 1 + s'(h_0) as gradient."""
    config = ConvNetConfig(depth=1, activation=activation, batch_norm=False)
    layers = ConvResNet(config).residual_layers
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
        for weight in (layers.conv1_weight, layers.conv2_weight):
            weight[0, :, :, 1, 1] = torch.eye(16)
    h = torch.linspace(-30, 30, 101 * 16).view(101, 16, 1, 1)
    h[-1] = float("nan")
    out = run_compiled(layers, h.requires_grad_())
    out.sum().backward()
    value, slope, z = (out - h).detach()[:-1], (h.grad - 1)[:-1], h.detach()[:-1].double()
    s = ACTIVATIONS[activation]
    torch.testing.assert_close(value.double(), s.function(z), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(slope.double(), s.derivative(z), rtol=1e-6, atol=1e-6)
    assert out[-1].isnan().all()


@needs_engine
@pytest.mark.parametrize("activation", list(engine.ACTIVATION_CODES))
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_is_not_hidden(activation, sign):
    """bn1 overflows to an infinity of that sign; GELU of minus infinity is NaN."""
    layers = make_layers("evaluation", activation, depth=1)
    with torch.no_grad():
        layers.bn1_weight.fill_(sign * 1e38)
        layers.bn1_running_var.fill_(1e-4)
        layers.conv1_bias.fill_(50)  # so that conv1 is above the running mean everywhere
    h, _ = draw_images(2)
    expected = run_stock(layers, h).isfinite()
    assert torch.equal(run_compiled(layers, h).isfinite(), expected)
    assert not expected.any() or activation in ("tanh", "relu", "softplus")


@needs_engine
def test_missing_memory_is_said_in_a_sentence():
    """In a process that may take 500 MB more: enough for the states, too little for the buffers of a thread."""
    layers = make_layers("no norm", depth=1)
    h = torch.zeros(1, 16, 1500, 1500)
    child = os.fork()
    if child == 0:
        try:
            here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (here + 500_000_000,) * 2)
            with torch.no_grad():
                run_compiled(layers, h)
        except MemoryError as error:
            os._exit(0 if "The compiled engine found no " in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_engine
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_threads_changes_no_bit(variant):
    layers = make_layers(variant)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute_results(copy.deepcopy(layers), run_compiled, *draw_images(n=11)))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@needs_engine
def test_without_gradients_output_and_running_statistics_are_the_same():
    for variant in VARIANTS:
        layers = make_layers(variant)
        expected = compute_results(copy.deepcopy(layers), run_compiled, *draw_images())
        with torch.no_grad():
            out = run_compiled(layers, draw_images()[0])
        assert not out.requires_grad
        assert torch.equal(out, expected["h_L"])
        assert all(torch.equal(buffer, expected[name]) for name, buffer in layers.named_buffers())


@needs_engine
def test_frozen_parameters_take_no_gradient_and_a_graph_can_be_used_twice():
    layers = make_layers("training")
    h, w = draw_images()
    expected = compute_results(copy.deepcopy(layers), run_compiled, h, w)
    layers.conv1_weight.requires_grad_(False)
    loss = (w * run_compiled(layers, h)).sum()  # h_0 takes no gradient here
    loss.backward(retain_graph=True)
    run_compiled(copy.deepcopy(layers), h)  # another pass must not touch what the first one kept
    loss.backward()
    assert layers.conv1_weight.grad is None
    assert torch.equal(layers.conv2_weight.grad, 2 * expected["d conv2_weight"])
    loss = (w.requires_grad_() * run_compiled(layers, h)).sum()
    gradient = torch.autograd.grad(loss, layers.conv2_weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_engine
def test_the_network_trains_alike_with_and_without_the_engine(monkeypatch):
    def take_steps() -> tuple[str, list[torch.Tensor]]:
        network = ConvResNet(ConvNetConfig(depth=4))
        optimiser = torch.optim.SGD(network.parameters(), lr=0.04, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            logits = network(torch.randn(4, 3, 32, 32, generator=generator))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 5, 9])).backward()
            optimiser.step()
        return network.engine, list(network.state_dict().values())

    name, found = take_steps()
    monkeypatch.setattr(engine, "load", lambda: (None, "switched off here"))
    fallback, expected = take_steps()
    assert (name, fallback) == ("compiled", "pytorch")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_engine
def test_losses_agree_to_rounding_until_the_sign_of_a_relu_turns(monkeypatch):
    """Rounding can turn the sign of a value before the stem's ReLU. Then gradients jump, and two ways of computing a
    run differ from then on. Up to that step their losses agree."""
    built = engine.load()
    networks = [ConvResNet(ConvNetConfig(depth=4, initialisation="iid")).train() for _ in range(2)]
    optimisers = [torch.optim.SGD(network.parameters(), lr=0.04, momentum=0.9) for network in networks]
    generator = torch.Generator().manual_seed(5)
    steps = 0
    for _ in range(150):
        pixels, labels = torch.randn(16, 3, 32, 32, generator=generator), torch.randint(10, (16,), generator=generator)
        losses, signs = [], []
        for network, optimiser, loaded in zip(networks, optimisers, (built, (None, "switched off here")), strict=True):
            monkeypatch.setattr(engine, "load", lambda loaded=loaded: loaded)
            before = network.bn1(network.conv1(pixels))
            logits = network.head(network.residual_layers(torch.relu(before)))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            signs.append(before > 0)
        assert losses[0] == pytest.approx(losses[1], abs=3e-6)
        if not torch.equal(*signs):
            break
        steps += 1
    assert [network.engine for network in networks] == ["compiled", "pytorch"]
    assert steps >= 5  # enough steps to compare; about a hundred on most machines


@needs_engine
def test_what_the_engine_does_not_take_is_said_in_words():
    layers = make_layers("training", depth=2)
    tensors = {name: layers.stacked(name) for name in layers.names()}
    h, _ = draw_images(2)

    def find_reason(h=h, activation="gelu", **changed) -> str:
        return engine.find_conv_stack_problem(h, tensors | changed, activation)

    assert not engine.find_conv_stack_problem(h, tensors, "gelu")
    assert "float64" in find_reason(h.double())
    assert "h has 8" in find_reason(h[:, :8])
    assert "'sine'" in find_reason(activation="sine")
    assert "meta" in find_reason(h.to("meta"))
    assert "(2, 16, 16, 3, 3)" in find_reason(**{"conv2.weight": torch.zeros(2, 16, 16, 5, 5)})
    assert "single value" in find_reason(h[:1, :, :1, :1])
    grouped = make_layers("group norm", depth=2)
    of_group = {name: grouped.stacked(name) for name in grouped.names()}
    assert not engine.find_conv_stack_problem(h, of_group, "gelu", 4)
    for tensors_, groups in ((tensors, 4), (of_group, 0), (of_group, 3), (of_group, -4)):
        assert f"norm_groups is {groups}" in engine.find_conv_stack_problem(h, tensors_, "gelu", groups)
    assert "each group" in engine.find_conv_stack_problem(h[:1, :, :1, :1], of_group, "gelu", 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in find_reason()
    del tensors["bn2.running_var"]
    assert "bn2.running_var" in find_reason()
    with pytest.raises(ValueError, match=r"cannot be used: .* needs the tensor bn2.running_var\."):
        engine.conv_stack(h, tensors, "gelu")


@pytest.fixture
def engine_anew():
    """The engine is looked for again in the test, and after it."""
    engine._load_library.cache_clear()
    yield
    engine._load_library.cache_clear()


def test_lib_engine_off_switches_it_off(monkeypatch):
    monkeypatch.setenv("LIB_ENGINE", "off")
    assert engine.report() == "engine: PyTorch, since LIB_ENGINE switches the compiled engine off"


def test_a_changed_source_has_another_name_so_a_stale_build_is_not_loaded(monkeypatch, tmp_path, engine_anew):
    before = engine.path()
    shutil.copytree(paths.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(paths, "CSRC", tmp_path / "csrc")
    monkeypatch.delenv("LIB_ENGINE", raising=False)
    assert engine.path() == before
    with open(tmp_path / "csrc" / "vector.h", "a") as file:
        file.write("// changed\n")
    assert engine.path() != before
    assert engine.load()[0] is None
    assert "not built for this machine and these sources" in engine.report()


# A Python module that compiles in a moment. If BROKEN is defined, it needs a function that does not exist.
TINY = """#include <Python.h>
extern "C" int nowhere();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny"};
#ifdef BROKEN
#define NEEDED nowhere()
#else
#define NEEDED 0
#endif
extern "C" PyObject* PyInit_NAME() { return NEEDED ? nullptr : PyModule_Create(&definition); }
"""


@needs_compiler
class TestBuild:
    """A tiny module is built and loaded in place of the engine."""

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch, tmp_path, engine_anew):
        monkeypatch.setattr(paths, "BUILD", tmp_path)
        monkeypatch.delenv("LIB_ENGINE", raising=False)
        monkeypatch.setattr(engine, "_LOAD", engine._LOAD.replace(", torch", ""))  # importing torch takes seconds
        self.broken = tmp_path / "broken"
        monkeypatch.setattr(
            engine,
            "_COMPILE",
            f"""import os, subprocess, sys
name, folder = sys.argv[1:3]
flags = ["-DNAME=" + name] + ["-DBROKEN"] * os.path.exists({str(self.broken)!r})
text = {TINY!r}.replace("PyInit_NAME", "PyInit_" + name)
command = ["c++", "-shared", "-fPIC", "-I{sysconfig.get_path("include")}", *flags, "-x", "c++", "-"]
subprocess.run([*command, "-o", f"{{folder}}/{{name}}.so"], input=text, text=True, check=True)
sys.argv[1:] = [name, f"{{folder}}/{{name}}.so"]
{engine._LOAD}""",
        )

    def explain_missing(self) -> str:
        """Look for the engine again, and say why it does not run, if so."""
        engine._load_library.cache_clear()
        return engine.explain_missing()

    def test_what_was_built_is_loaded_and_not_built_again(self, capsys):
        assert engine.main(["build"]) == 0
        assert capsys.readouterr().out.startswith("Built: ")
        assert self.explain_missing() == ""
        built = engine.path().stat().st_mtime_ns
        assert engine.main(["build"]) == 0
        assert capsys.readouterr().out.startswith("Up to date: ")
        assert engine.path().stat().st_mtime_ns == built
        assert sorted(path.suffix for path in engine.path().parent.iterdir()) == [".json", ".so"]

    @pytest.mark.slow
    @pytest.mark.parametrize("torn", [0, 1000])
    def test_a_torn_library_is_left_aside_and_replaced(self, torn):
        """The system ends a process that reads beyond the end of a cut file, so the file is not loaded."""
        whole = engine.build().read_bytes()
        engine.path().write_bytes(whole[:torn])
        assert "is damaged; `make engine` builds it anew" in self.explain_missing()
        engine.build()
        assert engine.path().read_bytes() == whole
        assert self.explain_missing() == ""

    @pytest.mark.slow
    def test_a_library_that_misses_something_is_left_aside_and_replaced(self):
        self.broken.touch()
        with pytest.raises(RuntimeError, match="undefined symbol"):
            engine.build()
        assert not engine.path().exists()
        # A library with a matching note that does not load.
        self.broken.unlink()
        good = engine.build()
        good.write_bytes(b"no library at all")
        note = json.dumps(engine._read_note(good) | {"sha256": engine._digest(good)})
        good.with_suffix(".json").write_text(note)
        assert "does not load (" in self.explain_missing()
        engine.build()
        assert self.explain_missing() == ""

    @pytest.mark.slow
    def test_a_build_that_fails_keeps_what_is_there(self, capsys):
        whole = engine.build().read_bytes()
        engine.path().with_suffix(".json").unlink()
        self.broken.touch()
        assert engine.main(["build"]) == 0
        assert "The compiled engine was not built: ImportError: " in capsys.readouterr().out
        assert engine.path().read_bytes() == whole

    def test_an_interrupted_build_is_said_and_leaves_nothing(self, monkeypatch, capsys):
        def interrupt(script, *arguments):
            (Path(arguments[1]) / "half.o").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "_run", interrupt)
        assert engine.main(["build"]) == 128 + signal.SIGINT
        assert capsys.readouterr().err == "Interrupted.\n"
        assert list(engine.path().parent.iterdir()) == []

    @pytest.mark.slow
    def test_another_compiler_builds_anew(self, monkeypatch, tmp_path):
        engine.build()
        other = tmp_path / "c++"
        other.write_text("#!/bin/sh\necho another compiler 99\n")
        other.chmod(0o755)
        monkeypatch.setenv("CXX", str(other))
        before = engine.path().stat().st_ino
        engine.build()
        assert engine.path().stat().st_ino != before
        assert engine._read_note(engine.path())["compiler"] == "another compiler 99"
        assert self.explain_missing() == ""


def test_an_engine_that_cannot_be_built_stops_nothing(monkeypatch, capsys):
    def fail_to_build():
        raise RuntimeError("OSError: libomp.so: cannot open shared object file")

    monkeypatch.setattr(engine, "build", fail_to_build)
    assert engine.main(["build"]) == 0
    assert "was not built: OSError: libomp.so: cannot open" in capsys.readouterr().out


def test_without_a_compiler_the_build_says_so_and_succeeds(monkeypatch, tmp_path, engine_anew, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert engine.main(["build"]) == 0
    assert "no C++ compiler 'no-such-compiler' was found" in (out := capsys.readouterr().out)
    assert "Everything works without it" in out
