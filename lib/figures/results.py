"""How a figure and its tables are written and shown: in one way, by every room."""

import io
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from lib import paths, tables
from lib.figures.style import SAVED

Data = dict[str, tables.Table]  # what a room computes: its tables, by the names of their CSV files


def png(figure: Figure, dpi: float = 150) -> bytes:
    """The figure as PNG, without a date or a program's name in it."""
    buffer = io.BytesIO()
    with mpl.rc_context(SAVED):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def show(figure: Figure) -> None:
    """Show a figure in a notebook, sharp on dense screens."""
    from IPython.display import display

    display(_image(figure))


def _image(figure: Figure):
    from IPython.display import Image

    return Image(png(figure), width=round(figure.get_figwidth() * 110))


def save(name: str, figure: Figure, data: Mapping[str, tables.Table] | None = None) -> list[Path]:
    """Write ``<name>.pdf`` and ``.png``, and a CSV for each table in ``data`` (by file name without ending).

    The folder is `paths.figures_output`. The same figure gives the same bytes. A ``<name>.yaml`` that is there holds
    the parameters of the numbers that are replaced: it is moved aside, to ``<name>.yaml.old``.
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
        return display(_image(figure), display_id=True)
    handle.update(_image(figure))
    return handle
