"""One HTML document from the executed notebooks of a profile, to read or to mail: ``make report``.

It begins as the README does, and the README's gallery is its table of contents. Every picture is inside the file and
every formula is MathML, so neither a kernel nor a network connection is needed. Code is folded. Explorer cells, which
need a kernel, are left out. Links from one notebook to another lead to its section. Everything that could run or load
something when the document is opened (raw HTML, scripts, addresses other than links) is removed.
"""

import argparse
import base64
import functools
import html
import io
import re
import sys
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

import latex2mathml.converter
import nbformat
import nh3
from jinja2 import pass_context
from jinja2.runtime import Context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from lib import commands, parameters, paths
from lib.project import notebooks

# The order of the paper's figures, then of others. Notebooks that are not listed come after these.
ORDER = (
    "claims",
    "figure_1_left",
    "figure_1_right",
    "figure_2",
    "figure_3",
    "table_1",
    "figure_4",
    "smoothness",
    "rounding",
    "stem",
)
TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{%- block input_group -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- endblock input_group -%}
"""
STYLE = """
body { max-width: 52rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
nav { border: 1px solid #ddd; border-radius: 6px; padding: .5rem 1rem; margin: 1rem 0 2rem; }
nav ol { columns: 2; padding-left: 1.2rem; margin: .3rem 0; }
nav td img { width: 200px; min-width: 120px; }
section { border-top: 2px solid #0072B2; margin-top: 3rem; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: #f6f8fa; padding: .6rem; border-radius: 6px; font-size: .85rem; line-height: 1.35; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; }
details.code > summary { color: #777; cursor: pointer; font-size: .8rem; }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link, .prompt { display: none; }
a { color: #0072B2; }
math[display="block"] { margin: .8rem 0; overflow-x: auto; }
"""
MATHML = {"math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mstyle", "mpadded", "mphantom", "menclose", "mtable"}
MATHML |= {"mtr", "mtd", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "mover", "munder", "munderover"}
MATHML_ATTRIBUTES = {"display", "displaystyle", "mathvariant", "stretchy", "fence", "form", "separator", "accent"}
MATHML_ATTRIBUTES |= {"width", "height", "depth", "minsize", "maxsize", "linethickness", "columnalign", "notation"}
ATTRIBUTES = {
    **nh3.ALLOWED_ATTRIBUTES,
    **dict.fromkeys(MATHML, MATHML_ATTRIBUTES),
    "*": {"class", "id", "title"},
    "details": {"open"},
}
LINK = re.compile(r'href="(?P<target>[^"#:]+)"')
PICTURE = re.compile(r'src="(?P<file>figures/[\w.-]+\.png)"')
GALLERY = "\n## Gallery\n"
WIDTHS = {"first": 1660, "gallery": 400}  # pixels of a picture, twice the width at which it is shown


def find_executed(profile: str) -> list[Path]:
    """The executed notebooks of a profile, in reading order.

    Raises FileNotFoundError if there is none.
    """
    folder = paths.BUILD / profile
    known = set(parameters.list_figures())
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if path.stem in known}
    if not found:
        raise FileNotFoundError(
            f"There is no executed notebook of the profile {profile!r}: `make figures PROFILE={profile}` makes them."
        )
    first = [name for name in ORDER if name in found]
    return [found[name] for name in first + [name for name in found if name not in first]]


def find_title(notebook: nbformat.NotebookNode, otherwise: str) -> str:
    """The first heading of a notebook, without the #; ``otherwise`` if it has none."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return otherwise


def convert_formula(formula: str, display: str = "inline") -> str:
    """A LaTeX formula as MathML ("inline" or "block"). If it cannot be converted, its LaTeX text."""
    try:
        return latex2mathml.converter.convert(formula.replace(r"\|", "‖"), display=display)
    except Exception:  # the package's errors have no common class
        return f"<code>{html.escape(formula)}</code>"


class _MathMLRenderer(IPythonRenderer):
    """Render Markdown as nbconvert does, with formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return convert_formula(body)

    def block_math(self, body: str) -> str:
        return convert_formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return convert_formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def _markdown(text: str, attachments: dict | None = None) -> str:
    renderer = _MathMLRenderer(escape=False, attachments=attachments, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(text)


@pass_context
def _markdown_cell(context: Context, source: str) -> str:
    return _markdown(source, context.get("cell", {}).get("attachments"))


def sanitise(body: str, without: Set[str] = frozenset()) -> str:
    """Remove from HTML everything that could run or load something, and the tags in ``without``.

    There remain no scripts, styles, frames or event handlers. Links lead to web pages or files, and pictures are inside
    the document.
    """

    def keep(tag: str, attribute: str, value: str) -> str | None:
        if attribute in ("src", "cite", "href"):
            inside = re.match(r"data:image/(png|jpeg|gif|svg\+xml);base64,", value) is not None
            link = tag == "a" and not value.startswith("data:")
            return value if link or (tag == "img" and inside) else None
        return value

    tags = (nh3.ALLOWED_TAGS | MATHML) - without
    schemes = {"http", "https", "mailto", "data"}
    return nh3.clean(body, tags=tags, attributes=ATTRIBUTES, attribute_filter=keep, url_schemes=schemes, link_rel=None)


def _remove_explorers(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without its explorers, which need a kernel, and without the text cells before them."""

    def keep(cell: nbformat.NotebookNode) -> bool:
        lead = cell.cell_type == "markdown" and cell.source.startswith("**Explore.**")
        return not lead and "explorer" not in cell.metadata.get("tags", [])

    return nbformat.from_dict({**notebook, "cells": [cell for cell in notebook.cells if keep(cell)]})


def _link_sections(body: str, sections: Sequence[str]) -> str:
    """Make links to a notebook lead to its section, and links to other files of the repository plain text."""

    def replace(match: re.Match) -> str:
        target = Path(match["target"])
        if target.suffix == ".ipynb" and target.stem in sections:
            return f'href="#{target.stem}"'
        return f'title="{html.escape(match["target"])} in the repository"'

    return LINK.sub(replace, body)


def _embed_pictures(body: str, width: int) -> str:
    """Put the project's pictures into the document, with at most that width in pixels."""
    return PICTURE.sub(lambda match: f'src="{_encode_picture(paths.ROOT / match["file"], width)}"', body)


@functools.cache
def _encode_picture(path: Path, width: int) -> str:
    with Image.open(path) as picture:
        picture.thumbnail((width, 10 * width))
        buffer = io.BytesIO()
        picture.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_front(names: Sequence[str]) -> tuple[str, str]:
    """The README's text before its gallery, and the gallery with links to the sections of these names."""
    first, _, rest = (paths.ROOT / "README.md").read_text(encoding="utf-8").partition(GALLERY)
    parts = {"first": first, "gallery": rest.partition("\n## ")[0]}
    for part, text in parts.items():
        body = _embed_pictures(_markdown(text), WIDTHS[part])
        parts[part] = _link_sections(sanitise(body), names)
    return parts["first"], parts["gallery"]


def render(profile: str) -> str:
    """The document, as HTML text."""
    exporter, sections, headings = HTMLExporter(raw_template=TEMPLATE), [], {}
    exporter.register_filter("markdown2html", _markdown_cell)
    files = find_executed(profile)
    names = [path.stem for path in files]
    for path in files:
        notebook = nbformat.read(path, as_version=4)
        body, _ = exporter.from_notebook_node(_remove_explorers(notebook))
        seconds = notebook.metadata.get(notebooks.SECONDS)
        took = f"<p>Made in {seconds:.0f} s.</p>\n" if seconds is not None else ""
        sections.append(f'<section id="{path.stem}">\n{took}{_link_sections(sanitise(body), names)}\n</section>')
        headings[path.stem] = sanitise(_markdown(find_title(notebook, path.stem)), without={"p", "a"}).strip()
    first, gallery = render_front(names)
    question = html.unescape(re.search(r"<h1[^>]*>(.*?)</h1>", first)[1])
    others = [name for name in names if f'href="#{name}"' not in gallery]
    entries = "".join(f'<li><a href="#{name}">{headings[name]}</a></li>' for name in others)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(question)}</title>",
            f"<style>{STYLE}</style>\n</head>\n<body>",
            first,
            f"<p>This document holds the executed notebooks of the profile {html.escape(profile)}, with folded code. A "
            "picture without a link belongs to a figure that the profile does not have. The numbers on this page are "
            "those of the paper profile.</p>",
            f"<nav>{gallery}{f'<ol>{entries}</ol>' if entries else ''}</nav>",
            *sections,
            "</body>\n</html>\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lib.project.report [--profile paper]``: write the document and print its path."""
    parser = argparse.ArgumentParser(prog="python -m lib.project.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", default=parameters.PAPER, help="profile of the executed notebooks (default: paper)"
    )
    profile = parser.parse_args(arguments).profile
    misuses = (FileNotFoundError, paths.CannotWrite, paths.NotAClone)
    return commands.exit_code(
        partial(_command, profile), "Interrupted; no report is written.", failures=(), misuses=misuses
    )


def _command(profile: str) -> None:
    target = paths.BUILD / f"report-{profile}.html"
    paths.check_clone()
    paths.check_writable(target.parent)
    document = render(profile)
    paths.write_content(target, document)
    print(f"wrote {paths.shorten(target)} ({len(document.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
