"""A room for each figure: its configuration, what it computes, draws, tabulates and concludes."""
