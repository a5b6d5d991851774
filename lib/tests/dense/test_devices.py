"""No operation mixes devices: fake tensors follow shapes and devices through the code, with or without a GPU.

PyTorch's fake tensors hold no numbers, so these tests show no result. If there is a GPU, the tests of training, of the
limit and of CIFAR-10 compare its numbers with the CPU's.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lib.cifar import dataset
from lib.cifar.network import ConvNetConfig, ConvResNet
from lib.dense.adjoint import Adjoint
from lib.dense.network import NetworkConfig, initialise


def move(module, device):
    """Move a module of fake tensors, which `Module.to` refuses."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    return module


@pytest.fixture(autouse=True)
def nothing_fake_stays():
    """Clear the cached tensors, which would be fake ones in later tests."""
    yield
    dataset._normalisation.cache_clear()


@pytest.mark.parametrize("ends", [False, True])
def test_the_adjoint_stays_on_its_device(ends):
    shape = {"hidden_dimension": 4, "train_ends": True} if ends else {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = NetworkConfig(depth=5, width=4, dimension=3, samples=6, **shape)
        weights, data = initialise(config)
        assert weights.V.device.type == "cpu"
        solver = Adjoint(config, weights.to("cuda"), data.to("cuda"))
        assert solver.forward().device.type == "cuda"
        solver.descend(0.1, clip=0.01)
        solver.forward()
        tensors = [*solver.gradients().items().values(), *solver.weights.items().values()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


@pytest.mark.parametrize("batch_norm", [True, False])
def test_images_and_network_stay_on_the_training_device(batch_norm):
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="cuda")
        images = dataset.Images(pixels, torch.zeros(64, dtype=torch.int64, device="cuda"))
        epoch = dataset.draw_epoch(64, torch.Generator().manual_seed(0), "cuda")
        network = move(ConvResNet(ConvNetConfig(depth=3, batch_norm=batch_norm)).train(), "cuda")
        batch, labels = dataset.batch(images, epoch, 0, 32)
        loss = F.cross_entropy(network(batch), labels)
    assert {tensor.device.type for tensor in (batch, labels, loss)} == {"cuda"}
    assert network.engine == "pytorch"


def test_a_tensor_on_another_device_is_found():
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = NetworkConfig(depth=5, width=4, dimension=3, samples=6)
        weights, data = initialise(config)
        with pytest.raises(RuntimeError, match="device"):
            Adjoint(config, weights.to("cuda"), data).forward()
