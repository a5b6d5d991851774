"""A residual network seen as an ODE: solvers through its layers, states computed backwards, fewer or more layers.

It works for every network that is given by a branch f(h, Z) and the stacked parameters of its layers.
"""
