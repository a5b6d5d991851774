import argparse
import json
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.cifar import checkpoints, monitor, training
from lib.cifar.checkpoints import Checkpoint, CheckpointError
from lib.cifar.config import CifarConfig
from lib.cifar.network import ConvResNet

CONFIG = CifarConfig(depth=3, activation="relu", initialisation="iid", seed=4, epochs=2)
SUMMARY = {"epochs": 2, "test_accuracy": 51.25, "von_neumann_conv1": None}


def make_perturbed(config: CifarConfig) -> ConvResNet:
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
    checkpoint = Checkpoint(CONFIG, make_perturbed(CONFIG), SUMMARY, training.versions())
    return checkpoints.save(tmp_path / "network.safetensors", checkpoint)


def rewrite(path, change):
    """Write the file again with changed tensors or header."""
    with checkpoints.safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_network_is_rebuilt_from_its_file_alone(tmp_path, batch_norm):
    config = CifarConfig(depth=3, batch_norm=batch_norm)
    network = make_perturbed(config)
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
        with pytest.raises(CheckpointError, match=r"network.safetensors is not a complete safetensors file"):
            checkpoints.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="header has format None, expected 'convolutional residual network'"):
        checkpoints.load(path)


def test_headers_with_the_older_name_of_initialisation_are_read(path):
    def make_older(tensors, header):
        config = json.loads(header["config"])
        config["smooth_init"] = config.pop("initialisation") == "weight-tied"
        header["config"] = json.dumps(config)

    rewrite(path, make_older)
    assert b"initialisation" not in path.read_bytes()
    read, expected = checkpoints.load(path), make_perturbed(CONFIG).state_dict()
    assert read.config == CONFIG
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.network.state_dict().items())


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


def test_a_header_that_lacks_something_gets_a_sentence(path):
    rewrite(path, lambda tensors, header: header.pop("summary"))
    for read in (checkpoints.load, checkpoints.read_header):
        with pytest.raises(CheckpointError, match=r"network.safetensors lacks summary in its header"):
            read(path)


def test_a_file_that_the_system_cannot_read_is_not_called_damaged(path, monkeypatch):
    stale = OSError(116, "Stale file handle")
    monkeypatch.setattr(checkpoints, "safe_open", lambda *_, **__: (_ for _ in ()).throw(stale))
    with pytest.raises(OSError, match="Stale file handle") as found:
        checkpoints.load(path)
    assert found.value is stale


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    network = make_perturbed(CONFIG)
    network.linear.bias.data[3] = math.nan
    with pytest.raises(CheckpointError, match=r"a.safetensors is not written, since linear.bias holds nan"):
        checkpoints.save(tmp_path / "a.safetensors", Checkpoint(CONFIG, network, SUMMARY, {}))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- the released format

NAME = "ckpt_lr_4e-02_depth_3_seed_2_use_bn_True_smooth_init_False_adaptive_False_non_lin_{}.pth"
LOG = {"test_loss": [2.0], "train_loss": [2.2, 2.1], "test_acc": [30.0], "train_acc": [20.0, 25.0]}


def write_released(folder, change=lambda content: content, activation="linear", **options):
    """Write a file as the released script does, apart from the change, and return its path and network."""
    network = make_perturbed(CONFIG)
    path = folder / NAME.format(activation)
    content = {"net": network.state_dict(), "acc": 30.0, "epoch": 1, "log_dict": dict(LOG)}
    torch.save(change(content), path, **options)
    return path, network


def rename_tensors(change):
    """A function that changes the names in a state dict."""
    return lambda content: content | {"net": {change(name): tensor for name, tensor in content["net"].items()}}


def convert_to(dtype):
    """A function that changes the precision of a state dict."""
    converted = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor  # noqa: E731
    return lambda content: content | {"net": {name: converted(tensor) for name, tensor in content["net"].items()}}


def test_released_files_are_converted(tmp_path, capsys):
    source, network = write_released(tmp_path)
    assert checkpoints.main(["convert", str(source)]) == 0
    read = checkpoints.load(source.with_suffix(".safetensors"))
    assert read.config == CifarConfig(
        activation="identity", initialisation="iid", depth=3, learning_rate=0.04, seed=2, epochs=2
    )
    assert read.summary["test_accuracy"] == 30.0
    assert math.isclose(read.summary["von_neumann_conv1"], monitor.measure(network)["von_neumann_conv1"])
    assert read.origin == f"converted from {source.name}"
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in read.network.state_dict().items())
    assert "activation: identity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        rename_tensors(lambda name: f"module.{name}"),
        rename_tensors(lambda name: f"_orig_mod.module.{name}"),
        lambda content: {"state_dict" if name == "net" else name: value for name, value in content.items()},
        lambda content: content | {"optimizer": {"lr": 0.1}, "net": content["net"] | {"total_ops": torch.zeros(1)}},
        convert_to(torch.float64),
        lambda content: content | {"net": {name: tensor.double() for name, tensor in content["net"].items()}},
        lambda content: content | {"net": {name: tensor.numpy() for name, tensor in content["net"].items()}},
        lambda content: content | {"args": argparse.Namespace(lr=0.04), "epoch": np.int64(1)},
        lambda content: content | {"log_dict": {name: list(np.array(values)) for name, values in LOG.items()}},
        lambda content: content | {"log_dict": {name: np.array(values, "f4") for name, values in LOG.items()}},
        lambda content: content | {"log_dict": {name: torch.tensor(values) for name, values in LOG.items()}},
        lambda content: (
            content | {"acc": np.float64(30), "log_dict": {n: [*map(torch.tensor, v)] for n, v in LOG.items()}}
        ),
    ],
)
def test_files_of_other_scripts_are_converted(tmp_path, change):
    source, network = write_released(tmp_path, change)
    read = checkpoints.load(checkpoints.convert_released(source))
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in read.network.state_dict().items())
    assert read.config.epochs == 2
    assert (read.summary["train_accuracy"], read.summary["test_accuracy_best"]) == (25.0, 30.0)


def test_half_precision_and_missing_counters_are_filled_up(tmp_path):
    halved = convert_to(torch.float16)

    def change(content):
        tensors = halved(content)["net"]
        return content | {"net": {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}}

    source, network = write_released(tmp_path, change)
    read = checkpoints.load(checkpoints.convert_released(source)).network.state_dict()
    assert torch.equal(read["linear.weight"], network.state_dict()["linear.weight"].half().float())
    assert read["bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content["net"], {"train_accuracy": None, "test_loss": None}),
        (lambda content: content | {"log_dict": {}}, {"train_accuracy": None}),
        (lambda content: content | {"log_dict": {key: [] for key in LOG}}, {"test_accuracy_best": None}),
        (
            lambda content: content | {"log_dict": {"test_acc": [30.0, 20.0]}},
            {"test_accuracy": 20.0, "test_loss": None},
        ),
        (lambda content: content | {"log_dict": "none"}, {"train_loss": None}),
    ],
)
def test_values_that_a_log_lacks_are_unknown_and_its_epochs_are_asked_for(tmp_path, change, expected):
    source, _ = write_released(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"linear.pth holds no log that tells how many epochs .* with --epochs"):
        checkpoints.convert_released(source)
    config, summary = checkpoints.read_header(checkpoints.convert_released(source, epochs=60))
    assert config.epochs == 60
    assert {name: summary[name] for name in expected} == expected


def test_renamed_files_are_converted_with_their_first_name(tmp_path, capsys):
    source, _ = write_released(tmp_path)
    copy = source.rename(tmp_path / f"{source.stem} (1).pt")
    assert checkpoints.read_header(checkpoints.convert_released(copy))[0].activation == "identity"
    other = copy.rename(tmp_path / "best.pth")
    assert checkpoints.main(["convert", str(other)]) == 1
    assert "best.pth does not name its run, expected a name such as ckpt_lr_4e-02" in capsys.readouterr().err
    assert checkpoints.main(["convert", str(other), "--name", source.name]) == 0
    assert checkpoints.read_header(other.with_suffix(".safetensors"))[0].seed == 2


def test_a_target_that_is_there_is_kept(tmp_path, capsys):
    source, _ = write_released(tmp_path)
    target = source.with_suffix(".safetensors")
    target.write_text("years of work")
    assert checkpoints.main(["convert", str(source)]) == 1
    assert f"{target} exists already: name another target, or replace it with --overwrite." in capsys.readouterr().err
    assert target.read_text() == "years of work"
    assert checkpoints.main(["convert", str(source), "--overwrite"]) == 0
    assert checkpoints.load(target).config.depth == 3


def test_a_schedule_of_no_epochs_is_refused(tmp_path, capsys):
    source, _ = write_released(tmp_path)
    assert checkpoints.main(["convert", str(source), "--epochs", "0"]) == 1
    assert "epochs is 0, expected a whole number of at least 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a pickle was run')",)


def test_pickled_code_is_not_run(tmp_path):
    for zipped in (True, False):
        source, _ = write_released(tmp_path, lambda _: {"net": Malicious()}, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"linear.pth is not a complete file of tensors and numbers") as error:
            checkpoints.convert_released(source)
        assert "weights_only" not in str(error.value)
        if zipped:
            assert "it holds objects of builtins.exec, which could run code: save only the network" in str(error.value)


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_wrong_released_files_get_sentences(tmp_path, capsys):
    for change, sentence in (
        (lambda c: c | {"net": c["net"] | {"linear.weight": torch.zeros(10, 16)}},
         r"the tensor linear.weight has shape \(10, 16\), expected \(10, 64\)"),
        (rename_tensors(lambda name: f"layers.{name}"),
         r"lacks the tensor conv1.weight.* \(it holds layers.conv1.weight\)"),
        (rename_tensors(lambda name: name.replace("layers.2", "layers.7")),
         r"lacks the tensor residual_layers.2.conv1.weight.* \(it holds residual_layers.7.conv1.weight\)"),
        (lambda c: c | {"net": {name: t for name, t in c["net"].items() if "layers.2" not in name}},
         r"holds 2 residual layers \(up to residual_layers.1\), expected 3 by its name: .*depth_2_"),
        (lambda c: c | {"net": c["net"] | {"conv1.bias": torch.zeros(16)}},
         r"holds a tensor conv1.bias of shape \(16,\) that its network does not have"),
        (lambda c: c | {"net": c["net"] | {"linear.bias": torch.full((10,), math.nan)}},
         r"is not a trained network, since linear.bias holds nan"),
        (lambda c: c | {"net": c["net"] | {"module.linear.bias": torch.zeros(10)}}, "holds linear.bias twice"),
        (lambda c: c | {"net": {}}, "holds nothing in net, expected the tensors"),
        (lambda c: c | {"net": c["net"] | {"linear.bias": np.array(["a"])}}, "holds linear.bias, a ndarray in net"),
        (lambda c: c | {"net": c["net"] | {"linear.bias": np.datetime64("2024-02-29")}}, "a datetime64 in net"),
        (lambda c: c | {"net": c["net"] | {"linear.bias": torch.ones(10).to_sparse()}}, "linear.bias, a sparse tensor"),
        (lambda c: c | {"net": c["net"] | {"linear.bias": torch.ones(10, device="meta")}}, "a tensor without numbers"),
        (lambda c: c["log_dict"], "holds test_loss, a list, expected the tensors of a state dict"),
        (lambda c: torch.zeros(3), "holds a Tensor, expected a dict with the entries net and log_dict"),
    ):  # fmt: skip
        source, _ = write_released(tmp_path, change, "relu")
        with pytest.raises(CheckpointError, match=sentence) as error:
            checkpoints.convert_released(source)
        assert str(error.value).startswith(str(source))
        assert "\n" not in str(error.value)
    for command in ("convert", "show"):
        assert checkpoints.main([command, str(tmp_path)]) == 1
        assert str(tmp_path) in capsys.readouterr().err
    whole = source.read_bytes()
    for content in (whole[:200], b"", b"no checkpoint"):
        source.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"relu.pth is not a complete file .*: it was cut off or is of another"
        ):
            checkpoints.convert_released(source)
    for old, new, sentence in (
        ("depth_3", "depth_0", "cannot be converted: depth is 0"),
        ("relu", "swish", "cannot be converted: activation is 'swish'"),
        ("4e-02", "fast", "names the learning rate 'fast', expected a number"),
    ):
        write_released(tmp_path, activation="relu")
        with pytest.raises(CheckpointError, match=sentence):
            checkpoints.convert_released(source, name=source.name.replace(old, new))
    assert not list(tmp_path.glob("*.safetensors"))
