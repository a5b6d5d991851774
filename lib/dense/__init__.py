"""The paper's fully connected residual network (eq. (3)): weights, training, large-depth limit."""
