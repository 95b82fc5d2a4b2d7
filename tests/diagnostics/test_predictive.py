import numpy as np
import pytest
import torch
from diagnostics_fakes import make_draws

from pgen.diagnostics import ppc, to_datatree


def tree_of(observed, replicates):
    draws = make_draws(
        {"mu": torch.zeros(5)},
        torch.zeros(5),
        torch.zeros(5),
        observed={"y": observed},
        log_likelihood={"y": torch.zeros(5, 3)},
    )
    return to_datatree(draws, predictive={"y": replicates})


@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_the_mean_under_a_flat_prior_says_one_half_whatever_the_data(offset):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(12, generator=generator, dtype=torch.float64) * 3 + offset
    mu = y.mean() + torch.randn(4000, 1, generator=generator, dtype=torch.float64) / 12**0.5  # posterior, unit noise
    replicates = mu + torch.randn(4000, 12, generator=generator, dtype=torch.float64)
    check = ppc(tree_of(y, replicates))
    assert check.ppp.sel(site="y", statistic="mean").item() == pytest.approx(0.5, abs=0.03)
    assert check.ppp.sel(site="y", statistic="sd").item() < 0.001  # the data spread three times as much
    assert check.replicated.sizes["draw"] == 4000
    np.testing.assert_allclose(check.observed.sel(site="y", statistic="max"), float(y.max()))


def test_ties_count_half():
    check = ppc(tree_of(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])))
    ppp = {name: check.ppp.sel(site="y", statistic=name).item() for name in check.statistic.values}
    assert ppp == {"mean": 0.5, "sd": 0.25, "min": 0.75, "max": 0.5}
    assert check.ppp_se.sel(site="y", statistic="min").item() == pytest.approx((0.75 * 0.25 / 2) ** 0.5)


def test_statistics_of_ones_own():
    tree = tree_of(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([[0.0, 2.0, 3.0]]))
    check = ppc(tree, {"median": np.median})
    assert check.observed.item() == 1.0 and check.replicated.item() == 2.0 and check.ppp.item() == 1.0
    with pytest.raises(ValueError, match="`statistics` is 'medan', which is unknown"):
        ppc(tree, ("medan",))


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="2 NaN"):
        ppc(tree_of(torch.tensor([0.0, torch.nan, torch.nan]), torch.zeros(4, 3)))
    with pytest.raises(ValueError, match=r"`predictive\['y'\]` should have shape \(S, 3\), as observed, got \(4, 3, 1\)"):
        ppc(tree_of(torch.zeros(3), torch.zeros(4, 3, 1)))
    with pytest.raises(ValueError, match="pass predictive= to to_datatree"):
        ppc(to_datatree(make_draws({"a": torch.zeros(3)}, torch.zeros(3), torch.zeros(3))))
