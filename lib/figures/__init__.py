"""A room for each figure: its config, what it computes, how it is drawn."""
