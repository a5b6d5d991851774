"""The report holds every executed notebook, its pictures and working links, and no explorers."""

import re
from html.parser import HTMLParser

import nbformat
import pytest

from lib import parameters, paths
from lib.project import report
from lib.tests.stored_notebooks import read_notebook

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

FORMULAS = r"""## How $\max_k\|Z_k\|_F<\frac1L$ falls

Inline $a<b_1$, and

$$\Big\|\frac{\partial\ell}{\partial A}\Big\|^2\ge\mu\,\ell,$$

\begin{align}x&=1\\y&=2\end{align}

but `$HOME` and $x^$ stay what they are."""
HOSTILE = """<script>steal()</script> <img src="https://tracker.example/x.png" onerror="steal()">
<iframe src="https://frame.example"></iframe> <style>body { display: none }</style>

[press](javascript:steal()) <a href="JavaScript:steal()">me</a> <a href="data:text/html,steal()">and me</a>

<table style="background: url(https://tracker.example/y.png)"><tr><td>kept</td></tr></table>"""


def make_notebook(title, link, *cells, explorer=False):
    code = nbformat.v4.new_code_cell("print(1 < 2)", execution_count=1)
    code.outputs = [nbformat.v4.new_output("display_data", data={"image/png": PIXEL})]
    cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\nSee [the other]({link})."), code, *cells]
    if explorer:
        cells.append(nbformat.v4.new_markdown_cell("**Explore.** The cell below moves."))
        cells.append(nbformat.v4.new_code_cell("explore_me()", metadata={"tags": ["explorer"]}))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(parameters, "list_figures", lambda: ["alpha", "beta", "figure_2"])
    folder = tmp_path / "paper"
    folder.mkdir()
    nbformat.write(make_notebook("Alpha < beta", "figure_2.ipynb", explorer=True), folder / "alpha.ipynb")
    mathematics = nbformat.v4.new_markdown_cell(FORMULAS)
    hostile = nbformat.v4.new_code_cell("show()", execution_count=2)
    hostile.outputs = [nbformat.v4.new_output("display_data", data={"text/html": HOSTILE})]
    cells = mathematics, nbformat.v4.new_markdown_cell(HOSTILE), hostile
    nbformat.write(make_notebook("Figure $2^L$", "../checkpoints/README.md", *cells), folder / "figure_2.ipynb")
    nbformat.write(make_notebook("On $2^L$", "alpha.ipynb"), folder / "beta.ipynb")
    nbformat.write(make_notebook("Not a figure", "x"), folder / "explore_depth.ipynb")
    return report.render("paper")


@pytest.mark.slow
def test_sections_come_in_reading_order_with_a_list_of_contents(document):
    assert re.findall(r'<section id="(\w+)">', document) == ["figure_2", "alpha", "beta"]
    assert '<li><a href="#alpha">Alpha &lt; beta</a></li>' in document


def test_it_opens_with_the_readme_and_its_gallery_as_contents(document):
    opening, _, contents = document.partition("<nav>")
    contents = contents.partition("</nav>")[0]
    question = re.findall(r"^# (.*)", (paths.ROOT / "README.md").read_text(), re.MULTILINE)[0]
    assert re.search(rf"<h1[^>]*>{re.escape(question)}</h1>", opening)
    assert opening.count('src="data:image/png') == 2
    (row,) = [row for row in contents.split("<tr>") if "figure_2" in row]
    assert re.search(r'<a href="#figure_2">\s*<img [^>]*src="data:image/png', row)
    assert "<!--" not in document
    assert '<a href="#figure_2">Figure' not in contents  # the gallery has a row for it


def test_links_between_notebooks_lead_to_sections_and_none_is_broken(document):
    assert '<a href="#figure_2">the other</a>' in document
    anchors = set(re.findall(r' id="([^"]+)"', document))
    local = {target for target in re.findall(r'href="#([^"]+)"', document)}
    assert {"figure_2", "alpha"} <= local
    assert local <= anchors
    assert not re.search(r'href="(?!#|https://)', document)


def test_the_document_holds_pictures_and_no_explorers(document):
    assert document.count(f"data:image/png;base64,{PIXEL}") == 3
    assert "explore_me" not in document
    assert "The cell below moves" not in document
    assert "<details" in document


class Loads(HTMLParser):
    """Finds what a browser would fetch or run when it opens the document, and all tags."""

    def __init__(self, document):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "background", "style"):
                right = value.startswith("data:image/png")
            else:
                right = not name.startswith("on") if name != "href" else value.startswith(("#", "https://"))
            if not right:
                self.found.append((tag, name, value))


def test_the_document_runs_nothing_and_loads_nothing(document):
    seen = Loads(document)
    assert seen.found == []
    assert {"script", "iframe", "link", "object"}.isdisjoint(seen.tags)
    assert document.count("<style>") == 1
    assert "url(" not in document
    assert document.count("<td>kept</td>") == 2


def test_formulas_are_mathml_in_text_titles_and_the_list_of_contents(document):
    body = re.sub(r"(?<=base64,)[^\"]*", "", document.partition("</style>")[2])
    (entry,) = re.findall(r'<li><a href="#beta">(.*?)</a></li>', body)
    assert entry == 'On <math display="inline"><mrow><msup><mn>2</mn><mi>L</mi></msup></mrow></math>'
    assert re.search(r"<h1[^>]*>Figure <math.*</math></h1>", body)
    assert re.search(r"<h2[^>]*>How <math.*<mfrac>.*</math> falls</h2>", body)
    assert body.count('<math display="block">') == 2
    assert "<mtable" in body
    assert "‖" in body
    assert "<code>$HOME</code>" in body
    assert set(re.findall(r"[^<>]*\$[^<>]*", body)) == {"$HOME"}
    assert "<code>x^</code>" in body


def test_every_formula_of_the_notebooks_can_be_read():
    cells = [cell for name in parameters.list_names() for cell in read_notebook(name).cells]
    text = report._markdown("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))
    assert text.count("<math") > 100
    assert re.findall(r".*<code>[^<]*[\\^].*|<m[a-z]+>[^<]*\\.*", text) == []


def test_without_executed_notebooks_it_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    assert report.main(["--profile", "released"]) == 2
    assert "`make figures PROFILE=released` makes them" in capsys.readouterr().err
