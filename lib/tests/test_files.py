"""Whole files, folders that can be written, and an installed package."""

import errno
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import toy_project

from lib import paths


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(draft):
        draft.write_text("half")
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        paths.write_atomically(path, fail)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("table.csv", "old")]
    paths.write_atomically(path, lambda draft: draft.write_text("new"))
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("table.csv", "new")]


def test_two_drafts_of_one_file_do_not_mix_even_if_processes_have_one_number(tmp_path):
    path = tmp_path / "table.csv"
    with paths.draft(path) as first, paths.draft(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its block ended last
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask_whatever_the_writer_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with paths.draft(tmp_path / "weights") as draft:
            draft.unlink()
            draft.touch(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".csv")
    paths.write_atomically(path, lambda draft: draft.write_text("whole"))
    assert path.read_text() == "whole"


def test_leftovers_of_killed_processes_go_and_the_drafts_of_others_stay(tmp_path):
    old, new = tmp_path / ".runs.csv.123.draft", tmp_path / ".4f.draft"
    for left in (old, new):
        left.touch()
    os.utime(old, (time.time() - 2 * paths.STALE,) * 2)
    paths.write_atomically(tmp_path / "runs.csv", lambda draft: draft.write_text(""))
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", new.name}


def test_a_full_disk_is_said_in_a_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fill_disk(draft):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))

    with pytest.raises(
        paths.CannotWrite, match=rf"^The folder {tmp_path} .* \(No space left on device\): free some space\.$"
    ):
        paths.write_atomically(path, fill_disk)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    paths.check_writable(tmp_path / "folder", tmp_path / "to" / "be" / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert list((tmp_path / "folder").iterdir()) == []
    file, gone = tmp_path / "a_file", tmp_path / "a_link"
    file.touch()
    gone.symlink_to(tmp_path / "not mounted")
    for place in (file, gone):
        sentence = rf"^The folder {place} cannot be written \(.*\): make it writable, or work in a copy"
        for below in (place, place / "quick"):
            with pytest.raises(paths.CannotWrite, match=sentence):
                paths.check_writable(tmp_path, below)
        for write in (paths.make_folder, lambda folder: paths.write_atomically(folder / "x", lambda draft: None)):
            with pytest.raises(paths.CannotWrite, match=sentence):
                write(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said_before_anything_is_computed(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(paths.CannotWrite, match="Permission denied"):
        paths.check_writable(tmp_path / "figures")


@pytest.mark.slow
def test_a_wheel_has_every_module_and_the_sources_of_the_engine(tmp_path):
    root, code = tmp_path / "project", "from setuptools import build_meta; build_meta.build_wheel('.')"
    pytest.importorskip("setuptools", minversion="77")
    kept = shutil.ignore_patterns("__pycache__")
    shutil.copytree(paths.ROOT / "lib", root / "lib", ignore=kept)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.ROOT / file, root)
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lib/")}
    tests = paths.ROOT / "lib" / "tests"
    modules = [path for path in (paths.ROOT / "lib").rglob("*.py") if tests not in path.parents]
    assert found == {str(path.relative_to(paths.ROOT)) for path in [*modules, *paths.CSRC.iterdir()]}


def test_nothing_is_written_beside_an_installed_package(tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    site.mkdir()
    (toy_project.write(tmp_path / "toy") / "lib").rename(site / "lib")
    before = sorted(site.rglob("*"))
    code = (
        "from lib import paths\n"
        "folders = paths.figures_output(), paths.BUILD, paths.CHECKPOINTS, paths.engines_folder()\n"
        "print(*folders, paths.cifar10_root(), sep='\\n')\n"
        "paths.check_clone()\n"
    )
    environment = toy_project.make_environment(
        PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(tmp_path / "cache"), CIFAR10_ROOT="images"
    )
    environment.pop("FIGURES_OUTPUT", None)

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True)

    done = run("-c", code)
    home = work / "neural-ode-regularization"
    expected = [home / "figures" / "custom", home / ".build", home / "checkpoints"]
    expected += [tmp_path / "cache" / "neural-ode-regularization" / "engine", work / "images"]
    assert done.stdout.splitlines() == list(map(str, expected))
    sentence = f"The package is installed in {site}, which has no notebooks: run this command in a clone"
    assert sentence in done.stderr
    command = run("-m", "lib.project.notebooks", "run", "figure_a")
    assert command.returncode == 1
    assert command.stderr.startswith(sentence)
    assert sorted(site.rglob("*")) == before
