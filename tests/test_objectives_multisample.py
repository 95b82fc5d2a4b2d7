"""Bounds of several samples: values that are known, gradients that agree in expectation, and what they refuse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import (
    ELBO_GAP,
    LOG_EVIDENCE,
    PRECISION,
    X_KNOWN,
    W,
    exact_guide,
    gaussian_guide,
    gaussian_model,
    linear_gaussian,
    log_evidence,
    seeded,
)
from pyro import poutine

import pgen
from pgen import ELBO, IWAE
from pgen.objectives import VIMCO, DReG, Renyi
from pgen.programs import isolated

BOUNDS = [DReG(3), Renyi(3), Renyi(3, alpha=1), Renyi(3, alpha=2.5), VIMCO(3)]


def evaluate(objective, model, guide, batch, num_data):
    with isolated():
        return objective(model, guide, batch, {"num_data": float(num_data)})


def rows(objective, model, guide, batch):
    with isolated():
        return objective.rows(model, guide, batch)


def gradients(objective, model, guide, batch, parameters, repeats):
    losses = [evaluate(objective, model, guide, batch, len(batch))[0] for _ in range(repeats)]
    return torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]) for loss in losses])


def agree(first, second):
    error = ((first.var(0) + second.var(0)) / len(first)).sqrt()
    return bool(((first.mean(0) - second.mean(0)).abs() < 4.5 * error + 1e-12).all())


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(12, 2, generator=generator, dtype=torch.float64) @ W.T + 0.3


@pytest.mark.parametrize("objective", BOUNDS, ids=repr)
@pytest.mark.parametrize("lengths", [(12,), (5, 5, 2), (1, 10, 1)])
def test_mean_over_a_partition_is_the_full_one(objective, lengths, x):
    losses = [evaluate(objective, gaussian_model, exact_guide, part, 12)[0] for part in x.split(lengths)]
    mean = sum(n / 12 * float(loss) for n, loss in zip(lengths, losses))
    assert mean == pytest.approx(-float(log_evidence(x).mean()), abs=1e-10)


@pytest.mark.parametrize(
    ("objective", "gap"),
    [(DReG(5), 0.0102), (VIMCO(5), 0.0102), (Renyi(5, alpha=0), 0.0102), (Renyi(5, alpha=1), ELBO_GAP)],
    ids=repr,
)
def test_bounds_fall_short_by_their_gap(objective, gap):
    bound, _ = rows(objective, gaussian_model, gaussian_guide, X_KNOWN.expand(40_000, 5))
    error = float(bound.std() / 200)
    assert float(bound.mean()) == pytest.approx(LOG_EVIDENCE - gap, abs=4 * error + 1e-4)


def test_renyi_bounds_fall_with_their_order():
    x = X_KNOWN.expand(20_000, 5)
    means = []
    for alpha in (-2.0, 0.0, 0.5, 1.0, 3.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            means.append(float(rows(Renyi(8, alpha=alpha), gaussian_model, gaussian_guide, x)[0].mean()))
    assert means == sorted(means, reverse=True)
    assert [Renyi(alpha=a).kind for a in (-0.1, 0, 1, 3)] == ["estimate", "lower_bound", "lower_bound", "lower_bound"]


def test_a_renyi_bound_of_many_samples_is_the_integral():
    """For Gaussians p(z | x) and q of variances 1/14 in both axes, by quadrature over the ratio."""
    alpha, precision = 0.5, PRECISION / 0.25
    q = torch.diag(torch.full((2,), 14.0, dtype=torch.float64))
    mixed = (1 - alpha) * precision + alpha * q
    divergence = ((1 - alpha) * precision.logdet() + alpha * q.logdet() - mixed.logdet()) / (2 * (1 - alpha))
    bound, _ = rows(Renyi(20_000, alpha=alpha), gaussian_model, gaussian_guide, X_KNOWN.expand(4, 5))
    assert float(bound.mean()) == pytest.approx(LOG_EVIDENCE + float(divergence), abs=0.006)


# --- gradients -----------------------------------------------------------------------------------------------------------


def off_the_posterior():
    """Parameters of the guide (in a chain z2, z1 given z2) and one of the model."""
    values = torch.tensor([0.5, 0.9, 0.3, 0.6, 0.8], dtype=torch.float64)
    gain, sd, back, rest, slope = parameters = [v.clone().requires_grad_() for v in values]

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(slope * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(gain * x, sd))
            pyro.sample("z1", dist.Normal(back * z2, rest))

    return model, guide, torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64), parameters


def test_the_doubly_reparameterised_gradient_expects_the_same():
    model, guide, x, parameters = off_the_posterior()
    big = x.repeat(300)
    plain = gradients(IWAE(4), model, guide, big, parameters, 40)
    assert agree(plain, gradients(DReG(4), model, guide, big, parameters, 40))
    assert float((plain.mean(0).abs() / plain.std(0)).min()) > 1.0


def test_the_doubly_reparameterised_gradient_vanishes_at_the_posterior():
    loc = (X_KNOWN @ torch.linalg.solve(PRECISION, W.T).T).clone().requires_grad_()

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=PRECISION / 0.25))

    for k in (1, 4):
        (zero,) = torch.autograd.grad(evaluate(DReG(k), gaussian_model, posterior, X_KNOWN, 1)[0], loc)
        assert float(zero.abs().max()) < 1e-12


def test_the_doubly_reparameterised_gradient_squares_the_shares(monkeypatch):
    """With draws that are fixed functions of loc, the gradient is a sum that can be written down."""
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([-0.4, 0.9, 0.1], dtype=torch.float64)
    x = torch.tensor([0.5, -0.2], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    z = (loc.detach() + 0.8 * noise)[:, None].expand(3, 2).clone().requires_grad_()
    log_w = dist.Normal(x.new_zeros(()), 1.0).log_prob(z) + dist.Normal(z, x.new_tensor(0.7)).log_prob(x)
    log_w = log_w - dist.Normal(loc.detach(), x.new_tensor(0.8)).log_prob(z)
    (slope,) = torch.autograd.grad(log_w.sum(), z)
    expected = -(torch.softmax(log_w.detach(), 0).square() * slope).sum(0).mean()

    drawn = {"z": loc + 0.8 * noise[:, None].expand(3, 2)}
    monkeypatch.setattr(pgen.objectives.multisample, "draw_guide", lambda *args: (drawn, {"z": -1}))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, x.new_tensor(0.8)))

    (got,) = torch.autograd.grad(evaluate(DReG(3), model, guide, x, 2)[0], loc)
    assert float(got) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_renyi_at_its_ends_has_the_gradient_of_its_neighbours(alpha):
    model, guide, x, parameters = off_the_posterior()
    other = IWAE(3) if alpha == 0 else ELBO(3)
    drawn = []
    for objective in (Renyi(3, alpha=alpha), other):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn.append(gradients(objective, model, guide, x, parameters, 1))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("local", [True, False], ids=["local", "shared"])
def test_vimco_is_unbiased(local):
    """Against the exact gradient of the two-sample bound, by enumeration."""
    y = torch.tensor([0.3, 1.4, -0.6], dtype=torch.float64) if local else torch.tensor([0.3, 1.4], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.7, 1.1] if local else 0.4, dtype=torch.float64, requires_grad=True)

    def model(y):
        if local:
            return _bernoulli(None)(y)
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    def guide(y):
        if local:
            return _bernoulli(logits)(y)
        pyro.sample("z", dist.Bernoulli(logits=logits))

    q = torch.sigmoid(logits)
    log_w = []
    for z in (0.0, 1.0):
        likelihood = dist.Normal(y.new_tensor(2 * z), 1.0).log_prob(y)
        prior = math.log(0.3 if z else 0.7)
        log_w.append(prior + (likelihood if local else likelihood.sum()) - (q if z else 1 - q).log())
    probability = [1 - q, q]
    bound = sum(
        probability[a] * probability[b] * (torch.logaddexp(log_w[a], log_w[b]) - math.log(2)) for a in (0, 1) for b in (0, 1)
    )
    exact = -torch.autograd.grad(bound.sum() / len(y), logits)[0].reshape(-1)
    drawn = gradients_of(VIMCO(2), model, guide, y, logits)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - exact).abs() < 4.5 * error).all())
    assert bool((exact.abs() > 4 * error).any())


def gradients_of(objective, model, guide, y, logits, repeats=600):
    found = [torch.autograd.grad(evaluate(objective, model, guide, y, len(y))[0], logits)[0] for _ in range(repeats)]
    return torch.stack(found).reshape(repeats, -1)


def test_vimco_has_less_variance_than_the_score_function():
    y = torch.tensor([0.3, 1.4, -0.6], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    model, guide = _bernoulli(None), _bernoulli(logits)
    drawn = gradients_of(VIMCO(8), model, guide, y, logits, 200)
    assert float(drawn.std(0).mean()) < 0.5 * float(gradients_of(ELBO(1), model, guide, y, logits, 200).std(0).mean())


def _bernoulli(logits):
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)) if logits is None else dist.Bernoulli(logits=logits))
            if logits is None:
                pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    return program


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [DReG(2), Renyi(2), VIMCO(2)], ids=repr)
def test_scales_and_shared_latents_under_minibatches_are_refused(objective, x):
    name = type(objective).__name__
    with pytest.raises(ValueError, match=f"is scaled, and {name} with a scale is no bound"):
        evaluate(objective, poutine.scale(gaussian_model, scale=0.5), gaussian_guide, x, 12)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match=f"so {name} needs all 12 data in each step"):
        evaluate(objective, model, guide, x[:5], 12)
    assert math.isfinite(float(evaluate(objective, model, guide, x, 12)[0]))


def test_what_has_no_gradient_is_sent_to_vimco():
    y, logits = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for objective in (DReG(2), Renyi(2)):
        with pytest.raises(ValueError, match="'z' cannot be reparameterised; use ELBO or VIMCO"):
            evaluate(objective, _bernoulli(None), _bernoulli(logits), y, 3)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`num_samples` of VIMCO should be at least 2"):
        VIMCO(1)
    with pytest.raises(ValueError, match="`alpha` should be a number"):
        Renyi(alpha=float("nan"))


# --- tiers ---------------------------------------------------------------------------------------------------------------


def _fit(objective, tier):
    if isinstance(objective, VIMCO):
        network = seeded(lambda: torch.nn.Linear(6, 3))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))
                pyro.sample("x", dist.Normal(z @ network.weight, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=network(x)).to_event(1))

        pair = pgen.Pair(model, guide)
    else:
        pair = seeded(linear_gaussian)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    run = pair.fit(x, objective=objective, steps=3, batch_size=5, compile=tier, unroll=1, progress=False, validation=x[:5])
    assert run.tier == tier and len(run.validation["bound"])
    return torch.cat([p.detach().reshape(-1) for p in pair.parameters()])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("objective", [DReG(3), Renyi(3), VIMCO(3)], ids=repr)
def test_the_tiers_agree(objective):
    eager = _fit(objective, "eager")
    assert torch.equal(eager, _fit(objective, "graph"))
    if isinstance(objective, DReG):
        torch.testing.assert_close(_fit(objective, "compiled"), eager, rtol=1e-4, atol=1e-5)
