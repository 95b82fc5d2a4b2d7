"""Objectives against a linear-Gaussian model whose evidence, gaps and gradients are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import ELBO_GAP, LOG_EVIDENCE, X_KNOWN, W, exact_guide, gaussian_guide, gaussian_model, log_evidence
from pyro import poutine

import pgen
from pgen import ELBO, IWAE
from pgen.programs import isolated

PARTITIONS = {"even": (4, 4, 4), "ragged": (5, 5, 2), "single": (1, 10, 1), "whole": (12,)}


def evaluate(objective, model, guide, batch, num_data):
    with isolated():
        return objective(model, guide, batch, {"num_data": float(num_data)})


def rows(objective, model, guide, batch):
    with isolated():
        return objective.rows(model, guide, batch)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(12, 2, generator=generator, dtype=torch.float64) @ W.T + 0.3


# --- partitions of the data ----------------------------------------------------------------------------------------------


def shared_model(x, noise):
    mu = pyro.sample("mu", dist.Normal(W.new_tensor(0.5), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(W.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + mu, 0.5).to_event(1), obs=x)


def shared_guide(x, noise):
    """Its draws are a function of the data: noise comes with each row."""
    mu = dist.Normal(W.new_tensor(0.2), 0.7)
    pyro.sample("mu", dist.Delta(mu.loc + 0.7 * 0.3, log_density=mu.log_prob(mu.loc + 0.7 * 0.3)))
    z = dist.Normal(x[:, :2], 0.4).to_event(1)
    value = x[:, :2] + 0.4 * noise
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(value, log_density=z.log_prob(value), event_dim=1))


def by_hand(x, noise):
    """The bound of ``shared_model`` under ``shared_guide``, nats a datum."""
    mu, z = torch.tensor(0.41, dtype=torch.float64), x[:, :2] + 0.4 * noise
    joint = dist.Normal(z @ W.T + mu, 0.5).log_prob(x).sum() + dist.Normal(W.new_zeros(2), 1.0).log_prob(z).sum()
    entropy = -dist.Normal(x[:, :2], 0.4).log_prob(z).sum()
    shared = dist.Normal(W.new_tensor(0.5), 2.0).log_prob(mu) - dist.Normal(W.new_tensor(0.2), 0.7).log_prob(mu)
    return float((joint + entropy + shared) / len(x))


@pytest.mark.parametrize("lengths", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("particles", [1, 3])
def test_mean_elbo_over_a_partition_is_the_full_one(lengths, particles, x):
    noise = torch.randn(12, 2, dtype=torch.float64)
    parts = zip(x.split(lengths), noise.split(lengths))
    losses = [evaluate(ELBO(particles), shared_model, shared_guide, part, 12)[0] for part in parts]
    mean = sum(n / 12 * float(loss) for n, loss in zip(lengths, losses))
    assert mean == pytest.approx(-by_hand(x, noise), abs=1e-12)


@pytest.mark.parametrize("lengths", PARTITIONS.values(), ids=PARTITIONS)
def test_mean_iwae_over_a_partition_is_the_full_one(lengths, x):
    losses = [evaluate(IWAE(3), gaussian_model, exact_guide, part, 12)[0] for part in x.split(lengths)]
    mean = sum(n / 12 * float(loss) for n, loss in zip(lengths, losses))
    assert mean == pytest.approx(-float(log_evidence(x).mean()), abs=1e-12)


def test_gradients_add_up_over_a_partition_too(x):
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(slope, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu * slope, 1.0).expand([5]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Delta(W.new_tensor(0.3)))

    def gradient(part):
        return torch.autograd.grad(evaluate(ELBO(), model, guide, part, 12)[0], slope)[0]

    parts = sum(len(part) / 12 * gradient(part) for part in x.split((5, 5, 2)))
    torch.testing.assert_close(parts, gradient(x), rtol=0, atol=1e-12)


# --- the evidence --------------------------------------------------------------------------------------------------------


def test_the_known_evidence_is_the_one_in_use():
    assert float(log_evidence(X_KNOWN)) == pytest.approx(LOG_EVIDENCE, abs=1e-6)
    assert ELBO_GAP == pytest.approx(0.0425789, abs=1e-7)


def test_elbo_falls_short_of_the_evidence_by_the_gap():
    x = X_KNOWN.expand(40_000, 5)
    bound, shared = rows(ELBO(), gaussian_model, gaussian_guide, x)
    assert bound.shape == (40_000,) and float(shared) == 0.0
    error = float(bound.std() / 200)
    assert float(bound.mean()) == pytest.approx(LOG_EVIDENCE - ELBO_GAP, abs=4 * error)
    assert 4 * error < 0.01  # four times finer than the gap itself


@pytest.mark.parametrize(("num_samples", "gap"), [(1, 0.0426), (2, 0.0228), (5, 0.0102), (10, 0.0054)])
def test_iwae_closes_the_gap_as_samples_grow(num_samples, gap):
    bound, _ = rows(IWAE(num_samples), gaussian_model, gaussian_guide, X_KNOWN.expand(40_000, 5))
    error = float(bound.std() / 200)
    assert float(bound.mean()) == pytest.approx(LOG_EVIDENCE - gap, abs=4 * error + 1e-4)
    assert error < gap / 8


@pytest.mark.parametrize("objective", [ELBO(), ELBO(3), IWAE(1), IWAE(4)], ids=repr)
def test_every_bound_is_tight_without_variance_at_the_posterior(objective, x):
    bound, _ = rows(objective, gaussian_model, exact_guide, x)
    torch.testing.assert_close(bound, log_evidence(x), rtol=0, atol=1e-10)
    loss, _ = evaluate(objective, gaussian_model, exact_guide, x, 12)
    assert float(loss) == pytest.approx(-float(log_evidence(x).mean()), abs=1e-10)


@pytest.mark.parametrize("num_samples", [1, 10, 200])
def test_log_prob_of_a_pair_is_the_evidence_at_the_posterior(num_samples, x):
    score = pgen.Pair(gaussian_model, exact_guide).log_prob(x, num_samples=num_samples)
    torch.testing.assert_close(score.value, log_evidence(x), rtol=0, atol=1e-10)
    assert num_samples == 1 or float(score.mc_error.max()) < 1e-6
    assert bool(score.mc_error.isnan().all()) == (num_samples == 1)  # one draw knows nothing of its error
    assert score.kind == "lower_bound" and score.event_size == 5


def test_log_prob_converges_to_the_evidence():
    score = pgen.Pair(gaussian_model, gaussian_guide).log_prob(X_KNOWN, num_samples=20_000)
    assert float(score.value) == pytest.approx(LOG_EVIDENCE, abs=4 * float(score.mc_error))
    assert float(score.mc_error) == pytest.approx(math.sqrt((1 / 0.8936 - 1) / 20_000), rel=0.1)  # ESS/S is .8936


# --- minibatches of multi-sample bounds ----------------------------------------------------------------------------------


def test_a_multi_sample_bound_stays_a_bound_under_subsampling():
    x = torch.randn(7_200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ W.T
    bounds = torch.stack([-evaluate(IWAE(10), gaussian_model, gaussian_guide, part, 7_200)[0] for part in x.split(24)])
    exact = float(log_evidence(x).mean())
    shortfall = exact - float(bounds.mean())
    assert 0.0 < shortfall < ELBO_GAP
    assert shortfall == pytest.approx(0.0054, abs=0.004)


def test_iwae_refuses_a_latent_outside_the_plate_under_minibatches(x):
    with pytest.raises(ValueError, match=r"site 'mu' lies outside the plate \"data\".*all 12 data"):
        evaluate(IWAE(2), shared_model, shared_guide, (x[:5], x[:5, :2]), 12)
    loss, _ = evaluate(IWAE(2), shared_model, shared_guide, (x, x[:, :2]), 12)
    assert float(loss) == pytest.approx(-by_hand(x, x[:, :2]), abs=1e-10)


@pytest.mark.parametrize("scaled", ["model", "guide"])
def test_iwae_refuses_a_scale(scaled, x):
    programs = {"model": gaussian_model, "guide": gaussian_guide}
    programs[scaled] = poutine.scale(programs[scaled], scale=0.5)
    with pytest.raises(ValueError, match="is scaled, and IWAE with a scale is no bound"):
        evaluate(IWAE(3), programs["model"], programs["guide"], x, 12)


def test_iwae_refuses_what_cannot_be_reparameterised(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z[:, None] * W.new_ones(5), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'z' cannot be reparameterised; use ELBO"):
        evaluate(IWAE(3), model, guide, x, 12)


# --- scale and mask ------------------------------------------------------------------------------------------------------


def test_elbo_honours_a_scale_and_a_mask_of_the_user(x):
    mask = torch.arange(12) % 3 > 0

    def model(x, mask):
        with poutine.scale(scale=0.25):
            mu = pyro.sample("mu", dist.Normal(W.new_tensor(0.5), 2.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask), poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(mu, 1.5).expand([5]).to_event(1), obs=x)

    def guide(x, mask):
        with poutine.scale(scale=0.25):
            pyro.sample("mu", dist.Delta(W.new_tensor(0.1), log_density=W.new_tensor(-0.6)))

    loss, metrics = evaluate(ELBO(), model, guide, (x, mask), 12)
    likelihood = 3 * float(dist.Normal(W.new_tensor(0.1), 1.5).log_prob(x[mask]).sum())
    shared = 0.25 * float(dist.Normal(W.new_tensor(0.5), 2.0).log_prob(W.new_tensor(0.1)) + 0.6)
    assert float(loss) == pytest.approx(-(likelihood + shared) / 12, abs=1e-12)
    assert float(metrics["log_likelihood"]) == pytest.approx(likelihood / 12, abs=1e-12)
    assert float(metrics["kl"]) == pytest.approx(-shared / 12, abs=1e-12)


def test_iwae_honours_a_mask(x):
    mask = torch.arange(12) > 4

    def masked(program):
        def run(x):
            with poutine.mask(mask=mask):
                program(x)

        return run

    bound, _ = rows(IWAE(3), masked(gaussian_model), masked(exact_guide), x)
    torch.testing.assert_close(bound, log_evidence(x) * mask, rtol=0, atol=1e-10)


# --- particles and score functions ---------------------------------------------------------------------------------------


def test_particles_divide_the_variance(x):
    def variance(particles):
        losses = [float(evaluate(ELBO(particles), gaussian_model, gaussian_guide, x[:1], 1)[0]) for _ in range(250)]
        return float(torch.tensor(losses).var())

    assert variance(1) / variance(8) == pytest.approx(8.0, rel=0.45)  # sd of the ratio: 13 %


def bernoulli_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)


def test_score_function_gradient_is_unbiased_inside_the_plate():
    y = torch.tensor([0.3, 1.4, -0.6], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64, requires_grad=True)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    def gradient():
        return torch.autograd.grad(evaluate(ELBO(500), bernoulli_model, guide, y, 3)[0], logits)[0]

    drawn = torch.stack([gradient() for _ in range(40)])
    q = torch.sigmoid(logits)
    joint = [dist.Bernoulli(0.3).log_prob(torch.tensor(float(z))) + dist.Normal(2.0 * z, 1.0).log_prob(y) for z in (0, 1)]
    bound = ((1 - q) * (joint[0] - (1 - q).log()) + q * (joint[1] - q.log())).mean()
    exact = -torch.autograd.grad(bound, logits)[0]
    error = drawn.std(0) / math.sqrt(40)
    assert bool(((drawn.mean(0) - exact).abs() < 4 * error).all())
    assert bool((error < 0.02).all()) and bool((exact.abs() > 4 * error).all())


@pytest.mark.parametrize("batch", [6, 2], ids=["all data", "minibatch"])
def test_score_function_gradient_is_unbiased_outside_the_plate(batch):
    y = torch.tensor([0.3, 1.4, -0.6, 0.9, 0.1, 0.4], dtype=torch.float64)
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def model(y):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def gradient():
        parts = [evaluate(ELBO(300), model, guide, part, 6)[0] for part in y.split(batch)]
        return torch.autograd.grad(sum(parts) / len(parts), logit)[0]

    drawn = torch.stack([gradient() for _ in range(40)])
    q = torch.sigmoid(logit)
    joint = [
        dist.Bernoulli(0.3).log_prob(torch.tensor(float(z))) + dist.Normal(float(z), 1.0).log_prob(y).sum() for z in (0, 1)
    ]
    bound = ((1 - q) * (joint[0] - (1 - q).log()) + q * (joint[1] - q.log())) / 6
    exact = -torch.autograd.grad(bound, logit)[0]
    error = drawn.std() / math.sqrt(40)
    assert abs(float(drawn.mean() - exact)) < 4 * float(error)
    assert 4 * float(error) < abs(float(exact))


def test_score_function_counts_what_a_local_latent_does_outside_its_plate():
    y = torch.tensor([0.3, 1.4, -0.6], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64, requires_grad=True)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.5)))
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=y.sum())

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    def gradient():
        return torch.autograd.grad(evaluate(ELBO(500), model, guide, y, 3)[0], logits)[0]

    drawn = torch.stack([gradient() for _ in range(40)])
    q, bound = torch.sigmoid(logits), 0.0
    for z in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3):
        log_q = (z * q.log() + (1 - z) * (1 - q).log()).sum()
        bound = bound + log_q.exp() * (3 * math.log(0.5) + dist.Normal(z.sum(), 1.0).log_prob(y.sum()) - log_q) / 3
    exact = -torch.autograd.grad(bound, logits)[0]
    assert bool(((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / math.sqrt(40)).all())


def test_reported_loss_is_the_bound_not_the_surrogate():
    y = torch.tensor([0.3, 1.4, -0.6], dtype=torch.float64)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(y.new_tensor(1.0)))

    loss, _ = evaluate(ELBO(), bernoulli_model, guide, y, 3)
    assert float(loss) == pytest.approx(-float(math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(y).mean()), abs=1e-6)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_numbers_of_samples_are_checked(bad):
    with pytest.raises(ValueError, match="`num_particles` should be a positive integer"):
        ELBO(bad)
    with pytest.raises(ValueError, match="`num_samples` should be a positive integer"):
        IWAE(bad)
