"""make train and make checkpoints, in a copy of the project; no run of these tests takes more than seconds."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cifar_set import needs_cifar10

from lib import cifar, cifar_training, engine, notebooks, parameters, paths, records, runs
from lib.cifar_training import CifarConfig

OUTSIDE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "PROFILE", "SET", "PARAMETERS", "PYTHONPATH")
OUTSIDE += ("ACTIVATION", "SMOOTH_INIT", "BATCH_NORM", "DEPTH", "LR", "EPOCHS", "SEED", "DEVICE", "THREADS", "LAUNCH")

# A scheduler's command that starts nothing: it notes what it was asked to run.
RECORDER = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/launched"
"""


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    shutil.copytree(paths.ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    shutil.copytree(paths.ROOT / "notebooks", root / "notebooks")
    shutil.copy(paths.ROOT / "Makefile", root)
    (root / "checkpoints").mkdir()
    shutil.copy(paths.CHECKPOINTS / "sweep.csv", root / "checkpoints")
    recorder = root / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    return root


def make(root, *arguments, **environment):
    outer = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", *arguments],
        cwd=root,
        env={**outer, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_a_sweep_that_cannot_be_listed_fails(project):
    sweep = project / "checkpoints" / "sweep.csv"
    sweep.write_text(sweep.read_text().replace("activation", "activaton", 1))
    for arguments in (["sweep"], ["sweep", "EPOCHS=thirty"]):
        result = make(project, *arguments, "LAUNCH=./recorder")
        assert result.returncode != 0
        assert "There is no list of runs" in result.stderr
    assert not (project / "launched").exists()


def test_a_sweep_launches_each_run_that_is_not_finished_once(project):
    # One run is in the table, another has its record only.
    in_table, in_record = (
        f"{network}_bn_depth256_lr0.04_epochs30_seed3" for network in ("gelu_weight-tied", "relu_iid")
    )
    (project / "checkpoints" / "runs.csv").write_text(f"run\n{in_table}\n")
    (project / "checkpoints" / "records").mkdir()
    (project / "checkpoints" / "records" / f"{in_record}.json").write_text("{}")
    result = make(project, "-j4", "sweep", "EPOCHS=30", "DEVICE=cpu", "LAUNCH=./recorder")
    assert result.returncode == 0, result.stderr
    launched = [line.split() for line in (project / "launched").read_text().splitlines()]
    names = [line[3] for line in launched]
    assert sorted(names) == sorted({config.name for config in records.sweep(30)} - {in_table, in_record})
    for line, name in zip(launched, names, strict=True):
        assert line == [sys.executable, "-m", "lib.runs", name, "--epochs", "30", "--set", "device=cpu"]


@needs_cifar10
def test_a_listed_run_that_fails_leaves_the_others_alone(project):
    (project / "recorder").write_text(RECORDER + "exit 3\n")
    result = make(project, "checkpoints", "EPOCHS=30", "LAUNCH=./recorder", f"CIFAR10_ROOT={paths.cifar10_root()}")
    assert result.returncode != 0
    assert len((project / "launched").read_text().splitlines()) == len(records.sweep(30)) > 1


def test_a_listed_run_has_the_values_of_the_list(project, capsys):
    name = records.sweep()[0].name
    assert runs.main([name, "--set", "device=cpu hold_stem=True"]) == 2
    assert f"{name} is listed in checkpoints/sweep.csv, hold_stem with it" in capsys.readouterr().err
    make(project, "sweep", "EPOCHS=30", "HOLD_STEM=True", "LAUNCH=./recorder")
    lines = (project / "launched").read_text().splitlines()
    assert all(line.endswith("--epochs 30 --set hold_stem=True") for line in lines)


def test_make_train_hands_its_variables_to_one_run(project):
    variables = ("ACTIVATION=gelu", "SMOOTH_INIT=True", "SEED=1", "DEPTH=256", "LR=0.04")
    assert make(project, "train", *variables, "LAUNCH=./recorder").returncode == 0
    (line,) = (project / "launched").read_text().splitlines()
    assert line.endswith(
        "-m lib.runs --profile paper --set activation=gelu smooth_init=True depth=256 seed=1 learning_rate=0.04"
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("depth=many", "train_cifar: depth is 'many', expected a whole number"),
        ("activation=swish", "activation is 'swish', expected one of: gelu"),
        ("width=3", "train_cifar has no parameter 'width'"),
        ("depth=4", "CIFAR-10 was not found whole in"),
        ("nonsense", "nonsense"),
    ],
)
def test_wrong_values_and_missing_images_stop_before_training(tmp_path, monkeypatch, capsys, settings, sentence):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setattr(runs.notebooks, "execute_with", lambda *a, **k: pytest.fail("the run was started"))
    assert runs.main(["--set", settings]) in (1, 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("profile", parameters.profiles())
def test_a_run_is_the_one_that_the_notebook_trains(profile):
    values = parameters.profile_values(runs.NOTEBOOK, profile) | {"seed": 3}
    namespace = {}
    notebook = parameters.read(runs.NOTEBOOK)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        exec(parameters.code(cell), namespace)
        namespace |= values if "parameters" in cell.metadata.tags else {}
        if "config" in cell.metadata.tags:
            break
    assert runs.config_of(values) == namespace["config"]


def test_a_run_that_is_training_already_is_not_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(runs.cifar, "load", lambda train: None)
    monkeypatch.setattr(runs.notebooks, "execute_with", lambda *a, **k: pytest.fail("the run was started"))
    with cifar_training.alone_in(cifar_training.run_folder(runs.config_of({"depth": 2, "seed": 5}))):
        assert runs.main(["--profile", "quick", "--set", "depth=2 seed=5"]) == 1
    assert capsys.readouterr().err.startswith("Another process is training the run in ")


def test_a_finished_run_is_never_trained_again(tmp_path, monkeypatch, capsys):
    config = CifarConfig(depth=4, epochs=1)
    monkeypatch.setattr(runs.notebooks, "execute_with", lambda *a, **k: pytest.fail("the run was started"))
    record = records.record_path(config, tmp_path)
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    runs.train(vars(config), tmp_path)
    assert "epochs1_seed0 is finished" in capsys.readouterr().out


def test_a_run_that_was_stopped_says_where_it_goes_on(tmp_path, monkeypatch, capsys):
    config = CifarConfig(depth=2, epochs=7)
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(runs.cifar, "load", lambda train: None)
    run = cifar_training.Training(config, torch.device("cpu"))
    run.epoch = 3
    folder = cifar_training.run_folder(config)
    folder.mkdir(parents=True)
    run.save(folder)

    def stop(*arguments, **options):
        raise runs.notebooks.RunFailed("stopped")

    monkeypatch.setattr(runs.notebooks, "execute_with", stop)
    with pytest.raises(runs.notebooks.RunFailed):
        runs.train(vars(config), tmp_path)
    assert f"{config.name}: going on after epoch 3 of 7" in capsys.readouterr().out


@needs_cifar10
def test_make_train_on_real_images(project):
    images = "train_images=320 test_images=100"
    root = paths.cifar10_root()
    result = make(project, "train", "DEPTH=4", "EPOCHS=2", f"SET={images} batch_size=32", f"CIFAR10_ROOT={root}")
    assert result.returncode == 0, result.stderr
    config = CifarConfig(depth=4, epochs=2, batch_size=32, train_images=320, test_images=100)
    folder = project / ".build" / "training" / config.name
    assert cifar_training.read_state(folder)["epoch"] == 2
    files = {path.name for path in folder.iterdir()}
    assert {f"{config.name}.safetensors", f"{config.name}.json", "log.json", "train_cifar.ipynb"} <= files
    assert "epoch 2 of 2, loss" in result.stderr  # a line an epoch where nobody looks at a bar
    executed = (folder / "train_cifar.ipynb").read_text()
    assert "image/png" in executed
    assert "min left" not in executed
    assert not (project / "checkpoints" / "records").exists()  # a trial is no result


@pytest.mark.parametrize(("built", "device", "said"), [(False, "cpu", 1), (True, "cpu", 0), (False, "cuda", 0)])
def test_without_the_compiled_engine_a_training_says_once_what_to_run(
    built, device, said, monkeypatch, tmp_path, capsys
):
    def stop(*arguments, **options):
        raise notebooks.RunFailed("stopped before its kernel starts")

    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(cifar, "load", lambda train: None)
    monkeypatch.setattr(notebooks, "execute_with", stop)
    monkeypatch.setattr(engine, "_built", lambda: (object() if built else None, f"not built; {engine.ADVICE}"))
    for name in ("LIB_ENGINE", "GOMP_SPINCOUNT", "TRAINING_PROGRESS"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    with pytest.raises(notebooks.RunFailed):
        runs.train({"depth": 2, "epochs": 1, "device": device}, into=tmp_path)
    out = capsys.readouterr().out
    assert out.count("`make engine` builds it") == out.count("PyTorch trains") == said
    assert os.environ["GOMP_SPINCOUNT"] == "5000"
