"""The Makefile and the runner in a toy project: what is made and when, and what a failure leaves."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import toy_project
import yaml
from jupyterlab_server import settings_utils

from lib import locks, paths
from lib.project import dependencies

make = toy_project.make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project in which `make -j2 figures` has just run."""
    root = toy_project.write(tmp_path_factory.mktemp("finished") / "project")
    result = make(root, "-j2", "figures")
    assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project with its time stamps, which a test may change."""
    return shutil.copytree(finished, tmp_path / "project", symlinks=True)


def would_run(root, *arguments):
    """The notebooks that make would run now."""
    printed = make(root, "-n", *arguments).stdout
    return [line.split(" run ")[1].split()[0] for line in printed.splitlines() if " run " in line]


def touch(path):
    later = time.time() + 5
    os.utime(path, (later, later))


@pytest.mark.slow
def test_help_lists_every_target_and_figure(finished):
    for arguments in ((), ("help",)):
        printed = make(finished, *arguments).stdout
        for target in ("figures", "test", "check", "lab", "env", "engine", "notebooks", "clean"):
            assert f"\n  {target} " in printed
        assert "figure_a               Title of figure_a" in printed
        assert "explore_c" not in printed


def test_a_fresh_clone_makes_every_figure_of_the_profile(tmp_path):
    root = toy_project.write(tmp_path / "project")
    (root / "figures" / "figure_a.csv").write_text("tracked, and as new as the notebook")
    assert would_run(root, "figures") == ["figure_a", "figure_b"]
    assert would_run(root, "figures", "PROFILE=released") == ["figure_a"]
    assert would_run(root, "figures", "PROFILE=quick") == ["figure_a", "figure_b"]


def test_figures_are_made_from_the_profile(finished):
    assert (finished / "figures" / "figure_a.csv").read_text() == "depth,value\n16,160\n"
    assert (finished / "figures" / "figure_b.csv").read_text() == "depth,value\n17,1\n"
    assert sorted(path.name for path in (finished / ".build" / "paper").iterdir()) == [
        "checked", "figure_a.d", "figure_a.ipynb", "figure_a.made", "figure_b.d", "figure_b.ipynb", "figure_b.made",
    ]  # fmt: skip


def test_a_second_make_does_nothing(finished):
    result = make(finished, "figures")
    assert "Nothing to be done for 'figures'" in result.stdout
    assert make(finished, "-q", "figures").returncode == 0


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("notebooks/figure_a.ipynb", ["figure_a"]),
        ("notebooks/profiles/paper/figure_b.yaml", ["figure_b"]),
        ("lib/tool.py", ["figure_a"]),
        ("lib/helper.py", ["figure_a"]),
        ("lib/paths.py", ["figure_a", "figure_b"]),
        ("lib/unused.py", []),
        ("lib/project/notebooks.py", []),
        ("notebooks/explore_c.ipynb", []),
        ("notebooks/profiles/released/figure_a.yaml", []),
    ],
)
def test_touching_a_file_remakes_what_depends_on_it(project, file, expected):
    touch(project / file)
    assert would_run(project, "figures") == expected


def test_what_is_edited_during_a_run_is_not_taken_for_done(project):
    # The stamp has the time of the start, so an edit during the run is newer.
    stamp = project / ".build" / "paper" / "figure_a.ipynb"
    begun = stamp.stat().st_mtime
    assert begun < (project / "figures" / "figure_a.csv").stat().st_mtime
    os.utime(project / "lib" / "helper.py", (begun + 0.01, begun + 0.01))
    assert would_run(project, "figures") == ["figure_a"]


@pytest.mark.slow
def test_a_figure_whose_file_is_gone_is_made_again(project):
    (project / "figures" / "figure_a.csv").unlink()
    assert would_run(project, "figures") == ["figure_a"]
    assert make(project, "figure_a").returncode == 0
    assert (project / "figures" / "figure_a.csv").exists()
    assert make(project, "-q", "figures").returncode == 0
    # The same for another profile: its list names files that are not there.
    shutil.copytree(project / ".build" / "paper", project / ".build" / "released")
    made = project / ".build" / "released" / "figure_a.made"
    made.write_text(made.read_text().replace("figures/", "figures/released/"))
    assert would_run(project, "figures", "PROFILE=released") == ["figure_a"]


def test_a_deleted_module_does_not_stop_make(project):
    (project / "lib" / "unused.py").unlink()
    (project / "lib" / "tool.py").write_text("def scaled(n):\n    return n\n")
    (project / "lib" / "helper.py").unlink()
    touch(project / "lib" / "tool.py")
    assert would_run(project, "figures") == ["figure_a"]


@pytest.mark.slow
def test_a_new_network_remakes_what_reads_the_networks(project):
    (project / "lib" / "helper.py").write_text("from lib import paths\n\nFACTOR, FOLDER = 10, paths.CHECKPOINTS\n")
    assert make(project, "figures").returncode == 0
    assert would_run(project, "figures") == []
    (project / "checkpoints" / "runs.csv").write_text("")
    touch(project / "checkpoints")
    assert would_run(project, "figures") == ["figure_a"]
    assert "lib.project.runs" not in make(project, "-n", "figures").stdout  # the folder, not the target checkpoints


def test_a_new_notebook_is_a_new_figure(project):
    toy_project.write_notebook(project / "notebooks", "figure_c", "from lib import checks, paths")
    assert would_run(project, "figures") == []
    assert would_run(project, "figure_c", "PROFILE=quick") == ["figure_c"]
    (project / "notebooks" / "profiles" / "paper" / "figure_c.yaml").write_text("depth: 8\n")
    assert would_run(project, "figures") == ["figure_c"]


@pytest.mark.slow
def test_other_profiles_and_custom_runs_keep_off_the_tracked_figures(project):
    tracked = {path: path.read_bytes() for path in (project / "figures").glob("*.csv")}
    result = make(project, "figures", "PROFILE=released")
    assert result.returncode == 0
    assert "Left out, since the profile has no values for them: figure_b." in result.stdout
    (project / "my.yaml").write_text("depth: 5\nlearning_rate: 0.25\n")
    result = make(project, "figure_a", "SET=depth=7 mode=plain", "PARAMETERS=my.yaml")
    assert result.returncode == 0, result.stderr
    assert (project / "figures" / "released" / "figure_a.csv").read_text() == "depth,value\n4,40\n"
    assert (project / "figures" / "custom" / "figure_a.csv").read_text() == "depth,value\n7,70\n"
    assert "learning_rate = 0.25" in (project / ".build" / "custom" / "figure_a.ipynb").read_text()
    beside = yaml.safe_load((project / "figures" / "custom" / "figure_a.yaml").read_text())
    assert beside == {"depth": 7, "learning_rate": 0.25, "mode": "plain"}
    assert {path: path.read_bytes() for path in (project / "figures").glob("*.csv")} == tracked
    assert make(project, "-q", "figures").returncode == 0
    assert make(project, "clean").returncode == 0
    assert sorted(path.name for path in (project / "figures").iterdir()) == ["custom", "figure_a.csv", "figure_b.csv"]
    assert would_run(project, "figures") == ["figure_a", "figure_b"]


@pytest.mark.slow
def test_two_runs_of_one_figure_do_not_mix(project):
    before = (project / "figures" / "figure_a.csv").read_text()
    with locks.hold_lock(project / ".build" / "locks" / "custom_figure_a", "the test holds it"):
        result = make(project, "figure_a", "SET=depth=7")
        assert result.returncode == 2
        busy = "Another process is making figure_a in .build/custom: wait for it, or end it."
        assert f"{busy} It is process {os.getpid()} on {socket.gethostname()}.\n" in result.stderr
        assert "Traceback" not in result.stderr
        assert not (project / "figures" / "custom").exists()
    assert make(project, "figure_a", "SET=depth=7").returncode == 0
    assert (project / "figures" / "custom" / "figure_a.csv").read_text() == "depth,value\n7,70\n"
    assert (project / "figures" / "figure_a.csv").read_text() == before


@pytest.mark.slow
def test_one_wrong_parameter_stops_every_figure_before_it_runs(project):
    (project / "notebooks" / "profiles" / "paper" / "figure_b.yaml").write_text("depth: 0\n")
    touch(project / "notebooks" / "figure_a.ipynb")
    touch(project / "notebooks" / "profiles" / "paper" / "figure_b.yaml")
    result = make(project, "figures")
    assert result.returncode == 2
    assert "figure_b: depth is 0, expected a whole number of at least 1." in result.stderr
    assert "Traceback" not in result.stderr
    assert "running" not in result.stdout


def test_an_unknown_profile_and_settings_for_all_stop_with_a_sentence(finished):
    result = make(finished, "figures", "PROFILE=papre")
    assert result.returncode == 2
    assert "There is no profile 'papre', the profiles are: quick paper released" in result.stderr
    assert not (finished / ".build" / "papre").exists()
    result = make(finished, "figures", "SET=depth=3")
    assert result.returncode == 2
    assert "SET and PARAMETERS change one run of one figure" in result.stderr


@pytest.mark.slow
def test_a_failed_run_keeps_the_old_figure_and_is_tried_again(project):
    (project / "notebooks" / "profiles" / "paper" / "figure_a.yaml").write_text("depth: 32\nmode: fails\n")
    touch(project / "notebooks" / "profiles" / "paper" / "figure_a.yaml")
    result = make(project, "figures")
    assert result.returncode == 2
    assert "RuntimeError: the loss is not finite" in result.stderr
    assert "figure_a stopped in its cell In [5]; .build/paper/figure_a.unfinished.ipynb" in result.stderr
    assert "lib/project/notebooks.py" not in result.stderr  # the notebook's traceback, not the runner's
    assert (project / "figures" / "figure_a.csv").read_text() == "depth,value\n16,160\n"
    assert would_run(project, "figures") == ["figure_a"]


# --- What make is given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "EPOCH=3"], "There is no variable EPOCH: did you mean EPOCHS?"),
        (["figures", "NON_LIN=relu"], "There is no variable NON_LIN: here it is ACTIVATION"),
        (["help", "PROFIL=quick"], "There is no variable PROFIL: did you mean PROFILE?"),
        (["clean", "x'y=3"], "There is no variable x'y, but ACTIVATION, "),
        (["figures", "DEPTH=3"], "make figures does not take DEPTH (a parameter of a figure goes into SET"),
        (["figure_b", "SEED=3"], 'make figure_b SET="seed=3"'),
        (["checkpoints", "LR=4e-2"], "make checkpoints does not take LR: the runs of checkpoints/sweep.csv have"),
        (["train", "DEPTH="], "DEPTH is empty: give it a value, or leave it out"),
        (["figure_a", "PARAMETERS="], "PARAMETERS is empty: give it a value, or leave it out"),
        (["train", "GIVEN="], "There is no variable GIVEN, but ACTIVATION, "),
        (["env", "LOCKED=yes"], "LOCKED=yes makes an environment, and PYTHON is one that is used as it is"),
        (["env", "LOCKED=no"], "LOCKED is 'no', expected yes, or leave it out"),
    ],
)
def test_a_variable_that_would_be_lost_stops_every_target(finished, arguments, sentence):
    result = make(finished, "-n", *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stdout == ""


def test_values_out_of_the_environment_change_no_run(finished):
    result = make(finished, "-n", "train", "SEED=1", DEPTH="4", PROFILE="quick", SET="epochs=1")
    *said, command = result.stdout.splitlines()
    assert shlex.split(command)[1:] == ["-m", "lib.project.runs", "--profile", "paper", "SEED=1"]
    assert {line.split()[0] for line in said} == {"DEPTH", "PROFILE", "SET"}


@pytest.mark.parametrize("target", ["train", "checkpoints", "stack", "train-depths"])
def test_every_value_of_a_training_comes_from_the_command_line(finished, target):
    values = {"EPOCHS": "3", "DEVICE": "cuda:1", "THREADS": "2", "FAMILIES": "a", "LAUNCH": "srun", "STACK": "--most 8"}
    calm, changed = make(finished, "-n", target), make(finished, "-n", target, **values)
    *said, commands = changed.stdout.rpartition("does\n")
    assert commands == calm.stdout
    assert all(f"{name} is in the environment" in said[0] for name in values)


@pytest.mark.slow
def test_values_go_on_to_the_letter_and_no_shell_reads_them(project):
    odd = 'it\'s "$(touch P)" `touch P`; touch P\ntouch P #'
    result = make(project, "-n", "train", f"ACTIVATION={odd}", f"SET=x={odd}", "SMOOTH_INIT=True", "LR=4e-2")
    words = shlex.split(result.stdout)[1:]
    kept = odd.replace("\n", " ")
    assert sorted(words[4:]) == sorted([f"--set=x={kept}", f"ACTIVATION={kept}", "SMOOTH_INIT=True", "LR=4e-2"])
    for arguments in (
        ["figure_a", f"SET=depth={odd}"],
        ["figure_a", f"PARAMETERS={odd}"],
        ["figures", f"PROFILE={odd}"],
    ):
        assert make(project, *arguments).returncode == 2
    launched = make(project, "train", "DEPTH=3", f"LAUNCH=echo {shlex.quote(odd)}").stdout
    assert launched.startswith(f"{kept} {sys.executable} -m lib.project.runs")
    assert not (project / "P").exists()


def test_notebooks_that_are_no_figures_are_left_out_with_a_sentence(project):
    notebooks_folder = project / "notebooks"
    write = toy_project.write_notebook
    for name in ("my notes", "a: b", "c#", "$(shell touch P)", "`touch P`;", "clean"):
        write(notebooks_folder, name, "from lib import checks, paths")
    text = (notebooks_folder / "figure_b.ipynb").read_text()
    (notebooks_folder / "Untitled.ipynb").write_text(text.replace('"parameters"', '"other"'))
    (notebooks_folder / "profiles" / "paper" / "figure_a (copy): 1.yaml").write_text("depth: 0\n")
    for folder in ("checkpoints", "figures"):
        (project / folder / "x: $(shell touch P) #.csv").write_text("")
    assert would_run(project, "figures") == []
    assert would_run(project, "figures", "PROFILE=quick") == ["figure_a", "figure_b"]
    result = make(project, "help")
    assert result.returncode == 0
    (said,) = (line for line in result.stdout.splitlines() if "Left out of notebooks/" in line)
    for name in ("my notes", "a: b", "c#", "$(shell touch P)", "`touch P`;", "clean", "Untitled"):
        assert f"{name}.ipynb" in said
    assert make(project, "clean").returncode == 0
    assert not (project / "P").exists()


def test_names_of_files_are_data_to_make(project, capsys):
    names = ["a b.csv", "$(shell touch P).csv", "copy (1)#.csv", "lr=1.csv", "a; touch P;.csv", "a: b.csv", "%.csv"]
    files = [project / "checkpoints" / name for name in names]
    for file in files:
        file.write_text("")
    stamp = project / ".build" / "paper" / "figure_a.ipynb"
    rules = dependencies.make_rules(stamp, files)
    stamp.with_suffix(".d").write_text(rules.replace(f"{project}/", ""))
    unwatched = capsys.readouterr().err
    assert [name for name in names if repr(str(project / "checkpoints" / name)) in unwatched] == names[3:]
    for file in files:
        os.utime(file, (1e9, 1e9))
    assert would_run(project, "figures") == []
    for file in files[:3]:
        touch(file)
        assert would_run(project, "figures") == ["figure_a"]
        os.utime(file, (1e9, 1e9))
    for file in files:  # a file that is gone makes the figure anew, and is no error
        file.unlink()
    assert would_run(project, "figures") == ["figure_a"]
    assert not (project / "P").exists()


def test_a_path_of_an_interpreter_with_a_space_is_refused(finished, tmp_path):
    (tmp_path / "a b").symlink_to(sys.executable)
    result = make(finished, "figures", f"PYTHON={tmp_path / 'a b'}")
    assert result.returncode == 2
    assert f"The path of PYTHON has a space, {tmp_path / 'a b'}, which make takes for two words" in result.stderr


def test_an_interpreter_without_the_packages_is_refused(project, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    touch(project / "notebooks" / "profiles" / "paper" / "figure_a.yaml")
    for interpreter, lacks in ((bare, "torch torchvision"), (tmp_path / "none", "everything: it does not run")):
        result = make(project, "figures", f"PYTHON={interpreter}")
        assert result.returncode == 2
        assert f"PYTHON is {interpreter}, which lacks {lacks}" in result.stderr
        assert make(project, "help", f"PYTHON={interpreter}").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "whom"),
    [(signal.SIGINT, "all"), (signal.SIGKILL, "all"), (signal.SIGTERM, "make"), (signal.SIGTERM, "runner")],
)
def test_an_interrupted_run_is_not_taken_for_done_and_ends(project, stop, whom):
    (project / "notebooks" / "profiles" / "paper" / "figure_a.yaml").write_text("mode: sleeps\n")
    shutil.rmtree(project / ".build")
    command = ["make", "figure_a", f"PYTHON={sys.executable}"]
    process = subprocess.Popen(
        command,
        cwd=project,
        env=toy_project.make_environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background ignore SIGINT, and their processes would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    staged = project / ".build" / "paper" / "figure_a.outputs" / "figure_a.csv"
    until = time.monotonic() + 120
    while not staged.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert staged.exists()
    family = psutil.Process(process.pid).children(recursive=True)
    (runner,) = (each for each in family if "lib.project.notebooks" in each.cmdline())
    assert runner.children()  # the kernel
    if whom == "all":
        os.killpg(process.pid, stop)
    else:
        os.kill(process.pid if whom == "make" else runner.pid, stop)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    if stop != signal.SIGKILL:
        assert [line for line in said.splitlines() if "make" not in line] == [
            "Interrupted; nothing of this run is kept."
        ]
    assert psutil.wait_procs(family, timeout=30)[1] == []
    with locks.hold_lock(project / ".build" / "locks" / "paper_figure_a", "the lock is held"):
        pass
    assert (project / "figures" / "figure_a.csv").read_text() == "depth,value\n16,160\n"
    assert not (project / ".build" / "paper" / "figure_a.ipynb").exists()
    assert would_run(project, "figures") == ["figure_a", "figure_b"]


@pytest.mark.slow
def test_an_error_hidden_in_an_explorer_fails_the_run(project):
    result = make(project, "figure_b", "SET=mode=hides")
    assert result.returncode == 2
    assert "figure_b hides an error in an explorer: KeyError: 'slider'" in result.stderr
    assert not (project / "figures" / "custom").exists()


@pytest.mark.slow
def test_a_dead_kernel_is_said_in_a_sentence(project):
    result = make(project, "figure_b", "SET=mode=dies")
    assert result.returncode == 2
    assert "figure_b: its Python process died" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_stored_notebooks_are_normalised_and_show_no_warning(project):
    notebook = project / "notebooks" / "figure_b.ipynb"
    before = notebook.stat().st_mtime
    command = [sys.executable, "-m", "lib.project.notebooks", "execute", "figure_b"]
    settings = {
        "cwd": project,
        "env": toy_project.make_environment(MPLBACKEND="agg"),
        "capture_output": True,
        "text": True,
    }
    result = subprocess.run(command, **settings)
    assert result.stdout == "figure_b: stored anew\n", result.stderr
    stored = notebook.read_text()
    assert '"execution_count": 5' in stored
    assert "widget" not in stored.replace("ipywidgets", "")
    assert str(project) not in stored
    assert notebook.stat().st_mtime == before  # so no figure is out of date
    assert not (project / "figures" / "custom").exists()
    assert subprocess.run(command, **settings).stdout == "figure_b: unchanged\n"
    notebook.write_text(stored.replace('\\"plain\\"  #', '\\"warns\\"  #'))
    result = subprocess.run(command, **settings)
    assert result.returncode == 1
    assert "figure_b wrote to stderr, which a stored notebook must not show:\na warning" in result.stderr


@pytest.mark.slow
def test_nbval_writes_into_the_build_folder_and_skips_what_needs_the_images(project, tmp_path):
    (project / "lib" / "tests").mkdir()
    for module in ("stored_notebooks", "shipped"):
        shutil.copy(paths.ROOT / "lib" / "tests" / f"{module}.py", project / "lib" / "tests")
    (project / "lib" / "cifar").mkdir()
    for module in ("__init__", "dataset"):
        shutil.copy(paths.ROOT / "lib" / "cifar" / f"{module}.py", project / "lib" / "cifar")
    needing = project / "notebooks" / "figure_b.ipynb"
    needing.write_text(needing.read_text().replace('"config"', '"config", "needs-cifar10"'))
    options = ["-rs", "--nbval-lax", "--nbval-current-env"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "notebooks/figure_a.ipynb", "notebooks/figure_b.ipynb"],
        cwd=project,
        env=toy_project.make_environment(CIFAR10_ROOT=str(tmp_path / "nowhere")),
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[-1].startswith("5 passed, 5 skipped"), result.stdout
    assert f"CIFAR-10 is not in {tmp_path / 'nowhere'}" in result.stdout
    assert (project / ".build" / "nbval" / "figure_a.csv").exists()
    assert not (project / "figures" / "custom").exists()


def test_jupyterlab_saves_a_notebook_only_if_it_is_told_to():
    (folder,) = re.findall(r"--LabApp.app_settings_dir=(\S+)", (paths.ROOT / "Makefile").read_text())
    schemas = Path(sysconfig.get_path("data")) / "share" / "jupyter" / "lab" / "schemas"
    documents, _ = settings_utils.get_settings(
        str(paths.ROOT / folder), str(schemas), "", schema_name="@jupyterlab/docmanager-extension:plugin"
    )
    assert documents["schema"]["properties"]["autosave"]["default"] is False
