"""Energy-based models and their objectives, where the answer is known."""

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from cases import seeded
from torch import nn

import pgen
from pgen.data import Dequantize, Standardize
from pgen.distributions.energy import Unnormalised
from pgen.evaluation.normalizer import LogNormalizer, settled
from pgen.evaluation.tempering import _in_neighbourhoods, _resampled
from pgen.models import RBM, EnergyBased, Gaussian
from pgen.objectives import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    NoiseContrastive,
    PersistentContrastiveDivergence,
    SlicedScoreMatching,
)
from pgen.programs import run_laws, run_program
from pgen.samplers.mcmc import exchange, gibbs, hmc, langevin, start, with_gradient
from pgen.training import Adam
from pgen.training.fit import NonFinite

VARIANCE = 1 / 2.5
X = seeded(lambda: math.sqrt(VARIANCE) * torch.randn(2000, 2, dtype=torch.float64))


class Quadratic(nn.Module):
    """f(x) = exp(-|x|^2 / 2 v), whose Z is 2 pi v in the plane."""

    def __init__(self, variance=1.0):
        super().__init__()
        self.log_precision = nn.Parameter(torch.tensor(-math.log(variance), dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -0.5 * self.log_precision.exp() * x.square().sum(1))


class Bowl(nn.Module):
    """The same as the energy of a family."""

    def __init__(self, centre=0.0, precision=1.0):
        super().__init__()
        self.log_precision = nn.Parameter(torch.tensor(math.log(precision)))
        self.centre = centre

    def forward(self, x):
        return 0.5 * self.log_precision.exp() * (x - self.centre).square().flatten(1).sum(1)


class TwoWells(nn.Module):
    """Minus the log-density of 0.8 N(-3, 0.5^2) + 0.2 N(3, 0.5^2), which no Gaussian term is to change."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor([0.8, 0.2]).log())

    def forward(self, x):
        wells = torch.stack([-0.5 * ((x[:, 0] - m) / 0.5).square() for m in (-3.0, 3.0)], 1)
        return -(wells + self.share).logsumexp(1)


def fitted(objective, x=X, steps=150, lr=0.05, **options):
    model = Quadratic()
    options = {"optimizer": Adam(lr), "schedule": "cosine", "precision": "float64", "compile": "graph", **options}
    run = pgen.Pair(model, lambda x: None).fit(x, objective=objective, steps=steps, progress=False, **options)
    return float(model.log_precision.exp().detach()), run


# --- samplers -------------------------------------------------------------------------------------------------------------


def moments(x):
    """Standardised deviations of mean and variance of N(0, v) draws from 0 and v, by their standard errors."""
    return float(x.mean() / (x.std() / math.sqrt(len(x)))), float((x.var() / 1 - 1) / math.sqrt(2 / len(x)))


def test_a_langevin_step_leaves_its_own_law_as_it_is():
    """On N(0, 1) the unadjusted step is an autoregression, of variance 1 / (1 - eps^2 / 4): fails once in 100 000."""
    size, density = 0.9, with_gradient(lambda u: -0.5 * u.square().sum(-1))
    variance = 1 / (1 - size**2 / 4)

    def step():
        state = start(density, math.sqrt(variance) * torch.randn(200_000, 1, dtype=torch.float64))
        return langevin(density, state, size)

    state, info = seeded(step, 1)
    mean, spread = moments(state.position[:, 0] / math.sqrt(variance))
    assert abs(mean) < 4.5 and abs(spread) < 4.5 and bool(info.accepted.all())
    assert abs(moments(state.position[:, 0])[1]) > 10  # the test can fail: the target's own variance is another


@pytest.mark.parametrize("leapfrog", [1, 3])
def test_corrected_steps_leave_the_target_as_it_is(leapfrog):
    density = with_gradient(lambda u: -0.5 * u.square().sum(-1))
    state, info = seeded(lambda: hmc(density, start(density, torch.randn(200_000, 1, dtype=torch.float64)), 0.9, leapfrog), 1)
    mean, spread = moments(state.position[:, 0])
    assert abs(mean) < 4.5 and abs(spread) < 4.5 and 0.5 < float(info.acceptance.mean()) < 1


def test_a_gibbs_sweep_leaves_a_law_over_three_values_as_it_is():
    """Chi-squared of 27 states, 26 degrees of freedom: fails once in 10 000."""
    field = torch.tensor([0.5, -0.3, 0.2]).double()

    def log_density(u):
        return u @ field + 0.7 * u[..., 0] * u[..., 1] - 0.4 * u[..., 1] * u[..., 2]

    values = torch.tensor([-1.0, 0.0, 2.0]).double()
    states = torch.cartesian_prod(values, values, values)
    share = log_density(states).softmax(0)

    def sweep():
        return gibbs(log_density, states[torch.multinomial(share, 50_000, replacement=True)], values)

    x = seeded(sweep, 2)
    counts = (x[:, None] == states).all(2).sum(0).double()
    assert int(counts.sum()) == 50_000
    assert float(((counts - 50_000 * share).square() / (50_000 * share)).sum()) < 62


def test_exchanges_leave_each_temperature_its_law():
    """N(0, 1 / (1 + 3 beta)) at three temperatures, fails once in 10 000; half of all pairs are tried."""
    betas = torch.tensor([0.0, 0.3, 1.0]).double()
    sd = (1 / (1 + 3 * betas)).sqrt()

    def exchanged():
        x = sd[:, None] * torch.randn(3, 200_000, dtype=torch.float64)
        levels, acceptance = exchange(betas, -1.5 * x.square())
        return x, levels, acceptance, x.gather(0, levels)

    x, levels, acceptance, after = seeded(exchanged, 3)
    assert acceptance.shape == (2, 200_000) and bool((levels.sort(0).values == torch.arange(3)[:, None]).all())
    for level in range(3):
        mean, spread = moments(after[level] / sd[level])
        assert abs(mean) < 4.5 and abs(spread) < 4.5
    for pair in range(2):
        c = -1.5 * x[pair : pair + 2].square()
        expected = ((betas[pair + 1] - betas[pair]) * (c[0] - c[1])).exp().clamp(max=1)
        torch.testing.assert_close(acceptance[pair], expected)
        swapped = (levels[pair] == pair + 1) & (levels[pair + 1] == pair)
        assert float(swapped.double().mean()) == pytest.approx(0.5 * float(expected.mean()), abs=0.006)


# --- objectives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["langevin", "hmc"])
def test_persistent_chains_find_the_precision(sampler):
    """Maximum likelihood: one over the data's mean square; of 1000 chains the standard error is about 3 %."""
    objective = PersistentContrastiveDivergence(2, sampler, leapfrog=3, restart=0.02)
    found, run = fitted(objective, batch_size=1000)
    assert found == pytest.approx(1 / float(X.square().mean()), rel=0.1)
    target = {"langevin": 0.574, "hmc": 0.65}[sampler]
    assert float(run.history["acceptance"][-50:].mean()) == pytest.approx(target, abs=0.1)
    assert run.word == "energy gap"


class Shares(nn.Module):
    """f(x) = e^s N(-2, .2^2) + e^-s N(2, .2^2): chains do not cross, and s is the modes' share alone."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        wells = torch.stack([-0.5 * ((x[:, 0] - m) / 0.2).square() for m in (-2.0, 2.0)], 1)
        with pyro.plate("data", len(x)):
            pyro.factor("energy", (wells + torch.stack([self.logit, -self.logit])).logsumexp(1))


def two_modes():
    return seeded(lambda: torch.where(torch.arange(500) < 400, -2.0, 2.0)[:, None] + 0.2 * torch.randn(500, 1).double())


def test_temperatures_set_the_shares_of_modes_between_which_chains_do_not_cross():
    """The data's log-odds are log 4, of which s is half; of 300 chains the standard error is about 0.07."""
    x, found = two_modes(), {}
    for num_temps in (1, 6):
        model = Shares()
        objective = PersistentContrastiveDivergence(2, num_chains=300, num_temps=num_temps)
        options = {"steps": 400, "optimizer": Adam(0.05), "schedule": "cosine", "precision": "float64", "compile": "graph"}
        pgen.Pair(model, lambda x: None).fit(x, objective=objective, batch_size=100, progress=False, **options)
        found[num_temps] = float(model.logit.detach())
    assert found[6] == pytest.approx(0.5 * math.log(4), abs=0.25)
    assert abs(found[1] - 0.5 * math.log(4)) > 0.35  # the test can fail: chains alone know nothing of it


def test_temperatures_move_until_all_exchange_equally_often():
    x, model = two_modes(), Shares()
    objective = PersistentContrastiveDivergence(1, num_chains=500, num_temps=5).begin(model, lambda x: None, (x,))
    before, rates = objective.chains.betas, []
    torch.testing.assert_close(before, torch.tensor([0, 1, 3, 7, 15]).double() / 15)
    with seeded(torch.random.fork_rng):
        for _ in range(400):
            with torch.no_grad():
                drawn, metrics = objective._negative(model, (x,))
            assert drawn[0].shape == (500, 1) and metrics["exchange"].shape == (4,) and metrics["acceptance"].shape == (5,)
            objective._adapt(metrics)
            rates.append(metrics["exchange"])
    late = torch.stack(rates[-100:]).mean(0)
    assert float(late.max() - late.min()) < 0.05 < float(rates[0].max() - rates[0].min())
    assert bool((objective.chains.betas.diff() > 0).all()) and float(objective.chains.betas[-1]) == pytest.approx(1)
    with pytest.raises(
        ValueError, match="num_temps=4 leads from a Gaussian to real data; with sampler='gibbs' use num_temps=1"
    ):
        PersistentContrastiveDivergence(sampler="gibbs", num_temps=4)


def test_short_chains_from_the_data_find_it_too():
    found, _ = fitted(ContrastiveDivergence(5, "langevin"), batch_size=1000)
    assert found == pytest.approx(1 / float(X.square().mean()), rel=0.15)


def test_sliced_score_matching_has_the_closed_form():
    """The loss is P^2 S / 2 - P a coordinate, least at P = 1 / S; the curvature is diagonal, so directions do not matter."""
    found, run = fitted(SlicedScoreMatching(), steps=400)
    assert found == pytest.approx(1 / float(X.square().mean()), rel=1e-4)
    assert run.history["loss"][-1] == pytest.approx(-found, rel=1e-4)  # two coordinates, - P / 2 each


def test_denoising_score_matching_finds_the_blurred_law():
    found, _ = fitted(DenoisingScoreMatching(0.4), x=X.repeat(10, 1), steps=150)
    assert found == pytest.approx(1 / (float(X.square().mean()) + 0.16), rel=0.03)


def test_noise_contrast_learns_the_normaliser():
    noise = Gaussian((2,), "diagonal")
    found, run = fitted(NoiseContrastive(noise, ratio=3), x=X.repeat(3, 1), steps=250)
    assert found == pytest.approx(1 / float(X.square().mean()), rel=0.05)
    assert run.history["log_normalizer"][-1] == pytest.approx(math.log(2 * math.pi / found), abs=0.05)
    assert not noise.primed  # it was fitted on a copy


def test_noise_with_latents_that_are_summed_counts_with_its_whole_density():
    noise, x = pgen.models.GaussianMixture((2,), 3).double(), torch.cat([X[:40] - 4, X[40:80] + 4])
    noise.fit(x, precision="float64", progress=False)
    model = Quadratic()
    objective = NoiseContrastive(noise, 2).begin(model, lambda x: None, (x,))
    with torch.random.fork_rng():
        data, drawn = objective._gains(model, (x,))
    expected = -0.5 * x.square().sum(1) - noise.log_prob(x).value - math.log(2)
    torch.testing.assert_close(data, expected)
    assert data.dtype == torch.float64 and drawn.shape == (160,)
    with pytest.raises(ValueError, match="`noise` should have an exact density, and GAN has none"):
        NoiseContrastive(pgen.models.GAN((2,))).begin(model, lambda x: None, (x,))


@pytest.mark.parametrize(
    "objective",
    [
        PersistentContrastiveDivergence(2, "hmc", num_chains=7, restart=0.3, leapfrog=2),
        PersistentContrastiveDivergence(2, num_chains=7, num_temps=3),
        ContrastiveDivergence(2, "unadjusted"),
        DenoisingScoreMatching(0.3),
        SlicedScoreMatching(2),
        NoiseContrastive(Gaussian((2,)), 2),
        NoiseContrastive(pgen.models.GaussianMixture((2,), 2), 2),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_tiers_agree(objective):
    losses = []
    for tier in ("eager", "graph"):
        model = EnergyBased((2,), hidden=(6,))
        run = model.fit(X[:20], objective=objective, batch_size=5, steps=8, compile=tier, precision="float64", progress=False)
        assert run.tier == tier
        losses.append(run.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.parametrize("num_temps", [1, 3])
def test_a_fit_goes_on_where_it_stopped_with_its_chains(tmp_path, num_temps):
    def fit(steps, folder, model=None):
        model = model or EnergyBased((2,), hidden=(6,))
        objective = PersistentContrastiveDivergence(1, num_chains=12, restart=0.1, num_temps=num_temps)
        options = {"objective": objective, "batch_size": 5, "compile": "graph", "progress": False, "schedule": "constant"}
        return model, model.fit(X[:20].float(), steps=steps, checkpoint=folder, **options)

    whole, run = fit(9, None)
    interrupted, _ = fit(4, tmp_path)
    again, resumed = fit(9, tmp_path, interrupted)  # which has kept chains of its own
    np.testing.assert_array_equal(resumed.history["loss"], run.history["loss"])
    for first, second in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(first, second)


def test_a_further_fit_begins_at_the_chains_that_were_kept():
    model = EnergyBased((2,), hidden=(6,))
    model.fit(X[:20].float(), steps=3, progress=False)
    kept = model.chains.clone()
    for count in (100, 600):
        begun = PersistentContrastiveDivergence(num_chains=count).begin(model.model, model.guide, {"x": X[:20].float()})
        assert torch.equal(begun.chains.x, kept.repeat(3, 1)[:count])


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_further_fit_with_labels_begins_at_the_chains_that_were_kept(context_dim):
    model, x = EnergyBased((2,), hidden=(6,), num_labels=3, context_dim=context_dim), X[:20].float()
    labels, context = torch.arange(20) % 3, x.flip(1)
    data = {"x": x, "labels": labels, **({"context": context} if context_dim else {})}
    model.fit(data, steps=3, progress=False)
    begun = PersistentContrastiveDivergence(num_chains=300).begin(model.model, model.guide, data)
    assert torch.equal(begun.chains.x, model.chains.repeat(2, 1)[:300])
    assert torch.equal(begun.chains.given[0], labels.repeat(15))
    if context_dim:
        assert torch.equal(begun.chains.given[1], model.chains_context.repeat(2, 1)[:300])
    model.fit(data, steps=2, progress=False)


def test_some_chains_begin_anew_where_data_are():
    x = 5 + 3 * X
    objective = PersistentContrastiveDivergence(1, num_chains=4000, restart=0.25).begin(Quadratic(), lambda x: None, (x,))
    with torch.random.fork_rng():
        at, _ = objective._renewed(Quadratic(), torch.full((4000, 2), 100.0, dtype=torch.float64), [], [])
    anew = (at < 100).all(1)
    assert float(anew.double().mean()) == pytest.approx(0.25, abs=0.03)  # four standard errors
    torch.testing.assert_close(at[anew].mean(0), x.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(at[anew].std(0), x.std(0), atol=0.2, rtol=0)
    assert bool((at[~anew] == 100).all())


def test_chains_that_diverge_are_named_and_nothing_is_lost():
    model = EnergyBased((2,), hidden=(6,))
    before = {name: value.clone() for name, value in model.named_parameters()}
    objective = ContrastiveDivergence(2, "unadjusted", step_size=1e18)
    with pytest.raises(NonFinite, match=r"the chains diverged .* use a smaller step_size, or sampler='langevin'") as caught:
        model.fit(X[:20].float(), objective=objective, steps=20, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert caught.value.run.skipped == 5


def test_an_energy_that_is_not_a_number_is_named():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (self.weight * x).sum(1).log()

    broken = EnergyBased((2,), Broken())
    with pytest.raises(ValueError, match=r"has a log-density of nan .* energy of x in \[-.*\] is not a finite .* in Broken"):
        broken.fit(X[:20].float(), steps=5, progress=False)
    ask = {"compile": "eager", "progress": False}
    with pytest.raises(FloatingPointError, match=r"the energy is nan at .* of 64 points where chains begin"):
        broken.sample(3, num_temps=4, num_steps=1, **ask)
    with pytest.raises(FloatingPointError, match=r"the energy is nan at .* of 64 points where chains begin"):
        (broken + broken).sample(3, num_temps=4, num_steps=1, **ask)
    broken.log_z.copy_(torch.tensor([0.3, 0.1]))
    with torch.no_grad():
        broken.network.weight.fill_(math.nan)
    for question in (broken.sample, broken.log_normalizer, (2 * broken).sample):
        with pytest.raises(FloatingPointError, match=r"parameter 'network.weight' of this EnergyBased is not finite"):
            question(**ask)
    assert broken.log_z.tolist() == pytest.approx([0.3, 0.1])
    with pytest.raises(ValueError, match=r"log-density of nan .*: parameter 'network.weight' is not finite"):
        broken.fit(X[:20].float(), steps=5, progress=False)
    with pytest.raises(FloatingPointError, match="log Z came out as nan: the energy is not a number"):
        settled(lambda count: LogNormalizer(math.nan, math.nan, math.nan, math.nan, count, 10), None)
    broken.take_normalizer(torch.tensor(math.nan))
    assert broken.log_z.tolist() == pytest.approx([0.3, 0.1])


# --- the family -----------------------------------------------------------------------------------------------------------


def plain(energy, shape=(1,), **settings):
    """A family whose energy is this module alone, its Gaussian of reference N(0, 4^2)."""
    model = EnergyBased(shape, energy, confine=False, **settings)
    model.scale.fill_(4.0)
    model.data_scale.fill_(4.0)
    return model


def test_the_normaliser_lies_between_its_bounds():
    model = plain(Bowl(1.0, 4.0), (2,))
    model.scale.fill_(1.5)
    truth = math.log(2 * math.pi / 4)
    found = model.log_normalizer(num_temps=60, num_chains=60, leapfrog=5, progress=False)
    assert found.lower < truth < found.upper and found.gap < 1
    assert abs(found.value - truth) < 5 * found.error
    score = model.log_prob(torch.ones(1, 2))
    assert score.kind == "estimate" and score.mean == pytest.approx(-found.value, abs=1e-6)
    assert float(score.mc_error[0]) == pytest.approx(found.error)


@pytest.mark.parametrize("family", ["energy", "rbm"])
def test_noise_of_dequantised_data_is_keyed(family):
    """Whatever came before, answers are the same, and torch's own generator is where it was."""
    x = torch.arange(24.0).reshape(12, 2) % 3
    preprocess = Dequantize(3)
    if family == "rbm":
        model = RBM((2,), 3, visible="gaussian", preprocess=preprocess)
        model.fit(x, steps=1, progress=False)
        ask = (lambda: model.log_normalizer("ais", num_temps=4, num_chains=5).upper, lambda: model.hidden(x))
    else:
        model = EnergyBased((2,), hidden=(4,), num_labels=3, preprocess=preprocess, tempering=(3, 1, 1))
        model.fit({"x": x, "labels": torch.arange(12) % 3}, steps=1, progress=False)
        options = {"num_temps": 3, "num_chains": 5, "leapfrog": 1, "progress": False}
        ask = (lambda: model.log_normalizer(**options).upper, lambda: model.predict_proba(x))
    with torch.random.fork_rng():
        for question in ask:
            found = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                found.append(torch.as_tensor(question()))
                assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(*found)


def test_temperatures_are_added_until_the_error_is_small():
    def estimate(error, gap):
        return lambda count: LogNormalizer(1.0, error / count, 0.0, gap / count, count, 10)

    assert settled(estimate(1.0, 5.0), None).num_temps == 60
    assert settled(estimate(1.0, math.nan), None).num_temps == 60
    assert settled(estimate(3.0, 5.0), None).num_temps == 250
    assert settled(estimate(1.0, 50.0), None).num_temps == 250
    assert settled(estimate(99.0, 5.0), None).num_temps == 1000
    assert settled(estimate(99.0, 5.0), 7).num_temps == 7
    model = plain(Bowl(), (2,))
    model.scale.fill_(1.2)
    found = model.log_normalizer(progress=False, num_chains=80, leapfrog=3)
    assert found.num_temps == 60 and found.lower < math.log(2 * math.pi) < found.upper


def test_resampling_leaves_each_region_its_share():
    """In random order the counts of 16 regions of 1024 particles would be off by 6 or so; neighbours in a row, by 1 or 2."""
    x = seeded(lambda: torch.randn(1024, 3).double())
    order = _in_neighbourhoods(x)
    assert order.sort().values.equal(torch.arange(1024))
    log_weight = seeded(lambda: torch.randn(1024).double(), 5)
    with torch.random.fork_rng():
        rows = _resampled(log_weight, x)
    region = torch.empty(1024, dtype=torch.int64)
    region[order] = torch.arange(1024) // 64
    wanted = 1024 * torch.zeros(16).double().index_add_(0, region, log_weight.softmax(0))
    assert float((torch.bincount(region[rows], minlength=16) - wanted).abs().max()) < 2
    assert float((region[rows][1:] == region[rows][:-1]).double().mean()) < 0.2  # and they come in random order
    first = [x[order[:512]][:, d].max() <= x[order[512:]][:, d].min() for d in range(3)]
    assert sum(map(bool, first)) == 1  # halved by one coordinate


def test_samples_have_the_shares_of_the_modes():
    """Of 1000 particles 800 are expected left; chains from noise without weights would give each well its basin's share."""
    x = plain(TwoWells()).sample(1000, num_temps=60, num_steps=10, progress=False)
    assert float((x < 0).float().mean()) == pytest.approx(0.8, abs=0.06)
    assert float(x[x < 0].std()) == pytest.approx(0.5, abs=0.06)
    assert float(x[x < 0].mean()) == pytest.approx(-3, abs=0.1)


def test_samples_come_in_the_units_of_the_data():
    x = (5 + 3 * X).float()
    model = EnergyBased((2,), hidden=(4,), preprocess=Standardize())
    model.fit(x, steps=2, progress=False)
    drawn = model.sample(400, num_temps=30, num_steps=5, progress=False)
    assert drawn.mean(0).tolist() == pytest.approx(x.mean(0).tolist(), abs=0.6)
    again = model.sample(50, start="chains", num_steps=3, progress=False)
    assert again.shape == (50, 2) and float((again - x.mean(0)).abs().max()) < 20


def test_replicates_of_many_data_come_from_fewer_chains():
    model = plain(TwoWells(), tempering=(20, 5, 3))
    found = model.predict(torch.zeros(3, 1), 700, seed=4, progress=False)["x"]
    chains = model.sample(2000, seed=4, progress=False)
    assert found.shape == (700, 3, 1) and bool(torch.isin(found, chains).all())
    shares = (found < 0).double().mean((1, 2))  # of three draws each: binomial about the chains' own share
    share = float((chains < 0).double().mean())
    assert float(shares.mean()) == pytest.approx(share, abs=0.03)
    assert float(shares.var()) == pytest.approx(share * (1 - share) / 3, rel=0.2)
    assert not torch.equal(found, model.predict(torch.zeros(3, 1), 700, seed=5, progress=False)["x"])


def test_each_context_has_few_chains_whose_draws_repeat(monkeypatch):
    model, asked = plain(Follows(), context_dim=1), []
    noise = seeded(lambda: torch.randn(13 * 150, 1))

    def sample(n, context, **options):
        asked.append(n)
        return context + 0.5 * noise[:n]

    monkeypatch.setattr(model, "sample", sample)
    where = torch.linspace(-3, 3, 150)[:, None]
    found = model.predict(torch.zeros(150, 1), 200, context=where, seed=4, progress=False)["x"]
    assert asked == [13 * 150] and found.shape == (200, 150, 1)  # max(2000, 10 * 150) // 150 for each
    assert all(len(found[:, row].unique()) == 13 for row in range(150))
    assert float((found.mean(0) - where).abs().max()) < 0.7  # five standard errors, 0.5 / sqrt(13) each
    assert len(found.reshape(200, -1).unique(dim=0)) == 200  # no two replicates are alike
    asked.clear()
    assert model.predict(torch.zeros(150, 1), 3, context=where, progress=False)["x"].shape == (3, 150, 1) and asked == [450]


def test_the_classifier_is_the_softmax_of_the_logits():
    model = EnergyBased((2,), hidden=(6,), num_labels=3)
    x, y = X[:50].float(), (X[:50, 0] > 0).long() + (X[:50, 1] > 0.3).long()
    model.fit({"x": x, "labels": y}, objective=ContrastiveDivergence(), epochs=40, optimizer=0.05, progress=False)
    with torch.no_grad():
        logits = model.network(x)
    torch.testing.assert_close(model.predict_proba(x), logits.softmax(1))
    joint = model.log_prob({"x": x, "labels": y}).value - model.log_prob(x).value
    torch.testing.assert_close(joint, logits.log_softmax(1).gather(1, y[:, None])[:, 0].double(), atol=1e-5, rtol=1e-5)
    assert float((model.predict_proba(x).argmax(1) == y).float().mean()) > 0.8


def test_a_product_of_two_gaussians_is_one():
    """N(-1, 1/2) times N(2, 1)^2 has precision 2 + 2 and mean (-2 + 4) / 4."""
    first, second = plain(Bowl(-1.0, 2.0)), plain(Bowl(2.0, 1.0))
    for model in (first, second):
        model.confine = True
        model.scale.fill_(1e3)
        model.data_scale.fill_(2.0)
    both = first + 2 * second
    x = both.sample(1500, num_temps=60, num_steps=20, progress=False)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.07) and float(x.var()) == pytest.approx(0.25, abs=0.04)
    at = torch.linspace(-1, 1, 5)[:, None]
    torch.testing.assert_close(both.energy(at), first.energy(at) + 2 * second.energy(at))
    assert both.log_prob(at).kind == "unnormalised"
    found = both.log_normalizer(num_temps=40, num_chains=40, leapfrog=3, progress=False)
    truth = 0.5 * math.log(2 * math.pi / 4) - 0.5 * (2 + 8 - 4 * 0.25)
    assert abs(found.value - truth) < 5 * found.error < 0.5 and found.lower < truth < found.upper


def test_an_energy_is_taken_off_another():
    """N(0, 1/4) over N(1, 1) has precision 3 and mean -1/3."""
    first, second = plain(Bowl(0.0, 4.0)), plain(Bowl(1.0, 1.0))
    first.confine, first.scale[:], first.data_scale[:] = True, 1e3, 2.0
    x = (first - second).sample(1000, num_temps=40, num_steps=10, progress=False)
    assert float(x.mean()) == pytest.approx(-1 / 3, abs=0.07) and float(x.var()) == pytest.approx(1 / 3, abs=0.05)
    assert (-first).terms[0][0] == -1.0
    with pytest.raises(ValueError, match=r"the weights \(1, -5\) leave nothing that keeps x from running away"):
        first.confine = second.confine = True
        (first - 5 * second).sample(5)


def test_slips_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`num_labels` should be 0 .* or 2 and more, got 1"):
        EnergyBased((2,), num_labels=1)
    with pytest.raises(ValueError, match="Bowl is a module of your own, which no file can hold"):
        plain(Bowl()).save(tmp_path / "model.pgen")
    with pytest.raises(ValueError, match=r"`energy` should give shape \(2,\) for 2 data, got \(2, 3\)"):
        EnergyBased((2,), nn.Linear(2, 3)).fit(X[:20].float(), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"energy='conv' needs images .* got event shape \(2,\)"):
        EnergyBased((2,), "conv")
    with pytest.raises(ValueError, match=r"`hidden` should be positive sizes, .*, got \(8, -1\)"):
        EnergyBased((2,), hidden=(8, -1))
    with pytest.raises(ValueError, match="`hidden` should be one or more positive sizes"):
        EnergyBased((8, 8), "conv", hidden=())
    with pytest.raises(ValueError, match="start='chains' is not possible: the last fit kept no chains"):
        EnergyBased((2,)).sample(3, start="chains")
    with pytest.raises(ValueError, match="made without classes"):
        EnergyBased((2,)).fit({"x": X[:5].float(), "labels": torch.zeros(5)}, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"has num_labels=3 and was given no labels.* use fit\(\{\"x\": x, \"labels\": y\}\)"):
        EnergyBased((2,), num_labels=3).fit(X[:5].float(), steps=1, progress=False)
    with pytest.raises(pgen.NotAvailable, match="no classes"):
        EnergyBased((2,)).predict_proba(X[:2].float())
    with pytest.raises(ValueError, match=r"shapes .* cannot be added"):
        EnergyBased((2,)) + EnergyBased((3,))
    with pytest.raises(ValueError, match=r"`noise` has event shape \(3,\), the data \(2,\)"):
        EnergyBased((2,)).fit(X[:20].float(), objective=NoiseContrastive(Gaussian((3,))), steps=1, progress=False)
    with pytest.raises(TypeError, match="`noise` should be a model"):
        NoiseContrastive("gaussian")
    with pytest.raises(ValueError, match=r"twice differentiable, and 'network.layers.1' is a ReLU: use activation='silu'"):
        EnergyBased((2,), activation="relu").fit(X[:20].float(), objective=SlicedScoreMatching(), steps=1, progress=False)
    with pytest.raises(ValueError, match="needs a model without latents, and this one draws 'z'"):
        pgen.models.VAE((2,), latent_dim=1, likelihood="gaussian").fit(
            X[:20].float(), objective=DenoisingScoreMatching(), steps=1, progress=False
        )


def test_energies_that_are_no_networks_are_named():
    class Known(nn.Module):
        def forward(self, x):
            return x.square().sum(1)

    for energy, got in ((lambda x: x.sum(1), "function"), (Bowl, "the class Bowl; give an instance"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"`energy` should be 'dense', 'conv' or a torch.nn.Module .* got {got}$"):
            EnergyBased((2,), energy)
    with pytest.raises(ValueError, match="`energy` Known has no parameters, so that there is nothing to fit"):
        EnergyBased((2,), Known())
    with pytest.raises(ValueError, match=r"`energy` Linear was given x of shape \(N, 2\): .*shapes cannot be multiplied"):
        EnergyBased((2,), nn.Linear(5, 1)).fit(X[:20].float(), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"`energy` should give shape \(2, 3\) for 2 data, got \(2, 1\)"):
        labelled = {"x": X[:20].float(), "labels": torch.arange(20) % 3}
        EnergyBased((2,), nn.Linear(2, 1), num_labels=3).fit(labelled, steps=1, progress=False)


def test_chains_that_stand_still_are_told():
    objective = PersistentContrastiveDivergence()
    steps = np.ones(400)
    history = {"data_energy": steps, "chain_energy": steps + 0.3, "acceptance": 0.6 * steps}
    assert objective.concerns(history) == {}
    assert "stand still (acceptance 1.0%)" in objective.concerns({**history, "acceptance": 0.01 * steps})["chains"]
    assert "1e+05 nats apart: the chains run away" in objective.concerns({**history, "chain_energy": 1e5 * steps})["chains"]
    assert objective.concerns({**history, "exchange": 0.5 * steps}) == {}
    assert "hardly exchange chains (1.0%)" in objective.concerns({**history, "exchange": 0.01 * steps})["temperatures"]
    short = {name: column[:100] for name, column in history.items()}
    assert objective.concerns({**short, "acceptance": 0 * steps[:100]}) == {}


def test_labels_that_teach_no_class_are_named():
    x = X[:12].float()
    with pytest.raises(ValueError, match="every datum has label 1, from which no class is learnt: give data of two classes"):
        EnergyBased((2,), num_labels=3).fit({"x": x, "labels": torch.ones(12)}, steps=1, progress=False)
    with pytest.warns(UserWarning, match="no datum has label 1, 3 of num_labels=4: "):
        EnergyBased((2,), num_labels=4).fit({"x": x, "labels": 2 * (torch.arange(12) % 2)}, steps=1, progress=False)
    stream = EnergyBased((2,), num_labels=3)
    stream.num_rows = 100
    stream.prime({"x": x, "labels": torch.ones(12, dtype=torch.int64)})  # the other rows may have other labels


def test_data_in_units_that_do_not_suit_are_named():
    x = X[:30].float()
    units = RBM((2,), 2, visible="gaussian")
    levels = EnergyBased((2,), preprocess=Dequantize(8))
    cases = {
        r"x lies in .*, with a standard deviation .*, and EnergyBased .*: use preprocess=": (EnergyBased((2,)), 1000 + x),
        r"and EnergyBased takes numbers about 0 .*: use": (EnergyBased((2,)), 0.05 * x),
        r"and RBM takes numbers about 0 .*: use": (units, 1000 + 100 * x),
        r"after `preprocess`.*: end `preprocess` with pgen": (levels, torch.full((30, 2), 4.0)),
    }
    for words, (model, data) in cases.items():
        with pytest.warns(UserWarning, match=words):
            model.prime({"x": data})
    for model, data in (
        (EnergyBased((2,), octaves=2), 1000 * x),
        (EnergyBased((2,), Bowl()), 1000 * x),
        (EnergyBased((2,), preprocess=Standardize()), 1000 * x),
        (EnergyBased((2,)), 8 * x),
        (EnergyBased((2,)), 0.2 * x),
    ):
        if model.preprocess is not None:
            model.preprocess.fit(data)
        model.prime({"x": data})


class Follows(nn.Module):
    """N(c, 1 / 4) given a context c."""

    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(4.0))

    def forward(self, x, context):
        return 0.5 * self.precision * (x - context).square().sum(1)


def test_each_context_has_a_law_of_its_own():
    model = plain(Follows(), context_dim=1)
    where = torch.tensor([[-2.0], [2.0]]).repeat_interleave(300, 0)
    x = model.sample(600, where, num_temps=30, num_steps=10, progress=False)
    assert float((x - where).mean()) == pytest.approx(0, abs=0.1) and float((x - where).std()) == pytest.approx(0.5, abs=0.06)
    found = model.log_normalizer(where[:1], num_temps=60, num_chains=60, leapfrog=3, progress=False)
    assert found.lower < 0.5 * math.log(2 * math.pi / 4) < found.upper
    assert model.log_prob(x[:2], where[:2]).kind == "unnormalised"  # one number would not do for all contexts
    with pytest.raises(ValueError, match="give `context`"):
        model.sample(3)


class Classes(nn.Module):
    """log p(x, y) of classes of shares 1 : 3 with p(x | y) = N(m_y, 1 / 4), m = -1, 2."""

    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(4.0))
        self.register_buffer("centre", torch.tensor([-1.0, 2.0]))

    def forward(self, x):
        return -0.5 * self.precision * (x - self.centre).square() + torch.tensor([1.0, 3.0]).log()


def barely_confined(model):
    """The Gaussian term lets sums be drawn from, and is too wide to matter."""
    model.confine, model.scale[:], model.data_scale[:] = True, 1e3, 2.0
    return model


FEW = {"num_temps": 40, "num_steps": 15, "progress": False}


def test_energies_at_contexts_are_added():
    """N(0, 1/4) times N(2, 1/4) is N(1, 1/8), and its Z the integral of exp(-4 (x - 1)^2 - 4)."""
    model, x = barely_confined(plain(Follows(), context_dim=1)), torch.linspace(-1, 3, 7)[:, None]
    zero, two = model.at(context=[0.0]), model.at(context=torch.tensor([[2.0]]))
    torch.testing.assert_close(two.log_prob(x).value, model.log_prob(x, torch.full((7, 1), 2.0)).value)
    both = zero + 1.0 * two
    torch.testing.assert_close(both.energy(x)[:, None], (4 * (x - 1).square() + 4).double(), atol=1e-4, rtol=1e-4)
    drawn = both.sample(600, **FEW)
    assert float(drawn.mean()) == pytest.approx(1, abs=0.07) and float(drawn.var()) == pytest.approx(1 / 8, abs=0.03)
    found = both.log_normalizer(num_temps=30, num_chains=40, leapfrog=3, progress=False)
    assert found.lower < 0.5 * math.log(2 * math.pi / 8) - 4 < found.upper
    other = barely_confined(plain(Bowl()))
    torch.testing.assert_close((zero + other).energy(x), zero.energy(x) + other.energy(x))
    with pytest.raises(ValueError, match=r"an energy with a context has a law for each of them: add model.at\(context=...\)"):
        model + other
    with pytest.raises(ValueError, match=r"context_dim=1; give `context`"):
        model.at()
    with pytest.raises(ValueError, match="made without context"):
        other.at(context=[1.0])


def test_each_class_has_a_law_of_its_own():
    model, x = barely_confined(plain(Classes(), num_labels=2)), torch.linspace(-2, 3, 6)[:, None]
    one = model.at(label=1)
    y = torch.ones(6, dtype=torch.int64)
    torch.testing.assert_close(one.log_prob(x).value, model.log_prob({"x": x, "labels": y}).value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.energy(x)[:, None], (2 * (x - 2).square() - math.log(3)).double(), atol=1e-4, rtol=1e-4)
    for drawn in (one.sample(500, **FEW), model.sample(500, label=1, **FEW)):
        assert float(drawn.mean()) == pytest.approx(2, abs=0.1) and float(drawn.std()) == pytest.approx(0.5, abs=0.07)
    assert bool((model.predict_proba(drawn).argmax(1) == 1).float().mean() > 0.98)
    torch.testing.assert_close((one - 0.5 * model.at(label=0)).energy(x), one.energy(x) - 0.5 * model.at(label=0).energy(x))
    for label in (2, -1, 0.5, "cat"):
        with pytest.raises(ValueError, match="`label` should be one class, 0 to 1, got"):
            model.at(label=label)
    with pytest.raises(ValueError, match=r"made without classes; make it with num_labels=... to ask for a `label`"):
        plain(Bowl()).sample(3, label=0)
    model.chains.zero_()
    with pytest.raises(ValueError, match="chains are kept for no single class; use start='noise'"):
        model.sample(3, label=0, start="chains")


def test_a_class_of_dequantised_data_is_drawn():
    x = torch.arange(60.0).reshape(30, 2) % 4
    model = EnergyBased((2,), hidden=(4,), num_labels=2, preprocess=Dequantize(4))
    model.fit({"x": x, "labels": torch.arange(30) % 2}, steps=1, progress=False)
    drawn = model.sample(5, label=1, num_temps=3, num_steps=1, progress=False)
    assert drawn.shape == (5, 2) and bool((drawn == drawn.round()).all())
    with pytest.raises(ValueError, match=r"nor taken at a context or class: .* model.sample\(n, context, label=...\)"):
        model.at(label=1)


def test_waves_of_standardised_data_stand_beside_them(tmp_path):
    """Units of x do not matter: the network sees data in their standard deviations, and saves with its octaves."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    models = [EnergyBased((2,), hidden=(8,), octaves=3, confine=False, seed=1) for _ in range(2)]
    for model, unit in zip(models, (1.0, 100.0)):
        model.prime({"x": unit * x})
    torch.testing.assert_close(models[0].energy(x), models[1].energy(100 * x), rtol=1e-4, atol=1e-5)
    assert models[0].network.layers[0].in_features == 2 * (1 + 2 * 3)
    models[0].save(tmp_path / "energy.pgen")
    again = pgen.load(tmp_path / "energy.pgen")
    assert again.octaves == 3
    torch.testing.assert_close(again.energy(x), models[0].energy(x))
    for settings in ({"octaves": -1}, {"octaves": 17}, {"octaves": 2, "energy": "conv"}):
        with pytest.raises(ValueError, match=r"`octaves` should be a number up to 16, with energy='dense', got"):
            EnergyBased((8, 8), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Programs that list their sites


def listed():
    """A classifier with its data, whose program has two sites."""
    model = EnergyBased((2,), hidden=(8,), num_labels=3)
    return model, {"x": seeded(lambda: torch.randn(20, 2)), "labels": torch.arange(20) % 3}


def test_listed_sites_are_those_of_the_pyro_program():
    model, batch = listed()
    traced, without = run_program(model.model, batch), run_program(model.sites, batch)
    assert list(traced) == list(without) == ["x", "labels"]
    for name, term in traced.items():
        torch.testing.assert_close(without[name].log_prob, term.log_prob)
        assert (without[name].plates, without[name].observed, without[name].local) == (term.plates, True, True)
        assert without[name].value is batch[name]
    assert run_program(model.sites, batch, double=True)["x"].log_prob.dtype == torch.float64
    laws = run_laws(model.sites, batch)
    assert [type(law) for law, _ in laws.values()] == [type(law) for law, _ in run_laws(model.model, batch).values()]


@pytest.mark.parametrize("objective", [SlicedScoreMatching(), ContrastiveDivergence(1), NoiseContrastive(Gaussian((2,)))])
def test_handlers_make_no_difference_to_a_loss(objective, monkeypatch):
    model, batch = listed()
    model.prime(batch)
    begun = objective.begin(model.model, model.guide, batch)
    found = []
    for own in (False, True):  # networks of one's own run inside Pyro's handlers
        monkeypatch.setattr(model, "own", own)
        torch.manual_seed(0)
        found.append(model.loss(copy.deepcopy(begun), batch, {"num_data": 20.0})[0])
    torch.testing.assert_close(*found)


def test_a_model_that_is_written_anew_is_the_one_that_is_trained():
    class Shifted(EnergyBased):
        def model(self, x=None, context=None, labels=None):
            with self.plate(x, context):
                seen.append(len(x))
                return pyro.sample("x", Unnormalised(lambda at: self._energy(at - 5.0), (2,)), obs=x)

    seen = []
    Shifted((2,), hidden=(8,)).loss(DenoisingScoreMatching(), {"x": X[:7].float()}, {"num_data": 7.0})
    assert seen and set(seen) == {7}


def test_statements_in_a_network_of_ones_own_are_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return pyro.param("factor", torch.tensor(0.5)) * (x - self.centre).square().sum(1)

    model = EnergyBased((2,), energy=Scaled(), confine=False)
    model.fit(X.float(), steps=60, objective=SlicedScoreMatching(), optimizer=0.05, progress=False)
    assert float(dict(model.home.named_parameters())["factor"].detach()) == pytest.approx(0.5 / VARIANCE, rel=0.2)


def test_sites_that_are_not_marked_are_a_program_like_any_other():
    class Plain(EnergyBased):
        def sites(self, x, context=None, labels=None):
            yield "x", Unnormalised(lambda at: self._energy(at, context), (2,)), x

    run = Plain((2,), hidden=(8,)).fit(X.float(), steps=3, objective=DenoisingScoreMatching(), progress=False)
    assert run.steps == 3


def test_factors_do_not_say_whether_noise_is_of_their_kind():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -pyro.param("a", torch.tensor(1.0)) * x.sum(1))

    x = torch.bernoulli(torch.full((40, 3), 0.5))
    noise = pgen.models.MADE((3,), likelihood="bernoulli", hidden=(4,))
    pgen.Pair(model).fit(x, objective=NoiseContrastive(noise), steps=2, progress=False)


def test_noise_without_a_normaliser_is_refused_before_it_is_trained():
    with pytest.raises(ValueError, match="`noise` should have an exact density, and EnergyBased lacks its normaliser"):
        EnergyBased((2,)).fit(X.float(), objective=NoiseContrastive(EnergyBased((2,))), steps=1, progress=False)
