"""Records of finished runs, and the tables of checkpoints/ that are gathered from them."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import shipped
import torch
from cifar_set import needs_cifar10, write_set
from finished_runs import finish, write_state

from lib import tables
from lib.checks import Divergence
from lib.cifar import monitor, records, training
from lib.cifar.config import CifarConfig
from lib.cifar.course import RATIOS
from lib.cifar.network import INITIALISATIONS, ConvResNet
from lib.figures.table_1 import PAPER_TABLE

SMALL = {"depth": 4, "epochs": 2, "test_every": 2}


def test_tracked_tables_are_those_of_the_tracked_records(tmp_path):
    """Otherwise the first training of a user would change tracked tables."""
    tracked = shipped.ROOT / "checkpoints"
    for file in (records.RUNS, records.DISTANCES):
        shutil.copy(tracked / file, tmp_path)
    shutil.copytree(tracked / "records", tmp_path / "records")
    records.gather(tmp_path)
    for file in (records.RUNS, records.DISTANCES):
        assert (tmp_path / file).read_bytes() == (tracked / file).read_bytes()


def test_a_run_becomes_rows(tmp_path, monkeypatch):
    write_set(tmp_path / "set", monkeypatch)
    config = CifarConfig(**SMALL)
    folder = tmp_path / "run"
    trained = list(training.train(config, folder))
    records.export(config, folder)
    assert records.publish(config, folder, tmp_path) == records.record_path(config, tmp_path)
    assert records.gather(tmp_path) == 1

    (run,) = records.read_runs(tmp_path)
    assert run.config == config
    assert run.values["train_accuracy"] == trained[-1].train_accuracy
    assert run.values["test_accuracy_best"] == trained[-1].test_accuracy
    assert run.values["von_neumann_conv2"] == trained[-1].von_neumann_conv2
    assert run.values["seconds"] == pytest.approx(sum(record.seconds for record in trained), abs=0.06)
    assert (run.values["device"], run.values["torch"]) == ("cpu", torch.__version__)

    network = run.load().network
    distances = records.read_distances(tmp_path)
    assert distances["layer"].tolist() == [1, 2, 3, 1, 2, 3]
    weight = network.state_dict()["residual_layers.1.conv2.weight"]
    following = network.state_dict()["residual_layers.2.conv2.weight"]
    expected = torch.linalg.vector_norm((following - weight).double())
    assert distances["distance"][4] == pytest.approx(expected.item(), rel=1e-5)


def test_runs_that_are_not_finished_are_not_exported(tmp_path):
    config = CifarConfig(**SMALL)
    with pytest.raises(ValueError, match=r"has 0 of 2 epochs in .*: train it to the end first"):
        records.export(config, tmp_path)


def test_a_state_is_exported_as_the_run_that_it_is(tmp_path):
    config = CifarConfig(**SMALL)
    finish(tmp_path, config)
    with pytest.raises(ValueError, match="holds a run with seed 0, expected 5"):
        records.export(replace(config, seed=5), tmp_path / "states" / config.name)


def test_tables_keep_rows_whose_record_is_gone(tmp_path):
    first, second = CifarConfig(**SMALL), CifarConfig(**SMALL, seed=1)
    record = finish(tmp_path, first)
    records.gather(tmp_path)
    before = (tmp_path / "runs.csv").read_text().splitlines()
    record.unlink()
    finish(tmp_path, second, von_neumann_conv1=None)
    assert records.finished_runs(tmp_path) == {first.name, second.name}  # by its row, and by its record
    assert records.gather(tmp_path) == 2
    after = (tmp_path / "runs.csv").read_text().splitlines()
    assert after[:2] == before
    assert [run.config for run in records.read_runs(tmp_path)] == [first, second]
    assert math.isnan(records.read_runs(tmp_path)[1].values["von_neumann_conv1"])
    assert len(records.read_distances(tmp_path)["run"]) == 2 * 2 * 3
    assert records.gather(tmp_path) == 2  # gathering again changes nothing
    assert (tmp_path / "runs.csv").read_text().splitlines() == after


def test_a_record_that_comes_while_the_tables_are_written_is_in_them(tmp_path, monkeypatch):
    first, second = CifarConfig(**SMALL), CifarConfig(**SMALL, seed=1)
    finish(tmp_path, first)
    write = tables.write_csv

    def write_late(path, table, **options):
        if not records.record_path(second, tmp_path).exists():
            finish(tmp_path, second)
        write(path, table, **options)

    monkeypatch.setattr(tables, "write_csv", write_late)
    assert records.gather(tmp_path) == 2
    assert [run.config for run in records.read_runs(tmp_path)] == [first, second]
    assert set(records.read_distances(tmp_path)["run"]) == {first.name, second.name}


def test_broken_records_get_a_sentence(tmp_path):
    record = finish(tmp_path, CifarConfig(**SMALL))
    whole = record.read_text()
    for content, sentence in (
        (whole[:500], r"seed0_testevery2.json is not a complete record of a run .*: move it aside"),
        ("", r"seed0_testevery2.json is not a complete record of a run"),
        (whole.replace('"summary"', '"other"'), r"json is not a complete record of a run \(it lacks summary\)"),
        (whole.replace('"version": 1', '"version": 2'), r"json has record version 2, expected 1: "),
    ):
        record.write_text(content)
        with pytest.raises(records.CheckpointError, match=sentence):
            records.gather(tmp_path)
        assert record.read_text() == content
    record.write_text(whole)
    (record.parent / "copy.json").write_text(whole)
    with pytest.raises(
        records.CheckpointError, match=r"copy.json is the record of gelu_\S+, expected a file of that name"
    ):
        records.gather(tmp_path)


def test_a_cut_table_of_runs_names_the_file_and_the_line(tmp_path, capsys, monkeypatch):
    for seed in (0, 1):
        finish(tmp_path, CifarConfig(**SMALL, seed=seed))
    records.gather(tmp_path)
    monkeypatch.setattr(records.paths, "CHECKPOINTS", tmp_path)
    path, whole = tmp_path / "runs.csv", (tmp_path / "runs.csv").read_text()
    for content, sentence in (
        (whole[:-3], "runs.csv: line 3 has no end"),
        (whole[:-100], "runs.csv: line 3 has "),
        (whole.replace(",16,", ",-1,", 1), "runs.csv, line 2: channels is -1, expected"),
    ):
        path.write_text(content)
        with pytest.raises(tables.TableError, match=sentence):
            records.read_runs(tmp_path)
    path.write_text(whole[:-100])
    for command in ("gather", "pending"):
        assert records.main([command]) == 1
        error = capsys.readouterr().err
        assert "runs.csv: line 3 has" in error
        assert len(error.splitlines()) == 1
    assert path.read_text() == whole[:-100]


@pytest.mark.parametrize("what", ["a weight", "its test loss"])
def test_what_is_not_finite_is_not_published(tmp_path, what):
    config = CifarConfig(**SMALL)
    network = ConvResNet(config.network)
    if what == "a weight":
        network.linear.weight.data[0, 0] = math.inf
    folder = tmp_path / "run"
    write_state(folder, config, network, **({} if what == "a weight" else {"test_loss": math.nan}))
    found = {"a weight": "linear.weight holds inf", "its test loss": "its test loss is nan"}[what]
    with pytest.raises(Divergence, match=rf"The run gelu_\S* in \S*run is not a result, since {found}: train one"):
        records.export(config, folder)
    assert [path.name for path in folder.iterdir()] == ["state.pt"]


def test_what_is_published_follows_the_umask(tmp_path):
    config = CifarConfig(**SMALL)
    before = os.umask(0o027)
    try:
        record = finish(tmp_path, config)
    finally:
        os.umask(before)
    assert record.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / f"{config.name}.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_schedule_of_no_epochs_is_refused(capsys):
    with pytest.raises(ValueError, match="epochs is 0, expected a whole number of at least 1"):
        records.read_sweep(0)
    assert records.main(["pending", "--epochs", "0"]) == 1
    assert "epochs is 0, expected" in capsys.readouterr().err


def test_the_sweep_holds_the_runs_of_table_1():
    configs = records.read_sweep()
    assert len({config.name for config in configs}) == len(configs)
    listed = {(c.activation, c.initialisation, c.seed) for c in configs if c.batch_norm}
    rows = {(row.activation, row.initialisation) for row in PAPER_TABLE}
    assert listed == {(*row, seed) for row in rows for seed in range(5)}
    paper = CifarConfig()
    for config in configs:
        for name in ("depth", "channels", "learning_rate", "epochs", "batch_size", "adaptive"):
            assert getattr(config, name) == getattr(paper, name)
    assert {config.epochs for config in records.read_sweep(30)} == {30}


def test_tables_and_records_with_the_older_name_of_initialisation_are_read(tmp_path):
    for initialisation in INITIALISATIONS:
        finish(tmp_path, CifarConfig(**SMALL, initialisation=initialisation))
    records.gather(tmp_path)
    new = (tmp_path / records.RUNS).read_text()
    runs = records.read_runs(tmp_path)
    older = (
        new.replace(",initialisation,", ",smooth_init,", 1)
        .replace(",weight-tied,", ",True,")
        .replace(",iid,", ",False,")
    )
    (tmp_path / records.RUNS).write_text(older)
    assert [run.config for run in records.read_runs(tmp_path)] == [run.config for run in runs]
    for path in (tmp_path / "records").glob("*.json"):
        entries = json.loads(path.read_text())
        entries["config"]["smooth_init"] = entries["config"].pop("initialisation") == "weight-tied"
        path.write_text(json.dumps(entries))
    records.gather(tmp_path)
    assert (tmp_path / records.RUNS).read_text() == new
    (tmp_path / "records" / f"{runs[0].config.name}.json").unlink()
    (tmp_path / records.RUNS).write_text(older)
    records.gather(tmp_path)  # one row from the older table, one from an older record
    assert (tmp_path / records.RUNS).read_text() == new
    (tmp_path / records.SWEEP).write_text("activation,smooth_init\ngelu,True\nrelu,False\n")
    assert [config.initialisation for config in records.read_sweep(folder=tmp_path)] == ["weight-tied", "iid"]


def test_a_sweep_with_unknown_columns_gets_a_sentence(tmp_path):
    (tmp_path / "sweep.csv").write_text("activation,width\ngelu,3\n")
    with pytest.raises(ValueError, match=r"sweep.csv has a column width, expected columns among: activation"):
        records.read_sweep(folder=tmp_path)
    (tmp_path / "sweep.csv").write_text("activation,learning_rate\n\ngelu,0.04\n\nrelu,o.04\n")
    with pytest.raises(tables.TableError, match=r"/sweep.csv, line 5: learning_rate is 'o.04', expected a number"):
        records.read_sweep(folder=tmp_path)


@needs_cifar10
def test_a_shipped_network_reproduces_its_record():
    shipped = [run for run in records.read_runs() if run.has_weights]
    if not shipped:
        pytest.skip("checkpoints/ holds no trained network yet")
    run = min(shipped, key=lambda run: run.config.depth)  # the fastest on 10,000 images
    checkpoint = run.load()
    measured = monitor.measure(checkpoint.network)
    for name in RATIOS:
        assert measured[name] == pytest.approx(run.values[name], rel=1e-9)
    from lib.cifar import dataset

    _, accuracy = training.evaluate(checkpoint.network, dataset.load(train=False, download=False))
    # The two are equal on the machine and engine that logged it. Rounding elsewhere may change up to five images.
    assert accuracy == pytest.approx(run.values["test_accuracy"], abs=0.05)
