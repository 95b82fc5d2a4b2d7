r"""Guide draws as a ``DataTree`` that ArviZ reads: groups, dims and what is known about the weights.

A tree from a variational fit has one chain of independent draws. r-hat and effective sample sizes of Markov chains always look
perfect on such draws and say nothing about the guide; pgen neither computes nor stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgen.contracts import Draws, Run

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["check_predictive", "to_datatree", "why_unweighted"]

_CHAIN_DRAW = ["chain", "draw"]


def to_datatree(
    draws: Draws,
    *,
    predictive: Mapping[str, Tensor] | None = None,
    run: Run | None = None,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    r"""Turn guide draws into a ``DataTree`` with dims (chain=1, draw, ...), for ArviZ and for every diagnostic here.

    Groups: ``posterior`` (constrained latents), ``sample_stats`` (``lp`` = :math:`\log p(x, z)`, ``log_q``, and, where they are
    importance ratios, ``log_weight`` and ``log_weight_rows``), ``log_likelihood``, ``observed_data``, ``posterior_predictive``
    and ``svi_history`` (dim ``step``). Where there are no weights, the attribute ``no_weights`` of ``sample_stats`` says why.
    Log-densities are float64 and in nats; latents keep their dtype. A ``/`` in a site's name becomes ``.``.

    Args:
        draws: From ``model.draw``.
        predictive: Draws ``(S', *observed shape)`` of observed sites; they need not go with ``draws`` one by one.
        run: Its history becomes ``svi_history``, its outcome attributes.
        coords: Coordinate values of named dims, for example ``{"data": school_names}``.
        attrs: Further attributes of the tree.

    Raises:
        ValueError: If replicates do not have the shape of the observed site, or a coordinate not the length of its dim.
    """
    import arviz_base
    import xarray as xr

    check_predictive(draws, predictive or {})
    groups = {
        "posterior": {name: _sampled(value) for name, value in draws.values.items()},
        "sample_stats": _sample_stats(draws),
        "log_likelihood": {name: _sampled(value) for name, value in draws.log_likelihood.items()},
        "observed_data": {name: _plain(value) for name, value in draws.observed.items()},
        "posterior_predictive": {name: _sampled(value) for name, value in (predictive or {}).items()},
    }
    groups = {group: {_safe(k): v for k, v in columns.items()} for group, columns in groups.items() if columns}
    tree = arviz_base.from_dict(
        groups,
        dims=_dims(draws, predictive or {}),
        coords={_safe(name): np.asarray(values) for name, values in (coords or {}).items()},
        sample_dims=_CHAIN_DRAW,
        attrs={"/": _attributes(draws, run, attrs or {}), **_group_attrs(draws, groups)},
    )
    for stat in tree["sample_stats"].data_vars.values():
        stat.attrs.update(units="nats", resolution=_resolution(draws))
    if run is not None and run.history:
        tree["svi_history"] = xr.DataTree(_history(run))
    return tree


def check_predictive(draws: Draws, predictive: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless replicates of an observed site have its shape behind the draw axis."""
    for name, value in predictive.items():
        want = tuple(draws.observed[name].shape) if name in draws.observed else tuple(value.shape[1:])
        if tuple(value.shape[1:]) != want:
            shape = ", ".join(map(str, want))
            raise ValueError(f"`predictive[{name!r}]` should have shape (S, {shape}), as observed, got {tuple(value.shape)}")


def why_unweighted(draws: Draws) -> str:
    """Why the draws carry no importance weights at all, or an empty string."""
    if not draws.values:
        return "the model has no latent variables"
    if draws.no_density:
        return f"the guide has no density at {', '.join(draws.no_density)} (a point mass)"
    if draws.subsampled and draws.log_weight_rows is None:
        return "a plate was subsampled: joint log-weights of a minibatch are not importance ratios"
    return ""


def _sample_stats(draws: Draws) -> dict[str, np.ndarray]:
    stats = {"lp": _sampled(draws.log_p), "log_q": _sampled(draws.log_q)}
    if why_unweighted(draws):
        return stats
    if not draws.subsampled:
        stats["log_weight"] = _sampled(draws.log_weight)
    if draws.log_weight_rows is not None and draws.has_local:
        stats["log_weight_rows"] = _sampled(draws.log_weight_rows)
    return stats


def _resolution(draws: Draws) -> float:
    """Log-weights closer than this, in nats, differ by rounding: 64 epsilons of the latents' dtype times their size."""
    kinds = [value.dtype for value in draws.values.values() if value.is_floating_point()]
    eps = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float64).eps)
    logs = torch.cat([draws.log_p.reshape(-1), draws.log_q.reshape(-1)]).abs()
    size = float(logs[logs.isfinite()].max()) if bool(logs.isfinite().any()) else 1.0
    return min(64 * eps * max(1.0, size), 0.01)  # at 0.01 nats the effective number of draws is still 0.9999 S


def _dims(draws: Draws, predictive: Mapping[str, Tensor]) -> dict[str, list[str]]:
    dims = {name: list(names) for name, names in draws.dims.items()}
    for name, value in {**draws.observed, **{k: v[0] for k, v in predictive.items()}}.items():
        plates = draws.likelihood_dims.get(name, ())
        dims[name] = [*plates, *(f"{name}_dim_{i}" for i in range(value.dim() - len(plates)))]
    dims["log_weight_rows"] = ["data"]
    return {_safe(name): [_safe(dim) for dim in names] for name, names in dims.items()}


def _group_attrs(draws: Draws, groups: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    common = {"inference_library": "pgen", "draws_are_iid": 1}
    attrs = {group: dict(common) for group in groups if group != "observed_data"}
    if reason := why_unweighted(draws):
        attrs["sample_stats"]["no_weights"] = reason
    if "posterior_predictive" in groups:
        attrs["posterior_predictive"]["paired_with_posterior"] = 0
    return attrs


def _attributes(draws: Draws, run: Run | None, attrs: Mapping[str, Any]) -> dict[str, Any]:
    import pyro

    from_run: dict[str, Any] = {}
    if run is not None:
        from_run = {
            "num_steps": run.steps,
            "stopped": run.stopped,
            "tier": run.tier,
            "fit_seed": run.seed,
            "num_data": run.num_data,
        }
    found = {
        "inference_library": "pgen",
        "sampler": "svi",
        "draws_are_iid": 1,
        "subsampled": draws.subsampled,
        "no_density": " ".join(draws.no_density),
        "torch_version": torch.__version__,
        "pyro_version": pyro.__version__,
        **from_run,
        **attrs,
    }
    return {str(key): _storable(value) for key, value in found.items()}


def _storable(value: Any) -> Any:
    """An attribute that NetCDF can hold."""
    if isinstance(value, (bool, np.bool_)):
        return int(value)
    return value if isinstance(value, (int, float, str)) and type(value) in (int, float, str) else str(value)


def _history(run: Run) -> xr.Dataset:
    import xarray as xr

    columns = {name: np.asarray(values) for name, values in run.history.items() if name != "step"}
    length = max((len(values) for values in columns.values()), default=0)
    steps = np.asarray(run.history.get("step", np.arange(length)))
    return xr.Dataset({_safe(name): ("step", values) for name, values in columns.items()}, coords={"step": steps})


def _sampled(value: Tensor) -> np.ndarray:
    """Draws with a chain axis of length one in front."""
    return _plain(value)[None]


def _plain(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def _safe(name: str) -> str:
    return name.replace("/", ".")
