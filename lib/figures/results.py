"""How every room writes and shows its figure and its tables."""

import io
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from lib import paths, tables
from lib.figures.style import SAVED

Data = dict[str, tables.Table]  # the tables that a room computes, by the names of their CSV files


def render_png(figure: Figure) -> bytes:
    """The figure as PNG, without metadata, so that the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context(SAVED):
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def show(figure: Figure) -> None:
    """Show a figure in a notebook, sharp on dense screens."""
    from IPython.display import display

    display(_render_image(figure))


def _render_image(figure: Figure):
    from IPython.display import Image

    return Image(render_png(figure), width=round(figure.get_figwidth() * 110))


def save(name: str, figure: Figure, data: Mapping[str, tables.Table] | None = None) -> list[Path]:
    """Write ``<name>.pdf`` and ``.png``, and a CSV for each table in ``data`` (by file name without ending).

    The folder is `paths.figures_output`. The same figure gives the same bytes. A ``<name>.yaml`` in it holds the
    parameters of the former results: it is renamed to ``<name>.yaml.old``.
    """
    folder = paths.figures_output()
    with suppress(FileNotFoundError):
        (folder / f"{name}.yaml").rename(folder / f"{name}.yaml.old")
    written = []
    with mpl.rc_context(SAVED):
        for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            target = folder / f"{name}.{ending}"
            paths.write_atomically(target, partial(figure.savefig, format=ending, metadata=metadata))
            written.append(target)
    written += [tables.write_csv(folder / f"{stem}.csv", table) for stem, table in (data or {}).items()]
    return written


def show_anew(figure: Figure, handle=None):
    """Show a figure in a notebook in place of the one that ``handle`` stands for; returns the handle."""
    from IPython.display import display

    if handle is None:
        return display(_render_image(figure), display_id=True)
    handle.update(_render_image(figure))
    return handle
