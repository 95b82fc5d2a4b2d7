"""The Gaussian: closed form against numpy, SVI against the closed form, low rank against its structure, bad covariances."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from pgen.data import Standardize
from pgen.models import Gaussian, GaussianMixture, KernelDensity

EXACT = {"precision": "float64"}


def data(rows=60, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mix + 3.0


def fitted(x, *args, **options):
    model = Gaussian(x.shape[1:], *args, **options)
    model.fit(x, **EXACT)
    return model


def test_the_full_closed_form_is_the_covariance_of_numpy():
    x = data()
    model = fitted(x)
    known = torch.from_numpy(np.cov(x.numpy().T, bias=True))
    torch.testing.assert_close(model.loc.detach(), x.mean(0))
    torch.testing.assert_close(model.distribution().covariance_matrix.detach(), known)
    log_p = MultivariateNormal(x.mean(0), known).log_prob(x)
    torch.testing.assert_close(model.log_prob(x).value, log_p)
    assert float(log_p.mean()) == pytest.approx(-0.5 * (4 * math.log(2 * math.pi * math.e) + float(torch.logdet(known))))


def test_the_diagonal_closed_form_is_the_variances_of_numpy():
    x = data()
    model = fitted(x, "diagonal")
    torch.testing.assert_close(model.distribution().variance.detach(), torch.from_numpy(x.numpy().var(0)))
    assert model.log_prob(x).mean < fitted(x).log_prob(x).mean


@pytest.mark.parametrize(("covariance", "rank"), [("full", None), ("diagonal", None), ("low_rank", 2)])
def test_numbers_whose_squares_overflow_have_a_density(covariance, rank):
    x, far = data(), data().float() * 1e20
    model = Gaussian((4,), covariance, rank=rank)
    model.fit(far, **({"steps": 1, "optimizer": 0.0001, "progress": False, "compile": "eager"} if rank else {}))
    known = fitted(x, "full" if covariance == "full" else "diagonal").log_prob(x)  # of a low rank one step is next to nothing
    score = model.log_prob(far)
    torch.testing.assert_close(score.value, known.value - 80 * math.log(10), atol=2e-3, rtol=0)
    assert score.mean == pytest.approx(known.mean - 80 * math.log(10), abs=1e-3) and math.isfinite(score.std_error)


def test_what_overflows_is_told_where_a_family_cannot_take_it():
    far = data().float() * 1e20
    told = r"has a log-density of (nan|-inf).*: x reaches .*e\+2\d, whose square float32 does not hold; use .*Standardize"
    with pytest.raises(ValueError, match=told):
        GaussianMixture((4,), 2).fit(far, steps=1, progress=False)
    with pytest.raises(ValueError, match=told):
        KernelDensity((4,), bandwidth="silverman").fit(far)


def test_arrays_are_vectors_in_row_major_order():
    x = data(50, 6)
    flat, arrays = fitted(x), Gaussian((2, 3))
    arrays.fit(x.reshape(-1, 2, 3), **EXACT)
    torch.testing.assert_close(arrays.log_prob(x.reshape(-1, 2, 3)).value, flat.log_prob(x).value)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_svi_reaches_the_closed_form(covariance):
    x = data() * torch.tensor([1.0, 10.0, 0.1, 3.0])
    solved, climbed = fitted(x, covariance), Gaussian((4,), covariance)
    run = climbed.fit(x, **EXACT, steps=1500, batch_size=60, optimizer=0.05, schedule="cosine", progress=False)
    gap = solved.log_prob(x).mean - climbed.log_prob(x).mean
    assert run.steps == 1500 and -1e-9 <= gap < 1e-3


def test_a_low_rank_fit_finds_the_structure_of_its_data():
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    noise = torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    x = torch.randn(4000, 1, generator=generator, dtype=torch.float64) @ factor.T
    x = x + noise * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    model = Gaussian((5,), "low_rank", rank=1, seed=2)
    run = model.fit(x, **EXACT, steps=400, batch_size=4000, optimizer=0.05, schedule="cosine", progress=False)
    assert run.steps == 400 and "closed form" not in run.stopped
    known = factor @ factor.T + noise.square().diag()
    torch.testing.assert_close(model.distribution().covariance_matrix.detach(), known, atol=0.1, rtol=0.1)
    assert model.log_prob(x).mean == pytest.approx(fitted(x).log_prob(x).mean, abs=3e-3)


# --- context -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_mean_is_the_least_squares_line_of_the_context(covariance):
    x, c = data(80), torch.randn(80, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = x + c @ torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model = Gaussian((4,), covariance, context_dim=3)
    model.fit(x, context=c, **EXACT)
    design = np.hstack([np.ones((80, 1)), c.numpy()])
    weights, *_ = np.linalg.lstsq(design, x.numpy(), rcond=None)
    np.testing.assert_allclose(model.slope.detach().numpy(), weights[1:].T)
    residual = x - torch.from_numpy(design @ weights)
    torch.testing.assert_close(model.log_prob(x, c).value, fitted(residual, covariance).log_prob(residual).value)
    mean = model.sample(20_000, c[:1], seed=1).mean(0)
    torch.testing.assert_close(mean, torch.from_numpy(design[0] @ weights), atol=0.15, rtol=0)


# --- bad data ------------------------------------------------------------------------------------------------------------


def test_singular_covariances_are_refused_with_the_column_and_the_remedy():
    constant, repeated = data(), data()
    constant[:, 2] = 7.0
    repeated[:, 3] = repeated[:, 0] - 2 * repeated[:, 1]
    with pytest.raises(ValueError, match=r"singular: number 2 of each datum is constant \(60 data of 4 numbers\); drop it"):
        fitted(constant)
    with pytest.raises(ValueError, match="number 2 of each datum is constant"):
        fitted(constant, "diagonal")
    with pytest.raises(
        ValueError, match=r"number 3 of each datum is a linear combination of others, or there are too few data"
    ):
        fitted(repeated)
    with pytest.raises(ValueError, match="or use covariance='low_rank' or 'diagonal'"):
        fitted(data(3))
    assert math.isfinite(fitted(repeated, "diagonal").log_prob(repeated).mean)


def test_columns_of_very_different_units_are_not_singular():
    x = data() * torch.tensor([1e-5, 1.0, 1e6, 1.0])
    assert math.isfinite(fitted(x).log_prob(x).mean)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`rank` goes with covariance='low_rank', and is needed there; got None"):
        Gaussian((3,), "low_rank")
    with pytest.raises(ValueError, match="`rank` goes with covariance='low_rank', and is needed there; got 2"):
        Gaussian((3,), rank=2)
    with pytest.raises(ValueError, match="`covariance` is 'ful', which is unknown; did you mean 'full'"):
        Gaussian((3,), "ful")


def test_preprocessing_changes_nothing_but_the_parameters():
    x = data()
    plain, standardised = fitted(x), fitted(x, preprocess=Standardize())
    torch.testing.assert_close(standardised.log_prob(x).value, plain.log_prob(x).value)
