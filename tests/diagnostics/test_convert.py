import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from diagnostics_fakes import PPCAFit, flat_run, gaussian_fit, make_draws

from pgen.diagnostics import to_datatree


def test_groups_dims_and_values():
    data = PPCAFit.data(6)
    draws = PPCAFit().draw(data, 20, seed=0)
    replicates = PPCAFit().predict(data, 9, seed=1)
    tree = to_datatree(draws, predictive=replicates, coords={"data": list("abcdef")}, attrs={"note": None, "fine": True})
    groups = {"posterior", "sample_stats", "log_likelihood", "observed_data", "posterior_predictive"}
    assert set(tree.children) == groups
    assert tree.posterior["z"].dims == ("chain", "draw", "data", "z_dim_0") and tree.posterior["z"].shape == (1, 20, 6, 2)
    assert tree.log_likelihood["x"].dims == ("chain", "draw", "data")
    assert tree.observed_data["x"].dims == ("data", "x_dim_0")
    assert tree.posterior_predictive["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert list(tree.posterior.data.values) == list("abcdef")
    stats = tree.sample_stats
    np.testing.assert_allclose(stats["lp"] - stats["log_q"], stats["log_weight"])
    np.testing.assert_allclose(stats["log_weight_rows"].sum("data"), stats["log_weight"])
    np.testing.assert_array_equal(stats["log_weight_rows"][0], draws.log_weight_rows.numpy())
    assert tree.attrs["draws_are_iid"] == 1 and tree.attrs["note"] == "None" and tree.attrs["fine"] == 1
    assert tree.attrs["subsampled"] == 0


def test_survives_netcdf(tmp_path):
    fit = gaussian_fit([0.0, 1.0], [1.0, 1.0], dtype=torch.float32)
    tree = to_datatree(fit.draw(None, 30, 0), predictive=fit.predict(None, 8, 1), run=flat_run(50))
    path = tmp_path / "tree.nc"
    tree.to_netcdf(path)
    with xr.open_datatree(path) as back:
        back.load()
    for group in tree.children:
        xr.testing.assert_equal(back[group].to_dataset(), tree[group].to_dataset())
    assert back.posterior["z"].dtype == np.float32 and back.sample_stats["lp"].dtype == np.float64
    assert back.attrs["num_steps"] == 50
    assert back.sample_stats["log_weight"].attrs["resolution"] == tree.sample_stats["log_weight"].attrs["resolution"]


def test_history_has_the_dim_step():
    tree = to_datatree(gaussian_fit([0.0], [1.0]).draw(None, 5, 0), run=flat_run(40))
    history = tree["svi_history"]
    assert dict(history.sizes) == {"step": 40} and list(history.data_vars) == ["loss", "lr"]
    assert history.step.values[0] == 1


@pytest.mark.parametrize(
    ("changes", "stats", "reason"),
    [
        ({"no_density": ("a",)}, {"lp", "log_q"}, "no density at a"),
        ({"subsampled": True}, {"lp", "log_q"}, "a plate was subsampled"),
        ({}, {"lp", "log_q", "log_weight"}, None),
    ],
)
def test_weights_are_stored_only_where_they_are_ratios(changes, stats, reason):
    draws = make_draws({"a": torch.randn(7)}, torch.zeros(7), torch.zeros(7), **changes)
    found = to_datatree(draws).sample_stats
    assert set(found.data_vars) == stats
    assert (reason is None) == ("no_weights" not in found.attrs)
    assert reason is None or reason in found.attrs["no_weights"]


def test_weights_of_each_datum_survive_subsampling():
    draws = replace(PPCAFit().draw(PPCAFit.data(5), 40, seed=0), subsampled=True)
    assert set(to_datatree(draws).sample_stats.data_vars) == {"lp", "log_q", "log_weight_rows"}


def test_odd_names_and_dtypes():
    values = {"net/w": torch.zeros(6, 2, 3, dtype=torch.bfloat16), "k": torch.arange(6)}
    tree = to_datatree(make_draws(values, torch.zeros(6), torch.zeros(6)))
    assert tree.posterior["net.w"].dims == ("chain", "draw", "net.w_dim_0", "net.w_dim_1")
    assert tree.posterior["net.w"].dtype == np.float32 and tree.posterior["k"].dtype == np.int64


def test_a_model_without_latents():
    draws = make_draws({}, torch.zeros(4), torch.zeros(4), has_global=False)
    tree = to_datatree(draws)
    assert "posterior" not in tree and tree.sample_stats.attrs["no_weights"] == "the model has no latent variables"


def test_resolution_follows_dtype_and_size():
    def resolution(dtype, size):
        draws = make_draws({"a": torch.zeros(3, dtype=dtype)}, torch.full((3,), size), torch.zeros(3))
        return to_datatree(draws).sample_stats["log_weight"].attrs["resolution"]

    assert resolution(torch.float64, 10.0) == pytest.approx(64 * 10 * 2.0**-52)
    assert resolution(torch.float32, 10.0) == pytest.approx(64 * 10 * 2.0**-23)
    assert resolution(torch.float32, -1e7) == 0.01
    assert math.isfinite(resolution(torch.float32, math.inf))
