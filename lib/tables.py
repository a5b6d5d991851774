"""Tidy tables: a dict of columns of equal length, with one observation in each row; CSV, Markdown and LaTeX."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib import digits, paths


class TableError(ValueError):
    """The file is not a complete table. The message names the file and the line."""


Table = Mapping[str, Sequence[Any] | np.ndarray]

# Names of parameters' values in pictures, menus and tables, if they differ from the values.
WORDS = {
    "iid": "i.i.d.",
    "gaussian-process": "Gaussian process",
    "gelu": "GELU",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "silu": "SiLU",
    "released": "released scaling",
    "eq3": "scaling of eq. (3)",
    "mean-field": "mean-field scaling",
}


def word(value: Any) -> Any:
    """The name of a parameter's value for readers."""
    return WORDS.get(value, value)


def from_rows(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()) -> dict[str, list]:
    """A table from observations, each a dict with the same keys. Given ``columns`` select and order its columns, and
    are there without observations too."""
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in columns or (rows[0] if rows else ())}


def rows(table: Table) -> list[dict[str, Any]]:
    """The observations of a table, each a dict: the inverse of `from_rows`."""
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _text(value: Any) -> str:
    """The shortest text that reads back as the same number."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, float | np.floating):
        return repr(float(value))
    return str(value)


def write_csv(path: Path, table: Table, exact: bool = False) -> Path:
    """Write a table, atomically, with one header line and floats to `digits.DIGITS` digits. With ``exact`` floats are
    in full precision, for results that cannot be computed again."""
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path.name}: the columns have lengths {lengths}, expected equal lengths.")

    def write_rows(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            columns = (table if exact else digits.round_table(table)).values()
            writer.writerows([_text(value) for value in row] for row in zip(*columns, strict=True))

    paths.write_atomically(path, write_rows)
    return path


def read_csv(path: Path, ended: bool = False) -> dict[str, np.ndarray]:
    """Read a table. A column becomes ints, floats or truth values if all its entries are such, else text.

    Raises TableError if the file is not a complete table. With ``ended``, the last line must end with a newline, as
    `write_csv` writes it: a table that was cut off inside its last entry does not.
    """
    return read_numbered(path, ended)[0]


def read_numbered(path: Path, ended: bool = False) -> tuple[dict[str, np.ndarray], list[int]]:
    """The table of `read_csv`, and the number of each row's line in the file, which may have blank lines."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, rows, numbers = next(reader, None), [], []
            for row in filter(None, reader):  # without blank lines
                rows.append(row)
                numbers.append(reader.line_num)
                if len(row) != len(header):
                    found = (
                        f"line {reader.line_num} has {len(row)} entries, expected {len(header)} as in the first line"
                    )
                    raise _describe_damage(path, found)
        except (csv.Error, UnicodeDecodeError) as error:
            raise _describe_damage(path, f"line {reader.line_num} cannot be read ({error})") from error
        if header is None:
            raise _describe_damage(path, "it is empty, expected a first line that names the columns")
        if ended and not _ends_with_newline(path):
            raise _describe_damage(path, f"line {reader.line_num} has no end")
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return {name: _convert_column(column) for name, column in zip(header, columns, strict=True)}, numbers


def _describe_damage(path: Path, found: str) -> TableError:
    return TableError(f"{paths.shorten(Path(path))}: {found}; it was cut off or edited, so restore or correct it.")


def _ends_with_newline(path: Path) -> bool:
    return Path(path).read_bytes()[-1:] in (b"\n", b"\r")


def _convert_column(column: Sequence[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.array(column, dtype=kind)
        except (ValueError, OverflowError):  # the latter for a whole number that int64 cannot hold
            continue
    if set(column) <= {"True", "False"}:
        return np.array([entry == "True" for entry in column])
    return np.array(column, dtype=str)


def select(table: Table, **values: Any) -> dict[str, np.ndarray]:
    """The rows in which each of these columns has the given value: all rows without a value."""
    matching = [np.asarray(table[name]) == value for name, value in values.items()]
    keep = np.all(matching, axis=0) if matching else slice(None)
    return {name: np.asarray(column)[keep] for name, column in table.items()}


def group(table: Table, *columns: str) -> dict[Any, dict[str, np.ndarray]]:
    """The rows by their value in a column, or by the tuple of their values in several, in order of appearance."""
    values = [np.asarray(table[name]).tolist() for name in columns]
    keys = dict.fromkeys(zip(*values, strict=True))
    found = {key: select(table, **dict(zip(columns, key, strict=True))) for key in keys}
    return found if len(columns) > 1 else {key[0]: rows for key, rows in found.items()}


def markdown(table: Table) -> str:
    """The table in Markdown, with entries as `str` writes them. A bar in an entry is escaped."""
    lines = [table, ["---"] * len(table), *zip(*table.values(), strict=True)]
    return "\n".join("| " + " | ".join(str(entry).replace("|", r"\|") for entry in line) + " |" for line in lines)


def latex(table: Table) -> str:
    """The table as a LaTeX ``tabular`` with booktabs rules. The characters %, & and _ are escaped."""

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
    """Write ``table`` as ``<name>.csv``, and ``readable``, the table for readers, as ``<name>.md`` and ``.tex``."""
    written = [write_csv(folder / f"{name}.csv", table)]
    for ending, text in (("md", markdown(readable)), ("tex", latex(readable))):
        written.append(folder / f"{name}.{ending}")
        paths.write_content(written[-1], text + "\n")
    return written
