"""The mixture of discretised logistics."""

import pytest
import torch

import pgen
from pgen.distributions import DiscretizedLogistic, DiscretizedLogisticMixture

LEVELS = 17


def mixture(levels=LEVELS, scale=0.0):
    draws = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DiscretizedLogisticMixture(draws[0], draws[1], draws[2] + scale, levels)


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("scale", [-6.0, 0.0, 2.0])
def test_masses_of_the_levels_sum_to_one(levels, scale):
    fn = mixture(levels, scale)
    masses = fn.log_prob(fn.enumerate_support()).exp().sum(0)
    torch.testing.assert_close(masses, torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)


def test_masses_are_differences_of_the_distribution_function():
    fn = mixture()
    x = torch.tensor([0.0, 5.0, 11.0, LEVELS - 1], dtype=torch.float64)
    y, half = 2 * x / (LEVELS - 1) - 1, 1 / (LEVELS - 1)

    def below(edge):
        return torch.sigmoid((edge.unsqueeze(-1) - fn.loc) / fn.log_scale.exp())

    upper = torch.where(x.unsqueeze(-1) == LEVELS - 1, torch.ones(1, dtype=torch.float64), below(y + half))
    lower = torch.where(x.unsqueeze(-1) == 0, torch.zeros(1, dtype=torch.float64), below(y - half))
    torch.testing.assert_close(fn.log_prob(x).exp(), (fn.logits.softmax(-1) * (upper - lower)).sum(-1))


def test_far_levels_keep_finite_masses_and_gradients_in_float32():
    loc = torch.tensor([[1.0]], requires_grad=True)
    log_scale = torch.tensor([[-7.0]], requires_grad=True)
    fn = DiscretizedLogisticMixture(torch.zeros(1, 1), loc, log_scale, 256)
    log_prob = fn.log_prob(torch.tensor([0.0]))
    assert -2.3e3 < log_prob.item() < -2.1e3  # (2 - 1 / 255) e^7 = 2189 nats away
    log_prob.sum().backward()
    assert bool(torch.isfinite(loc.grad).all()) and float(loc.grad) != 0 and bool(torch.isfinite(log_scale.grad).all())


def test_samples_follow_the_masses():
    from pyro.distributions.testing.gof import multinomial_goodness_of_fit

    fn = mixture(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = fn.sample((20_000,))
    assert x.shape == (20_000, 4)
    masses = fn.log_prob(fn.enumerate_support()).exp()
    for column in range(4):
        counts = torch.bincount(x[:, column].long(), minlength=5)
        assert multinomial_goodness_of_fit(masses[:, column], counts, total_count=len(x)) > 1e-4
    torch.testing.assert_close(x.double().mean(0), fn.mean, rtol=0, atol=0.05)


def test_start_puts_centres_at_quantiles():
    x = torch.arange(LEVELS).double().repeat(3, 1).T  # (17, 3): every level once
    outputs = DiscretizedLogistic((3,), LEVELS, num_components=2).start(x).reshape(3, 6)
    torch.testing.assert_close(outputs[0, 2:4], torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_start_looks_at_some_of_many_data():
    x = torch.arange(2.0).repeat(1_000_000).expand(9, -1).reshape(-1, 1)  # more than torch takes quantiles of
    outputs = DiscretizedLogistic((1,), 2, num_components=2).start(x)
    torch.testing.assert_close(outputs[2:4], torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_values_off_the_grid_are_refused():
    vae = pgen.models.VAE((3,), 2, (4,), likelihood="discretized_logistic_mixture", num_classes=LEVELS)
    x = torch.zeros(6, 3)
    x[4, 1] = 2.5
    with pytest.raises(ValueError, match=r"data row 4 holds 2\.5, outside the support .*lower_bound=0, upper_bound=16"):
        vae.fit(x, progress=False)
    with pytest.raises(ValueError, match="`num_components` goes with"):
        pgen.models.VAE((3,), likelihood="bernoulli", num_components=3)
    with pytest.raises(ValueError, match="`num_classes` is missing"):
        pgen.models.VAE((3,), likelihood="discretized_logistic_mixture")
