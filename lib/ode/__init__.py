"""A residual network seen as an ODE: solvers through its layers, states computed backwards, fewer or more layers.

Nothing here knows a particular network: a branch f(h, Z) and the stacked parameters of the layers are enough.
"""
