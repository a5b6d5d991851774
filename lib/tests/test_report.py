"""The report holds every executed notebook, its pictures and working links, and no explorers."""

import re

import nbformat
import pytest

from lib import parameters, paths, report

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook(title, link, explorer=False):
    code = nbformat.v4.new_code_cell("print(1 < 2)", execution_count=1)
    code.outputs = [nbformat.v4.new_output("display_data", data={"image/png": PIXEL})]
    cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\nSee [the other]({link})."), code]
    if explorer:
        cells.append(nbformat.v4.new_markdown_cell("**Explore.** The cell below moves."))
        cells.append(nbformat.v4.new_code_cell("explore_me()", metadata={"tags": ["explorer"]}))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(parameters, "figures", lambda: ["alpha", "figure_2"])
    folder = tmp_path / "paper"
    folder.mkdir()
    nbformat.write(notebook("Alpha < beta", "figure_2.ipynb", explorer=True), folder / "alpha.ipynb")
    nbformat.write(notebook("Figure 2", "../checkpoints/README.md"), folder / "figure_2.ipynb")
    nbformat.write(notebook("Not a figure", "x"), folder / "explore_depth.ipynb")
    return report.render("paper")


def test_sections_come_in_reading_order_with_a_list_of_contents(document):
    assert re.findall(r'<section id="(\w+)">', document) == ["figure_2", "alpha"]
    assert '<li><a href="#alpha">Alpha &lt; beta</a></li>' in document


def test_links_between_notebooks_lead_to_sections_and_none_is_broken(document):
    assert '<a href="#figure_2">the other</a>' in document
    anchors = set(re.findall(r' id="([^"]+)"', document))
    local = {target for target in re.findall(r'href="#([^"]+)"', document)}
    assert {"figure_2", "alpha"} <= local
    assert local <= anchors
    assert not re.search(r'href="(?!#|https://)', document)


def test_pictures_are_inside_and_explorers_are_not(document):
    assert document.count(f"data:image/png;base64,{PIXEL[:20]}") == 2
    assert "explore_me" not in document
    assert "The cell below moves" not in document
    assert "<details" in document


def test_without_executed_notebooks_it_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    assert report.main(["--profile", "released"]) == 2
    assert "`make figures PROFILE=released` makes them" in capsys.readouterr().err
