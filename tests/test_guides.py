"""Automatic guides, Pyro's own, and those written by hand, on programs with known posteriors."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pgen

AUTOMATIC = ["mean_field", "low_rank", "full_rank", "flow"]
QUICK = {"compile": "graph", "progress": False, "precision": "float64"}

# --- Bayesian linear regression: y ~ N(X b, 0.5^2), b ~ N(0, I), with correlated columns -------------------------------

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
X[:, 1] = X[:, 0] + 0.4 * X[:, 1]
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.5 * torch.randn(
    30, generator=torch.Generator().manual_seed(6), dtype=torch.float64
)
COVARIANCE = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + X.T @ X / 0.25)
MEAN = COVARIANCE @ X.T @ Y / 0.25
EVIDENCE = float(
    torch.distributions.MultivariateNormal(Y.new_zeros(30), X @ X.T + 0.25 * torch.eye(30, dtype=torch.float64)).log_prob(Y)
)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)


def indexed(x, y):
    """The same, written for one draw: a name for each coefficient."""
    b = pyro.sample("b", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b[0] * x[:, 0] + b[1] * x[:, 1] + b[2] * x[:, 2], 0.5), obs=y)


def check_regression(pair, *, covariance, tolerance, num_samples=20_000):
    draws = pair.draw((X, Y), num_samples, seed=3)
    b = draws.values["b"]
    sd = covariance.diagonal().sqrt()
    assert float(((b.mean(0) - MEAN) / sd).abs().max()) < tolerance + 4 / math.sqrt(num_samples)
    measured = torch.cov(b.T)
    error = (measured - covariance) / (sd[:, None] * sd[None, :])
    assert float(error.abs().max()) < tolerance + 4 / math.sqrt(num_samples)
    return draws


@pytest.mark.parametrize("model", [regression, indexed])
def test_full_rank_is_exact_on_a_gaussian_posterior(model):
    pair = pgen.Pair(model, "full_rank")
    pair.fit((X, Y), steps=1200, objective=pgen.ELBO(64), seed=1, **QUICK)
    draws = check_regression(pair, covariance=COVARIANCE, tolerance=0.02)
    evidence = float(torch.logsumexp(draws.log_weight, 0) - math.log(len(draws.log_p)))
    assert evidence == pytest.approx(EVIDENCE, abs=0.01)
    assert float(draws.log_weight.std()) < 0.1


def test_mean_field_finds_the_inverse_diagonal_of_the_precision():
    pair = pgen.Pair(regression)
    pair.fit((X, Y), steps=1200, objective=pgen.ELBO(64), seed=1, **QUICK)
    precision = torch.linalg.inv(COVARIANCE).diagonal()
    check_regression(pair, covariance=torch.diag(1 / precision), tolerance=0.03)


def test_low_rank_holds_a_common_direction_that_independence_does_not():
    size = 6
    spread = torch.eye(size, dtype=torch.float64) + 4 * torch.ones(size, size, dtype=torch.float64)
    precision = torch.linalg.inv(spread)

    def prior(y):
        pyro.sample("b", dist.MultivariateNormal(y.new_zeros(size), spread))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])

    y = torch.tensor([1.0], dtype=torch.float64)
    evidence = float(dist.Normal(0.0, 1.0).log_prob(y))
    # the best independent Gaussians have the precision's diagonal
    gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    for guide, expected in {"mean_field": gap, "low_rank": 0.0}.items():
        pair = pgen.Pair(prior, guide)
        pair.fit(y, steps=1500, objective=pgen.ELBO(16), seed=1, **QUICK)
        draws = pair.draw(y, 20_000, seed=2)
        assert evidence - float(draws.log_weight.mean()) == pytest.approx(expected, abs=0.03 + 0.03 * gap)
        weight = (draws.log_weight - evidence).exp()
        assert guide == "mean_field" or float(weight.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(AUTOMATIC)))
def test_a_guide_starts_where_a_simpler_one_is(first, second):
    y = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64)
    simple = pgen.Pair(constrained, first)
    simple.fit(y, steps=200, seed=1, **QUICK)
    rich = pgen.Pair(constrained, second)
    rich.fit(y, steps=1, optimizer=1e-9, seed=1, **QUICK)
    with torch.no_grad():
        rich._guide.start_at(simple._guide)
    bounds = [float(pair.draw(y, 3000, seed=2).log_weight.mean()) for pair in (simple, rich)]
    assert bounds[1] == pytest.approx(bounds[0], abs=0.05)
    values = [pair.draw(y, 3000, seed=2).values["real"] for pair in (simple, rich)]
    torch.testing.assert_close(values[1].mean(0), values[0].mean(0), rtol=0, atol=0.15)
    if "rank" in first and "rank" in second:  # the whole covariance
        torch.testing.assert_close(torch.cov(values[1].T), torch.cov(values[0].T), rtol=0, atol=0.15)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # torch's own, for every diagonal
def test_a_low_rank_guide_in_three_tiers():
    states = []
    for tier in ("eager", "graph", "compiled"):
        pair = pgen.Pair(constrained, "low_rank")
        y = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64)
        run = pair.fit(y, steps=6, seed=1, compile=tier, unroll=1, progress=False, precision="float64")
        assert run.tier == tier
        states.append(state(pair))
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[2], states[0], rtol=1e-9, atol=1e-9)


def test_draws_of_a_program_written_for_one_draw_are_independent():
    pair = pgen.Pair(indexed, "full_rank")
    pair.fit((X, Y), steps=20, **QUICK)
    draws = pair.draw((X, Y), 7, seed=2)
    b = draws.values["b"]
    assert b.shape == (7, 3) and len(b.unique(dim=0)) == 7
    likelihood = dist.Normal(b @ X.T, 0.5).log_prob(Y)
    torch.testing.assert_close(draws.log_likelihood["y"], likelihood)
    torch.testing.assert_close(draws.log_p, likelihood.sum(1) + dist.Normal(0.0, 1.0).log_prob(b).sum(1))
    # log q by the definition: the same Gaussian, its parameters fitted to many draws
    many = pair.draw((X, Y), 20_000, seed=4).values["b"]
    q = torch.distributions.MultivariateNormal(many.mean(0), torch.cov(many.T))
    torch.testing.assert_close(draws.log_q, q.log_prob(b), rtol=0, atol=0.1)


def test_minibatches_reach_the_same_posterior():
    pair = pgen.Pair(regression, "full_rank")
    pair.fit((X, Y), steps=3000, batch_size=8, seed=1, **QUICK)
    check_regression(pair, covariance=COVARIANCE, tolerance=0.15)


# --- supports and plates -------------------------------------------------------------------------------------------------


def constrained(y):
    """Latents on every kind of support. The data say nothing of them, so the evidence is known and weights average to it."""
    one = y.new_ones(())
    pyro.sample("real", dist.Normal(y.new_zeros(2), 1.5).to_event(1))
    pyro.sample("positive", dist.LogNormal(0.3 * one, 0.5))
    pyro.sample("simplex", dist.Dirichlet(y.new_tensor([4.0, 3.0, 2.0, 5.0])))
    pyro.sample("correlation", dist.LKJCholesky(3, 8.0 * one))
    pyro.sample("interval", dist.Beta(5.0 * one, 4.0 * one))
    with pyro.plate("groups", 2):
        pyro.sample("group", dist.HalfNormal(0.5 * one))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0 * one, 1.0), obs=y)


@pytest.mark.parametrize("guide", AUTOMATIC)
def test_densities_are_right_on_every_support(guide):
    y = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64)
    pair = pgen.Pair(constrained, guide)
    pair.fit(y, steps=600, objective=pgen.ELBO(4), seed=1, **QUICK)
    draws = pair.draw(y, 3000, seed=2)
    weight = (draws.log_weight - dist.Normal(0.0, 1.0).log_prob(y).sum()).exp()
    error = float(weight.std()) / math.sqrt(3000)
    assert float(weight.mean()) == pytest.approx(1.0, abs=4 * error)
    assert error < 0.06
    shapes = {name: tuple(value.shape[1:]) for name, value in draws.values.items()}
    assert shapes == {"real": (2,), "positive": (), "simplex": (4,), "correlation": (3, 3), "interval": (), "group": (2,)}
    assert bool((draws.values["positive"] > 0).all()) and bool((draws.values["group"] > 0).all())
    torch.testing.assert_close(draws.values["simplex"].sum(-1), torch.ones(3000, dtype=torch.float64))
    factor = draws.values["correlation"]
    torch.testing.assert_close((factor @ factor.mT).diagonal(dim1=1, dim2=2), torch.ones(3000, 3, dtype=torch.float64))


def two_plates(y):
    """y (N, 3): three measurements of each datum, each with a latent of its own, and a mean each."""
    with pyro.plate("kinds", 3, dim=-2):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(3, 1), 2.0))
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)


@pytest.mark.parametrize("guide", AUTOMATIC)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_plates_in_two_directions(guide, batch_size):
    y = torch.randn(11, 3, dtype=torch.float64)
    pair = pgen.Pair(two_plates, guide)
    run = pair.fit(y, steps=7, batch_size=batch_size, **QUICK)
    draws = pair.draw(y, 5)
    assert draws.values["mu"].shape == (5, 3, 1) and draws.values["z"].shape == (5, 3, 11)
    assert draws.dims["z"] == ("kinds", "data") and draws.log_likelihood["y"].shape == (5, 3, 11)
    assert draws.log_p_rows.shape == (5, 11)
    by_hand = dist.Normal(0.0, 2.0).log_prob(draws.values["mu"]).sum((1, 2))
    by_hand = by_hand + dist.Normal(draws.values["mu"], 1.0).log_prob(draws.values["z"]).sum((1, 2))
    by_hand = by_hand + dist.Normal(draws.values["z"], 1.0).log_prob(y.T).sum((1, 2))
    torch.testing.assert_close(draws.log_p, by_hand)
    assert run.steps == 7


def local(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("guide", AUTOMATIC)
def test_a_local_latent_keeps_its_row_under_ragged_minibatches(guide):
    y = torch.linspace(-4.0, 6.0, 11, dtype=torch.float64)
    pair = pgen.Pair(local, guide)
    pair.fit(y, steps=1200, batch_size=4, seed=1, **QUICK)
    z = pair.draw(y, 4000).values["z"]
    torch.testing.assert_close(z.mean(0), y / 2, rtol=0, atol=0.15)
    torch.testing.assert_close(z.std(0), torch.full_like(y, math.sqrt(0.5)), rtol=0.15, atol=0)


@pytest.mark.parametrize("batch_size", [None, 50])
def test_log_prob_of_many_rows_with_a_latent_each(batch_size):
    """More rows than share a noise key, so that rows must be matched with their own parameters."""
    y = torch.linspace(-2.0, 3.0, 130, dtype=torch.float64)
    pair = pgen.Pair(local)
    pair.fit(y, steps=300, batch_size=batch_size, seed=1, **QUICK)
    score = pair.log_prob(y, num_samples=500)
    torch.testing.assert_close(score.value, dist.Normal(0.0, math.sqrt(2.0)).log_prob(y), rtol=0, atol=0.3)


def test_a_table_of_rows_does_not_answer_for_other_rows():
    y = torch.linspace(-4.0, 6.0, 11, dtype=torch.float64)
    pair = pgen.Pair(local)
    pair.fit(y, steps=5, batch_size=4, **QUICK)
    with pytest.raises(pgen.NotAvailable, match="does not know these rows"):
        pair.draw(y[:7], 5)


@pytest.mark.parametrize("guide", AUTOMATIC)
def test_a_program_without_a_data_plate(guide):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    pair = pgen.Pair(model, guide)
    pair.fit(y, steps=800, objective=pgen.ELBO(4), seed=1, **QUICK)
    mu = pair.draw(y, 4000).values["mu"]
    variance = 1 / (3 + 1 / 9)
    assert float(mu.mean()) == pytest.approx(7 * variance, abs=0.05)
    assert float(mu.std()) == pytest.approx(math.sqrt(variance), rel=0.08)


def test_a_discrete_latent_without_end_is_refused_by_name():
    def count(y):
        z = pyro.sample("z", dist.Poisson(3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"latent 'z' is discrete \(Poisson\)"):
        pgen.Pair(count).fit(torch.zeros(3), steps=1, progress=False)


def test_guide_names_are_checked():
    with pytest.raises(ValueError, match="`guide` is 'fullrank', which is unknown; did you mean 'full_rank'"):
        pgen.Pair(regression, "fullrank")


# --- Pyro's own guides -----------------------------------------------------------------------------------------------------

AUTOGUIDES = [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal]


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides_of_pyro_work_as_guides(kind, tmp_path):
    def make():
        return pgen.Pair(regression, kind(regression))

    pair = make()
    pair.fit((X, Y), steps=1200, objective=pgen.ELBO(32), seed=1, **QUICK)
    draws = pair.draw((X, Y), 4000, seed=2)
    sd = COVARIANCE.diagonal().sqrt()
    assert float(((draws.values["b"].mean(0) - MEAN) / sd).abs().max()) < 0.15
    if kind is autoguide.AutoMultivariateNormal:
        torch.testing.assert_close(torch.cov(draws.values["b"].T), COVARIANCE, rtol=0.15, atol=2e-4)
        evidence = float(torch.logsumexp(draws.log_weight, 0) - math.log(4000))
        assert evidence == pytest.approx(EVIDENCE, abs=0.05)
    pair.save(tmp_path / "pair.pgen")
    again = make().load(tmp_path / "pair.pgen").draw((X, Y), 4000, seed=2)
    assert torch.equal(again.log_q, draws.log_q)


def test_autodelta_finds_the_mode_and_says_that_it_has_no_density():
    pair = pgen.Pair(regression, autoguide.AutoDelta(regression))
    pair.fit((X, Y), steps=600, optimizer=0.1, seed=1, **QUICK)
    draws = pair.draw((X, Y), 2)
    torch.testing.assert_close(draws.values["b"][0], MEAN, rtol=0, atol=0.01)
    assert draws.no_density == ("b",)


# --- guides and models written by hand ---------------------------------------------------------------------------------------


def test_parameters_of_functions_belong_to_the_pair_and_to_nobody_else():
    def model(y):
        sd = pyro.param("sd", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, sd), obs=y)

    y = torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=torch.float64)
    pairs = [pgen.Pair(model), pgen.Pair(model)]
    for pair in pairs:
        assert pair.fit(y, steps=500, **QUICK).steps == 500
        score = pair.log_prob(y)
        rms = float(y.square().mean().sqrt())
        torch.testing.assert_close(score.value, dist.Normal(0.0, rms).log_prob(y), rtol=0, atol=1e-3)
        assert score.kind == "exact" and score.mc_error is None
    assert torch.equal(state(pairs[0]), state(pairs[1]))
    assert not list(pyro.get_param_store().keys())


def amortized(encoder, decoder, named):
    """A model and a guide that refer to their networks."""

    def model(x):
        if named:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        if named:
            pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


class Holder(nn.Module):
    """Programs as methods, as in Pyro's own examples."""

    def __init__(self, encoder, decoder, named):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.programs = amortized(encoder, decoder, named)

    def model(self, x):
        self.programs[0](x)

    def guide(self, x):
        self.programs[1](x)


def as_methods(*parts):
    holder = Holder(*parts)
    return holder.model, holder.guide


def behind_a_helper(encoder, decoder, named):
    def decode(z):
        return decoder(z)

    return amortized(encoder, decode, False)


WAYS = {"closure": amortized, "methods": as_methods, "helper": behind_a_helper}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("named", [False, True], ids=["plain", "pyro.module"])
def test_networks_that_programs_refer_to_are_trained(way, named):
    if way == "helper" and named:
        pytest.skip("the helper is no module, so it cannot be registered")
    encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)
    before = [p.detach().clone() for net in (encoder, decoder) for p in net.parameters()]
    pair = pgen.Pair(*WAYS[way](encoder, decoder, named))
    if way == "helper":  # out of sight: refused, never left untrained in silence
        with pytest.raises(ValueError, match=r"would not be trained: add pyro\.module"):
            pair.fit(torch.randn(7, 3), steps=3, progress=False)
        return
    pair.fit(torch.randn(7, 3), steps=3, progress=False, compile="eager")
    after = [p for net in (encoder, decoder) for p in net.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after))
    assert {id(p) for p in after} == {id(p) for p in pair.parameters()}


class Slope(PyroModule):
    def __init__(self):
        super().__init__()
        self.b = PyroSample(lambda self: dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        self.offset = PyroModule[nn.Linear](3, 1, bias=False)
        self.sd = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y):
        b = self.b
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ b + 0.0 * self.offset(x).squeeze(-1), self.sd), obs=y)


class SlopeGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.ones(3), constraint=dist.constraints.positive)

    def forward(self, x, y):
        pyro.sample("b", dist.Normal(self.loc, self.scale).to_event(1))


@pytest.mark.parametrize("guide", [SlopeGuide, lambda: "mean_field"], ids=["PyroModule", "automatic"])
def test_pyro_modules_with_parameters_and_samples(guide, tmp_path):
    pair = pgen.Pair(Slope(), guide())
    pair.fit((X, Y), steps=1200, objective=pgen.ELBO(4), seed=1, **QUICK)
    draws = pair.draw((X, Y), 1000, seed=2)
    assert float((draws.values["b"].mean(0) - MEAN).abs().max()) < 0.1
    assert all(p.dtype == torch.float64 for p in pair.parameters())
    pair.save(tmp_path / "pair.pgen")
    again = pgen.Pair(Slope(), guide()).load(tmp_path / "pair.pgen").draw((X, Y), 1000, seed=2)
    assert torch.equal(again.log_weight, draws.log_weight)


def test_a_parameter_that_appears_late_is_refused():
    calls = []

    def model(y):
        calls.append(1)
        if len(calls) > 2:
            pyro.param("late", torch.tensor(0.0))
        mu = pyro.sample("mu", dist.Normal(pyro.param("early", torch.tensor(0.0)), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"parameter 'late' appeared after the first run of the programs.*known: early"):
        pgen.Pair(model, guide).fit(torch.zeros(3), steps=5, progress=False)


@pytest.mark.parametrize(
    ("init", "constraint", "message"),
    [
        (torch.tensor(-1.0), dist.constraints.positive, "initial value of parameter 'sd' is outside its constraint"),
        (None, dist.constraints.real, "parameter 'sd' has no initial value"),
    ],
)
def test_initial_values_are_checked(init, constraint, message):
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, pyro.param("sd", init, constraint=constraint)), obs=y)

    with pytest.raises(ValueError, match=message):
        pgen.Pair(model).fit(torch.zeros(3), steps=1, progress=False)
