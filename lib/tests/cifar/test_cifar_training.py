import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_set import needs_cifar10, write_set
from safetensors.torch import save_file

from lib import checks, locks, paths
from lib.checks import Divergence
from lib.cifar import dataset, layer_log, monitor, schedule, states, training
from lib.cifar.config import CifarConfig
from lib.cifar.progress import EpochRecord, Progress, progress
from lib.cifar.states import LAYER_LOG_FILE, read_state
from lib.cifar.training import Training, train
from lib.measures import straight_line_ratio

SMALL = {"depth": 4, "epochs": 3, "batch_size": 32, "test_every": 2}


@pytest.fixture
def generated_set(tmp_path, monkeypatch):
    return write_set(tmp_path / "set", monkeypatch)


def finish(config: CifarConfig, folder: Path) -> list[EpochRecord]:
    return [record for record in train(config, folder) if isinstance(record, EpochRecord)]


def drop_seconds(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in log]


def assert_same_state(first: Path, second: Path) -> None:
    """Compare weights, running statistics, momenta, random state and log, bit by bit."""
    one, other = read_state(first), read_state(second)
    assert one["epoch"] == other["epoch"]
    assert all(torch.equal(one["network"][name], other["network"][name]) for name in one["network"])
    momenta, others = one["optimizer"]["state"], other["optimizer"]["state"]
    assert momenta.keys() == others.keys()
    assert all(torch.equal(momenta[i]["momentum_buffer"], others[i]["momentum_buffer"]) for i in momenta)
    assert torch.equal(one["generator"], other["generator"])
    assert drop_seconds(one["log"]) == drop_seconds(other["log"])


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_training_learns_and_logs(tmp_path):
    config = CifarConfig(**SMALL | {"epochs": 8})
    reports = list(train(config, tmp_path / "run", report_every=4))
    records = [report for report in reports if isinstance(report, EpochRecord)]
    assert [record.epoch for record in records] == list(range(8))
    assert records[-1].train_loss < 0.8 * records[0].train_loss
    assert records[-1].train_accuracy > 30
    assert [record.test_accuracy is not None for record in records] == [False, True] * 4
    assert records[0].von_neumann_conv1 is not None
    assert records[0].stem_scale == pytest.approx(1, abs=0.2)  # it starts at 1
    assert 0 < records[0].path_length < records[-1].path_length  # it starts at 0
    assert records[0].noise_conv1 is None  # four layers are too few to know it
    # 300 images in batches of 32: ten batches, reported after the fourth and the eighth.
    reported = [(report.epoch, report.batch) for report in reports if isinstance(report, Progress)]
    assert reported == [(epoch, batch) for epoch in range(8) for batch in (4, 8)]
    assert read_state(tmp_path / "run")["log"] == [vars(record) for record in records]
    assert list(train(config, tmp_path / "run")) == []  # a finished run is not redone


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
@pytest.mark.parametrize("options", [{}, {"batch_norm": False, "activation": "relu", "adaptive": True}])
def test_resumed_run_is_bit_identical(tmp_path, options):
    config = CifarConfig(**SMALL, **options)
    finish(config, tmp_path / "whole")
    for _ in range(2):  # stopped inside the second epoch, twice
        interrupted = train(config, tmp_path / "parts", report_every=1)
        for report in interrupted:
            if isinstance(report, Progress) and report.epoch == 1 and report.batch == 5:
                interrupted.close()
    assert read_state(tmp_path / "parts")["epoch"] == 1
    assert [record.epoch for record in finish(config, tmp_path / "parts")] == [1, 2]
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_the_layer_log_has_a_row_an_epoch_and_survives_interruptions(tmp_path):
    config = CifarConfig(**SMALL)
    finish(config, tmp_path / "whole")
    interrupted = train(config, tmp_path / "parts")
    next(interrupted)
    interrupted.close()
    finish(config, tmp_path / "parts")
    whole, parts = (layer_log.read(tmp_path / name / LAYER_LOG_FILE, config.name) for name in ("whole", "parts"))
    assert whole["epoch"].tolist() == [0, 1, 2]
    assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)
    kernels = torch.stack(
        [read_state(tmp_path / "whole")["network"][f"residual_layers.{k}.conv1.weight"] for k in range(config.depth)]
    ).double()
    norm, distance = kernels.flatten(1).norm(dim=1), (kernels[1:] - kernels[:-1]).flatten(1).norm(dim=1)
    second = (kernels[2:] - 2 * kernels[1:-1] + kernels[:-2]).flatten(1).norm(dim=1)
    for name, expected in (("norm", norm), ("distance", distance), ("second_difference", second)):
        torch.testing.assert_close(whole[f"{name}_conv1"][-1].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("generated_set")
def test_a_run_from_before_the_layer_log_goes_on_and_logs_the_epochs_that_follow(tmp_path):
    config = CifarConfig(**SMALL)
    interrupted = train(config, tmp_path)
    next(interrupted)
    interrupted.close()
    state = read_state(tmp_path)
    del state["layers"]
    torch.save(state, tmp_path / "state.pt")
    finish(config, tmp_path)
    assert layer_log.read(tmp_path / LAYER_LOG_FILE, config.name)["epoch"].tolist() == [1, 2]


def read_umask() -> int:
    os.umask(found := os.umask(0))
    return found


def read_safetensors_header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def test_a_layer_log_that_is_cut_or_of_another_run_is_refused_in_a_sentence(tmp_path):
    kernels = {"conv1": torch.randn(4, 2, 2, 3, 3), "conv2": torch.randn(4, 2, 2, 3, 3)}
    path = tmp_path / "log.layers.safetensors"
    layer_log.write(path, layer_log.extend({}, 0, kernels), "one")
    with pytest.raises(layer_log.LayerLogError, match='is the layer log of "one", expected that of other'):
        layer_log.read(path, "other")
    whole = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o666 & ~read_umask()
    for content in (whole[:-5], whole[:100], whole[:4], b"", b"no log at all"):
        path.write_bytes(content)
        with pytest.raises(
            layer_log.LayerLogError, match=r"layers.safetensors is not a complete layer log .*: move it aside"
        ):
            layer_log.read(path, "one")
        assert path.read_bytes() == content
    header = read_safetensors_header(whole)
    uneven = {name: torch.zeros(1 + (name == "epoch"), 4) for name in layer_log.NAMES}
    save_file(uneven, path, metadata=header)
    with pytest.raises(layer_log.LayerLogError, match=r"epoch \(2, 4\).*, expected one row for each epoch: move it"):
        layer_log.read(path, "one")
    save_file({name: uneven[name] for name in layer_log.NAMES[:-1]}, path, metadata=header)
    with pytest.raises(layer_log.LayerLogError, match="lacks second_difference_conv2, which a layer log has: move"):
        layer_log.read(path, "one")
    save_file(uneven, path, metadata=header | {"run": "not JSON"})
    with pytest.raises(layer_log.LayerLogError, match="is the layer log of not JSON, expected that of one"):
        layer_log.read(path, "one")
    save_file({"epoch": torch.zeros(2)}, path)
    with pytest.raises(layer_log.LayerLogError, match="has format None, expected 'layer log'"):
        layer_log.read(path, "one")
    with pytest.raises(FileNotFoundError, match="There is no layer log"):
        layer_log.read(tmp_path / "none", "one")


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_seeds_matter_and_initialisations_share_their_data(tmp_path):
    finish(CifarConfig(**SMALL), tmp_path / "tied")
    finish(CifarConfig(**SMALL, initialisation="iid"), tmp_path / "iid")
    finish(CifarConfig(**SMALL, seed=1), tmp_path / "other")
    tied, iid, other = (read_state(tmp_path / name) for name in ("tied", "iid", "other"))
    assert torch.equal(tied["generator"], iid["generator"])
    assert not torch.equal(tied["generator"], other["generator"])
    assert tied["log"][0]["train_loss"] != other["log"][0]["train_loss"]


KILLED = """
import sys
import torch
from torchvision.datasets import CIFAR10
torch.set_num_threads(1)
from lib.cifar.training import train
from lib.cifar.config import CifarConfig
CIFAR10.train_list, CIFAR10.test_list, md5 = eval(sys.argv[1])
CIFAR10.meta = {**CIFAR10.meta, "md5": md5}
for report in train(CifarConfig(depth=4, epochs=3, batch_size=32, test_every=2), sys.argv[2], report_every=1):
    print(report, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["epoch=1, batch=3", "EpochRecord(epoch=1"])
def test_killed_run_resumes_bit_identical(tmp_path, generated_set, moment):
    from torchvision.datasets import CIFAR10

    sums = repr((CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta["md5"]))
    command = [sys.executable, "-c", KILLED, sums, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        for line in process.stdout:
            if moment in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert read_state(tmp_path / "killed")["epoch"] in (1, 2)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        finish(CifarConfig(**SMALL), tmp_path / "killed")
        finish(CifarConfig(**SMALL), tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.usefixtures("generated_set")
def test_an_interrupted_write_keeps_the_last_state(tmp_path, monkeypatch):
    config = CifarConfig(**SMALL)
    run = train(config, tmp_path)
    next(run)
    before = (tmp_path / states.STATE_FILE).read_bytes()

    def fail(state, path):
        Path(path).write_bytes(b"half a sta")
        raise OSError("No space left on device")

    monkeypatch.setattr(training.torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        next(run)
    assert (tmp_path / states.STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*draft"))


@pytest.mark.usefixtures("generated_set")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    config = CifarConfig(**SMALL)
    run = train(config, tmp_path)
    next(run)
    monkeypatch.setattr(training, "learning_rate", lambda config, epoch: 1e30)
    with pytest.raises(Divergence, match=r"gelu_weight-tied\S* diverged: the loss is nan in epoch 2.*epoch 1 stays"):
        list(run)
    state = read_state(tmp_path)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


@pytest.mark.usefixtures("generated_set")
def test_a_test_loss_that_is_not_finite_is_not_saved(tmp_path):
    """One step of 1e30: the loss before it is finite, the loss after it is not."""
    config = CifarConfig(depth=2, epochs=1, train_images=64, test_images=64, learning_rate=1e30)
    with pytest.raises(Divergence, match=r"diverged: .* after epoch 1; no epoch was complete yet: try a learning rate"):
        list(train(config, tmp_path))
    assert read_state(tmp_path) is None
    assert not (tmp_path / states.LOG_FILE).exists()


@pytest.mark.usefixtures("generated_set")
@pytest.mark.parametrize("name", ["residual_layers.conv2_weight", "residual_layers.bn1_running_var", "linear.bias"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, name):
    complete = training.Training.train_epoch

    def train_epoch(self, *arguments):
        yield from complete(self, *arguments)
        if self.epoch == 1:
            self.tensors()[name].detach().view(-1)[-1] = math.inf

    monkeypatch.setattr(training.Training, "train_epoch", train_epoch)
    with pytest.raises(Divergence, match=f"diverged: {name} holds inf after epoch 2; the state after epoch 1 stays"):
        list(train(CifarConfig(**SMALL | {"test_every": 3}), tmp_path))
    assert read_state(tmp_path)["epoch"] == 1
    assert layer_log.read(tmp_path / LAYER_LOG_FILE, CifarConfig(**SMALL | {"test_every": 3}).name)[
        "epoch"
    ].tolist() == [0]


def test_only_short_trials_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    tiny = CifarConfig(depth=2, epochs=4, train_images=640, test_images=500)
    for options in ({}, {"train_images": 2501}, {"epochs": 60}, {"train_images": 0}):
        config = replace(tiny, **options)
        folder = states.run_folder(config)
        folder.mkdir(parents=True)
        Training(config, torch.device("cpu")).save(folder)
        assert states.start_trial_anew(config) == (not options)
        assert (read_state(folder) is None) == (not options)
    with (
        states.lock_folder(states.run_folder(tiny)),
        pytest.raises(locks.Busy, match="Another process is training the run in"),
    ):
        states.start_trial_anew(tiny)


@pytest.mark.usefixtures("generated_set")
def test_foreign_states_are_refused(tmp_path):
    config = CifarConfig(**SMALL)
    run = train(config, tmp_path)
    next(run)
    with pytest.raises(RuntimeError, match="Another process is training the run in"):
        next(train(config, tmp_path))
    run.close()
    with pytest.raises(ValueError, match=r"holds a run with seed 0, expected 5: give this run another folder, or move"):
        next(train(CifarConfig(**SMALL, seed=5), tmp_path))
    path = tmp_path / states.STATE_FILE
    state, whole = read_state(tmp_path), path.read_bytes()
    aside = rf"move {tmp_path} aside to start anew\.$"
    for content in (whole[:1000], whole[:-1], b"", b"no state at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"state.pt cannot be read as a training state \(.*bytes\): {aside}"):
            next(train(config, tmp_path))
        assert path.read_bytes() == content
    for change, sentence in (
        ({"format": 7}, "state.pt has state format 7, expected 1"),
        ({"optimizer": None, "log": None}, "state.pt lacks optimizer, log, which a training state has"),
        (
            {"network": state["network"] | {"linear.bias": torch.zeros(3)}},
            "state.pt does not hold the run .*linear.bias",
        ),
        ({"layers": {"epoch": torch.zeros(1)}}, "state.pt does not hold the run .*norm_conv1"),
        (
            {"layers": {name: values[..., :2] for name, values in state["layers"].items()}},
            "state.pt does not hold the run",
        ),
    ):
        torch.save({name: value for name, value in (state | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=f"{sentence}.*: {aside}"):
            next(train(config, tmp_path))


@pytest.mark.parametrize(
    "error", [OSError(116, "Stale file handle"), PermissionError(13, "Denied"), MemoryError("full")]
)
def test_a_state_that_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch, error):
    (tmp_path / states.STATE_FILE).write_bytes(b"a sound state")
    monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as found:
        read_state(tmp_path)
    assert found.value is error


def test_a_state_that_memory_has_no_room_for_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / states.STATE_FILE).write_bytes(b"a sound state")
    no_room = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes")
    monkeypatch.setattr(training.torch, "load", lambda *_, **__: (_ for _ in ()).throw(no_room))
    with pytest.raises(RuntimeError, match="can't allocate memory") as found:
        read_state(tmp_path)
    assert found.value is no_room


def test_schedule_ends_at_zero_with_its_own_epochs():
    config = CifarConfig(epochs=30)
    rates = [schedule.learning_rate(config, epoch) for epoch in range(31)]
    assert rates[0] == 0.04
    assert rates[15] == pytest.approx(0.02)
    assert rates[30] == 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.04)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for rate in rates[:30]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12)
        optimizer.step(), scheduler.step()


@pytest.mark.slow
def test_weight_decay_alone_is_what_the_optimizer_leaves_without_gradients():
    config = CifarConfig(epochs=20)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [weight], lr=config.learning_rate, momentum=schedule.MOMENTUM, weight_decay=schedule.WEIGHT_DECAY
    )
    weight.grad = torch.zeros_like(weight)
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(config, epoch)
        for _ in range(schedule.steps(config, 50_000)):
            optimizer.step()
    left = schedule.weight_decay_alone(schedule.training_time(config, 50_000))
    assert left < 0.25
    assert weight.item() == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize("depth_scaling", [False, True])
def test_the_step_is_the_documented_sgd(tmp_path, generated_set, depth_scaling):
    """Two epochs of one step, by hand: momentum 0.9, decay on every parameter, the cosine's two rates."""
    from torch.nn import functional as F

    from lib.cifar.network import ConvResNet

    config = CifarConfig(**SMALL | {"batch_size": 300, "epochs": 2, "adaptive": True}, depth_scaling=depth_scaling)
    factor = config.depth / 256 if depth_scaling else 1.0
    finish(config, tmp_path / "run")
    network = ConvResNet(config.network).train()
    images = dataset.load(train=True)
    generator, momenta = torch.Generator().manual_seed(config.seed), {}
    for residual_rate, end_rate in ((0.04, 0.01), (0.02, 0.005)):
        network.zero_grad()
        pixels, labels = dataset.batch(images, dataset.draw_epoch(300, generator), 0, 300)
        F.cross_entropy(network(pixels), labels).backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                rate, decay = end_rate, 5e-4
                if name.startswith("residual_layers"):
                    rate, decay = residual_rate * factor, 5e-4 / factor
                momenta[name] = 0.9 * momenta.get(name, 0) + parameter.grad + decay * parameter
                parameter -= rate * momenta[name]
    found = read_state(tmp_path / "run")["network"]
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("generated_set")
def test_a_held_stem_keeps_its_scale_and_the_rest_trains(tmp_path):
    held = CifarConfig(**SMALL, hold_stem=True)
    records = finish(held, tmp_path / "held")
    assert [record.stem_scale for record in records] == [1.0] * 3
    before, after = Training(held, torch.device("cpu")).network.state_dict(), read_state(tmp_path / "held")["network"]
    trained = [name for name in before if name.endswith(("weight", "bias"))]
    still = {name for name in trained if torch.equal(after[name], before[name])}
    assert still == {"bn1.weight", "bn1.bias"}
    assert records[-1].train_loss < records[0].train_loss


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_watched_epochs_have_the_losses_and_measures_of_the_log(tmp_path):
    config, images = CifarConfig(**SMALL), dataset.load(train=True)
    log = finish(config, tmp_path)
    run = Training(config, torch.device("cpu"))
    for record in log[:2]:
        lines = list(monitor.watch(run, images))
        sizes = [32] * 9 + [12]  # 300 images
        assert [line["step"] for line in lines] == list(range(1, 11))
        assert {line["epoch"] for line in lines} == {record.epoch + 1}
        losses = [line["loss"] for line in lines]
        assert sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / 300 == pytest.approx(record.train_loss)
        assert lines[-1]["path_length"] == record.path_length
    assert run.epoch == 2

    seldom = list(monitor.watch(run, images, 4, monitor.measure))
    assert [line["step"] for line in seldom] == [4, 8, 10]  # every fourth, and the last
    images_each = [128, 128, 44]
    total = sum(n * line["loss"] for n, line in zip(images_each, seldom, strict=True))
    assert total / 300 == pytest.approx(log[2].train_loss)
    assert seldom[-1]["von_neumann_conv1"] == log[2].von_neumann_conv1
    with pytest.raises(ValueError, match="every is 0, expected a whole number of at least 1"):
        next(monitor.watch(run, images, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_layers_that_start_equal_have_noise_from_rounding_alone():
    config, images = CifarConfig(**SMALL | {"depth": 32, "seed": 1}), dataset.load(train=True)
    ends = {}
    for dtype in (torch.float32, torch.float64):
        run = Training(config, torch.device("cpu"), dtype)
        assert {parameter.dtype for parameter in run.network.parameters()} == {dtype}
        *_, ends[dtype] = monitor.watch(run, images, 10, monitor.measure)
    single, double = ends.values()
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
    # After ten steps the layers are a straight line over the depth, up to rounding.
    assert double["von_neumann_conv1"] == pytest.approx(straight_line_ratio(32), rel=1e-4)
    assert single["von_neumann_conv1"] > 2 * double["von_neumann_conv1"]
    assert double["noise_conv1"] < 1e-9 * single["noise_conv1"]


@pytest.mark.usefixtures("generated_set")
def test_states_from_before_an_option_go_on(tmp_path):
    config = CifarConfig(**SMALL)
    finish(config, tmp_path)
    state = read_state(tmp_path)
    del state["config"]["hold_stem"]
    torch.save(state, tmp_path / states.STATE_FILE)
    assert finish(config, tmp_path) == []  # it is read, and finished already
    with pytest.raises(ValueError, match="holds a run with hold_stem False, expected True"):
        finish(CifarConfig(**SMALL, hold_stem=True), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("generated_set")
def test_states_with_the_older_name_of_initialisation_go_on(tmp_path):
    config = CifarConfig(**SMALL, initialisation="iid")
    finish(config, tmp_path / "whole")
    started = train(config, tmp_path / "older")
    next(started)
    started.close()
    state = read_state(tmp_path / "older")
    del state["config"]["initialisation"]
    state["config"]["smooth_init"] = False
    torch.save(state, tmp_path / "older" / states.STATE_FILE)
    assert len(finish(config, tmp_path / "older")) == config.epochs - 1
    ends = [read_state(tmp_path / name)["network"] for name in ("whole", "older")]
    assert all(tensor.equal(ends[1][name]) for name, tensor in ends[0].items())
    with pytest.raises(ValueError, match="holds a run with initialisation 'iid', expected 'weight-tied'"):
        finish(CifarConfig(**SMALL), tmp_path / "older")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"initialisation": "gaussian-process"}, "initialisation is 'gaussian-process', expected one of: weight-tied"),
        ({"learning_rate": "4e-2"}, "learning_rate is '4e-2', expected a number above 0"),
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"adaptive": "False"}, "adaptive is 'False', expected True or False"),
        ({"hold_stem": 1}, "hold_stem is 1, expected True or False"),
        ({"depth_scaling": 1}, "depth_scaling is 1, expected True or False"),
        ({"norm_groups": -1}, "norm_groups is -1, expected a whole number of at least 0"),
        ({"stem_activation": "swish"}, "stem_activation is 'swish', expected one of: gelu, relu"),
        ({"depth": 2.5}, "depth is 2.5"),
    ],
)
def test_config_checks_itself(values, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        CifarConfig(**values)


def test_numbers_of_numpy_make_the_same_run():
    config = CifarConfig(depth=np.int64(8), learning_rate=np.float64(0.1), batch_norm=np.bool_(True), seed=np.uint8(3))
    plain = CifarConfig(depth=8, learning_rate=0.1, batch_norm=True, seed=3)
    assert config.name == plain.name
    assert json.dumps(vars(config)) == json.dumps(vars(plain))


def test_names_tell_runs_apart():
    options = [
        {},
        {"initialisation": "iid"},
        {"batch_norm": False},
        {"activation": "relu"},
        {"depth": 128},
        {"seed": 1},
        {"learning_rate": 0.1},
        {"epochs": 30},
        {"adaptive": True},
        {"hold_stem": True},
        {"depth_scaling": True},
        {"batch_norm": False, "norm_groups": 1},
        {"batch_norm": False, "norm_groups": 4},
        {"stem_activation": "gelu"},
        {"channels": 8},
        {"batch_size": 128},
        {"test_every": 1},
        {"train_images": 100},
        {"test_images": 100},
    ]
    assert len({CifarConfig(**option).name for option in options}) == len(options)
    assert CifarConfig(epochs=30).name == "gelu_weight-tied_bn_depth256_lr0.04_epochs30_seed0"


def test_devices_get_sentences():
    for device in ("gpu", "mps", "meta"):
        with pytest.raises(ValueError, match=f"device is '{device}', expected auto, cpu, cuda"):
            checks.usable_device(device)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device is 'cuda:99', but PyTorch sees \d+ CUDA devices here"):
            checks.usable_device("cuda:99")
    else:
        with pytest.raises(ValueError, match="device is 'cuda', but PyTorch sees no CUDA device here"):
            checks.usable_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")
@pytest.mark.usefixtures("generated_set")
def test_cuda_follows_the_cpu(tmp_path):
    config = CifarConfig(**SMALL)
    finish(config, tmp_path / "cpu")
    for record in train(config, tmp_path / "cuda", device="cuda"):
        assert record.device.startswith("cuda")
    ours, theirs = read_state(tmp_path / "cuda")["log"], read_state(tmp_path / "cpu")["log"]
    assert ours[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize(("images", "steps"), [(50_000, 782), (640, 10), (641, 11), (1, 1)])
def test_every_image_is_in_a_batch(images, steps):
    assert schedule.steps(CifarConfig(), images) == steps


@pytest.mark.usefixtures("generated_set")
def test_batches_of_one_image_train(tmp_path):
    """One image gives every channel 100 values for batch norm, so its statistics exist."""
    (record,) = train(CifarConfig(depth=2, epochs=1, train_images=1, test_images=3), tmp_path)
    assert math.isfinite(record.train_loss)
    (record,) = train(CifarConfig(depth=2, epochs=1, train_images=3, test_images=3, batch_size=1), tmp_path / "single")
    assert math.isfinite(record.train_loss)


@pytest.mark.usefixtures("generated_set")
def test_versions_of_all_parts_of_a_run_are_kept(tmp_path, monkeypatch):
    config = CifarConfig(**SMALL)
    now, run = training.versions(), train(config, tmp_path)
    for torch_version in ("2.11", "2.12", "2.12"):
        monkeypatch.setattr(training, "versions", lambda found=torch_version: now | {"torch": found})
        next(train(config, tmp_path))
    assert read_state(tmp_path)["versions"] == now | {"torch": "2.11 + 2.12"}
    run.close()


@pytest.mark.slow
@needs_cifar10
def test_real_images_are_learnt(tmp_path):
    config = CifarConfig(depth=4, epochs=5, batch_size=32, train_images=640, test_images=200, learning_rate=0.02)
    records = [record for record in train(config, tmp_path, download=False)]
    assert records[-1].train_loss < math.log(10) - 0.15
    assert records[-1].test_accuracy > 15  # chance is 10


def test_a_wrong_kind_of_progress_is_named_by_where_it_came_from(monkeypatch):
    monkeypatch.delenv("TRAINING_PROGRESS", raising=False)
    with pytest.raises(ValueError, match=r"^kind is 'dots', expected one of: bar, lines, none"):
        list(progress([], CifarConfig(), "dots"))
    monkeypatch.setenv("TRAINING_PROGRESS", "dashes")
    with pytest.raises(ValueError, match=r"^TRAINING_PROGRESS is 'dashes', expected one of"):
        list(progress([], CifarConfig(), "dots"))
