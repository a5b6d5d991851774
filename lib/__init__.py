"""Deep residual networks trained towards neural ODEs: the light package behind the notebooks.

Reference: Marion, Wu, Sander, Biau, "Implicit regularization of deep residual networks towards neural
ODEs", ICLR 2024 (arXiv 2309.01213). Equation and section numbers in this package are the paper's.
"""

__version__ = "0.1.0"
