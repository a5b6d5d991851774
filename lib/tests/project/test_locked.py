"""The constraints file of `make env LOCKED=yes` fits the package's requirements and the tracked figures."""

import re

import pytest
from packaging.utils import canonicalize_name

from lib import paths, tables
from lib.project import locked


def test_every_declared_package_is_locked_to_a_version_that_is_asked_for():
    versions = locked.read()
    for requirement in locked.read_declared():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_it_names_packages_and_versions_alone():
    lines = locked.CONSTRAINTS.read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages == sorted(packages, key=lambda line: line.split("==")[0])
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.!]*", line) for line in packages)


def test_it_holds_what_made_the_tracked_figures():
    """`lib.project.bench --figures` notes the PyTorch with which the seconds of the tracked figures were measured."""
    (machine,) = set(tables.read_csv(paths.FIGURES / "figure_seconds.csv")["machine"].tolist())
    assert f"PyTorch {locked.read()['torch']}" in machine


@pytest.mark.slow
def test_the_file_is_written_from_the_environment_that_runs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locked, "CONSTRAINTS", tmp_path / "folder" / "constraints.txt")
    monkeypatch.setattr(locked.paths, "ROOT", paths.ROOT)
    assert locked.main() == 0
    assert locked.read() == locked.versions()
    assert {"torch", "numpy", "safetensors"} <= set(locked.read())
    written = locked.CONSTRAINTS.stat().st_mtime_ns
    assert locked.main() == 0
    assert locked.CONSTRAINTS.stat().st_mtime_ns == written  # a new time would make the environment anew
