"""Divergences against known answers, and two-sample tests at their level."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

import pgen
from pgen.evaluation.divergences import jensen_shannon, kl, mmd, sliced_wasserstein, wasserstein
from pgen.models import VAE, Gaussian


def draw(n, dim, shift=0.0, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def within(found, truth, errors=4.0):
    return abs(found.value - truth) < errors * found.std_error


# --- between densities ---------------------------------------------------------------------------------------------------


def test_samples_far_from_zero_lose_nothing():
    x, y = (torch.randn(40, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    near, far = (mmd(x + c, y + c, permutations=0).value for c in (0.0, 1e7))
    assert far == pytest.approx(near, abs=1e-6)


def test_kl_of_gaussians_is_the_closed_form():
    p = MultivariateNormal(torch.tensor([0.0, 1.0, -1.0]), torch.diag(torch.tensor([1.0, 0.5, 2.0])))
    q = MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.3)
    truth = float(torch.distributions.kl_divergence(p, q))
    found = kl(p, q, 20_000, seed=1)
    assert within(found, truth) and found.std_error < 0.03 and found.kind == "exact"
    assert not within(kl(q, p, 20_000, seed=1), truth)  # it is not symmetric
    assert kl(p, q, 50, seed=1).value == kl(p, q, 50, seed=1).value != kl(p, q, 50, seed=2).value


def test_the_standard_error_is_that_of_the_mean():
    p, q = Normal(0.0, 1.0), Normal(1.0, 1.0)  # log p - log q = 1/2 - x: variance 1, KL 1/2
    assert kl(p, q, 10_000).std_error == pytest.approx(0.01, rel=0.05)
    values = torch.tensor([kl(p, q, 100, seed=s).value for s in range(200)])
    assert float(values.mean()) == pytest.approx(0.5, abs=0.03) and float(values.std()) == pytest.approx(0.1, rel=0.2)


def test_kl_of_fitted_models_and_toys():
    target = pgen.data.toy.banana()
    x = target.sample(2000, seed=1)
    full, diagonal = Gaussian((2,)), Gaussian((2,), "diagonal")
    full.fit(x), diagonal.fit(x)
    truth = MultivariateNormal(full.loc, scale_tril=full.distribution().scale_tril)
    other = MultivariateNormal(diagonal.loc, scale_tril=diagonal.log_scale.exp().diag())
    assert within(kl(full, diagonal, 5000), float(torch.distributions.kl_divergence(truth, other).detach()))
    gap = kl(target, full, 5000)
    held_out = target.sample(5000, seed=2)
    assert gap.value == pytest.approx(-target.entropy - full.log_prob(held_out).mean, abs=0.1)


def test_bounds_make_a_divergence_a_bound_or_an_estimate():
    x = torch.bernoulli(torch.full((40, 3), 0.5), generator=torch.Generator().manual_seed(0))
    vae = VAE((3,), 2, (4,))
    vae.fit(x, steps=2, progress=False)
    exact = Independent(Bernoulli(torch.full((3,), 0.5)), 1)
    assert kl(vae, exact, 50, num_samples=5).kind == "lower_bound"
    assert kl(exact, vae, 50, num_samples=5).kind == "upper_bound"
    assert jensen_shannon(exact, vae, 50, num_samples=5).kind == "estimate"


def test_jensen_shannon_against_a_grid():
    p, q = Normal(0.0, 1.0), Normal(1.5, 0.7)
    t = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    a, b = p.log_prob(t).exp(), q.log_prob(t).exp()
    m = (a + b) / 2
    truth = float(torch.trapezoid(0.5 * (torch.xlogy(a, a / m) + torch.xlogy(b, b / m)), t))
    found = jensen_shannon(p, q, 20_000, seed=3)
    assert within(found, truth) and found.std_error < 0.01
    assert within(jensen_shannon(q, p, 20_000, seed=4), truth)
    assert jensen_shannon(p, p, 100).value == pytest.approx(0.0, abs=1e-12)


def test_supports_that_differ():
    one, two = torch.distributions.Uniform(0.0, 1.0, validate_args=False), torch.distributions.Uniform(0.0, 2.0)
    assert kl(one, two, 100).value == pytest.approx(math.log(2), abs=1e-6)
    assert kl(two, one, 100).value == math.inf
    # p = U(0, 1), q = U(0, 2): 1/2 log(4/3) + 1/2 (1/2 log(2/3) + 1/2 log 2)
    truth = 0.5 * math.log(4 / 3) + 0.25 * (math.log(2 / 3) + math.log(2))
    assert within(jensen_shannon(one, two, 20_000), truth)


def test_what_cannot_be_compared_says_so():
    x = torch.bernoulli(torch.full((40, 1), 0.5), generator=torch.Generator().manual_seed(0))
    vae, gaussian = VAE((1,), 2, (4,)), Gaussian((1,))
    vae.fit(x, steps=1, progress=False), gaussian.fit(x)
    with pytest.raises(ValueError, match="one score is a log-mass, the other a log-density"):
        kl(vae, gaussian, 10, num_samples=2)
    with pytest.raises(ValueError, match=r"`p` gives log-densities of shape \(10, 2\) to 10 draws; use Independent"):
        kl(Normal(torch.zeros(2), 1.0), Normal(torch.zeros(2), 1.0), 10)
    with pytest.raises(pgen.NotAvailable, match="float does not sample"):
        kl(3.0, Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="`q` should be a fitted model"):
        kl(Normal(0.0, 1.0), 3.0)
    with pytest.raises(ValueError, match=r"^`q` cannot score the draws, of event shape \(\): .* \(Boolean\(\)\) .*0.5\)$"):
        kl(Normal(0.0, 1.0), torch.distributions.Bernoulli(0.5, validate_args=True), 10)
    with pytest.raises(ValueError, match=r"^`p` cannot score the draws"):  # draws of q, which p scores
        jensen_shannon(torch.distributions.Bernoulli(0.5, validate_args=True), Normal(0.0, 1.0), 10)
    with pytest.raises(ValueError, match="`n` should be a positive integer"):
        jensen_shannon(Normal(0.0, 1.0), Normal(0.0, 1.0), 0)


# --- between samples -----------------------------------------------------------------------------------------------------


def brute_mmd(x, y, h):
    k = lambda a, b: math.exp(-0.5 * float((a - b).square().sum()) / h**2)  # noqa: E731
    n, m = len(x), len(y)
    inside = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    outside = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return inside + outside - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_is_its_definition_and_its_expectation_a_closed_form():
    x, y = draw(7, 3, seed=1), draw(5, 3, 1.0, seed=2)
    assert mmd(x, y, bandwidth=1.3, permutations=0).value == pytest.approx(brute_mmd(x, y, 1.3), abs=1e-12)
    assert mmd(x, y, permutations=0).p_value is None
    # One dimension, N(0, 1) against N(d, 1), bandwidth h: 2 h / sqrt(h^2 + 2) (1 - exp(-d^2 / (2 (h^2 + 2)))).
    truth = 2 / math.sqrt(3) * (1 - math.exp(-1 / 6))
    found = [mmd(draw(300, 1, seed=s), draw(200, 1, 1.0, seed=s + 500), bandwidth=1.0, permutations=0) for s in range(60)]
    values = torch.tensor([f.value for f in found])
    assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(60))
    assert float(torch.tensor([f.std_error for f in found]).mean()) == pytest.approx(float(values.std()), rel=0.3)


QUICK = [mmd, partial(sliced_wasserstein, num_projections=10, resamples=1)]


@pytest.mark.parametrize("test", QUICK, ids=["mmd", "sliced"])
def test_p_values_hold_their_level_and_find_what_is_there(test):
    p = [test(draw(30, 2, seed=s), draw(20, 2, seed=s + 1000), permutations=99).p_value for s in range(200)]
    rejected = sum(v <= 0.1 for v in p)
    assert 6 <= rejected <= 36  # 20 expected, sd 4.2: fails once in 2000 by chance
    assert all(1 / 100 <= v <= 1 for v in p)
    assert test(draw(60, 2), draw(60, 2, 1.0, seed=1), permutations=99).p_value == pytest.approx(0.01)


def test_one_dimension_agrees_with_scipy():
    from scipy.stats import wasserstein_distance

    x, y = draw(40, 1, seed=1), draw(25, 1, 0.4, seed=2)
    truth = wasserstein_distance(x[:, 0], y[:, 0])
    for found in (wasserstein(x, y), sliced_wasserstein(x, y)):
        assert found.value == pytest.approx(truth, abs=1e-10)
    large = wasserstein(draw(2000, 1, seed=1), draw(2000, 1, 1.0, seed=2), permutations=20)
    assert within(large, 1.0)
    assert large.std_error == pytest.approx(math.sqrt(2 / 2000), rel=0.3)  # the error of a difference of means


def test_sliced_distance_of_a_shift_is_its_mean_projection():
    x = draw(200, 2)
    found = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), num_projections=2000, permutations=0, resamples=2)
    assert found.value == pytest.approx(5 * 2 / math.pi, rel=0.03)  # the mean of |cos| is 2 / pi


def test_exact_distance_in_the_plane():
    x = draw(30, 2)
    shifted = x[torch.randperm(30, generator=torch.Generator().manual_seed(1))] + torch.tensor([3.0, 4.0])
    found = wasserstein(x, shifted, permutations=19, resamples=5)
    assert found.value == pytest.approx(5.0, abs=1e-9) and found.p_value == pytest.approx(0.05)
    same = wasserstein(x, draw(30, 2, seed=7), permutations=19, resamples=5)
    assert same.value > 0.2 and same.p_value > 0.05  # far from zero, though nothing differs


def test_bad_samples_are_one_line():
    x = draw(6, 2)
    with pytest.raises(ValueError, match=r"`x` and `y` should be of one event shape, got \(2,\) and \(3,\)"):
        mmd(x, draw(6, 3))
    with pytest.raises(ValueError, match=r"`y` should be a sample of two points or more, .* got shape \(1, 2\)"):
        sliced_wasserstein(x, x[:1])
    with pytest.raises(ValueError, match="`y` has no rows"):
        mmd(x, x[:0])
    with pytest.raises(ValueError, match="should have one size for an exact assignment, got 6 and 5"):
        wasserstein(x, x[:5])
    with pytest.raises(ValueError, match="the median is no bandwidth"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="has 5001 points"):
        mmd(torch.zeros(5001, 1), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="`permutations` should be 0"):
        mmd(x, x, permutations=-1)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        mmd(x, torch.full((4, 2), math.nan))


def test_divergences_print_what_they_are_and_leave_the_random_state(capsys):
    state = torch.get_rng_state()
    text = str(mmd(draw(10, 2), draw(10, 2, 3.0, seed=1), permutations=19, bandwidth=1.0))
    assert text.startswith("MMD² ") and "p = 0.05 (10 and 10 samples)" in text and "h = 1" in text
    assert "nats (10 samples)" in repr(kl(Normal(0.0, 1.0), Normal(0.0, 2.0), 10))
    assert torch.equal(state, torch.get_rng_state())
