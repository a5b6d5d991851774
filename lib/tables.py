"""Tidy tables: a dict of equally long columns, one observation a row; CSV, Markdown and LaTeX."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib import digits, paths


class TableError(ValueError):
    """A file that is no whole table; the sentence names it and the line."""


Table = Mapping[str, Sequence[Any] | np.ndarray]

# What parameters' values are called in pictures, menus and tables, if it is not what they are.
WORDS = {
    "iid": "i.i.d.",
    "gaussian-process": "Gaussian process",
    "gelu": "GELU",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "released": "released scaling",
    "eq3": "scaling of eq. (3)",
    "mean-field": "mean-field scaling",
}


def word(value: Any) -> Any:
    """What a value of a parameter is called where people read it."""
    return WORDS.get(value, value)


def from_rows(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()) -> dict[str, list]:
    """A table from observations, each a dict with the same keys; of these columns, which are then there without
    observations too."""
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in columns or (rows[0] if rows else ())}


def rows(table: Table) -> list[dict[str, Any]]:
    """The observations of a table, each a dict: the way back from `from_rows`."""
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _text(value: Any) -> str:
    """The shortest text that reads back as the same number."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, float | np.floating):
        return repr(float(value))
    return str(value)


def write_csv(path: Path, table: Table, exact: bool = False) -> Path:
    """Write a table, atomically, with one header line and floats to `digits.DIGITS` digits, in full precision if
    ``exact``: records of what nobody can run again."""
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path.name}: the columns have lengths {lengths}, expected equal ones.")

    def write_rows(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            columns = (table if exact else digits.table(table)).values()
            writer.writerows([_text(value) for value in row] for row in zip(*columns, strict=True))

    paths.write_atomically(path, write_rows)
    return path


def read_csv(path: Path, ended: bool = False) -> dict[str, np.ndarray]:
    """Read a table; a column becomes ints, floats or truth values if every entry reads as one, else text.

    Raises TableError for a file that is no whole table. With ``ended`` the last line must have an end, as `write_csv`
    gives it one: a table that was cut inside its last entry has none.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, rows = next(reader, None), []
            for row in filter(None, reader):  # but for blank lines
                rows.append(row)
                if len(row) != len(header):
                    found = (
                        f"line {reader.line_num} has {len(row)} entries, expected {len(header)} as in the first line"
                    )
                    raise _not_whole(path, found)
        except (csv.Error, UnicodeDecodeError) as error:
            raise _not_whole(path, f"line {reader.line_num} cannot be read ({error})") from error
        if header is None:
            raise _not_whole(path, "it is empty, expected a first line that names the columns")
        if ended and not _ends_with_a_line(path):
            raise _not_whole(path, f"line {reader.line_num} has no end")
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return {name: _values(column) for name, column in zip(header, columns, strict=True)}


def _not_whole(path: Path, found: str) -> TableError:
    return TableError(f"{paths.short(Path(path))}: {found}; it was cut off or edited, so restore or mend it.")


def _ends_with_a_line(path: Path) -> bool:
    return Path(path).read_bytes()[-1:] in (b"\n", b"\r")


def _values(column: Sequence[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.array(column, dtype=kind)
        except ValueError:
            continue
    if set(column) <= {"True", "False"}:
        return np.array([entry == "True" for entry in column])
    return np.array(column, dtype=str)


def select(table: Table, **values: Any) -> dict[str, np.ndarray]:
    """The rows in which every named column has the given value."""
    keep = np.all([np.asarray(table[name]) == value for name, value in values.items()], axis=0)
    return {name: np.asarray(column)[keep] for name, column in table.items()}


def markdown(table: Table) -> str:
    """The table in Markdown, entries as `str` shows them (a bar in an entry is escaped)."""
    lines = [table, ["---"] * len(table), *zip(*table.values(), strict=True)]
    return "\n".join("| " + " | ".join(str(entry).replace("|", r"\|") for entry in line) + " |" for line in lines)


def latex(table: Table) -> str:
    """The table as a LaTeX ``tabular`` with booktabs rules; the characters % and & and _ are escaped."""

    def row(entries: Iterable[Any]) -> str:
        texts = (str(entry).replace("±", r"$\pm$") for entry in entries)
        for special in "%&_":
            texts = [text.replace(special, "\\" + special) for text in texts]
        return " & ".join(texts) + r" \\"

    body = "\n".join(row(entries) for entries in zip(*table.values(), strict=True))
    columns = "l" * len(table)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{row(table)}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"
    )


def write(folder: Path, name: str, table: Table, readable: Table) -> list[Path]:
    """Write ``<name>.csv``, and the table as it is read as ``<name>.md`` and ``.tex``."""
    written = [write_csv(folder / f"{name}.csv", table)]
    for ending, text in (("md", markdown(readable)), ("tex", latex(readable))):
        written.append(folder / f"{name}.{ending}")
        paths.write_content(written[-1], text + "\n")
    return written
