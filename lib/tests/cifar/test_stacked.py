"""Stacked runs: the CUDA kernels against autograd, and stacks of runs against runs alone.

The kernels' source is compiled as C++ (cuda_on_cpu.h), and their threads take turns on the CPU, so these tests need no
GPU. They do not show races and speed. If there is a GPU, the last tests run the kernels on it.
"""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import paths
from lib.checks import Divergence
from lib.cifar import dataset, monitor, records, states
from lib.cifar import training as cifar_training
from lib.cifar.config import CifarConfig
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.cifar.schedule import MOMENTUM, WEIGHT_DECAY
from lib.cifar.stacked import layers as stacked_layers
from lib.cifar.stacked import stack as stack_module
from lib.cifar.stacked import training as stacked_training
from lib.cifar.stacked.layers import StackedLayers
from lib.cifar.stacked.stack import Stack
from lib.cifar.training import Training

CPU = torch.device("cpu")
BLOCKS, IMAGES = 2, 4
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="stacked runs need a GPU of compute capability 9.0",
)
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler for the kernels"
)


class CpuKernels:
    """`stacked_layers.Kernels` on the CPU."""

    blocks = BLOCKS

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = library

    def launch(self, name: str, arguments: ctypes.Structure, blocks: int) -> None:
        function = getattr(self.functions, f"{name}_on_cpu")
        function(ctypes.byref(arguments), *([] if name in ("stack_update", "stack_prepare") else [blocks]))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("stack") / "stack.so"
    sizes = [f"-DBLOCKS={BLOCKS}", f"-DIMAGES={IMAGES}", f"-DWARPS={stacked_layers.WARPS}", "-DON_CPU"]
    sizes += [f"-DUPDATE_BLOCKS={2 * BLOCKS}"]
    tests = Path(__file__).parent
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{paths.CSRC}", f"-I{tests}"]
    subprocess.run([*command, *sizes, str(tests / "conv_stack_on_cpu.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.shared_bytes.restype = library.kept_floats.restype = ctypes.c_long
    return library


@pytest.fixture
def kernels(library, monkeypatch) -> CpuKernels:
    monkeypatch.setattr(stacked_layers, "BATCH", BLOCKS * IMAGES)
    monkeypatch.setenv("LIB_ENGINE", "off")
    return CpuKernels(library)


def make_networks(*activations: str, depth: int = 2) -> list[ConvResNet]:
    """Networks away from their initialisation, at which every block is 0."""
    found = [
        ConvResNet(ConvNetConfig(depth=depth, activation=activation, initialisation="iid", seed=seed)).train()
        for seed, activation in enumerate(activations)
    ]
    generator = torch.Generator().manual_seed(1)
    for network in found:
        for name in ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"):
            tensor = network.residual_layers.stacked(name)
            tensor.data += torch.randn(tensor.shape, generator=generator) / 2
    return found


def to_rows(images: torch.Tensor) -> torch.Tensor:
    """(n, 16, 10, 10) -> (n, 100, 16)"""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def to_images(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(1, (10, 10)).permute(0, 3, 1, 2).contiguous()


def compute_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|"""
    found = found.cpu().double()
    return float((found - expected.cpu()).norm() / expected.cpu().norm())


def compute_exactly(network: ConvResNet, h: torch.Tensor, above: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute h_L, dl/dh_0, all gradients, running statistics, and h_L in evaluation mode, by float64 autograd."""
    layers = copy.deepcopy(network).double().residual_layers
    x = to_images(h).double().requires_grad_()
    h_L = layers(x)
    h_L.backward(to_images(above).double())
    found = {"h_L": to_rows(h_L.detach()), "dl/dh_0": to_rows(x.grad)}
    parts = [f"{part}.weight" for part in ("conv1", "conv2", "bn1", "bn2")] + ["bn1.bias", "bn2.bias"]
    found |= {f"gradient of {name}": layers.stacked(name).grad for name in parts}
    found |= {name: layers.stacked(name) for name in layers.names() if "running" in name}
    found["h_L in evaluation"] = to_rows(layers.eval()(x).detach())
    return found


def compute_stacked(layers: StackedLayers, h: torch.Tensor, above: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the same for all networks of a stack, under the same names. The first axis is the run."""
    found = {"h_L": layers.forward(h), "dl/dh_0": layers.backward(above)}
    gradients = layers.gradients | layers.weight_gradients()
    found |= {f"gradient of {name}": tensor for name, tensor in gradients.items()}
    found |= layers.running
    found["h_L in evaluation"] = layers.forward(h, training=False)
    return found


def draw_inputs(runs: int, n: int, device=CPU) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(runs, n, 100, 16, generator=generator).to(device) for _ in range(2))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("n", [BLOCKS * IMAGES, BLOCKS])  # a whole batch, and one image a block
def test_forward_and_backward_agree_with_float64_autograd(kernels, n):
    nets = make_networks("gelu", "relu", "identity")
    h, above = draw_inputs(3, n)
    found = compute_stacked(StackedLayers(nets, kernels, CPU), h, above)
    for run, network in enumerate(nets):
        for name, tensor in compute_exactly(network, h[run], above[run]).items():
            assert compute_relative_error(found[name][run], tensor) < 3e-6, (run, name)
    assert not found["gradient of conv1.bias"].any()


@needs_compiler
@pytest.mark.parametrize("size", [1e-15, 1e6])
def test_small_and_large_gradients_keep_their_digits(kernels, size):
    """Half precision reaches from 6e-8 to 65504; the kernels choose a power of two for each layer."""
    (network,) = make_networks("gelu")
    h, above = draw_inputs(1, BLOCKS)
    found = compute_stacked(StackedLayers([network], kernels, CPU), h, above * size)
    expected = compute_exactly(network, h[0], above[0].double() * size)
    for name in ("dl/dh_0", "gradient of conv1.weight", "gradient of conv2.weight"):
        assert compute_relative_error(found[name][0], expected[name]) < 3e-6, name


@pytest.mark.slow
@needs_compiler
def test_a_run_does_not_depend_on_the_others_of_its_stack(kernels):
    nets = make_networks("gelu", "relu")
    h, above = draw_inputs(2, BLOCKS)
    together = compute_stacked(StackedLayers(nets, kernels, CPU), h, above)
    alone = compute_stacked(StackedLayers(nets[1:], kernels, CPU), h[1:], above[1:])
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], together[name][1]), name


@pytest.mark.slow
@needs_compiler
def test_a_step_is_that_of_torch_sgd(kernels):
    (network,) = make_networks("gelu")
    layers = StackedLayers([network], kernels, CPU)
    h, above = draw_inputs(1, BLOCKS)
    names = list(layers.parameters)
    expected = [layers.parameters[name].clone().requires_grad_() for name in names]
    optimizer = torch.optim.SGD(expected, lr=0.3, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    momenta = {name: torch.zeros_like(tensor) for name, tensor in layers.parameters.items()}
    for _ in range(2):  # the second step has momentum, and weights that the first step prepared for the kernels
        layers.forward(h)
        layers.backward(above)
        gradients = layers.gradients | layers.weight_gradients()
        for name, parameter in zip(names, expected, strict=True):
            parameter.grad = gradients[name].clone()
        optimizer.step()
        layers.update(momenta, torch.tensor(0.3))
    for name, parameter in zip(names, expected, strict=True):
        assert compute_relative_error(layers.parameters[name], parameter.detach().double()) < 1e-6, name
    prepared = layers.buffers["weight"].clone()
    layers.prepare()
    assert torch.equal(prepared, layers.buffers["weight"])


@needs_compiler
def test_sizes_are_those_of_the_source(kernels, library):
    forward, backward = stacked_layers.shared_bytes(BLOCKS)
    assert 0 <= forward - library.shared_bytes(0) < 16
    assert backward == library.shared_bytes(1)
    assert stacked_layers.kept_floats(BLOCKS) == library.kept_floats()


def test_a_block_fits_into_the_shared_memory_of_a_multiprocessor():
    for blocks in stack_module.BLOCKS_PER_RUN:
        assert stacked_layers.shared_bytes(blocks)[1] <= 227 * 1024


# ---- Whole networks ----

SHORT = {"depth": 2, "batch_size": BLOCKS * IMAGES, "train_images": 10, "test_images": 3, "epochs": 2, "test_every": 2}
SHALLOW = {**SHORT, "depth": 1}


def draw_sets(config: CifarConfig) -> list[dataset.Images]:
    generator = torch.Generator().manual_seed(3)
    return [
        dataset.Images(
            torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.randint(10, (n,), generator=generator),
        )
        for n in (config.train_images, config.test_images)
    ]


@pytest.mark.slow
@needs_compiler
def test_a_stack_trains_as_its_runs_alone(kernels):
    configs = [
        CifarConfig(activation=activation, initialisation=initialisation, seed=seed, **SHORT)
        for activation, initialisation, seed in (("gelu", "weight-tied", 0), ("relu", "iid", 1))
    ]
    train_set, test_set = draw_sets(configs[0])
    runs = [Training(config, CPU) for config in configs]
    stack = Stack(runs, train_set, test_set, CPU, kernels)
    values = stack.train_epoch(0), stack.evaluate(), stack.measure()
    stack.update_runs()
    for place, config in enumerate(configs):
        alone = Training(config, CPU)
        *_, progress = alone.train_epoch(train_set, 0)
        found = [values[0][0][place], values[0][1][place], values[1][0][place], values[1][1][place]]
        test = cifar_training.evaluate(alone.network, test_set)
        assert torch.tensor(found).tolist() == pytest.approx([progress.loss, progress.accuracy, *test], rel=1e-6)
        weights, scales = values[2][place]
        stacked_values, own_values = monitor.measure_smoothness(weights) | scales, monitor.measure(alone.network)
        assert stacked_values.keys() == own_values.keys()
        known = [name for name, value in own_values.items() if value is not None]  # noise needs more than two layers
        assert len(known) == 4
        assert [stacked_values[name] for name in known] == pytest.approx([own_values[name] for name in known], rel=1e-5)
        state = runs[place].network.state_dict()
        for name, tensor in alone.network.state_dict().items():
            assert torch.allclose(state[name].double(), tensor.double(), rtol=1e-4, atol=1e-6), name
        for one, other in zip(alone.network.parameters(), runs[place].network.parameters(), strict=True):
            momenta = [run.optimizer.state[p]["momentum_buffer"] for run, p in ((alone, one), (runs[place], other))]
            assert torch.allclose(*momenta, rtol=1e-3, atol=1e-6)


class ByAutograd:
    """`StackedLayers` by autograd, in the precision of the networks."""

    def __init__(self, networks, kernels, device) -> None:
        self.layers = [copy.deepcopy(network.residual_layers) for network in networks]
        first = self.layers[0]
        self.parameters = self._share(name for name in first.names() if name.endswith((".weight", ".bias")))
        self.running = self._share(name for name in first.names() if "running" in name)

    def _share(self, names) -> dict[str, torch.Tensor]:
        """Tensors of all networks, the runs first. From now on the networks' own tensors are views of them."""
        found = {name: torch.stack([layers.stacked(name).detach() for layers in self.layers]) for name in names}
        for name, tensor in found.items():
            for layers, own in zip(self.layers, tensor, strict=True):
                layers.stacked(name).data = own
        return found

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.given = [to_images(own).requires_grad_() for own in h]
        self.found = [layers(own) for layers, own in zip(self.layers, self.given, strict=True)]
        return torch.stack([to_rows(h_L.detach()) for h_L in self.found])

    def backward(self, above: torch.Tensor) -> torch.Tensor:
        gradients = []
        for layers, given, h_L, own in zip(self.layers, self.given, self.found, above, strict=True):
            wanted = [given, *(layers.stacked(name) for name in self.parameters)]
            gradients.append(torch.autograd.grad(h_L, wanted, to_images(own)))
        below, *self.gradients = (torch.stack(of) for of in zip(*gradients, strict=True))
        return torch.stack([to_rows(own) for own in below])

    def update(self, momenta: dict[str, torch.Tensor], rate: torch.Tensor) -> None:
        names = list(self.parameters)
        parameters, momenta = ([of[name] for name in names] for of in (self.parameters, momenta))
        stacked_layers.descend(parameters, momenta, self.gradients, rate)


class StepByStep(Stack):
    """A stack that keeps the loss of every step, and computes in the precision of its runs."""

    def images(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = super().images(size)
        return pixels.to(self.ends["conv1.weight"].dtype), labels

    def step(self, size: int) -> None:
        before = self._loss.clone()
        super().step(size)
        self.losses = [*getattr(self, "losses", []), (self._loss - before) / size]


@pytest.mark.slow
def test_the_first_hundred_losses_of_a_stack_are_those_of_its_runs_alone(monkeypatch):
    """In float64, since in float32 rounding soon turns the sign of a value before a ReLU, and then the runs differ."""
    monkeypatch.setattr(stack_module, "StackedLayers", ByAutograd)
    monkeypatch.setattr(stacked_layers, "BATCH", 8)
    setting = {
        "depth": 2,
        "batch_size": 8,
        "train_images": 800,
        "test_images": 1,
        "epochs": 1,
        "learning_rate": 1 / 32,
    }
    configs = [
        CifarConfig(activation=activation, initialisation=initialisation, seed=seed, **setting)
        for activation, initialisation, seed in (("gelu", "weight-tied", 0), ("relu", "iid", 1))
    ]
    train_set, test_set = draw_sets(configs[0])
    runs = [Training(config, CPU, torch.float64) for config in configs]
    stack = StepByStep(runs, train_set, test_set, CPU, SimpleNamespace(blocks=BLOCKS))
    stack.train_epoch(0)
    for place, config in enumerate(configs):
        alone = [line["loss"] for line in monitor.watch(Training(config, CPU, torch.float64), train_set)]
        assert len(alone) == 100
        assert max(alone) - min(alone) > 0.1
        assert [loss[place].item() for loss in stack.losses] == pytest.approx(alone, abs=1e-9)


@pytest.mark.slow
@needs_compiler
def test_a_run_in_a_stack_is_the_run_in_a_stack_of_its_own_to_the_bit(kernels):
    configs = [CifarConfig(activation=name, seed=seed, **SHALLOW) for seed, name in enumerate(("gelu", "relu"))]
    train_set, test_set = draw_sets(configs[0])

    def train_stack(*configs):
        runs = [Training(config, CPU) for config in configs]
        stack = Stack(runs, train_set, test_set, CPU, kernels)
        losses = stack.train_epoch(0)[0]
        stack.update_runs()
        return losses, runs

    losses, runs = train_stack(*configs)
    for place, config in enumerate(configs):
        loss, (own,) = train_stack(config)
        assert loss[0] == losses[place]
        for name, tensor in own.network.state_dict().items():
            assert torch.equal(runs[place].network.state_dict()[name], tensor), name


@pytest.mark.slow
@needs_compiler
def test_a_stacked_run_is_saved_and_continued(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    config = CifarConfig(**SHALLOW)
    train_set, test_set = draw_sets(config)
    monkeypatch.setattr(dataset, "load", lambda train, *_: train_set if train else test_set)
    whole = list(stacked_training.train([config], device="cpu", kernels=kernels))
    folder = states.run_folder(config)
    finished = states.read_state(folder)
    assert [written[0].epoch for written in whole] == [0, 1]
    assert whole[0][0].test_accuracy is None
    assert whole[1][0].test_accuracy is not None
    assert whole[1][0].engine == "stacked (1 runs)"
    assert list(stacked_training.train([config], device="cpu", kernels=kernels)) == []  # it is finished

    (folder / states.STATE_FILE).unlink()
    first = list(stacked_training.train([config], device="cpu", kernels=kernels, minutes=0.0))
    assert len(first) == 1
    assert states.read_state(folder)["epoch"] == 1
    list(stacked_training.train([config], device="cpu", kernels=kernels))
    again = states.read_state(folder)
    for name, tensor in finished["network"].items():
        assert torch.equal(tensor, again["network"][name]), name


@pytest.mark.slow
@needs_compiler
def test_a_diverged_run_leaves_the_others_alone(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    configs = [CifarConfig(activation=activation, **{**SHALLOW, "epochs": 1}) for activation in ("gelu", "relu")]
    train_set, test_set = draw_sets(configs[0])
    monkeypatch.setattr(dataset, "load", lambda train, *_: train_set if train else test_set)
    initialise = Training.__init__

    def initialise_broken(self, config, device):
        initialise(self, config, device)
        if config.activation == "relu":
            self.network.linear.bias.data[0] = float("nan")

    monkeypatch.setattr(Training, "__init__", initialise_broken)
    training = stacked_training.train(configs, device="cpu", kernels=kernels)
    assert len(next(training)) == 1
    with pytest.raises(stacked_training.Divergence, match=r"diverged: relu_\S* \(.* in epoch 1\)\. Try a smaller"):
        next(training)
    assert states.read_state(states.run_folder(configs[0]))["epoch"] == 1
    assert states.read_state(states.run_folder(configs[1])) is None


@needs_compiler
def test_a_stack_ends_when_no_run_is_left(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    config = CifarConfig(**{**SHALLOW, "epochs": 5, "learning_rate": 1e30})
    train_set, test_set = draw_sets(config)
    monkeypatch.setattr(dataset, "load", lambda train, *_: train_set if train else test_set)
    yielded = []
    with pytest.raises(stacked_training.Divergence, match=r"diverged: gelu_\S* \(.* in epoch [12]\)\."):
        yielded.extend(stacked_training.train([config], device="cpu", kernels=kernels))
    assert all(yielded)  # no epoch without a run


@pytest.mark.slow
@needs_compiler
def test_a_stacked_run_that_is_not_finite_is_not_saved(kernels, tmp_path, monkeypatch):
    """The losses of the epoch are finite. The weights after it, or the test loss, are not."""
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    configs = [CifarConfig(activation=name, **{**SHALLOW, "epochs": 1}) for name in ("gelu", "relu", "identity")]
    train_set, test_set = draw_sets(configs[0])
    monkeypatch.setattr(dataset, "load", lambda train, *_: train_set if train else test_set)
    evaluate = Stack.evaluate

    def evaluate_broken(self):
        loss, accuracy = evaluate(self)
        self.layers.parameters["conv1.bias"][1, 0, 0] = float("inf")
        loss[2] = float("nan")
        return loss, accuracy

    monkeypatch.setattr(Stack, "evaluate", evaluate_broken)
    training = stacked_training.train(configs, device="cpu", kernels=kernels)
    assert len(next(training)) == 1
    found = r"relu_\S* \(residual_layers.conv1_bias holds inf in epoch 1\), identity_\S* \(the test loss is nan in"
    with pytest.raises(Divergence, match=found):
        next(training)
    assert [states.read_state(states.run_folder(config)) is None for config in configs] == [
        False, True, True,
    ]  # fmt: skip


# ---- Errors and the command line ----


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"depth": 3}, "differ in activation, initialisation and seed alone"),
        ({"epochs": 30}, "differ in activation, initialisation and seed alone"),
        ({"activation": "tanh"}, "one of the activations gelu, relu, identity"),
        ({"hold_stem": True}, "differ in activation, initialisation and seed alone"),
        ({"batch_norm": False}, "differ in activation, initialisation and seed alone"),
    ],
)
def test_runs_that_cannot_be_stacked_are_named(other, words):
    config = CifarConfig()
    changed = replace(config, **other)
    with pytest.raises(ValueError, match=f"{changed.name}.*{words}"):
        next(stacked_training.train([config, changed], device="cpu", kernels=object()))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CifarConfig(batch_norm=False), "stacking needs batch norm, .*one of the activations"),
        (CifarConfig(hold_stem=True), "stacking needs batch norm, hold_stem .*one of the activations"),
        (CifarConfig(stem_activation="gelu"), "stacking needs .*a ReLU in the stem"),
        (CifarConfig(channels=8), "it has 8 channels and batches of 64, expected 16 and 64"),
        (CifarConfig(batch_size=32), "it has 16 channels and batches of 32, expected 16 and 64"),
    ],
)
def test_a_network_that_the_kernels_do_not_know_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        next(stacked_training.train([config], device="cpu", kernels=object()))


def test_a_last_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="1001 training images leave 41 for the last batch, expected a multiple of 8"):
        stack_module._check_batches(1001, 8)
    for blocks in stack_module.BLOCKS_PER_RUN:
        stack_module._check_batches(dataset.TRAIN_IMAGES, blocks)


def test_without_cuda_a_sentence_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stacked_training.main(["--epochs", "7"]) == 2
    said = "Stacked runs need CUDA, but PyTorch sees no CUDA device here: train one run with make train.\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert stacked_training.main(["--epochs", "7", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "device is 'cpu', but stacked runs need CUDA: train one run with make train.\n"


def test_the_command_takes_runs_by_name_or_the_pending_ones(capsys):
    assert stacked_training.main(["nonsense"]) == 2
    assert (
        capsys.readouterr().err
        == "checkpoints/sweep.csv lists no run nonsense: check the name, or add a line for it.\n"
    )
    assert stacked_training.main(["--most", "0"]) == 2
    assert capsys.readouterr().err.startswith("most is 0, expected")
    name = "gelu_iid_bn_depth256_lr0.04_epochs7_seed0"
    assert [config.name for config in stacked_training._pending([name, name], 7)] == [name]
    pending = stacked_training._pending([], 7)
    assert {config.seed for config in pending} == {0, 1, 2, 3, 4}
    assert all(config.batch_norm and config.epochs == 7 for config in pending)
    assert stacked_training.main(["gelu_iid_bn_depth256_lr0.04_epochs180_seed0"]) == 0
    assert capsys.readouterr().out == "All of these runs are finished.\n"


@pytest.mark.slow
def test_training_needs_none_of_the_notebooks_packages():
    """A machine with a GPU often has PyTorch without Jupyter."""
    hidden = ("papermill", "nbformat", "nbclient", "nbconvert", "ipywidgets", "IPython", "matplotlib")
    code = f"import sys; sys.modules |= dict.fromkeys({hidden}); import lib.cifar.stacked.training"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_compiler
def test_the_command_trains_and_publishes_stack_after_stack(kernels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    columns = {"depth": 1, "batch_size": BLOCKS * IMAGES, "epochs": 1}
    runs = [f"{activation},{','.join(map(str, columns.values()))}" for activation in ("gelu", "relu", "tanh")]
    (tmp_path / "checkpoints" / records.SWEEP).write_text("\n".join([f"activation,{','.join(columns)}", *runs]) + "\n")
    train_set, test_set = draw_sets(CifarConfig(**SHALLOW))
    monkeypatch.setattr(dataset, "load", lambda train, *_: train_set if train else test_set)
    train = stacked_training.train

    def train_on_cpu(configs, **given):
        return train(configs, **{**given, "device": "cpu"}, kernels=kernels)

    monkeypatch.setattr(stacked_training, "train", train_on_cpu)
    assert stacked_training.main(["--most", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("A stack of 1 runs: ") == 2
    assert said.count("epoch 1 of 1, ") == 2
    finished = [run.config.activation for run in records.read_runs(tmp_path / "checkpoints")]
    assert finished == ["gelu", "relu"]  # the kernels do not have tanh
    assert all(run.has_weights for run in records.read_runs(tmp_path / "checkpoints"))


def test_runs_of_a_stack_have_the_same_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    configs = [CifarConfig(depth=2, seed=seed) for seed in range(4)] + [CifarConfig(depth=3)]
    for config in configs[1:3]:
        run = Training(config, CPU)
        run.epoch = 5
        states.run_folder(config).mkdir(parents=True)
        run.save(states.run_folder(config))
    stacks = [[(config.depth, config.seed) for config in stack] for stack in stacked_training._stacks(configs, 15)]
    assert stacks == [[(2, 0), (2, 3)], [(2, 1), (2, 2)], [(3, 0)]]
    assert [len(stack) for stack in stacked_training._stacks(configs, 1)] == [1] * 5


def test_a_run_that_diverges_leaves_the_other_stacks_alone(tmp_path, monkeypatch, capsys):
    trained = []

    def diverge_once(configs, **options):
        trained.append([config.seed for config in configs])
        if len(trained) == 1:
            raise Divergence("The loss was not finite.")
        yield []

    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(stacked_training, "train", diverge_once)
    assert stacked_training.main(["--epochs", "7", "--most", "20"]) == 1
    assert len(trained) == 2
    assert capsys.readouterr().err == "The loss was not finite.\n"


def test_few_runs_have_more_blocks_each():
    assert [stack_module.blocks_per_run(runs, 132) for runs in (1, 7, 8, 15, 40)] == [16, 16, 8, 8, 8]


# ---- On a GPU ----


@needs_cuda
@pytest.mark.parametrize("blocks", stack_module.BLOCKS_PER_RUN)
def test_the_kernels_on_a_gpu_agree_with_float64_autograd(blocks):
    device = torch.device("cuda")
    nets = make_networks("gelu", "relu", "identity", depth=16)
    h, above = draw_inputs(3, 64, device)
    layers = StackedLayers(nets, stacked_layers.Kernels(blocks, device), device)
    found = compute_stacked(layers, h, above)
    for run, network in enumerate(nets):
        for name, tensor in compute_exactly(network, h[run].cpu(), above[run].cpu()).items():
            assert compute_relative_error(found[name][run], tensor) < 1e-5, (run, name)
    assert torch.equal(layers.backward(above), found["dl/dh_0"])


@needs_cuda
def test_a_stack_on_a_gpu_starts_as_its_runs_alone():
    """Two ways of computing a run agree to rounding, until rounding turns the sign of a value before a ReLU."""
    config = CifarConfig(depth=16, train_images=640, test_images=64, epochs=1)
    device = torch.device("cuda")
    train_set, test_set = (dataset.Images(one.pixels.cuda(), one.labels.cuda()) for one in draw_sets(config))
    run, alone = Training(config, CPU), Training(config, device)
    loss, _ = Stack([run], train_set, test_set, device).train_epoch(0)
    *_, progress = alone.train_epoch(train_set, 0)
    assert float(loss[0]) == pytest.approx(progress.loss, abs=1e-4)
