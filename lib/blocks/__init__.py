"""Any residual block: is h_{k+1} = h_k + (1/L) f(h_k, Z_{k+1}) still a neural ODE after training (section 4.3)?

    class MyBlock(torch.nn.Module): ...                       # forward(h) keeps the shape of h
    table = successive_distances(MyBlock, depths=[8, 16, 32, 64], x=x, y=y, iterations=60)
    print(fit_slope(table["depth"], table["max_distance"]))   # -1: its layers sample a Lipschitz function of s = k/L

`block` makes a block and checks whether it can be a layer, `network` stacks layers, `training` trains one depth, and
`distances` compares depths. `catalogue` has blocks by name.
"""

from lib.blocks.catalogue import make_block
from lib.blocks.distances import DistancesConfig, compare_depths, distance_steps, successive_distances
from lib.blocks.network import BlockNetwork
from lib.blocks.training import gaussian_data, train
from lib.checks import Divergence
from lib.rates import fit_slope

__all__ = [
    "BlockNetwork",
    "DistancesConfig",
    "Divergence",
    "compare_depths",
    "distance_steps",
    "fit_slope",
    "gaussian_data",
    "make_block",
    "successive_distances",
    "train",
]
