"""The PL condition: its constant is the smallest ratio over all residuals, and is 0 for narrow networks."""

import dataclasses

import pytest
import torch

from lib.dense import lojasiewicz
from lib.dense.network import Data, NetworkConfig, initialise
from lib.dense.training import train

CONFIG = NetworkConfig(
    depth=5, width=9, dimension=3, output_dimension=2, hidden_dimension=6, samples=6, convention="eq3",
    initialisation="iid", initial_V="drawn", train_ends=True, seed=1,
)  # fmt: skip


def record_start(config, y):
    """The record of the initial weights with these targets."""
    weights, data = initialise(config)
    (record,) = train(config, 0.1, 0, start=(weights, Data(data.x, y)))
    return record


def test_the_kernel_gives_the_ratio_for_any_targets():
    weights, data = initialise(CONFIG)
    kernel = lojasiewicz.tangent_kernel(CONFIG, weights, data.x)
    for seed in range(3):
        record = record_start(CONFIG, torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).double())
        r = record.solver.residual
        expected = 4 * CONFIG.loss_scale**2 * torch.einsum("ia,iajb,jb->", r, kernel, r) / record.loss
        assert lojasiewicz.ratio(record) == pytest.approx(float(expected), rel=1e-10)
        assert sum(lojasiewicz.shares(record).values()) == pytest.approx(1)


def test_the_constant_is_the_smallest_ratio_over_residuals():
    weights, data = initialise(CONFIG)
    mu = lojasiewicz.constant(CONFIG, weights, data.x)
    kernel = lojasiewicz.tangent_kernel(CONFIG, weights, data.x).reshape(12, 12)
    worst = torch.linalg.eigh(kernel).eigenvectors[:, 0].reshape(6, 2)
    output = record_start(CONFIG, torch.zeros(6, 2)).solver.residual
    assert lojasiewicz.ratio(record_start(CONFIG, output - worst)) == pytest.approx(mu, rel=1e-6)
    for seed in range(5):
        other = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).double()
        assert lojasiewicz.ratio(record_start(CONFIG, output - other)) > mu


@pytest.mark.parametrize(("width", "positive"), [(1, False), (2, False), (3, True), (12, True)])
def test_at_the_start_the_constant_is_positive_from_a_width_of_n_minus_d_on(width, positive):
    """n - d = 3; the closed form is that of the module's docstring."""
    config = dataclasses.replace(CONFIG, width=width, initialisation="weight-tied", initial_V="zero")
    weights, data = initialise(config)
    S = torch.nn.functional.gelu(data.x @ weights.W[0, :3] / 6**0.5)
    closed = 4 / 6 * torch.linalg.eigvalsh(2 * data.x @ data.x.mT + S @ S.mT / width)[0]
    mu = lojasiewicz.constant(config, weights, data.x)
    assert mu == pytest.approx(max(0.0, float(closed)), abs=1e-12)
    assert (mu > 1e-9) is positive


def test_a_network_without_trained_ends_is_refused():
    config = NetworkConfig(depth=2, width=2, dimension=2, samples=2)
    weights, data = initialise(config)
    with pytest.raises(ValueError, match="train_ends=True"):
        lojasiewicz.constant(config, weights, data.x)
