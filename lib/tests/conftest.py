"""Settings of every unit test: no window, and one thread, since the networks are small."""

import matplotlib
import torch

matplotlib.use("agg")
torch.set_num_threads(1)
