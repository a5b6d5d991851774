"""The commands of the Makefile: running notebooks, checking parameters, the report."""
