"""The compiled engine: its sources are in csrc, and `build` finds, builds and loads it."""
