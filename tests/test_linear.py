"""Probabilistic PCA and factor analysis: closed forms, scikit-learn, missing entries by brute force."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import pgen
from pgen.data import Standardize
from pgen.distributions import LinearGaussian, regress
from pgen.models import FactorAnalysis, Gaussian, ProbabilisticPCA

BOTH = pytest.mark.parametrize("family", [ProbabilisticPCA, FactorAnalysis])
EXACT = {"precision": "float64"}


def data(rows=90, size=5, rank=2, seed=0):
    """Draws of a linear-Gaussian model, with columns of very different units."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    units = 10.0 ** torch.linspace(-1, 1, size, dtype=torch.float64)
    return (draw(rows, rank) @ draw(rank, size) + draw(rows, size) * torch.linspace(0.4, 1.2, size) + 3.0) * units


def with_holes(x, share=0.3, seed=1):
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(holes, torch.full_like(x, math.nan), x)


def covariance(model):
    return (model.weight @ model.weight.T + model.variance.diag()).detach()


def brute_force(model, x):
    """log p of the observed entries of each row, by the marginal of the full Gaussian, one row at a time."""
    loc, full = model._loc(None).detach(), covariance(model)
    values = []
    for row in x:
        seen = ~row.isnan()
        part = full[seen][:, seen]
        values.append(MultivariateNormal(loc[seen], part).log_prob(row[seen]) if bool(seen.any()) else torch.zeros(()))
    return torch.stack(values)


def fitted(family, x, latent_dim=2, **options):
    model = family(x.shape[1:], latent_dim)
    run = model.fit(x, **EXACT, progress=False, **options)
    return model, run


# --- closed forms --------------------------------------------------------------------------------------------------------


def test_ppca_is_the_formula_of_tipping_and_bishop():
    x = data(70, 5)
    model, run = fitted(ProbabilisticPCA, x)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    noise, dim = values[2:].mean(), 5
    known = -0.5 * (dim * math.log(2 * math.pi) + np.log(values[:2]).sum() + (dim - 2) * math.log(noise) + dim)
    score = model.log_prob(x)
    assert score.kind == "exact" and score.mean == pytest.approx(known, abs=1e-9)
    assert "closed form" in run.stopped and run.steps == 0 and run.bound == pytest.approx(known, abs=1e-9)
    torch.testing.assert_close(model.variance, torch.full((5,), float(noise), dtype=torch.float64))
    torch.testing.assert_close(model.principal_axes().norm(dim=0), torch.from_numpy(np.sqrt(values[:2] - noise)))


def test_ppca_agrees_with_scikit_learn_where_both_divide_by_the_same_number():
    from sklearn.decomposition import PCA

    x = data(40, 6)
    model, _ = fitted(ProbabilisticPCA, x, 3)
    peer = PCA(3, svd_solver="full").fit(x.numpy())
    peer.explained_variance_ *= 39 / 40  # scikit-learn divides by N - 1
    peer.noise_variance_ *= 39 / 40
    assert model.log_prob(x).mean == pytest.approx(peer.score(x.numpy()), abs=1e-6)
    torch.testing.assert_close(model.principal_axes().abs(), torch.from_numpy(
        np.abs(peer.components_.T) * np.sqrt(peer.explained_variance_ - peer.noise_variance_)))  # fmt: skip


def test_factor_analysis_is_at_least_as_likely_as_scikit_learns_and_agrees():
    from sklearn.decomposition import FactorAnalysis as Peer

    x = data(80, 7)
    model, run = fitted(FactorAnalysis, x)
    peer = Peer(2, tol=1e-10, max_iter=5000, svd_method="lapack").fit(x.numpy())
    assert "L-BFGS" in run.stopped
    assert model.log_prob(x).mean == pytest.approx(peer.score(x.numpy()), abs=1e-5)
    assert model.log_prob(x).mean > peer.score(x.numpy()) - 1e-9
    np.testing.assert_allclose(covariance(model), peer.get_covariance(), rtol=2e-3, atol=2e-3)


def test_factor_analysis_does_not_depend_on_units():
    x = data(60, 5)
    units = torch.tensor([1.0, 1000.0, 0.01, 3.0, 1.0], dtype=torch.float64)
    plain, scaled = fitted(FactorAnalysis, x)[0], fitted(FactorAnalysis, x * units)[0]
    torch.testing.assert_close(scaled.log_prob(x * units).value, plain.log_prob(x).value - units.log().sum(), atol=1e-4, rtol=0)


@BOTH
def test_svi_climbs_from_a_random_start_to_the_closed_form(family):
    x = data(80, 5)
    x = (x - x.mean(0)) / x.std(0)
    solved = fitted(family, x)[0].log_prob(x).mean
    model = family((5,), 2, seed=3)
    model.primed = True  # not at the solution, where training would start
    model.fit(x, **EXACT, steps=800, batch_size=80, optimizer=0.05, schedule="cosine", progress=False)
    assert solved - 1e-2 < model.log_prob(x).mean <= solved + 1e-9


@BOTH
def test_the_bound_is_the_likelihood_at_every_draw(family):
    x = data(12, 5)
    model, _ = fitted(family, x)
    draws = model.draw(with_holes(x), 7, seed=2)
    torch.testing.assert_close(draws.log_weight_rows, model.log_prob(with_holes(x)).value.expand(7, -1))


def test_annealing_the_joint_model_finds_the_marginal():
    x = data(12, 5)
    model, _ = fitted(ProbabilisticPCA, x / x.std(0))
    annealed = model.log_prob(x / x.std(0), method="ais", num_temps=100, num_chains=16)
    assert annealed.kind == "lower_bound"
    assert annealed.mean == pytest.approx(model.log_prob(x / x.std(0)).mean, abs=0.1)


# --- missing entries -----------------------------------------------------------------------------------------------------


@BOTH
def test_a_closed_form_leaves_the_global_generator_alone(family):
    x, before = data(30, 5), torch.get_rng_state()
    fitted(family, x)
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_missing_entries_are_integrated_out(family):
    x = data(30, 5)
    model, _ = fitted(family, x)
    holed = with_holes(x, 0.5)
    holed[3] = math.nan
    score = model.log_prob(holed)
    torch.testing.assert_close(score.value, brute_force(model, holed), rtol=0, atol=1e-9)
    assert float(score.value[3]) == pytest.approx(0, abs=1e-12)
    assert score.event_size == pytest.approx(float((~holed.isnan()).double().sum() / 30))
    masked = model.log_prob({"x": x, "observed": ~holed.isnan()})
    torch.testing.assert_close(masked.value, score.value)


@BOTH
def test_fit_with_missing_entries_maximises_the_likelihood_of_those_observed(family):
    x = with_holes(data(400, 5), 0.2)
    model, run = fitted(family, x, epochs=300, batch_size=400, optimizer=0.03)
    assert run.steps == 300 and "closed form" not in run.stopped
    total = model.log_prob(x).mean
    with torch.no_grad():
        for p in model.parameters():  # no step along any axis gains anything to speak of
            for at in range(p.numel()):
                for step in (0.05, -0.05):
                    p.view(-1)[at] += step
                    assert model.log_prob(x).mean < total + 1e-3
                    p.view(-1)[at] -= step


@BOTH
def test_imputation_is_the_conditional_gaussian(family):
    x = data(60, 5)
    model, _ = fitted(family, x)
    row = x[7:8].clone()
    row[0, [1, 4]] = math.nan
    loc, full = model._loc(None).detach(), covariance(model)
    seen, gone = [0, 2, 3], [1, 4]
    gain = torch.linalg.solve(full[seen][:, seen], full[seen][:, gone]).T
    mean = loc[gone] + gain @ (row[0, seen] - loc[seen])
    spread = full[gone][:, gone] - gain @ full[seen][:, gone]
    filled = model.impute(row)
    torch.testing.assert_close(filled[0, gone], mean)
    assert torch.equal(filled[0, seen], row[0, seen])
    draws = model.impute(row, num_samples=20_000, seed=1)
    assert draws.shape == (20_000, 1, 5) and bool((draws[:, 0, seen] == row[0, seen]).all())
    found = draws[:, 0, gone]
    sd = spread.diagonal().sqrt()
    assert bool(((found.mean(0) - mean).abs() < 4.5 * sd / math.sqrt(20_000)).all())
    torch.testing.assert_close(torch.cov(found.T) / sd / sd[:, None], spread / sd / sd[:, None], atol=0.05, rtol=0)


def test_preprocessing_does_not_take_holes_for_data():
    model = ProbabilisticPCA((5,), 2, preprocess=pgen.data.Logit())
    with pytest.raises(ValueError, match=r"x has missing entries \(NaN\), which Logit would count as data; take Standardize"):
        model.fit(with_holes(data()))


def test_standardising_leaves_holes_out():
    """Moments are those of what was observed, and the density is that of the same model in the units of the data."""
    x = with_holes(data()).double()
    model = FactorAnalysis((5,), 2, preprocess=Standardize()).double()
    model.fit(x, steps=30, precision="float64", progress=False)
    np.testing.assert_allclose(model.preprocess.mean, np.nanmean(x, 0), rtol=1e-6)
    np.testing.assert_allclose(model.preprocess.sd, np.nanstd(x, 0), rtol=1e-6)
    plain, scale = FactorAnalysis((5,), 2).double(), model.preprocess.sd
    with torch.no_grad():
        plain._take(
            model.preprocess.mean + scale * model._loc(None), scale, scale[:, None] * model.weight, scale**2 * model.variance
        )
    torch.testing.assert_close(model.log_prob(x).value, plain.log_prob(x).value, rtol=0, atol=1e-6)
    filled = model.impute(x)
    torch.testing.assert_close(filled, plain.impute(x), rtol=1e-6, atol=1e-6)


# --- latents -------------------------------------------------------------------------------------------------------------


@BOTH
def test_encoding_is_the_posterior_mean(family):
    x = data(25, 5)
    model, _ = fitted(family, x)
    weight, noise = model.weight.detach(), model.variance.detach()
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ (weight / noise[:, None])
    known = torch.linalg.solve(precision, weight.T @ ((x - x.mean(0)) / noise).T).T
    torch.testing.assert_close(model.encode(x), known)
    posterior = model.draw(x[:3], 20_000, seed=3).values["z"]
    torch.testing.assert_close(torch.cov(posterior[:, 1].T), torch.linalg.inv(precision), atol=0.02, rtol=0)


def test_principal_axes_do_not_depend_on_the_rotation():
    model, _ = fitted(FactorAnalysis, data())
    axes, angle = model.principal_axes(), torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    with torch.no_grad():
        model.loading.copy_(model.loading @ turn)
    torch.testing.assert_close(model.principal_axes(), axes)
    torch.testing.assert_close(axes @ axes.T, (model.weight @ model.weight.T).detach())


# --- context -------------------------------------------------------------------------------------------------------------


@BOTH
def test_the_mean_follows_the_context_by_least_squares(family):
    x, c = data(80, 5), torch.randn(80, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moved = x + c @ torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 5
    model = family((5,), 2, context_dim=3)
    model.fit(moved, context=c, **EXACT)
    residual = moved - torch.from_numpy(np.hstack([np.ones((80, 1)), c]) @ np.linalg.lstsq(
        np.hstack([np.ones((80, 1)), c]), moved.numpy(), rcond=None)[0])  # fmt: skip
    plain = fitted(family, residual)[0]
    assert model.log_prob(moved, c).mean == pytest.approx(plain.log_prob(residual).mean, abs=1e-9)
    torch.testing.assert_close(model.encode(moved, c).abs(), plain.encode(residual).abs(), atol=1e-4, rtol=0)


def test_regress_refuses_a_context_that_repeats_itself():
    c = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    with pytest.raises(ValueError, match="columns of `context` are constant or depend on each other"):
        regress(torch.zeros(3, 2), c)


def test_regress_takes_classes_as_indicators_that_sum_to_one():
    """The mean given a class and a number is that with one indicator left out."""
    draw = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hot = torch.nn.functional.one_hot(torch.arange(30) % 4, 4)
    c = torch.cat([hot, draw[:, :1]], 1)
    loc, slope, rest = regress(draw[:, 1:], c)
    fewer, slopes, expected = regress(draw[:, 1:], c[:, 1:])
    torch.testing.assert_close(rest, expected)
    torch.testing.assert_close(loc + c @ slope.T, fewer + c[:, 1:] @ slopes.T)
    with pytest.raises(ValueError, match="depend on each other"):
        regress(draw[:, 1:], torch.cat([c, 2 * c[:, 4:]], 1))


# --- bad data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"steps": 1, "progress": False, "compile": "eager"}], ids=["closed", "steps"])
def test_so_few_rows_that_nothing_is_left_for_the_noise_are_told_of(options):
    def fit(rows, latent_dim, **more):
        FactorAnalysis((5,), latent_dim, **more).fit(data(rows, 5), **options)

    fit(4, 2)
    with pytest.warns(UserWarning, match=r"3 rows for latent_dim=2: .*; lower `latent_dim` to 1 or less, or give 4 rows"):
        fit(3, 2)
    with pytest.warns(UserWarning, match=r"has 2 rows for latent_dim=1: .*noise alone; give 3 rows or more$"):
        fit(2, 1)


def test_bad_data_are_named():
    x = data()
    constant, never = x.clone(), x.clone()
    constant[:, 2], never[:, 3] = 7.0, math.nan
    with pytest.raises(ValueError, match=r"number 2 of each datum is constant \(90 data of 5 numbers\); drop it"):
        FactorAnalysis((5,), 2).fit(constant)
    assert math.isfinite(fitted(ProbabilisticPCA, constant)[0].log_prob(constant).mean)
    for family in (ProbabilisticPCA, FactorAnalysis):
        with pytest.raises(ValueError, match="number 3 of each datum is missing in all 90 data; drop it"):
            family((5,), 2).fit(never)
        with pytest.raises(ValueError, match="`latent_dim` should be less than the 5 numbers of a datum, got 5"):
            family((5,), 5)
    with pytest.raises(ValueError, match="lie in 3 dimensions or fewer"):
        ProbabilisticPCA((5,), 3).fit(data(4, 5), **EXACT)


def test_almost_full_rank_equals_the_full_gaussian():
    x = data(50, 4)
    full = Gaussian((4,))
    full.fit(x, **EXACT)
    model, _ = fitted(ProbabilisticPCA, x, 3)
    assert model.log_prob(x).mean == pytest.approx(full.log_prob(x).mean, abs=1e-9)


@pytest.mark.parametrize("family", [ProbabilisticPCA, FactorAnalysis])
def test_numbers_whose_squares_overflow_have_a_density(family):
    x, model = data(), family((5,), 2)
    model.fit((x * 1e20).float())
    gaps = x.clone()
    gaps[::3, 1] = math.nan  # densities of what is observed
    known = fitted(family, x)[0]
    for seen in (x, gaps):
        size = 20 * math.log(10) * (~seen.isnan()).sum(1)
        found = model.log_prob((seen * 1e20).float()).value
        torch.testing.assert_close(found, known.log_prob(seen).value - size, atol=2e-2, rtol=0)


def test_the_distribution_samples_what_it_scores():
    from pyro.distributions.testing.gof import vector_density_goodness_of_fit

    fn = LinearGaussian(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([[1.0], [0.5], [-2.0]]), torch.tensor([0.5, 0.1, 1.0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = fn.sample((3003,))
    assert vector_density_goodness_of_fit(x.double(), fn.log_prob(x).exp().double()) > 1e-4
    known = MultivariateNormal(fn.loc, fn.factor @ fn.factor.T + fn.scale.square().diag())
    torch.testing.assert_close(fn.log_prob(x), known.log_prob(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(fn.variance, known.variance)
    assert pgen.models.REGISTRY["factor_analysis"] is FactorAnalysis
