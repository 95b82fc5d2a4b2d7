import math

import numpy as np
import pytest
import torch
import xarray as xr
from diagnostics_fakes import PPCAFit, gaussian_fit, make_draws, mean_field_fit

from pgen.diagnostics import (
    good_khat,
    importance_ess,
    importance_resample,
    pareto_khat,
    posterior_error,
    psis,
    psis_expectation,
    to_datatree,
)


def narrow_log_weights(scale, shape, seed=0):
    """log N(z; 0, 1) - log N(z; 0, scale), z from the latter."""
    z = np.random.default_rng(seed).normal(size=shape) * scale
    return -0.5 * z**2 + 0.5 * z**2 / scale**2 + math.log(scale)


def shifted_log_weights(shift, size, seed=0):
    z = np.random.default_rng(seed).normal(size=size) + shift
    return -0.5 * z**2 + 0.5 * (z - shift) ** 2


def tree_of(fit, num=4000, seed=0, **draw):
    return to_datatree(fit.draw(None, num, seed), **draw)


# ------------------------------------------------------------------------------------------------------ the tail


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_weights_are_constant(dtype):
    fit = gaussian_fit([0.3, -1.0, 2.0], [0.5, 1.0, 1.5], dtype=dtype)
    fit.p_mean, fit.p_cov = fit.q_mean, fit.q_cov
    weight = tree_of(fit).sample_stats["log_weight"]
    assert (np.ptp(weight.values) > 1e-8) == (dtype == torch.float32)  # rounding is there to be seen through
    fitted = psis(weight)
    assert fitted.status.item() == "constant"
    assert fitted.khat.item() == -math.inf and fitted.khat_se.item() == 0
    assert fitted.ess.item() == pytest.approx(4000, rel=1e-12)
    np.testing.assert_allclose(fitted.log_weight_smoothed, -math.log(4000))


@pytest.mark.parametrize(
    ("scale", "khat", "tolerance"),
    [
        (0.95, 0.10, 0.09),
        (0.9, 0.20, 0.11),
        (0.8, 0.36, 0.13),
        (0.7, 0.50, 0.15),
        (0.6, 0.61, 0.16),
        (0.5, 0.73, 0.17),
        (1.5, -1.7, 0.3),
        (3.0, -1.7, 0.3),
    ],
)
def test_too_narrow_and_too_wide_guides(scale, khat, tolerance):
    fitted = psis(narrow_log_weights(scale, 100_000, seed=3))
    assert fitted.khat.item() == pytest.approx(khat, abs=tolerance)
    if scale >= 0.8:  # the weights have a variance, and 1 / E w^2 is this
        assert fitted.ess.item() / 100_000 == pytest.approx(math.sqrt(2 * scale**2 - 1) / scale**2, rel=0.03)


@pytest.mark.parametrize(
    ("shift", "khat", "fraction"), [(0.5, 0.08, 0.78), (1.0, 0.23, 0.368), (1.5, 0.43, 0.105), (2.0, 0.57, None)]
)
def test_displaced_guides_look_repairable(shift, khat, fraction):
    fitted = importance_ess(shifted_log_weights(shift, 100_000))
    assert fitted.khat.item() == pytest.approx(khat, abs=0.16)
    if fraction is not None:
        assert fitted.ess_fraction.item() == pytest.approx(fraction, abs=0.03)


@pytest.mark.parametrize(("dim", "khat", "tolerance"), [(10, 0.12, 0.15), (100, 0.21, 0.2), (1000, 0.73, 0.25)])
def test_khat_grows_with_dimension(dim, khat, tolerance):
    fitted = psis(narrow_log_weights(0.95, (4000, dim)).sum(axis=1))
    assert fitted.khat.item() == pytest.approx(khat, abs=tolerance)


@pytest.mark.parametrize(("rho", "khat"), [(0.3, 0.30), (0.6, 0.56), (0.8, 0.73), (0.95, 0.87)])
def test_mean_field_guide_of_correlated_posterior(rho, khat):
    tree = tree_of(mean_field_fit(rho), num=100_000)
    assert psis(tree.sample_stats["log_weight"]).khat.item() == pytest.approx(khat, abs=0.15)
    if rho == 0.3:
        error = posterior_error(tree)["z"]
        np.testing.assert_allclose(error.sel(statistic="sd_ratio"), math.sqrt(1 - rho**2), atol=0.01)
        np.testing.assert_allclose(error.sel(statistic="shift"), 0.0, atol=0.01)
        assert importance_ess(tree.sample_stats["log_weight"]).ess_fraction.item() == pytest.approx(0.879, abs=0.01)


def test_agrees_with_arviz_stats():
    from arviz_stats.base import array_stats

    for size in (1000, 5000):
        log_weight = np.concatenate(
            [narrow_log_weights(s, (3, size), seed=size) for s in (0.95, 0.7, 0.5, 2.0)]
            + [np.random.default_rng(1).standard_t(3, size=(3, size))]
        )
        ours = psis(log_weight.T)
        smoothed, khat = array_stats.psislw(-log_weight, r_eff=1, axis=-1)
        np.testing.assert_allclose(ours.khat, khat, atol=0.08)
        np.testing.assert_allclose(ours.log_weight_smoothed.values[0].T, smoothed, atol=0.12)


def test_khat_error_is_what_repetition_shows():
    for num, spread in ((1000, 0.154), (4000, 0.11)):
        fitted = pareto_khat(narrow_log_weights(math.sqrt(0.5), (num, 400)))
        tail = math.ceil(min(num / 5, 3 * math.sqrt(num)))
        np.testing.assert_allclose(fitted.khat_se, (1 + fitted.khat) / math.sqrt(tail))
        assert float(fitted.khat.std()) == pytest.approx(spread, abs=0.03)
        assert float(fitted.khat_se.mean()) == pytest.approx(spread, abs=0.03)
        np.testing.assert_allclose(fitted.ci_high - fitted.ci_low, 2 * 1.96 * fitted.khat_se)


def test_each_datum_has_its_own_shape_and_the_joint_one_says_nothing():
    tree = to_datatree(PPCAFit().draw(PPCAFit.data(200), 4000, seed=0))
    each = psis(tree.sample_stats["log_weight_rows"])
    assert each.khat.dims == ("data",) and each.sizes["data"] == 200
    assert float(each.khat.mean()) == pytest.approx(2 / 7, abs=0.04)
    assert float(each.ess.mean()) / 4000 == pytest.approx(0.8936, abs=0.01)
    joint = psis(tree.sample_stats["log_weight"])
    assert joint.khat.item() > 1.0 and joint.ess.item() < 40
    assert each.log_weight_smoothed.dims == ("chain", "draw", "data")


def test_rows_do_not_depend_on_their_company(monkeypatch):
    log_weight = narrow_log_weights(0.7, (1000, 23))
    together = psis(log_weight)
    monkeypatch.setattr("pgen.diagnostics.importance._CHUNK", 10_000)
    xr.testing.assert_allclose(psis(log_weight), together)
    xr.testing.assert_allclose(psis(log_weight[:, 7]), together.isel(dim_0=7), rtol=1e-12)


@pytest.mark.parametrize(
    ("log_weight", "status"),
    [
        (np.r_[np.zeros(99), np.nan], "non_finite"),
        (np.r_[np.zeros(99), np.inf], "non_finite"),
        (np.full(100, -np.inf), "non_finite"),
        (np.arange(20.0), "too_few"),
        (np.r_[np.full(99, -np.inf), 0.0], "too_few"),
        (np.tile([0.0, -1.0], 50), "bounded"),  # the tail is one value
        (np.linspace(-5000.0, 0.0, 1000), "heavy"),  # ratios underflow
        (np.r_[np.full(50, -np.inf), np.zeros(50)], "bounded"),
    ],
)
def test_states(log_weight, status):
    fitted = psis(log_weight)
    assert fitted.status.item() == status
    assert np.isnan(fitted.khat.item()) == (status in ("non_finite", "too_few"))
    if status != "non_finite":
        assert np.exp(fitted.log_weight_smoothed.values).sum() == pytest.approx(1.0)


def test_a_tail_of_equal_weights_is_not_fitted_to_their_rounding():
    noise = np.random.default_rng(0).uniform(-2e-15, 2e-15, size=100)
    fitted = psis(np.tile([0.0, -1.0], 50) + noise)
    assert fitted.status.item() == "bounded" and fitted.khat.item() == -math.inf


def test_good_khat_and_draws_needed():
    assert good_khat(100) == pytest.approx(0.5)
    assert good_khat(10**6) == 0.7
    fitted = psis(narrow_log_weights(0.8, 4000))
    assert fitted.min_ss.item() == pytest.approx(10 ** (1 / (1 - fitted.khat.item())))


def test_sign_and_offset():
    log_weight = narrow_log_weights(0.6, 2000)
    xr.testing.assert_allclose(psis(log_weight + 300.0), psis(log_weight), atol=1e-9)
    assert psis(-log_weight).khat.item() < 0 < psis(log_weight).khat.item()


def test_draw_dims_may_have_other_names_and_places():
    log_weight = narrow_log_weights(0.8, (3, 2, 1500))
    array = xr.DataArray(log_weight, dims=("school", "chain", "draw"), coords={"school": ["a", "b", "c"]})
    fitted = psis(array)
    assert list(fitted.school.values) == ["a", "b", "c"] and fitted.log_weight_smoothed.dims == array.dims
    flat = psis(xr.DataArray(log_weight.reshape(3, 3000), dims=("school", "sample")), dim=("sample",))
    np.testing.assert_allclose(flat.khat, fitted.khat)


def test_a_number_is_refused():
    with pytest.raises(ValueError, match="draws along the first axis"):
        psis(1.0)


# ------------------------------------------------------------------------------------------------- the summaries


def test_posterior_error_sees_the_shift_that_khat_does_not():
    tree = tree_of(gaussian_fit([1.0], [1.0]), num=100_000)
    error = posterior_error(tree)
    shift, se = (error["z"].sel(statistic=name).item() for name in ("shift", "shift_se"))
    assert shift == pytest.approx(1.0, abs=0.015)
    assert se == pytest.approx(math.sqrt(math.e * 2 / 100_000), rel=0.5)  # of the weighted mean, which dominates
    assert error["z"].sel(statistic="sd_ratio").item() == pytest.approx(1.0, abs=0.03)
    assert error.psis_status.item() == "ok" and error["z"].sel(statistic="khat").item() < 0.7


def test_equal_weights_change_nothing():
    fit = gaussian_fit([0.3, -1.0], [0.5, 1.5])
    fit.p_mean, fit.p_cov = fit.q_mean, fit.q_cov
    error = posterior_error(tree_of(fit, 50))["z"]
    np.testing.assert_allclose(error.sel(statistic="sd_ratio"), 1.0, rtol=1e-12)
    np.testing.assert_allclose(error.sel(statistic=["shift", "shift_se", "sd_ratio_se"]), 0.0, atol=1e-12)


def test_khat_of_an_expectation_sees_either_tail_of_the_quantity():
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heavy = 2 * (uniform**-0.5 - 1)  # generalised Pareto with shape 1/2
    zero = torch.zeros(4000)
    khat = psis_expectation(to_datatree(make_draws({"up": heavy, "down": -heavy, "flat": uniform}, zero, zero))).sel(
        statistic="khat"
    )
    assert khat["up"].item() == pytest.approx(0.5, abs=0.2) and khat["down"].item() == pytest.approx(khat["up"].item())
    assert khat["flat"].item() < 0


def test_standard_errors_match_repetition():
    found = [posterior_error(tree_of(gaussian_fit([0.5, 0.0], [1.0, 0.9], 0.2), 2000, seed))["z"] for seed in range(24)]
    stacked = xr.concat(found, dim="seed")
    for name in ("shift", "sd_ratio"):
        spread = stacked.sel(statistic=name).std("seed").values
        np.testing.assert_allclose(stacked.sel(statistic=f"{name}_se").mean("seed"), spread, rtol=0.4)


def test_expectations_are_those_of_the_posterior():
    summary = psis_expectation(tree_of(gaussian_fit([0.5, -0.3], [1.0, 1.2], 0.3), num=20_000))["z"]
    assert summary.dims == ("statistic", "z_dim_0")
    want = {"mean": 0.0, "sd": 1.0, "q05": -1.645, "median": 0.0, "q95": 1.645}
    for name, value in want.items():
        np.testing.assert_allclose(summary.sel(statistic=name), value, atol=0.05)
    assert (np.abs(summary.sel(statistic="mean")) < 4 * summary.sel(statistic="mcse")).all()
    assert (summary.sel(statistic="khat") < 0.7).all()


def test_local_latents_use_their_own_weights():
    data = PPCAFit.data(30, seed=2)
    summary = psis_expectation(to_datatree(PPCAFit().draw(data, 4000, seed=1)))["z"]
    covariance = np.linalg.inv(np.array([[14.0, 4.0], [4.0, 14.0]]))
    np.testing.assert_allclose(summary.sel(statistic="sd"), math.sqrt(covariance[0, 0]), rtol=0.1)
    np.testing.assert_allclose(summary.sel(statistic="sd").mean(), math.sqrt(covariance[0, 0]), rtol=0.01)


def test_sizes_of_one_survive():
    z = torch.randn(500, 1, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    tree = to_datatree(make_draws({"z": z}, log_q - 0.1 * z[:, 0, 0, 0] ** 2, log_q))
    assert tree.posterior["z"].shape == (1, 500, 1, 3, 1)
    assert posterior_error(tree)["z"].shape == (5, 1, 3, 1)


def test_errors_that_weights_cannot_measure_are_nan():
    tree = tree_of(gaussian_fit([5.0], [0.4]))
    error = posterior_error(tree)
    assert error.psis_status.item() == "heavy"
    assert error["z"].sel(statistic=["shift", "sd_ratio"]).isnull().all()
    assert np.isfinite(error["z"].sel(statistic="khat")).all()


def test_var_names_are_checked():
    tree = tree_of(gaussian_fit([0.0], [1.0]))
    assert list(psis_expectation(tree, "z").data_vars) == ["z"]
    with pytest.raises(ValueError, match="`var_names` is 'zz', which is unknown; did you mean 'z'"):
        psis_expectation(tree, ["zz"])


def test_without_weights_the_reason_is_given():
    draws = make_draws({"a": torch.zeros(50)}, torch.zeros(50), torch.zeros(50), no_density=("a",))
    with pytest.raises(ValueError, match=r"no density at a \(a point mass\)"):
        psis_expectation(to_datatree(draws))


# ---------------------------------------------------------------------------------------------------- resampling


def test_resampled_draws_are_the_posteriors():
    tree = tree_of(gaussian_fit([0.8, 0.0], [1.0, 1.3]), num=20_000)
    for replace in (False, True):
        plain = importance_resample(tree, 1500, replace=replace, seed=1)
        z = plain.posterior["z"]
        assert z.shape == (1, 1500, 2) and plain.attrs["resampled"] == "psis"
        np.testing.assert_allclose(z.mean(("chain", "draw")), 0.0, atol=0.12)
        np.testing.assert_allclose(z.std(("chain", "draw")), 1.0, atol=0.08)
        unique = len(np.unique(z.values[0, :, 0]))
        assert (unique == 1500) == (not replace)
        assert plain.log_likelihood["y"].shape == (1, 1500, 7)


def test_resampling_local_latents_goes_datum_by_datum():
    data = PPCAFit.data(4, seed=3)
    tree = to_datatree(PPCAFit(scale=1.3).draw(data, 4000, seed=1))
    z = importance_resample(tree, 800, seed=2).posterior["z"]
    assert z.dims == ("chain", "draw", "data", "z_dim_0") and z.shape == (1, 800, 4, 2)
    correlation = [np.corrcoef(z.values[0, :, i].T)[0, 1] for i in range(4)]
    np.testing.assert_allclose(correlation, -2 / 7, atol=0.12)  # q has none


def test_resampling_refuses_what_it_cannot_do():
    tree = tree_of(gaussian_fit([0.0], [1.1]), num=100)
    with pytest.raises(ValueError, match="`num_samples` is 101, more than the draws"):
        importance_resample(tree, 101)
    with pytest.warns(UserWarning, match="resampling is unreliable"):
        importance_resample(tree_of(gaussian_fit([5.0], [0.4])), 10)
    draws = make_draws({"a": torch.zeros(50)}, torch.full((50,), math.nan), torch.zeros(50))
    with pytest.raises(ValueError, match="cannot be fitted"):
        importance_resample(to_datatree(draws), 10)
