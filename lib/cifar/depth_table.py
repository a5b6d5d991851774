"""The table ``checkpoints/depth_limit.csv``: how far networks of depth L are from those of depth 2L.

`lib.cifar.depth_limit` trains the networks and adds rows. Nothing is trained here."""

from collections.abc import Iterable

import numpy as np

from lib import locks, paths, tables
from lib.cifar.records import read_table

TABLE = "depth_limit.csv"
KIND = ("activation", "normalisation", "stem_activation")  # columns that identify a kind of networks
FAMILY = (*KIND, "seed", "epochs")  # and those that identify a family
# The kinds: the paper's networks, and others that differ in one or two of the three.
KINDS = (
    ("gelu", "batch", "relu"),
    ("gelu", "batch", "gelu"),
    ("gelu", "none", "relu"),
    ("gelu", "none", "gelu"),
    ("gelu", "group", "gelu"),
    ("relu", "batch", "gelu"),
)
MEASURES = ("weights_conv1", "weights_conv2", "hidden_states", "logits")
DOUBLE_DEPTH, LAST_BIT = "double depth", "last bit"  # what a network is compared with


def read() -> dict[str, np.ndarray]:
    """One row for each family, epoch, depth and comparison. The losses of a row compared with "last bit" are the
    copy's. No rows without the file. Raises TableError if the file is not such a table."""
    numbers = ("seed", "epochs", "depth", "epoch", "flow_time", "train_loss", "test_accuracy", "steepness", *MEASURES)
    found = read_table(TABLE, (*FAMILY, "compared_with", *numbers))
    if wrong := [name for name in numbers if len(found[name]) and found[name].dtype.kind not in "if"]:
        raise tables.TableError(f"checkpoints/{TABLE}: an entry of {wrong[0]} is no number; restore the file.")
    return found


def add(new: Iterable[dict]) -> None:
    """Write rows into the table. They replace rows of the same family, epoch, depth and comparison. If another process
    writes, wait for it. Raises what `read` raises."""
    names = (*FAMILY, "epoch", "depth", "compared_with")
    with locks.wait_for_lock(paths.BUILD / "locks" / TABLE, f"Another process is writing checkpoints/{TABLE}."):
        rows = {tuple(row[name] for name in names): row for row in (*tables.rows(read()), *new)}
        tables.write_csv(paths.CHECKPOINTS / TABLE, tables.from_rows(list(rows.values())))
