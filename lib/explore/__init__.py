"""Explorers, wired from functions that exist without them."""
