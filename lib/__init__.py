"""Companion of Marion, Wu, Sander, Biau, "Implicit regularization of deep residual networks towards neural ODEs".

    checks paths parameters    values, places and files, the parameters of notebooks
    tables digits              tables, and the digits that another machine finds too
    activations measures rates functions, smoothness along the depth, rates in it
    dense       the fully connected network of eq. (3): weights, training, large-depth limit
    cifar       the convolutional network of Section 5.2: images, training, checkpoints, records
    blocks      any residual block of one's own (section 4.3)
    ode         the layers of a network as an ODE: solvers, states computed backwards, fewer layers
    engine      the compiled engine (C++ and CUDA) and what it costs
    figures     a room for each figure, of the same name as its notebook: config, computation, drawing, claims
    explore     the explorers: the only package that knows widgets
    project     the Makefile's commands: notebooks, runs, report, verify

``dense`` and ``cifar`` do not import each other; ``figures`` never trains on CIFAR-10; nothing imports ``project``.
Equation and section numbers are the paper's (ICLR 2024, arXiv 2309.01213). What most users need is here by name.
"""

import importlib
import sys

__version__ = "0.1.0"


def _say_interrupted(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # a command, `python -m lib....`, which Ctrl-C may end while it still imports
    sys.excepthook = _say_interrupted

# Fetched on first use, so that `import lib` costs nothing.
EXPORTS = {
    "Data": "lib.dense.network",
    "NetworkConfig": "lib.dense.network",
    "initialise": "lib.dense.network",
    "train": "lib.dense.training",
    "progress": "lib.dense.training",
    "SuccessiveDistance": "lib.dense.distances",
    "fit_slope": "lib.measures",
    "von_neumann_ratio": "lib.measures",
    "CifarConfig": "lib.cifar.config",
    "load": "lib.cifar.checkpoints",
    "resample": "lib.cifar.resampling",
    "successive_distances": "lib.blocks.distances",
}


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"lib has no {name!r}: it has the packages of its docstring and {', '.join(EXPORTS)}.")
    return getattr(importlib.import_module(EXPORTS[name]), name)
