"""make train and make checkpoints, with runs that take seconds at most."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import toy_project
from cifar_set import needs_cifar10
from finished_runs import write_state

from lib import parameters, paths
from lib.checks import Divergence
from lib.cifar import dataset, records, states, training
from lib.cifar.config import CifarConfig
from lib.cifar.network import ConvResNet
from lib.engine import build as engine
from lib.project import runs, variables

# In the place of a scheduler's command: it notes what it was asked to run, and ends with $STATUS.
RECORDER = """#!/bin/sh
printf '%s\\n' "$*" >> "$(dirname "$0")/launched"
exit "${STATUS:-0}"
"""


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    shutil.copytree(paths.ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    shutil.copytree(paths.ROOT / "notebooks", root / "notebooks")
    shutil.copy(paths.ROOT / "Makefile", root)
    return root


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A list of runs in a folder of its own, and a recorder. ``sweep.read_launched()`` has the words of each start."""

    class Sweep:
        folder, recorder = tmp_path / "checkpoints", tmp_path / "recorder"

        def read_launched(self):
            notes = tmp_path / "launched"
            return [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []

        def start(self, *arguments):
            return runs.main(["--listed", f"--launch={self.recorder}", *arguments])

    (tmp_path / "checkpoints" / "records").mkdir(parents=True)
    shutil.copy(paths.CHECKPOINTS / records.SWEEP, Sweep.folder)
    Sweep.recorder.write_text(RECORDER)
    Sweep.recorder.chmod(0o755)
    monkeypatch.setattr(paths, "CHECKPOINTS", Sweep.folder)
    monkeypatch.setattr(runs.records, "gather", lambda: 0)
    made = Sweep()
    made.fetched = []  # the runs that were started when the images were fetched
    monkeypatch.setattr(runs.dataset, "load", lambda train: made.fetched.append(made.read_launched()))
    return made


def test_a_sweep_that_cannot_be_listed_fails(sweep, capsys):
    assert sweep.start("EPOCHS=thirty") == 2
    assert capsys.readouterr().err == "epochs is 'thirty', expected a whole number of at least 1.\n"
    listed = sweep.folder / records.SWEEP
    listed.write_text(listed.read_text().replace("activation", "activaton", 1))
    assert sweep.start() == 2
    assert "has a column activaton" in capsys.readouterr().err
    assert sweep.read_launched() == []


def test_a_sweep_launches_each_run_that_is_not_finished_once(sweep):
    # One run is in the table, another has its record only.
    in_table, in_record = (
        f"{network}_bn_depth256_lr0.04_epochs30_seed3" for network in ("gelu_weight-tied", "relu_iid")
    )
    (sweep.folder / "runs.csv").write_text(f"run\n{in_table}\n")
    (sweep.folder / "records" / f"{in_record}.json").write_text("{}")
    assert sweep.start("EPOCHS=30", "DEVICE=cpu", "--set=threads=1", "--jobs=4") == 0
    assert sweep.fetched == [[]]
    names = [words[3] for words in sweep.read_launched()]
    assert sorted(names) == sorted({config.name for config in records.read_sweep(30)} - {in_table, in_record})
    for words, name in zip(sweep.read_launched(), names, strict=True):
        assert words == [
            sys.executable,
            "-m",
            "lib.project.runs",
            name,
            "EPOCHS=30",
            "DEVICE=cpu",
            "--set",
            "threads=1",
        ]


def test_a_listed_run_that_fails_leaves_the_others_alone(sweep, monkeypatch, capsys):
    monkeypatch.setenv("STATUS", "3")
    assert sweep.start() == 1
    listed = records.read_sweep()
    assert len(sweep.read_launched()) == len(listed) > 1
    assert capsys.readouterr().err.startswith(f"{len(listed)} of the listed runs did not finish: {listed[0].name}, ")


@pytest.mark.parametrize("status", [128 + signal.SIGTERM, 128 + signal.SIGINT])
def test_after_a_run_that_was_ended_no_other_is_started(sweep, monkeypatch, capsys, status):
    monkeypatch.setenv("STATUS", str(status))
    assert sweep.start() == 1
    assert len(sweep.read_launched()) == 1
    assert f"{len(records.read_sweep()) - 1} more were not started, since one was ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--launch=srunn -n1"], "LAUNCH is 'srunn -n1': there is no command srunn; check the spelling and the PATH."),
        (["--launch=srun 'x"], 'LAUNCH is "srun \'x": no closing quotation.'),
        (["--jobs=-1"], "jobs is -1, expected a whole number of at least 0."),
        (["--set=foo=3"], "train_cifar has no parameter 'foo'"),
        (["--set=hold_stem=True"], "hold_stem is set, but checkpoints/sweep.csv sets it for"),
        (["--launch=", "THREADS=-1"], "threads is -1, expected a whole number of at least 0."),
    ],
)
def test_a_sweep_with_wrong_arguments_starts_nothing(sweep, capsys, arguments, sentence):
    assert sweep.start(*arguments) == 2
    assert sentence in capsys.readouterr().err
    assert sweep.read_launched() == sweep.fetched == []


def test_make_calls_the_sweep_with_its_jobs(project):
    result = toy_project.make(project, "-n", "-j4", "checkpoints", "EPOCHS=30", "DEVICE=cpu", "LAUNCH=srun -n1 'a b'")
    (sweep,) = result.stdout.splitlines()
    words = shlex.split(sweep)[1:]
    assert words[:6] == ["-m", "lib.project.runs", "--listed", "--jobs", "4", "--launch=srun -n1 'a b'"]
    assert sorted(words[6:]) == ["DEVICE=cpu", "EPOCHS=30"]


def test_a_listed_run_has_the_values_of_the_list(capsys):
    name = records.read_sweep()[0].name
    assert runs.main([name, "DEVICE=cpu", "HOLD_STEM=True"]) == 2
    assert f"hold_stem is set, but checkpoints/sweep.csv sets it for {name}" in capsys.readouterr().err
    assert runs.main([name, "EPOCHS=0"]) == 2
    assert "epochs is 0, expected" in capsys.readouterr().err
    assert runs.main([name, name]) == 2
    assert runs.main(["gelu"]) == 2
    assert "lists no run gelu" in capsys.readouterr().err


def test_the_variables_of_make_are_the_parameters_of_the_run():
    assert variables.read_values(["ACTIVATION=gelu", "SMOOTH_INIT=True", "SEED=1", "LR=4e-2", "HOLD_STEM=false"]) == {
        "activation": "gelu", "initialisation": "weight-tied", "seed": 1, "learning_rate": 0.04, "hold_stem": False,
    }  # fmt: skip
    for given in ("INITIALISATION=iid", "SMOOTH_INIT=False"):
        assert variables.read_values([given]) == {"initialisation": "iid"}
    assert variables.read_values(["INITIALISATION=weight-tied", "SMOOTH_INIT=True"]) == {
        "initialisation": "weight-tied"
    }
    for given in (["INITIALISATION=iid", "SMOOTH_INIT=True"], ["SMOOTH_INIT=iid"], ["LR=[1"], ["DEPTH= "]):
        with pytest.raises(parameters.WrongParameters, match=given[0].partition("=")[0]):
            variables.read_values(given)
    makefile = (paths.ROOT / "Makefile").read_text()
    listed = re.search(r"^TRAINING := (.*)$", makefile, re.MULTILINE)[1].split()
    offered = parameters.read_parameters(runs.NOTEBOOK)
    for variable in set(listed) - {"SMOOTH_INIT"}:
        assert variables.PARAMETERS.get(variable, variable.lower()) in offered


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NON_LIN", "ACTIVATION"),
        ("use-bn", "BATCH_NORM"),
        ("lr", "LR"),
        ("smooth_init", "SMOOTH_INIT"),
        ("DPETH", "DEPTH"),
    ],
)
def test_a_foreign_variable_is_answered_with_the_one_that_was_meant(name, meant):
    known = ["ACTIVATION", "BATCH_NORM", "DEPTH", "LR", "SMOOTH_INIT"]
    assert re.search(rf"variable {name}\b.*\b{meant}\b", variables.explain_unknown(name, known))
    assert variables.explain_unknown("ZZZ", known).startswith(
        "There is no variable ZZZ, but ACTIVATION, BATCH_NORM, DEPTH, LR, "
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("depth=many", "train_cifar: depth is 'many', expected a whole number"),
        ("activation=swish", "activation is 'swish', expected one of: gelu"),
        ("width=3", "train_cifar has no parameter 'width'"),
        ("depth=4", "CIFAR-10 was not found complete in"),
        ("nonsense", "nonsense"),
        ("device=mps", "device is 'mps', expected auto, cpu, cuda"),
        ("threads=-1", "threads is -1, expected a whole number of at least 0."),
        ("seed=99999999999999999999", "seed is 99999999999999999999, expected a whole number of at most"),
    ],
)
def test_wrong_values_and_missing_images_stop_before_training(tmp_path, monkeypatch, capsys, settings, sentence):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setattr(runs.training, "train", lambda *a, **k: pytest.fail("the run was started"))
    assert runs.main(["--set", settings]) in (1, 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("profile", parameters.list_profiles())
def test_a_run_is_the_one_that_the_notebook_trains(profile):
    values = parameters.profile_values(runs.NOTEBOOK, profile) | {"seed": 3}
    namespace = {}
    for cell in parameters.code_cells(runs.NOTEBOOK):
        exec(parameters.extract_python(cell), namespace)
        namespace |= values if "parameters" in cell.tags else {}
        if "config" in cell.tags:
            break
    assert runs.build_config(values) == namespace["config"]


def test_a_run_that_is_training_already_is_not_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(runs.dataset, "load", lambda train: None)
    monkeypatch.setattr(runs.training, "train", lambda *a, **k: pytest.fail("the run was started"))
    with states.lock_folder(states.run_folder(runs.build_config({"depth": 2, "seed": 5}))):
        assert runs.main(["--profile", "quick", "--set", "depth=2 seed=5"]) == 1
    assert capsys.readouterr().err.startswith("Another process is training the run in ")


def test_a_finished_run_is_never_trained_again(tmp_path, monkeypatch, capsys):
    config = CifarConfig(depth=4, epochs=1)
    monkeypatch.setattr(runs.training, "train", lambda *a, **k: pytest.fail("the run was started"))
    record = records.record_path(config, tmp_path)
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    runs.train(vars(config), tmp_path)
    assert "epochs1_seed0 is finished" in capsys.readouterr().out


@pytest.mark.parametrize("trial", [{}, {"train_images": 100, "test_images": 50}])
def test_a_run_that_was_stopped_says_where_it_goes_on(tmp_path, monkeypatch, capsys, trial):
    config = CifarConfig(depth=2, epochs=7, **trial)
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(runs.dataset, "load", lambda train: None)
    run = training.Training(config, torch.device("cpu"))
    run.epoch = 3
    folder = states.run_folder(config)
    folder.mkdir(parents=True)
    run.save(folder)

    def stop(config, **options):
        raise Divergence("stopped")

    monkeypatch.setattr(runs.training, "train", stop)
    with pytest.raises(Divergence):
        runs.train(vars(config), tmp_path)
    assert f"{config.name}: going on after epoch 3 of 7" in capsys.readouterr().out


def test_a_finished_trial_is_not_trained_again(tmp_path, monkeypatch, capsys):
    config = CifarConfig(depth=2, epochs=1, train_images=100)
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(runs.dataset, "load", lambda train: None)
    monkeypatch.setattr(runs.training, "train", lambda *a, **k: pytest.fail("the run was started"))
    write_state(states.run_folder(config), config, ConvResNet(config.network))
    records.export(config)
    assert runs.train(vars(config), tmp_path) == states.run_folder(config)
    assert f"{config.name} is finished, a trial that stays in" in capsys.readouterr().out


@pytest.mark.slow
@needs_cifar10
def test_make_train_on_real_images(project):
    images = "train_images=320 test_images=100"
    root = paths.cifar10_root()
    values = ("DEPTH=4", "EPOCHS=2", f"SET={images} batch_size=32", f"CIFAR10_ROOT={root}")
    checkpoints = sorted((project / "checkpoints").glob("*"))
    result = toy_project.make(project, "train", *values, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    config = CifarConfig(depth=4, epochs=2, batch_size=32, train_images=320, test_images=100)
    folder = project / ".build" / "training" / config.name
    assert states.read_state(folder)["epoch"] == 2
    files = {path.name for path in folder.iterdir()}
    ends = ("safetensors", "json", "layers.safetensors")
    others = {"state.pt", "log.json", "log.layers.safetensors", "lock"}
    assert files == {f"{config.name}.{end}" for end in ends} | others
    assert "epoch 2 of 2, loss" in result.stderr  # a line an epoch if there is no terminal
    assert sorted((project / "checkpoints").glob("*")) == checkpoints  # a trial is not published


@pytest.mark.slow
@needs_cifar10
def test_a_run_that_a_person_ends_says_one_sentence_and_goes_on(project):
    words = [sys.executable, "-m", "lib.project.runs", "--profile", "quick", "EPOCHS=40", "--set", "train_images=320"]
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    options = {"cwd": project, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests in the background ignore SIGINT, and their processes would inherit that.
    reset_signal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(words, preexec_fn=reset_signal, **options) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        *epochs, last = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 128 + signal.SIGINT
    assert all(": epoch " in line for line in [first, *epochs])
    assert last == runs.INTERRUPTED
    done = 1 + len(epochs)
    with subprocess.Popen(words, preexec_fn=reset_signal, **options) as process:
        assert "epoch" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert re.search(rf": going on after epoch ({done}|{done + 1}) of 40$", said, re.MULTILINE)


@pytest.mark.parametrize(("built", "device", "said"), [(False, "cpu", 1), (True, "cpu", 0), (False, "cuda", 0)])
def test_without_the_compiled_engine_a_training_says_once_what_to_run(
    built, device, said, monkeypatch, tmp_path, capsys
):
    def stop(*arguments, **options):
        raise Divergence("stopped before it starts")

    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(dataset, "load", lambda train: None)
    monkeypatch.setattr(training, "train", stop)
    monkeypatch.setattr(engine, "_load_library", lambda: (object() if built else None, f"not built; {engine.ADVICE}"))
    monkeypatch.delenv("LIB_ENGINE", raising=False)
    with pytest.raises(Divergence):
        runs.train({"depth": 2, "epochs": 1, "device": device}, into=tmp_path)
    out = capsys.readouterr().out
    assert out.count("`make engine` builds it") == out.count("PyTorch trains") == said
