"""The compiled engine: the sources in csrc, and what finds, builds and loads it."""
