"""The restricted Boltzmann machine against sums over all its states."""

import itertools
import math

import numpy as np
import pytest
import torch

import pgen
from pgen.models import MADE, RBM, EnergyBased, Gaussian
from pgen.objectives import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    NoiseContrastive,
    PersistentContrastiveDivergence,
    SlicedScoreMatching,
)

X = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).double()


def machine(num_visible=3, num_hidden=2, seed=0, scale=1.0, **settings):
    model = RBM((num_visible,), num_hidden, seed=seed, **settings).double()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


def bits(count):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)), dtype=torch.float64)


def joint(model):
    """exp(-E(v, h)) of all pairs of states, from the definition."""
    v, h = bits(model.num_visible), bits(model.num_hidden)
    energy = -(v @ model.visible_bias)[:, None] - (h @ model.hidden_bias)[None] - v @ model.weight @ h.T
    return v, h, (-energy).exp()


@pytest.mark.parametrize("sizes", [(3, 2), (2, 5), (4, 4), (5, 1)])
def test_the_normaliser_is_the_sum_over_all_states(sizes):
    model = machine(*sizes)
    _, _, mass = joint(model)
    assert model.log_normalizer().value == pytest.approx(float(mass.sum().log().detach()), abs=1e-12)
    v = bits(sizes[0])
    score = model.log_prob(v)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value.exp(), (mass.sum(1) / mass.sum()).detach())
    torch.testing.assert_close(model.free_energy(v), -mass.sum(1).log().detach())


def test_parts_of_the_states_add_up(monkeypatch):
    model = machine(3, 4)
    whole = model.log_normalizer().value
    monkeypatch.setattr("pgen.models.boltzmann.STATES", 5)
    assert model.log_normalizer().value == pytest.approx(whole, abs=1e-12)


def test_real_visible_units_are_integrated():
    model = machine(1, 3, visible="gaussian")
    grid = torch.linspace(-30, 30, 20001, dtype=torch.float64)[:, None]
    mass = float(torch.trapezoid(model.log_prob(grid).value.exp(), grid[:, 0]))
    assert mass == pytest.approx(1, abs=1e-9)


def test_the_gradient_follows_the_likelihood():
    """With many sweeps the expected gradient of contrastive divergence is that of the exact log-likelihood."""
    model = machine()
    _, _, mass = joint(model)
    exact = model.distribution().free_energy(X).mean() + mass.sum().log()
    wanted = dict(zip(dict(model.named_parameters()), torch.autograd.grad(exact, list(model.parameters()))))
    batch = X.repeat(4000, 1)
    (found,) = model.gradients(batch, ContrastiveDivergence(30, "gibbs"), seed=1)
    for name, gradient in wanted.items():
        # each is a difference of means of bits: the standard error is below 0.5 / sqrt(20 000) = 0.0035
        torch.testing.assert_close(found[name], gradient, atol=0.0035 * 4.5, rtol=0)


def test_one_step_of_contrastive_divergence_is_the_expectation_over_one_sweep():
    """CD-1 against the exact sum over hidden states and next visible states."""
    model = machine()
    v, h, _ = joint(model)
    on_h = torch.sigmoid(X @ model.weight + model.hidden_bias)
    p_h = torch.stack([torch.where(state > 0, on_h, 1 - on_h).prod(1) for state in h], 1)  # (N, 2^H)
    on_v = torch.sigmoid(h @ model.weight.T + model.visible_bias)
    p_v = torch.stack([torch.where(state > 0, on_v, 1 - on_v).prod(1) for state in v], 1)  # (2^H, 2^D)
    after = (p_h @ p_v).mean(0).detach()  # the law of v after one sweep
    law = model.distribution()
    loss = law.free_energy(X).mean() - (after * law.free_energy(v)).sum()
    wanted = torch.autograd.grad(loss, model.weight)[0]
    (found,) = model.gradients(X.repeat(4000, 1), ContrastiveDivergence(1, "gibbs"), seed=2)
    torch.testing.assert_close(found["weight"], wanted, atol=0.0035 * 4.5, rtol=0)


def test_sweeps_leave_the_law_as_it_is():
    """Chi-squared of 20 000 chains after three sweeps from exact draws; right sweeps fail once in 10 000."""
    model = machine(3, 2, scale=1.5)
    law = model.distribution()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = law.draw(20_000)
        for _ in range(3):
            x = law.gibbs(x)
    counts = torch.bincount((x @ torch.tensor([4.0, 2.0, 1.0]).double()).long(), minlength=8).double()
    expected = 20_000 * model.log_prob(bits(3)).value.exp()
    assert float(((counts - expected).square() / expected).sum()) < 29.9  # chi-squared, 7 degrees of freedom


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_annealing_finds_the_normaliser_between_its_bounds(visible):
    model = machine(6, 5, scale=0.7, visible=visible)
    truth = model.log_normalizer("enumerate").value
    found = model.log_normalizer("ais", num_temps=500, num_chains=200, seed=1)
    assert abs(found.value - truth) < 5 * found.error and 0 < found.error < 0.05
    assert found.lower < truth < found.upper and found.gap < 0.3
    assert str(found).startswith("log Z = ") and "200 chains" in str(found)
    assert str(model.log_normalizer()) == f"log Z = {truth:.4f} nats, enumerated"


def test_without_a_sum_the_density_is_an_estimate(monkeypatch):
    model = machine(6, 5, scale=0.7)
    exact = model.log_prob(bits(6))
    monkeypatch.setattr("pgen.models.boltzmann.MOST_UNITS", 4)
    assert model.log_prob(bits(6)).kind == "unnormalised"
    with pytest.raises(ValueError, match=r"method='enumerate' would sum 2\^5 states \(at most 2\^4\); use 'ais'"):
        model.log_normalizer("enumerate")
    model.log_normalizer(num_temps=500)
    score = model.log_prob(bits(6))
    assert score.kind == "estimate" and float((score.value - exact.value).abs().max()) < 0.1
    assert float(score.mc_error[0]) > 0
    x = model.sample(4000, num_steps=20)
    torch.testing.assert_close(x.mean(0), (exact.value.exp() @ bits(6)), atol=0.04, rtol=0)
    model.fit(bits(6), steps=1, precision="float64", progress=False)
    assert model.log_prob(bits(6)).kind == "unnormalised"  # of other parameters nothing is known


def test_training_raises_the_exact_likelihood():
    model = RBM((3,), 2)
    x = X.float().repeat(20, 1)
    options = {"optimizer": 0.05, "steps": 300, "batch_size": 100, "compile": "graph"}
    run = model.fit(x, validation=x, early_stopping=0, validate_every=100, progress=False, **options)
    entropy = -(0.4 * math.log(0.4) + 3 * 0.2 * math.log(0.2))  # of the data
    assert entropy < -run.bound < 1.7 < -run.validation["bound"][0] + 0.2
    assert run.word == "exact log-likelihood"
    assert {"data_energy", "chain_energy"} <= set(run.history)
    assert model.kept_chains() is not None


def test_chains_go_on_where_a_fit_was_interrupted(tmp_path):
    def fit(steps, folder):
        model = RBM((3,), 2)
        objective = PersistentContrastiveDivergence(2, "gibbs", num_chains=12, restart=0.1)
        options = {"objective": objective, "optimizer": 0.05, "batch_size": 2, "compile": "graph", "progress": False}
        return model, model.fit(X.float(), steps=steps, checkpoint=folder, **options)

    whole, run = fit(9, None)
    fit(4, tmp_path)
    again, resumed = fit(9, tmp_path)
    np.testing.assert_array_equal(resumed.history["loss"], run.history["loss"])
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.chains, again.chains)


def test_held_out_likelihoods_are_in_the_units_of_the_data():
    y = 5 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    model = RBM((2,), 2, visible="gaussian", preprocess=pgen.data.Standardize())
    run = model.fit(y, validation=y[:20], steps=1, early_stopping=0, progress=False)
    assert run.word == "exact log-likelihood"
    assert run.validation["bound"][-1] == pytest.approx(model.log_prob(y[:20]).mean, rel=1e-5)


def test_dequantised_data_have_a_bound_of_their_mass():
    x = torch.arange(8.0).reshape(4, 2) % 3
    model = RBM((2,), 2, visible="gaussian", preprocess=pgen.data.Dequantize(3))
    model.fit(x, steps=1, progress=False)
    assert (model.log_prob(x).kind, model.log_prob(x).measure) == ("lower_bound", "mass")


def test_slips_are_named():
    model = RBM((3,), 2)
    with pytest.raises(ValueError, match="`objective` ELBO would raise the density of site 'x' without end"):
        model.fit(X, objective=pgen.ELBO(), steps=1, progress=False)
    with pytest.raises(ValueError, match="`sampler` is 'langevin', but discrete data have no gradient"):
        model.fit(X, objective=ContrastiveDivergence(1, "langevin"), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"row 0 holds 1.5, outside the support Boolean"):
        model.fit(X + 0.5, steps=1, progress=False)
    with pytest.raises(ValueError, match="`restart` should be a probability below 1"):
        PersistentContrastiveDivergence(restart=1.0)
    with pytest.raises(pgen.NotAvailable, match="no latents to anneal"):
        model.log_prob(X, method="ais")


def test_weights_that_are_no_numbers_are_named(monkeypatch):
    model = machine(6, 5)
    with torch.no_grad():
        model.weight[2, 1] = math.nan
    for most in (22, 4):  # enumerated, and by chains
        monkeypatch.setattr("pgen.models.boltzmann.MOST_UNITS", most)
        for question in (model.sample, model.log_normalizer):
            with pytest.raises(FloatingPointError, match="parameter 'weight' of this RBM is not finite"):
                question()


def test_bits_are_trained_by_no_gradient_of_x():
    x = X.float()
    for objective in (DenoisingScoreMatching(0.1), SlicedScoreMatching()):
        with pytest.raises(ValueError, match=rf"{type(objective).__name__} follows the gradient of .* x is discrete"):
            RBM((3,), 2).fit(x, objective=objective, steps=1, progress=False)
    with pytest.raises(ValueError, match="the model gives x a mass, and `noise` Gaussian a density: use noise over the same"):
        RBM((3,), 2).fit(x, objective=NoiseContrastive(Gaussian((3,), "diagonal")), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"the model gives x a density, and `noise` MADE a mass: use Gaussian\(shape"):
        EnergyBased((3,)).fit(x, objective=NoiseContrastive(fair_bits()), steps=1, progress=False)


def fair_bits():
    """Independent bits of probability a half."""
    noise = MADE((3,), hidden=4, likelihood="bernoulli")
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.zero_()
    noise.primed = True
    return noise


def test_noise_of_bits_is_a_contrast_for_bits():
    """G = -F(x) + 3 log 2 - log 5 against fair bits, five a datum, at c = 0."""
    model = machine(3, 2)
    objective = NoiseContrastive(fair_bits(), 5).begin(model.model, model.guide, {"x": X})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        data, noise = objective._gains(model.model, {"x": X})
    torch.testing.assert_close(data, -model.free_energy(X) + 3 * math.log(2) - math.log(5))
    assert noise.shape == (25,)


def test_grey_levels_are_told_the_ways_out():
    x = torch.linspace(0, 16, 30).reshape(10, 3)
    with pytest.raises(
        ValueError, match=r"visible='gaussian', preprocess=Standardize\(\), or make bits: x = \(x > 8\).float\(\)"
    ):
        RBM((3,)).fit(x, steps=1, progress=False)


def test_sweeps_in_half_precision_keep_rare_bits_rare():
    machine = RBM((6,), 3)
    with torch.no_grad():
        machine.visible_bias.fill_(-9.0)
        machine.weight.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = machine.distribution().gibbs(torch.zeros(100_000, 6))
            assert machine.distribution().hidden(v[:5]).dtype == torch.float32  # so that what is drawn is on a fine grid
    assert float(v.mean()) < 3e-4  # 1.2e-4, and numbers of 8 bits have none below 1/256
