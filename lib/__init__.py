"""Companion of Marion, Wu, Sander, Biau, "Implicit regularization of deep residual networks towards neural ODEs".

    checks commands            checks of values, how a command ends
    paths locks parameters     places and files, locks, the parameters of notebooks
    tables digits              tables, rounded to the digits that are the same on every machine
    parallel                   independent computations on several processes
    activations measures rates activations, smoothness along the depth, slopes
    dense       the fully connected network of eq. (3): weights, training, large-depth limit
    cifar       the convolutional network of Section 5.2: images, training, checkpoints, records
    blocks      residual networks of any block (section 4.3)
    ode         the layers of a network as an ODE: solvers, states computed backwards
    engine      the compiled engine (C++ and CUDA)
    figures     a room for each figure, of the same name as its notebook: config, computation, drawing, claims
    explore     the explorers: the only package that knows widgets
    project     the Makefile's commands: notebooks, runs, report, verify

``dense`` and ``cifar`` do not import each other; ``figures`` never trains on CIFAR-10; nothing imports ``project``.
Equation and section numbers are the paper's (ICLR 2024, arXiv 2309.01213). The names that most users need are here.
"""

import importlib
import sys

__version__ = "0.1.0"


def _say_interrupted(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # a command, `python -m lib....`: Ctrl-C may end it while it imports
    sys.excepthook = _say_interrupted

# Imported on first use, so that `import lib` is fast.
EXPORTS = {
    "Data": "lib.dense.network",
    "NetworkConfig": "lib.dense.network",
    "initialise": "lib.dense.network",
    "train": "lib.dense.training",
    "progress": "lib.dense.training",
    "SuccessiveDistance": "lib.dense.distances",
    "fit_slope": "lib.rates",
    "von_neumann_ratio": "lib.measures",
    "CifarConfig": "lib.cifar.config",
    "load": "lib.cifar.checkpoints",
    "resample": "lib.cifar.resampling",
    "successive_distances": "lib.blocks.distances",
}


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(
            f"lib has no {name!r}, expected a package in its docstring or one of: {', '.join(EXPORTS)}."
        )
    return getattr(importlib.import_module(EXPORTS[name]), name)
