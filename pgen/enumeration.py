r"""Exact sums over the discrete latents of a model.

A latent with finitely many values that no guide draws takes all its values at once, along an axis of its own to the left of
the plates (Pyro's parallel enumeration), and is then summed out of everything that depends on it:

.. math:: \log p(x \mid \theta) = \log \sum_z p(z \mid \theta) \, p(x \mid z, \theta)

The sums follow the plates and the order in time of ``pyro.markov``, so that a hidden Markov chain of length T with K states
costs :math:`T K^2` and not :math:`K^T`. A mask of the data acts inside the sum, where it leaves a factor of one; a scale
never does.

References:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs, arXiv:1902.03210.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["MAX_PLATES", "Marginal", "enumerating", "is_finite", "marginals"]

MAX_PLATES = 6
"""Plate axes -1 to -6 belong to plates; enumerated latents take the axes to the left of them."""


class _Unguided(Messenger):
    """Asks for every value of each discrete latent, but those that are given one."""

    def __init__(self, given: Container[str]) -> None:
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and is_finite(msg["fn"]):
            msg["infer"] = {**msg["infer"], "enumerate": None if msg["name"] in self.given else "parallel"}


class _Parallel(EnumMessenger):
    """Pyro's parallel enumeration, inside ``torch.func.vmap`` too, where a tensor's ``data`` may not be asked for."""

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if not isinstance(fn, TorchDistributionMixin) or value is None:
            return
        dims = msg["infer"].setdefault("_dim_to_id", {})
        dims.update(self._param_dims.get(name, {}))
        shape = value.shape[: value.dim() - fn.event_dim]
        self._value_dims[name] = {dim: number for dim, number in dims.items() if len(shape) >= -dim and shape[dim] > 1}


def is_finite(fn: Any) -> bool:
    """Whether a distribution has finitely many values that can be listed."""
    return isinstance(fn, TorchDistributionMixin) and bool(fn.has_enumerate_support)


@contextlib.contextmanager
def enumerating(given: Container[str]) -> Iterator[None]:
    """Run a model so that its discrete latents take all their values.

    Args:
        given: Sites whose values a handler outside gives.
    """
    with _Parallel(first_available_dim=-1 - MAX_PLATES), _Unguided(given):
        yield


@dataclass(frozen=True)
class Marginal:
    """What is left of sites that share enumerated latents, after the sum.

    Attributes:
        sites: Their names.
        log_prob: Over the plates that contain all the sums.
        plates: ``(name, axis)`` of those plates, the axis counted in ``log_prob``.
        scale: The scale that all of the sites share.
    """

    sites: tuple[str, ...]
    log_prob: Tensor
    plates: tuple[tuple[str, int], ...]
    scale: Any


def marginals(trace: Any, log_probs: Mapping[str, Tensor]) -> list[Marginal]:
    """Sum the enumerated latents out of a trace.

    Args:
        trace: Of a model that ran inside ``enumerating``.
        log_probs: Unscaled log-density of each site, masked unless the site is enumerated.
    """
    infer = {name: trace.nodes[name]["infer"] for name in log_probs}
    if not any("_enumerate_dim" in each for each in infer.values()):
        return []
    trace.symbolize_dims()
    summed = {each["_enumerate_symbol"] for each in infer.values() if "_enumerate_dim" in each}
    factors = {n: packed.pack(lp, infer[n]["_dim_to_symbol"]) for n, lp in log_probs.items()}
    factors = {n: f for n, f in factors.items() if summed & set(f._pyro_dims)}
    return [_contract(trace, {n: factors[n] for n in names}, summed) for names in _components(factors, summed)]


def _components(factors: Mapping[str, Any], summed: set[str]) -> list[list[str]]:
    """Names of factors, grouped by the enumerated latents that they share."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, factor in factors.items():
        names, dims = [name], summed & set(factor._pyro_dims)
        for group in [g for g in groups if g[1] & dims]:
            groups.remove(group)
            names, dims = group[0] + names, group[1] | dims
        groups.append((names, dims))
    return [names for names, _ in groups]


def _contract(trace: Any, factors: Mapping[str, Tensor], summed: set[str]) -> Marginal:
    sites = {name: trace.nodes[name] for name in factors}
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name, factor in factors.items():
        tree.setdefault(_ordinal(trace, sites[name]), []).append(factor)
    try:
        ((ordinal, (result,)),) = contract_tensor_tree(tree, set(summed), ring=_Ring()).items()
    except NotImplementedError as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"the latents behind {_names(sites)} cannot be summed out: {why}") from error
    frames = {f for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized}
    kept = sorted((f.name, f.dim, f.size) for f in frames if trace.plate_to_symbol[f.name] in ordinal)
    shape = [1] * max((-dim for _, dim, _ in kept), default=0)
    for _, dim, size in kept:
        shape[dim] = size
    log_prob = packed.unpack(result, trace.symbol_to_dim).expand(shape)  # packing drops axes of length one
    return Marginal(tuple(sites), log_prob, tuple((name, dim) for name, dim, _ in kept), _common_scale(sites))


class _Ring(LogRing):
    """Sums of products in log space, by ``logsumexp`` of whole products, which neither underflows nor overflows."""

    def sumproduct(self, terms: Any, dims: set[str]) -> Tensor:
        """The product of all terms, summed over ``dims``; the latent whose sum is the smallest goes first."""
        left = list(terms)
        while pending := set(dims) & {dim for term in left for dim in term._pyro_dims}:
            dim = min(sorted(pending), key=lambda dim: _width(_with(left, dim)))
            product = _product(_with(left, dim))
            summed = torch.logsumexp(product, product._pyro_dims.index(dim))  # type: ignore[attr-defined]
            summed._pyro_dims = product._pyro_dims.replace(dim, "")  # type: ignore[attr-defined]
            left = [term for term in left if dim not in term._pyro_dims] + [summed]
        return _product(left)


def _with(terms: Iterable[Any], dim: str) -> list[Any]:
    return [term for term in terms if dim in term._pyro_dims]


def _width(terms: Iterable[Any]) -> int:
    return math.prod({dim: n for term in terms for dim, n in zip(term._pyro_dims, term.shape)}.values())


def _product(terms: list[Any]) -> Any:
    first, *others = packed.broadcast_all(*terms)
    product = sum(others, first)
    product._pyro_dims = first._pyro_dims
    return product


def _ordinal(trace: Any, site: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)


def _common_scale(sites: Mapping[str, Any]) -> Any:
    scales = [site["scale"] for site in sites.values()]
    first = scales[0]
    for name, scale in zip(sites, scales):
        if scale is not first and (isinstance(scale, Tensor) or isinstance(first, Tensor) or scale != first):
            raise ValueError(
                f"site {name!r} has another scale than the sites with which it shares a sum over a discrete latent "
                f"({_names(sites)}), and a scale cannot go inside a sum: give them one common poutine.scale"
            )
    return first


def _names(sites: Iterable[str]) -> str:
    names = list(sites)
    return ", ".join(map(repr, names[:4])) + (" ..." if len(names) > 4 else "")
