import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib import checkpoints, cifar_training
from lib.checkpoints import Checkpoint, CheckpointError
from lib.cifar_training import CifarConfig
from lib.convnet import ConvResNet

CONFIG = CifarConfig(depth=3, activation="relu", smooth_init=False, seed=4, epochs=2)
SUMMARY = {"epochs": 2, "test_accuracy": 51.25, "von_neumann_conv1": None}


def perturbed(config: CifarConfig) -> ConvResNet:
    network = ConvResNet(config.network).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
            else:
                tensor += 17
    return network


@pytest.fixture
def path(tmp_path):
    checkpoint = Checkpoint(CONFIG, perturbed(CONFIG), SUMMARY, cifar_training.versions())
    return checkpoints.save(tmp_path / "network.safetensors", checkpoint)


def rewrite(path, change, metadata=None):
    """The file with changed tensors or header."""
    with checkpoints.safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_network_is_rebuilt_from_its_file_alone(tmp_path, batch_norm):
    config = CifarConfig(depth=3, batch_norm=batch_norm)
    network = perturbed(config)
    written = checkpoints.save(tmp_path / "a.safetensors", Checkpoint(config, network, SUMMARY, {"torch": "2"}))
    read = checkpoints.load(written)
    assert read.config == config
    assert read.summary == SUMMARY
    assert read.versions == {"torch": "2"}
    assert read.origin == "trained here"
    assert not read.network.training
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(read.network(images), network(images))
    assert checkpoints.read_header(written) == (config, SUMMARY)


def test_header_is_json_and_names_are_the_released_ones(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["config"])["learning_rate"] == 0.04
    assert set(json.loads(metadata["versions"])) == {"python", "torch", "torchvision"}
    assert set(header) == set(ConvResNet(CONFIG.network).state_dict())
    assert header["residual_layers.2.conv1.weight"]["shape"] == [16, 16, 3, 3]


def test_truncated_and_foreign_files_get_sentences(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*nothing.safetensors: train it"):
        checkpoints.load(tmp_path / "nothing.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:100], b"", b"PK\x03\x04 a zip file, as torch.save writes"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"network.safetensors is not a whole safetensors file"):
            checkpoints.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="header has format None, expected 'convolutional residual network'"):
        checkpoints.load(path)


def test_other_versions_and_configurations_get_sentences(path):
    rewrite(path, lambda tensors, header: header.update(format_version="7"))
    with pytest.raises(CheckpointError, match="has format version '7', expected 1"):
        checkpoints.load(path)
    rewrite(path, lambda tensors, header: header.update(format_version="1", config='{"depth": 0}'))
    with pytest.raises(CheckpointError, match="configuration that cannot be read: depth is 0"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.update({"residual_layers.1.conv2.weight": torch.zeros(16, 8, 3, 3)}),
            r"network.safetensors: the tensor residual_layers.1.conv2.weight has shape \(16, 8, 3, 3\), "
            r"expected \(16, 16, 3, 3\)",
        ),
        (
            lambda tensors: tensors.pop("residual_layers.2.bn1.running_var"),
            r"lacks the tensor residual_layers.2.bn1.running_var, expected with shape \(16,\)",
        ),
        (
            lambda tensors: tensors.update({"residual_layers.3.conv1.bias": torch.zeros(16)}),
            r"holds a tensor residual_layers.3.conv1.bias of shape \(16,\) that its network does not have",
        ),
        (
            lambda tensors: tensors.update({"linear.bias": torch.zeros(10, dtype=torch.float64)}),
            "the tensor linear.bias has type torch.float64, expected torch.float32",
        ),
    ],
)
def test_wrong_tensors_are_named_with_both_shapes(path, change, sentence):
    rewrite(path, lambda tensors, header: change(tensors))
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.load(path)


# ------------------------------------------------------------------------------------- the released format

NAME = "ckpt_lr_4e-02_depth_3_seed_2_use_bn_True_smooth_init_False_adaptive_False_non_lin_{}.pth"


def released(folder, content=None, activation="linear"):
    network = perturbed(CONFIG)
    log = {"test_loss": [2.0], "train_loss": [2.2, 2.1], "test_acc": [30.0], "train_acc": [20.0, 25.0]}
    path = folder / NAME.format(activation)
    torch.save(content or {"net": network.state_dict(), "acc": 30.0, "epoch": 1, "log_dict": log}, path)
    return path, network


def test_released_files_are_converted(tmp_path, capsys):
    source, network = released(tmp_path)
    assert checkpoints.main(["convert", str(source)]) == 0
    read = checkpoints.load(source.with_suffix(".safetensors"))
    assert read.config == CifarConfig(
        activation="identity", smooth_init=False, depth=3, learning_rate=0.04, seed=2, epochs=2
    )
    assert read.summary["test_accuracy"] == 30.0
    assert math.isclose(read.summary["von_neumann_conv1"], cifar_training.measured(network)["von_neumann_conv1"])
    assert read.origin == f"converted from {source.name}"
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in read.network.state_dict().items())
    assert "activation: identity" in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a pickle was run')",)


def test_pickled_code_is_not_run(tmp_path):
    source, _ = released(tmp_path, {"net": Malicious(), "log_dict": {}})
    with pytest.raises(CheckpointError, match="not a whole checkpoint of the released format"):
        checkpoints.convert_released(source)


def test_wrong_released_files_get_sentences(tmp_path, capsys):
    source, network = released(tmp_path)
    other = source.rename(tmp_path / "best.pth")
    assert checkpoints.main(["convert", str(other)]) == 1
    assert "best.pth does not name its run, expected a name such as ckpt_lr_4e-02" in capsys.readouterr().err
    state = network.state_dict() | {"linear.weight": torch.zeros(10, 16)}
    log = {"test_loss": [2.0], "train_loss": [2.2], "test_acc": [30.0], "train_acc": [20.0]}
    source, _ = released(tmp_path, {"net": state, "acc": 1.0, "epoch": 0, "log_dict": log}, "relu")
    sentence = r"relu.pth: the tensor linear.weight has shape \(10, 16\), expected \(10, 64\)"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.convert_released(source)
    assert not list(tmp_path.glob("*.safetensors"))
