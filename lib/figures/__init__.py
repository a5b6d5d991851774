"""Figures, each with a module of its notebook's name: configuration, computation, picture and fits."""
