"""Annealed importance sampling and its transitions, against known answers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import VARIANCE, W, exact_guide, gaussian_guide, gaussian_model, log_evidence
from torch.distributions import MultivariateNormal

import pgen
from pgen.evaluation.annealing import AIS, anneal, schedule
from pgen.models import VAE
from pgen.programs import isolated
from pgen.samplers import hmc, start, with_gradient

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
TARGET = MultivariateNormal(torch.tensor([1.0, -2.0], dtype=torch.float64), COVARIANCE)
KNOWN = {"step_size": 0.12, "num_chains": 20, "leapfrog": 5}


def simulated(count=40):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return z, z @ W.T + math.sqrt(VARIANCE) * torch.randn(count, 5, dtype=torch.float64, generator=generator)


# --- one transition ------------------------------------------------------------------------------------------------------


def test_a_density_comes_with_its_gradient():
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    value, gradient = with_gradient(TARGET.log_prob)(x)
    torch.testing.assert_close(value, TARGET.log_prob(x))
    torch.testing.assert_close(gradient, (TARGET.mean - x) @ torch.linalg.inv(COVARIANCE))
    assert not value.requires_grad and not gradient.requires_grad


@pytest.mark.parametrize("step_size", [0.5, 1.2])  # the larger one is refused often, and must be invariant still
def test_transitions_leave_the_target_as_it_is(step_size):
    density = with_gradient(TARGET.log_prob)
    state = start(density, TARGET.sample((20_000,)))
    rates = []
    for _ in range(6):
        state, info = hmc(density, state, step_size, 3)
        rates.append(float(info.acceptance.mean()))
        assert float(info.accepted.double().mean()) == pytest.approx(rates[-1], abs=0.02)
    torch.testing.assert_close(state.position.mean(0), TARGET.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(state.position.T), COVARIANCE, rtol=0, atol=0.08)
    assert (rates[0] < 0.9) == (step_size > 1)
    torch.testing.assert_close(state.log_density, TARGET.log_prob(state.position))


def test_transitions_reach_the_target_from_afar():
    density = with_gradient(TARGET.log_prob)
    state = start(density, torch.zeros(4000, 2, dtype=torch.float64))
    for _ in range(60):
        state, _ = hmc(density, state, 0.3, 4)
    torch.testing.assert_close(state.position.mean(0), TARGET.mean, rtol=0, atol=0.1)


def test_the_energy_error_falls_with_the_square_of_the_step():
    density = with_gradient(TARGET.log_prob)
    state = start(density, TARGET.sample((500,)))
    errors = []
    for halving in range(3):
        torch.manual_seed(1)
        _, info = hmc(density, state, 0.2 / 2**halving, 5 * 2**halving)
        errors.append(float(info.energy_error.abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_a_trajectory_that_leaves_the_numbers_is_refused():
    density = with_gradient(lambda x: -x.square().sum(-1).exp())
    state = start(density, torch.full((5, 1), 2.0))
    new, info = hmc(density, state, 50.0, 4)
    assert torch.equal(new.position, state.position) and not bool(info.accepted.any()) and bool((info.acceptance == 0).all())


def test_parts_go_with_the_position():
    density = lambda x: (*with_gradient(TARGET.log_prob)(x), 3 * x, x.sum(-1))  # noqa: E731
    state = start(density, TARGET.sample((50,)))
    state, info = hmc(density, state, 1.2, 3)
    assert 0 < int(info.accepted.sum()) < 50
    torch.testing.assert_close(state.parts, (3 * state.position, state.position.sum(-1)))


# --- the path ------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_a_sigmoid_from_zero_to_one():
    betas = schedule(10)
    assert betas[0] == 0.0 and betas[-1] == 1.0 and bool((betas.diff() > 0).all())
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(11, dtype=torch.float64))
    low, high = 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))
    assert float(betas[2]) == pytest.approx((1 / (1 + math.exp(2.4)) - low) / (high - low))


def bounds(x, z, num_temps, guide=gaussian_guide, **options):
    settings = AIS(num_temps, **options)
    with isolated(None), torch.no_grad():
        below = anneal(gaussian_model, guide, x, settings, seed=1)
        above = anneal(gaussian_model, guide, x, settings, seed=2, posterior={"z": z})
    return below, above


def test_few_temperatures_leave_the_gap_that_is_known_and_many_close_it():
    z, x = simulated()
    exact = log_evidence(x)
    for num_temps, low, high in ((5, -0.47, 0.99), (20, -0.11, 0.35)):
        below, above = bounds(x, z, num_temps, **KNOWN)
        assert float((below.value - exact).mean()) == pytest.approx(low, abs=0.3 if num_temps == 5 else 0.15)
        assert float((above.value - exact).mean()) == pytest.approx(high, abs=0.3)
    below, above = bounds(x, z, 200, **KNOWN)
    assert abs(float((above.value - below.value).mean())) < 0.05
    assert float((below.value - exact).abs().mean()) < 3 * float(below.error.mean())
    assert float(below.acceptance.mean()) == pytest.approx(0.99, abs=0.01)


def test_the_pilot_run_finds_steps_that_are_accepted_as_wanted():
    z, x = simulated()
    below, above = bounds(x, z, 200, num_chains=20, leapfrog=5)
    for found in (below, above):
        assert float(found.acceptance.mean()) == pytest.approx(0.7, abs=0.12)
        assert float((found.value - log_evidence(x)).mean()) == pytest.approx(0.0, abs=0.06)


def test_from_an_exact_guide_both_bounds_are_the_evidence():
    z, x = simulated(7)
    for found in bounds(x, z, 20, guide=exact_guide, num_chains=3, initial="guide"):
        torch.testing.assert_close(found.value, log_evidence(x), rtol=0, atol=1e-9)
        assert float(found.error.max()) < 1e-6


@pytest.mark.parametrize("num_chains", [1, 2])
def test_the_mean_weight_is_unbiased_however_few_the_temperatures(num_chains):
    _, x = simulated(1)
    x = x.expand(4000, -1) * 0.5
    with isolated(None), torch.no_grad():
        found = anneal(gaussian_model, gaussian_guide, x, AIS(6, num_chains, 2, step_size=0.3), seed=3)
    assert float((found.value - log_evidence(x)).exp().mean()) == pytest.approx(1.0, abs=0.15)
    assert float((found.value - log_evidence(x)).mean()) < -0.1
    assert bool(found.error.isnan().all()) == (num_chains == 1)


# --- as questions --------------------------------------------------------------------------------------------------------


def test_log_prob_by_annealing_agrees_with_many_samples():
    pair = pgen.Pair(gaussian_model, gaussian_guide)
    _, x = simulated(70)  # more than a unit
    score = pair.log_prob(x, method="ais", num_temps=50, leapfrog=3)
    assert score.kind == "lower_bound" and score.num_samples == 16 and len(score) == 70
    assert abs(score.mean - float(log_evidence(x).mean())) < 0.1
    few = [pair.log_prob(x, method="ais", num_temps=3, leapfrog=1, seed=seed).value for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_family_anneals_in_every_tier(likelihood):
    vae = VAE((2, 3), 4, (7,), likelihood=likelihood, context_dim=2, seed=3)
    x, context = torch.bernoulli(torch.rand(9, 2, 3)), torch.randn(9, 2)
    asked = {"method": "ais", "num_temps": 20, "num_chains": 5, "leapfrog": 3}
    eager = vae.log_prob(x, context, compile="eager", **asked)
    graph = vae.log_prob(x, context, compile="graph", **asked)
    assert torch.equal(eager.value, graph.value) and torch.equal(eager.mc_error, graph.mc_error)
    if likelihood == "bernoulli":
        compiled = vae.log_prob(x, context, compile="compiled", **asked)
        torch.testing.assert_close(compiled.value, eager.value, rtol=0, atol=0.02)
    many = vae.log_prob(x, context, num_samples=20_000)
    assert float((eager.value - many.value).abs().max()) < 5 * float(eager.mc_error.max()) + 0.1
    from_guide = vae.log_prob(x, context, initial="guide", **asked)
    assert float((from_guide.value - many.value).abs().max()) < 5 * float(from_guide.mc_error.max()) + 0.1


def test_preprocessed_data_are_scored_in_their_own_units():
    x = 100 + 5 * torch.randn(30, 3)
    vae = VAE((3,), 2, (5,), likelihood="gaussian", preprocess=pgen.data.Standardize())
    vae.fit(x, steps=3, progress=False)
    annealed, many = vae.log_prob(x, method="ais", num_temps=50), vae.log_prob(x, num_samples=5000)
    assert annealed.mean == pytest.approx(many.mean, abs=0.1)


def test_simulated_data_are_sandwiched():
    pair = pgen.Pair(gaussian_model, gaussian_guide)
    _, x = simulated()
    found = pair.bdmc(x, num_temps=200, seed=1, **KNOWN)
    assert found.lower.kind == "lower_bound" and found.upper.kind == "upper_bound" and len(found.lower) == 40
    assert abs(found.gap) < 0.06 and found.lower.event_size == 5
    assert "on 40 simulated data (gap" in str(found)
    vae = VAE((2, 3), 4, (7,), seed=3)
    found = vae.bdmc(10, num_temps=40, num_chains=8, leapfrog=3)
    assert abs(found.gap) < 0.3 and len(found.upper) == 10


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 2.0))
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(3.0, dtype=y.dtype), 3.0))
    with pyro.plate("data", len(y)):
        own = pyro.sample("own", dist.Normal(mu, 0.5))
        pyro.sample("y", dist.Normal(own, 1.0 / scale.sqrt()), obs=y)


def quadrature(y):
    """log p(y) of ``conjugate``: own integrates out exactly, then a grid over mu and scale."""
    mu = torch.linspace(-8, 8, 801, dtype=y.dtype)
    scale = torch.linspace(1e-3, 6, 1201, dtype=y.dtype)
    prior = dist.Normal(0.0, 2.0).log_prob(mu)[:, None] + dist.Gamma(3.0, 3.0).log_prob(scale)
    sd = (0.25 + 1 / scale).sqrt()
    likelihood = sum(dist.Normal(mu[:, None], sd).log_prob(value) for value in y)
    return float(torch.logsumexp((prior + likelihood).flatten(), 0) + math.log((mu[1] - mu[0]) * (scale[1] - scale[0])))


def test_the_evidence_of_shared_latents_some_of_them_constrained():
    y = torch.tensor([0.3, -1.2, 2.5, 0.7, 1.1], dtype=torch.float64)
    pair = pgen.Pair(conjugate)
    pair.fit(y, steps=300, progress=False, precision="float64", optimizer=0.05)
    exact = quadrature(y)
    annealed = pair.log_evidence(y, num_temps=200, num_chains=64, leapfrog=5)
    assert annealed.kind == "lower_bound" and len(annealed) == 1 and annealed.event_size == 5
    assert annealed.mean == pytest.approx(exact, abs=0.1)
    assert abs(annealed.mean - exact) < 4 * float(annealed.mc_error)
    important = pair.log_evidence(y, method="importance", num_samples=20_000)
    assert exact - 0.8 < important.mean < exact + 0.1  # a mean-field guide
    found = pair.bdmc(y, num_temps=100, num_chains=32, leapfrog=5)
    assert abs(found.gap) < 0.5 and len(found.lower) == 1


def test_finite_latents_are_summed_out_along_the_path():
    def mixture(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(z + 4 * k, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.5))

    x = torch.tensor([-1.0, 0.5, 2.0, 4.5], dtype=torch.float64)
    parts = [dist.Normal(4.0 * k, math.sqrt(1.25)).log_prob(x) + math.log((0.7, 0.3)[k]) for k in (0, 1)]
    pair = pgen.Pair(mixture, guide)
    score = pair.log_prob(x, method="ais", num_temps=120, num_chains=32, leapfrog=4)
    error = score.value - torch.logaddexp(*parts)
    assert bool((error.abs() < 4 * score.mc_error).all()) and float(score.mc_error.max()) < 0.15
    assert abs(pair.bdmc(x, num_temps=60, num_chains=32, leapfrog=4).gap) < 0.3


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_annealed_says_so():
    y = torch.tensor([0.3, -1.2, 2.5], dtype=torch.float64)
    pair = pgen.Pair(conjugate)
    pair.fit(y, steps=2, progress=False, precision="float64")
    with pytest.raises(pgen.NotAvailable, match=r"data share 'mu', so no datum has a density"):
        pair.log_prob(y, method="ais")
    with pytest.raises(pgen.NotAvailable, match="use initial='prior'"):
        pair.log_evidence(y, initial="guide")
    with pytest.raises(TypeError, match=r"unknown option 'num_temp' of method='ais'; did you mean 'num_temps'"):
        pair.log_evidence(y, num_temp=3)
    with pytest.raises(TypeError, match=r"unknown option 'num_temps' of method='importance'; .* takes none of its own"):
        pair.log_prob(y, num_temps=3)
    with pytest.raises(ValueError, match="`method` is 'asi', which is unknown; did you mean 'ais'"):
        pair.log_prob(y, method="asi")
    with pytest.raises(ValueError, match="`num_chains` should be a positive integer, got 0"):
        AIS(num_chains=0)


def test_discrete_latents_and_observed_computations_are_refused():
    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.ones(len(x))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x))))

    with pytest.raises(pgen.NotAvailable, match="latent 'z' is discrete"):
        pgen.Pair(discrete, guide).log_prob(torch.zeros(3), method="ais")

    def computed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(pgen.NotAvailable, match="site 'x' observes something computed"):
        pgen.Pair(computed, normal).bdmc(torch.zeros(3))

    def plain(x):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    with pytest.raises(pgen.NotAvailable, match="no latent variables"):
        pgen.Pair(plain, lambda x: None).log_evidence(torch.zeros(2))
