"""Deep residual networks trained towards neural ODEs: the light package behind the notebooks.

The modules, from the mathematics outwards:

    the network     network, activations, conventions, gaussian_process
    gradients       adjoint (PyTorch, the reference), compiled and engine (C++ in csrc)
    training        training (depth L), limit (infinite depth)
    what is shown   distances, experiments (Figures 1 and 2), theory, counterexample, claims
    CIFAR-10        cifar, convnet, cifar_training, checkpoints, records, runs, cifar_results,
                    cifar_smoothness, stacked_layers and stacked_training (many runs on a GPU, CUDA in csrc)
    pictures        plots, plots_theory, pictures (of the explorers), tables, digits (what is written of a number)
    explorers       explorers (the widgets), live (their threads), depths and trained (what they show)
    the house       paths, checks, parameters, notebooks (the runner), report, bench,
                    verify (whether the tables are reproduced), locked (what versions made them)

Reference: Marion, Wu, Sander, Biau, "Implicit regularization of deep residual networks towards neural
ODEs", ICLR 2024 (arXiv 2309.01213). Equation and section numbers in this package are the paper's.
"""

__version__ = "0.1.0"
