r"""Running Pyro programs: in a parameter store of their own, on a batch, once or for many draws at a time.

The rest of pgen never touches Pyro's global store, its validation flag or its traces; it asks this module.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .contracts import Batch, Draws, Measure, nearest
from .enumeration import Marginal, enumerating, is_finite, marginals

__all__ = [
    "DATA_PLATE",
    "At",
    "ParameterHome",
    "PlateSize",
    "Term",
    "Traces",
    "aside",
    "batch_length",
    "call",
    "check_pair",
    "check_support",
    "closure_modules",
    "current_rows",
    "draw",
    "draw_guide",
    "held",
    "innermost",
    "isolated",
    "keyed_rng",
    "lists_sites",
    "localize",
    "measure_of",
    "python_state",
    "rows_at",
    "run_distributions",
    "run_latents",
    "run_laws",
    "run_model",
    "run_pair",
    "run_program",
    "run_sites",
    "run_values",
    "vectorize",
]

DATA_PLATE = "data"
"""Name of the plate that holds the batch axis."""


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and isolation


class ParameterHome(nn.Module):
    """Owns what ``pyro.param`` and ``pyro.module`` ask for, as ordinary parameters (unconstrained inside)."""

    def __init__(self) -> None:
        super().__init__()
        self._constraints: dict[str, Constraint] = {}
        self._names: dict[str, str] = {}
        self._adopted: dict[str, nn.Parameter] = {}
        self.open = True

    @staticmethod
    def _escape(name: str) -> str:
        return name.replace(".", ":")

    def names(self) -> list[str]:
        """The names under which the programs know their parameters."""
        return list(self._names)

    def adopt(self, modules: dict[str, nn.Module]) -> None:
        """Own modules that a plain function refers to."""
        for name, module in modules.items():
            self.add_module(f"module_{name}", module)

    def get(self, name: str, init: Any, constraint: Constraint) -> Tensor:
        """The constrained value of parameter ``name``, created from ``init`` when first asked for."""
        if name in self._adopted:
            return self._adopted[name]
        if name not in self._names:
            self._create(name, init, constraint)
            if name in self._adopted:
                return self._adopted[name]
        unconstrained = getattr(self, self._names[name])
        return transform_to(self._constraints[name])(unconstrained)

    def _create(self, name: str, init: Any, constraint: Constraint) -> None:
        if not self.open:
            raise ValueError(
                f"parameter {name!r} appeared after the first run of the programs; make every pyro.param in each run "
                f"(known: {', '.join(self._names) or 'none'})"
            )
        if init is None:
            raise ValueError(f"parameter {name!r} has no initial value; write pyro.param({name!r}, torch.tensor(...))")
        value = init() if callable(init) and not isinstance(init, Tensor) else init
        if isinstance(value, nn.Parameter) and constraint is torch.distributions.constraints.real:
            self._adopted[name] = value
            if not any(value is owned for owned in self.parameters()):
                self.register_parameter(self._escape(name), value)
            return
        value = torch.as_tensor(value).detach()
        if not bool(constraint.check(value).all()):
            raise ValueError(f"initial value of parameter {name!r} is outside its constraint {constraint}")
        unconstrained = transform_to(constraint).inv(value).clone()
        self.register_parameter(self._escape(name), nn.Parameter(unconstrained))
        self._names[name], self._constraints[name] = self._escape(name), constraint


class _Homecoming(Messenger):
    """Answers every ``pyro.param`` from a ParameterHome."""

    def __init__(self, home: ParameterHome) -> None:
        super().__init__()
        self.home = home

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if getattr(msg["fn"], "__self__", None) is not pyro.get_param_store():
            return  # a PyroModule's own parameter, which it holds itself
        args, kwargs = msg["args"], msg["kwargs"]
        init = args[1] if len(args) > 1 else kwargs.get("init_tensor")
        constraint = kwargs.get("constraint") or torch.distributions.constraints.real
        msg["value"] = self.home.get(msg["name"], init, constraint)
        msg["done"] = True


@contextlib.contextmanager
def isolated(home: ParameterHome | None = None, *, validate: bool = False) -> Iterator[None]:
    """Run Pyro statements with module-local parameters, an empty store and a chosen validation flag; then restore all."""
    flag = bool(torch.distributions.Distribution._validate_args)  # type: ignore[attr-defined]
    shared = not pyro.settings.get("module_local_params")
    try:
        if shared:
            pyro.settings.set(module_local_params=True)
        with pyro.get_param_store().scope(), pyro.validation_enabled(validate):
            with contextlib.nullcontext() if home is None else _Homecoming(home):
                yield
    finally:
        if shared:
            pyro.settings.set(module_local_params=False)
        torch.distributions.Distribution.set_default_validate_args(flag)


def localize(module: nn.Module) -> None:
    """Let PyroModules that were made outside ``isolated`` keep their parameters to themselves inside it."""
    for part in module.modules():
        context = getattr(part, "_pyro_context", None)
        if context is not None and not hasattr(context, "param_state"):
            context.param_state = {"params": {}, "constraints": {}}


def closure_modules(fn: Callable[..., Any]) -> dict[str, nn.Module]:
    """The ``nn.Module`` objects that a plain function or a bound method refers to, by name."""
    if isinstance(getattr(fn, "__self__", None), nn.Module):
        return {"self": fn.__self__}  # type: ignore[attr-defined]
    if isinstance(fn, functools.partial):
        return closure_modules(fn.func)
    if isinstance(fn, nn.Module) or not inspect.isfunction(inspect.unwrap(fn)):
        return {}
    found = inspect.getclosurevars(inspect.unwrap(fn))
    return {k: v for k, v in {**found.globals, **found.nonlocals}.items() if isinstance(v, nn.Module)}


def python_state(program: Callable[..., Any]) -> dict[str, str]:
    """The plain Python values that a program may read: its closure's, its globals', and attributes of its modules, as text.

    A captured graph freezes them; one that a program changes as it runs must be noticed.
    """
    owner, fn = getattr(program, "__self__", None), inspect.unwrap(getattr(program, "__func__", program))
    owner = program if isinstance(program, nn.Module) else owner
    found: dict[str, Any] = {}
    if inspect.isfunction(fn):
        names = inspect.getclosurevars(fn)
        found = {**names.globals, **names.nonlocals}
    if isinstance(owner, nn.Module):
        for where, module in owner.named_modules():
            found |= {f"{where}.{n}".lstrip("."): v for n, v in vars(module).items() if n != "training" and n[:1] != "_"}
    return {name: repr(value) for name, value in found.items() if _plain(value)}


def _plain(value: Any, depth: int = 2) -> bool:
    """Numbers, strings, and short containers of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    parts = list(value.values()) if isinstance(value, dict) else value
    return depth > 0 and isinstance(parts, (list, tuple)) and len(parts) <= 100 and all(_plain(v, depth - 1) for v in parts)


@contextlib.contextmanager
def keyed_rng(key: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators with ``key`` inside, and give the caller's random state back afterwards."""
    device = torch.device(device)
    state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        seed_generators(key, device)
        yield
    finally:
        torch.set_rng_state(state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


def seed_generators(key: int, device: torch.device | str = "cpu") -> None:
    """Seed the default generator of the CPU, and of ``device`` where that is a GPU."""
    torch.default_generator.manual_seed(key)
    if torch.device(device).type == "cuda":
        torch.cuda.default_generators[torch.device(device).index or 0].manual_seed(key)


# ---------------------------------------------------------------------------------------------------------------------
# Running a pair once


class PlateSize(Messenger):
    """Tells ``GenerativeModel.plate`` how many data to generate when neither x nor context says so."""

    size: int | None = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __enter__(self) -> PlateSize:
        self._before, PlateSize.size = PlateSize.size, self._size
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        PlateSize.size = self._before
        return super().__exit__(*args)


_ROWS: list[Tensor | None] = [None]


@contextlib.contextmanager
def rows_at(index: Tensor | None) -> Iterator[None]:
    """Tell guides with a row of parameters for each datum which rows the batch holds; None for all of them in order."""
    _ROWS.append(index)
    try:
        yield
    finally:
        _ROWS.pop()


def current_rows() -> Tensor | None:
    """Indices of the rows in the batch at hand, ``(B,)``; None where the batch is the whole data set."""
    return _ROWS[-1]


def call(program: Callable[..., Any], batch: Batch) -> Any:
    """Call a program on a batch: a tensor or a tuple by position, a dict by name."""
    if isinstance(batch, dict):
        return program(**batch)
    return program(*batch) if isinstance(batch, tuple) else program(batch)


def batch_length(batch: Batch) -> int:
    """Length of a batch along axis 0."""
    leaves = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    return 0


@dataclass(frozen=True)
class Term:
    """One site's log-density: unscaled, masked, with its plate axes named.

    Attributes:
        log_prob: Shape ``batch_shape`` of the site.
        scale: Product of the program's own scales: ``poutine.scale`` and subsampling plates.
        plates: ``(name, axis)`` for each plate, the axis negative, counted in ``batch_shape``.
        mask: The mask that ``log_prob`` went through; None for none.
    """

    name: str
    value: Any
    fn: Any
    log_prob: Tensor
    scale: float | Tensor
    plates: tuple[tuple[str, int], ...]
    observed: bool
    auxiliary: bool
    mask: Any = None

    @property
    def measure(self) -> Measure:
        """Whether the site has a density or a mass; empty where its distribution does not say."""
        return measure_of(self.fn)

    @property
    def estimated(self) -> bool:
        """Whether ``log_prob`` is an unbiased estimate of a log-density: then means of it are bounds, and nothing else is."""
        return bool(getattr(innermost(self.fn), "estimated", False))

    @property
    def local(self) -> bool:
        """Whether the site lies in the data plate."""
        return any(name == DATA_PLATE for name, _ in self.plates)

    @property
    def reparameterized(self) -> bool:
        """Whether the gradient flows through the value."""
        return _has_rsample(self.fn)

    @property
    def rows(self) -> Tensor:
        """Log-density with every axis but the data plate's summed out: ``(B,)`` in the plate, a scalar outside."""
        log_prob = self.log_prob
        for name, axis in self.plates:
            if name == DATA_PLATE and log_prob.dim() >= -axis:
                others = [i for i in range(log_prob.dim()) if i != log_prob.dim() + axis]
                return log_prob.sum(others) if others else log_prob
        return log_prob.sum()


@dataclass(frozen=True)
class Traces:
    """Both programs, run once on the same latents.

    Attributes:
        model: The model's sites.
        guide: The guide's sites; their log-densities with parameters held constant where that was asked for.
        subsampled: Whether a plate was subsampled.
        scores: The guide's sites through whose values no gradient flows, log-densities with their gradient.
        proposals: The guide's distributions, with their gradient.
    """

    model: dict[str, Term]
    guide: dict[str, Term]
    subsampled: bool
    scores: dict[str, Term]
    proposals: dict[str, Any]

    @property
    def latents(self) -> dict[str, Term]:
        """The model's unobserved sites."""
        return {name: term for name, term in self.model.items() if not term.observed}

    @property
    def likelihoods(self) -> dict[str, Term]:
        """The model's observed sites."""
        return {name: term for name, term in self.model.items() if term.observed}


def _term(site: dict[str, Any], double: bool, masked: bool = True) -> Term:
    fn, value = site["fn"], site["value"]
    if type(fn) is pyro.distributions.Delta and site["infer"].get("is_change_of_variables", False):
        log_prob = fn.log_density  # at its own point, which is where it was drawn
    else:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    log_prob = scale_and_mask(log_prob.double() if double else log_prob, mask=site["mask"] if masked else None)
    plates = tuple((f.name, f.dim) for f in site["cond_indep_stack"] if f.vectorized)
    auxiliary = bool(site["infer"].get("is_auxiliary", False))
    return Term(site["name"], value, fn, log_prob, site["scale"], plates, bool(site["is_observed"]), auxiliary, site["mask"])


def _has_rsample(fn: Any) -> bool:
    return bool(getattr(fn, "has_rsample", False))


def _sites(trace: poutine.Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic", False):
            yield name, site


def _terms(trace: poutine.Trace, double: bool) -> dict[str, Term]:
    return {name: _term(site, double) for name, site in _sites(trace)}


def _model_terms(trace: poutine.Trace, double: bool) -> dict[str, Term]:
    """Terms of a model that ran inside ``enumerating``: latents summed out, what depends on them in one marginal term."""
    terms = {name: _term(site, double, masked="_enumerate_dim" not in site["infer"]) for name, site in _sites(trace)}
    for marginal in marginals(trace, {name: term.log_prob for name, term in terms.items()}):
        sites = [terms.pop(name) for name in marginal.sites]
        terms |= {term.name: term for term in _remaining(marginal, sites)}
    return terms


def _remaining(marginal: Marginal, sites: list[Term]) -> Iterator[Term]:
    """The marginal under the name of what was observed (else of a latent), and latents without a density of their own."""
    observed = [site for site in sites if site.observed]
    latents = [site for site in sites if not site.observed and not is_finite(site.fn)]
    if len(observed) > 1:
        names = [site.name for site in observed]
        name = "+".join(names) if len(names) < 4 else f"{names[0]}+...+{names[-1]}"
        size = sum(math.prod(site.fn.event_shape) for site in observed)
        several = _Several(torch.Size([size]), {site.name: site.value for site in observed})
        observed = [replace(observed[0], name=name, fn=several, auxiliary=False)]
    for site in (observed + latents)[:1]:
        yield replace(site, log_prob=marginal.log_prob, plates=marginal.plates, scale=marginal.scale, mask=None)
    for site in (observed + latents)[1:]:
        shape = site.value.shape[: site.value.dim() - site.fn.event_dim]
        yield replace(site, log_prob=marginal.log_prob.new_zeros(shape), mask=None)


@dataclass(frozen=True)
class _Several:
    """Stands for the distributions of several observed sites."""

    event_shape: torch.Size
    values: dict[str, Any]


def _observed(terms: dict[str, Term]) -> dict[str, Any]:
    """Value of each observed site, those behind a common marginal included."""
    found: dict[str, Any] = {}
    for name, term in terms.items():
        found |= term.fn.values if isinstance(term.fn, _Several) else {name: term.value}
    return found


def _subsampled(trace: poutine.Trace) -> bool:
    return any(
        site_is_subsample(s) and s["value"] is not None and len(s["value"]) < s["fn"].size
        for s in trace.nodes.values()
        if s["type"] == "sample"
    )


def run_pair(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, *, double: bool = False, hold: bool = False
) -> Traces:
    """Run the guide, then the model on its latents; inside ``isolated``.

    Args:
        model: The model program.
        guide: The guide program, called with the same arguments.
        batch: Their arguments.
        double: Whether to reduce log-densities in float64.
        hold: Whether the guide's log-densities hold its parameters constant; see ``held``.
    """
    guide_trace = _trace(guide, batch)
    # not poutine.replay(model): its wrapper takes a keyword `context` for its own
    with ReplayMessenger(trace=guide_trace), enumerating(guide_trace.nodes):
        model_trace = _trace(model, batch)
    return _traces(model_trace, guide_trace, double, held(guide, batch, _values(guide_trace), double=double) if hold else None)


def run_distributions(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> dict[str, Any]:
    """Distributions of the model's sites at a draw of the guide. No value is scored, so it may lie outside its support."""
    return {name: fn for name, (fn, _) in run_sites(model, guide, batch).items()}


def run_sites(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> dict[str, tuple[Any, Any]]:
    """Distribution and value of the model's sites at a draw of the guide, none of them scored."""
    guide_trace = _trace(guide, batch)
    with ReplayMessenger(trace=guide_trace), enumerating(guide_trace.nodes):
        return {name: (site["fn"], site["value"]) for name, site in _sites(_trace(model, batch))}


def measure_of(fn: Any) -> Measure:
    """Whether a distribution has a density or a mass; empty where it does not say."""
    try:
        return "mass" if fn.support.is_discrete else "density"
    except (NotImplementedError, AttributeError):  # torch's and Pyro's ways of having no support
        return ""


def _traces(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, double: bool = False, guide: dict[str, Term] | None = None
) -> Traces:
    scored = {name: _term(site, double) for name, site in _sites(guide_trace) if not _has_rsample(site["fn"])}
    if guide is None:
        guide = {name: scored[name] if name in scored else _term(site, double) for name, site in _sites(guide_trace)}
    proposals = {name: site["fn"] for name, site in _sites(guide_trace)}
    return Traces(_model_terms(model_trace, double), guide, _subsampled(model_trace), scored, proposals)


def _trace(program: Callable[..., Any], batch: Batch) -> poutine.Trace:
    return poutine.trace(program).get_trace(*_args(batch), **_kwargs(batch))


def _values(trace: poutine.Trace) -> dict[str, Any]:
    return {name: s["value"] for name, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}


def held(guide: Callable[..., Any], batch: Batch, values: dict[str, Any], *, double: bool = False) -> dict[str, Term]:
    r"""The guide's terms at given draws, with its parameters held constant: :math:`\log q_{\bar\phi}(z)`.

    The gradient flows through the draws alone, those that other draws are conditioned on included. The guide runs a second
    time; in a captured graph the two runs are one, since they compute the same numbers. A noise site from which a bijection
    with parameters makes latents names them and its inverse, ``infer={"preimage": (site, inverse)}``; a Delta's
    ``log_density`` must be a function of draws.

    Args:
        guide: The guide program; inside ``isolated``.
        batch: Its arguments.
        values: The values of all its sample sites.
        double: Whether to reduce log-densities in float64.
    """
    with _Held(), _Again(values):
        return _terms(_trace(guide, batch), double)


class At(Messenger):
    """Runs a program at given values of its sample sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Again(Messenger):
    """Gives sample sites the values that they had; as views, so that no transform finds what it remembers of them."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        source, inverse = msg["infer"].get("preimage", (msg["name"], _as_is))
        value = inverse(self.values[source])
        msg["value"], msg["done"] = value.view_as(value) if isinstance(value, Tensor) else value, True


def _as_is(value: Any) -> Any:
    return value


_DROPOUTS = {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"}
_CHANCE = {"rand", "randn", "rand_like", "randn_like", "normal", "normal_", "uniform_", "bernoulli", "bernoulli_"}


class _Held(TorchFunctionMode):
    """Holds parameters constant, and the running statistics of batch normalisation as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _constant, (args, kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CHANCE or (name in _DROPOUTS and kwargs.get("training", True)):
            raise ValueError(
                f"the guide draws random numbers outside its sample sites ({name}), so that its log-density cannot be "
                f"evaluated again at the same draws: leave dropout out of it, or do not hold its parameters constant"
            )
        if func is torch.nn.functional.batch_norm and kwargs.get("training"):
            args = (args[0], None, None, *args[3:])
        if func is torch.Tensor.add_ and not args[0].is_floating_point():
            return args[0]  # the count of batches
        return func(*args, **kwargs)


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor


Sites = Iterator[tuple[str, Any, Tensor]]
"""Name, distribution and value of each site of a program that lists them."""


def lists_sites(program: Callable[..., Sites]) -> Callable[..., Sites]:
    """Mark a program that yields its sites ``(name, distribution, value)`` in place of Pyro's statements.

    All are observed, and each in the data plate with one axis, the batch's. ``run_program`` and ``run_laws`` take either kind,
    and this one without Pyro's handlers, which cost more than the arithmetic of a small model.
    """
    program.lists_sites = True  # type: ignore[attr-defined]
    return program


def run_program(program: Callable[..., Any], batch: Batch, *, double: bool = False) -> dict[str, Term]:
    """Run one program and describe its sites; inside ``isolated``, but for one that lists them."""
    if not getattr(program, "lists_sites", False):
        return _terms(_trace(program, batch), double)
    return {name: _listed(name, fn, value, double) for name, fn, value in call(program, batch)}


def _listed(name: str, fn: Any, value: Tensor, double: bool) -> Term:
    log_prob = fn.log_prob(value)
    plates = ((DATA_PLATE, -1),)
    return Term(name, value, fn, log_prob.double() if double else log_prob, 1.0, plates, observed=True, auxiliary=False)


def run_laws(program: Callable[..., Any], batch: Batch) -> dict[str, tuple[Any, Any]]:
    """Run one program and take the distribution and the value of each site, without densities; inside ``isolated``."""
    if getattr(program, "lists_sites", False):
        return {name: (fn, value) for name, fn, value in call(program, batch)}
    return {name: (site["fn"], site["value"]) for name, site in _sites(_trace(program, batch))}


def run_values(program: Callable[..., Any], batch: Batch) -> dict[str, Any]:
    """Run one program and take the values that its sites draw, without their densities; inside ``isolated``."""
    return _values(_trace(program, batch))


def run_model(model: Callable[..., Any], batch: Batch, values: dict[str, Tensor], *, double: bool = False) -> dict[str, Term]:
    """Run a model at given values, other discrete latents summed out; inside ``isolated``."""
    with At(values), enumerating(values):
        return _model_terms(_trace(model, batch), double)


def draw_guide(guide: Callable[..., Any], batch: Batch, num_samples: int) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Draws of all sites of a guide ``(S, *shape)``, and the data axis of each, from the right (None outside the plate)."""
    axes: dict[str, int | None] = {}

    def once() -> dict[str, Tensor]:
        sites = dict(_sites(_trace(guide, batch)))
        for name, site in sites.items():
            frames = (f.dim - site["fn"].event_dim for f in site["cond_indep_stack"] if f.name == DATA_PLATE)
            axes[name] = next(frames, None)
        return {name: site["value"] for name, site in sites.items()}

    return vectorize(once, num_samples), axes


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Run other programs in the midst of one, whose plates and handlers do not see them; parameters keep their home."""
    stack, dims = pyro.poutine.runtime._PYRO_STACK, pyro.poutine.runtime._DIM_ALLOCATOR._stack
    handlers, allocated = stack[:], dims[:]
    stack[:], dims[:] = [handler for handler in handlers if isinstance(handler, _Homecoming)], []
    try:
        yield
    finally:
        stack[:], dims[:] = handlers, allocated


def run_latents(model: Callable[..., Any], batch: Batch) -> dict[str, Term]:
    """Run the model and describe the latent sites that need a guide, which are not summed out; inside ``isolated``."""
    sites = _sites(_trace(model, batch))
    return {name: _term(s, False) for name, s in sites if not s["is_observed"] and not is_finite(s["fn"])}


def _args(batch: Batch) -> tuple[Any, ...]:
    return () if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)


def _kwargs(batch: Batch) -> dict[str, Any]:
    return batch if isinstance(batch, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Many draws at a time


class _OutOfPlaceNoise(TorchFunctionMode):
    """Lets ``torch.empty(shape).normal_()`` and the like draw independently under vmap."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_:
            mean, sd = _bind(("mean", "std"), (0.0, 1.0), args, kwargs)
            return torch.randn_like(args[0]) * sd + mean
        if func is torch.Tensor.uniform_:
            low, high = _bind(("from", "to"), (0.0, 1.0), args, kwargs)
            return torch.rand_like(args[0]) * (high - low) + low
        if func is torch.Tensor.exponential_:
            (rate,) = _bind(("lambd",), (1.0,), args, kwargs)
            return -torch.log1p(-torch.rand_like(args[0])) / rate
        if func is torch.Tensor.cauchy_:
            median, scale = _bind(("median", "sigma"), (0.0, 1.0), args, kwargs)
            return median + scale * torch.tan(torch.pi * (torch.rand_like(args[0]) - 0.5))
        return func(*args, **kwargs)


def _bind(names: tuple[str, ...], defaults: tuple[float, ...], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    given = list(args[1 : 1 + len(names)])
    return [given[i] if i < len(given) else kwargs.get(n, d) for i, (n, d) in enumerate(zip(names, defaults))]


def vectorize(fn: Callable[..., Any], num: int, *inputs: Any) -> Any:
    """Evaluate ``fn`` independently ``num`` times in one batched run; every tensor returned gets a leading axis.

    ``fn`` is written for one draw and needs no knowledge of the extra axis; it is given each input (tensors, or dicts of
    tensors, with a leading axis of length ``num``) without it. Programs that cannot be batched (an operation without a
    batching rule, control flow on values) are run ``num`` times in a loop: slower, the same distribution.
    """
    try:
        with _OutOfPlaceNoise(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.func.vmap(lambda _, *args: fn(*args), randomness="different")(torch.empty(num), *inputs)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError):
        runs = [fn(*tree_map_only(Tensor, lambda t: t[i], inputs)) for i in range(num)]  # noqa: B023
        leaves = [torch.utils._pytree.tree_flatten(run) for run in runs]
        stacked = [torch.stack(parts) for parts in zip(*(flat for flat, _ in leaves))]
        return torch.utils._pytree.tree_unflatten(stacked, leaves[0][1])


def _axis_names(term: Term, plates: dict[int, str]) -> tuple[str, ...]:
    batch_dims = term.log_prob.dim()
    names = tuple(plates.get(i - batch_dims, f"{term.name}_batch_{i}") for i in range(batch_dims))
    return names + tuple(f"{term.name}_dim_{i}" for i in range(term.value.dim() - batch_dims))


def draw(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, num_samples: int) -> Draws:
    """Draw from the guide and weigh the draws, on a whole batch, inside ``isolated`` and ``keyed_rng``.

    Args:
        model: The model program.
        guide: The guide program.
        batch: Their arguments, the full data set where joint weights are wanted.
        num_samples: Draws S.

    Returns:
        Draws, with float64 log-densities.
    """
    static: dict[str, Any] = {}

    def once() -> dict[str, dict[str, Tensor]]:
        traces = run_pair(model, guide, batch, double=True)
        static["traces"] = traces
        latents = traces.latents
        return {
            "values": {name: traces.guide[name].value for name in latents if name in traces.guide},
            "p": {name: term.rows for name, term in traces.model.items()},
            "q": {name: term.rows for name, term in traces.guide.items()},
            "likelihood": {name: term.log_prob for name, term in traces.likelihoods.items()},
        }

    out = vectorize(once, num_samples)
    traces: Traces = static["traces"]
    latents = traces.latents
    dims = {name: _axis_names(latents[name], {axis: plate for plate, axis in latents[name].plates}) for name in out["values"]}
    likelihood_dims = {
        name: _axis_names(term, {axis: plate for plate, axis in term.plates})[: term.log_prob.dim()]
        for name, term in traces.likelihoods.items()
    }
    return Draws(
        values={name: value.detach() for name, value in out["values"].items()},
        dims=dims,
        log_p=_joint(out["p"], num_samples),
        log_q=_joint(out["q"], num_samples),
        log_p_rows=_in_plate(out["p"], traces.model),
        log_q_rows=_in_plate(out["q"], traces.guide, like=_in_plate(out["p"], traces.model)),
        log_likelihood={name: value.detach() for name, value in out["likelihood"].items()},
        likelihood_dims=likelihood_dims,
        observed=_observed(traces.likelihoods),
        has_global=any(not t.local for t in latents.values()),
        has_local=any(t.local for t in latents.values()),
        subsampled=traces.subsampled,
        no_density=_point_masses(traces.guide),
    )


def _point_masses(guide: dict[str, Term]) -> tuple[str, ...]:
    """Guide sites that put all mass on one point; a Delta beside an auxiliary site is a change of variables instead."""
    if any(term.auxiliary for term in guide.values()):
        return ()
    return tuple(term.name for term in guide.values() if isinstance(innermost(term.fn), pyro.distributions.Delta))


def _joint(rows: dict[str, Tensor], num_samples: int) -> Tensor:
    if not rows:
        return torch.zeros(num_samples, dtype=torch.float64)
    return torch.stack([r.reshape(len(r), -1).sum(-1) for r in rows.values()]).sum(0).detach()


def _in_plate(rows: dict[str, Tensor], terms: dict[str, Term], like: Tensor | None = None) -> Tensor | None:
    local = [r for name, r in rows.items() if terms[name].local]
    if not local:
        return None if like is None else torch.zeros_like(like)
    return torch.stack(torch.broadcast_tensors(*local)).sum(0).detach()


# ---------------------------------------------------------------------------------------------------------------------
# The first look at a pair


def check_pair(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, num_data: int) -> Traces:
    """Run both programs with validation on, strictly; one-line errors name the site and the fix.

    Args:
        model: The model program.
        guide: The guide program.
        batch: The first batch.
        num_data: Rows N of the whole data set.

    Raises:
        ValueError: On a latent that only one program has, an observed value whose shape is not exactly its site's, an
            axis outside every plate, a data plate of the wrong size, a value outside the likelihood's support, or a
            log-density that is not finite.
    """
    guide_trace = _trace(guide, batch)
    with ReplayMessenger(trace=guide_trace):
        model_trace = _trace(model, batch)
    summed = _check_sites(model_trace, guide_trace)
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic", False):
                _check_site(program, site, batch_length(batch), num_data)
    _check_sums(summed, batch_length(batch), num_data)
    with pyro.validation_enabled(False):
        return _traces(_enumerated(model, guide_trace, batch, list(summed)) if summed else model_trace, guide_trace)


def _enumerated(model: Callable[..., Any], guide_trace: poutine.Trace, batch: Batch, names: list[str]) -> poutine.Trace:
    """The model at all values of the latents that the guide leaves out."""
    try:
        with ReplayMessenger(trace=guide_trace), enumerating(guide_trace.nodes):
            return _trace(model, batch)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the model cannot be run at all values of {names[0]!r} at once, along an axis to the left of the plates "
            f"({' '.join(str(error).split())[:120]}): write what depends on it with broadcasting, or put the site into the "
            f"guide, where infer={{'enumerate': 'parallel'}} runs the programs at one value at a time"
        ) from error


def _check_sums(summed: dict[str, Any], rows: int, num_data: int) -> None:
    for name, site in summed.items():
        local = any(f.name == DATA_PLATE for f in site["cond_indep_stack"])
        if not local and 0 < rows < num_data:
            raise ValueError(
                f'the discrete latent {name!r} lies outside the plate "{DATA_PLATE}", so the sum over its values needs all '
                f"{num_data} data in each step (batch of {rows}): drop batch_size, or put it into the guide"
            )


def _check_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> dict[str, Any]:
    """The latents that are to be summed out: discrete, and left out of the guide."""

    def sampled(trace: poutine.Trace) -> dict[str, Any]:
        sites = trace.nodes.values()
        return {s["name"]: s for s in sites if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)}

    latents, proposals = sampled(model_trace), sampled(guide_trace)
    for name, site in latents.items():
        if name not in proposals and not is_finite(site["fn"]):
            endless = site["fn"].support.is_discrete
            kind = " (it is discrete with endlessly many values, so it cannot be summed out)" if endless else ""
            stray = next((n for n in proposals if n not in model_trace.nodes), None)
            instead = "" if stray is None else f" (it samples {stray!r}, which the model does not)"
            raise ValueError(
                f"the guide lacks the latent {name!r}{kind}{instead}; add pyro.sample({name!r}, ...) to the guide, "
                f"or let pgen write one: Pair(model, guide='mean_field')"
            )
    for name, site in proposals.items():
        if name not in model_trace.nodes and not site["infer"].get("is_auxiliary", False):
            raise ValueError(f"the guide samples {name!r}, which is no site of the model{nearest(name, list(latents))}")
        if name in model_trace.nodes and model_trace.nodes[name]["is_observed"]:
            raise ValueError(f"the guide samples {name!r}, which the model observes; remove it from the guide")
    return {name: site for name, site in latents.items() if name not in proposals}


def _check_site(program: str, site: dict[str, Any], rows: int, num_data: int) -> None:
    name, fn, value = site["name"], site["fn"], site["value"]
    where = f"{program} site {name!r}"
    if tuple(value.shape) != tuple(fn.shape()):
        raise ValueError(
            f"{where} has shape {tuple(fn.shape())} but its value has shape {tuple(value.shape)}, and pgen does not broadcast: "
            f"{_shape_hint(tuple(fn.shape()), tuple(value.shape))}"
        )
    plates = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    own = next((f for f in plates.values() if f.name == DATA_PLATE and f.full_size not in (None, f.size)), None)
    if own is not None:
        raise ValueError(
            f'plate "{DATA_PLATE}" of {where} subsamples by itself ({own.size} of {own.full_size}), and fit would scale it '
            f'again: write pyro.plate("{DATA_PLATE}", len(y)) and give fit the batch_size'
        )
    for axis in range(-len(fn.batch_shape), 0):
        size = fn.batch_shape[axis]
        if size > 1 and axis not in plates:
            fix = f'put it into `with pyro.plate("{DATA_PLATE}", len(x))`' if size == rows else "declare it with .to_event(1)"
            raise ValueError(f"{where} has an axis of size {size} (axis {axis}) outside every plate; {fix}")
    data_plate = next((f for f in plates.values() if f.name == DATA_PLATE), None)
    if data_plate is not None and 0 < rows != data_plate.size and data_plate.size != num_data:
        raise ValueError(
            f'plate "{DATA_PLATE}" of {where} has size {data_plate.size} but the batch has {rows} rows (N = {num_data}); '
            f'write pyro.plate("{DATA_PLATE}", len(x)): fit scales it to the whole data set'
        )
    _check_values(where, site)


def _shape_hint(expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    if len(expected) == len(got) + 1 and expected[-1] == 1:
        return "unsqueeze the value (x[:, None]) or squeeze the parameters (.squeeze(-1))"
    if len(got) == len(expected) + 1 and got[-1] == 1:
        return "squeeze the value: x.squeeze(-1)"
    if len(expected) > len(got):
        return "check the parameters' shapes and the plates around the site (is it inside one plate too many?)"
    if len(expected) < len(got):
        return "give each axis of the value to a plate or to the event: Normal(mu, sigma).to_event(1)"
    return "give the value exactly the site's shape"


def _check_values(where: str, site: dict[str, Any]) -> None:
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if site["is_observed"] and value.numel():
        check_support(where, fn, value, mask)
    part = fn
    while part is not None:  # masked values may lie outside the support, and an expanded distribution validates by itself
        part._validate_args, part = False, getattr(part, "base_dist", None)
    log_prob = scale_and_mask(fn.log_prob(value), mask=mask)
    finite = torch.isfinite(log_prob)
    if not bool(finite.all()):
        raise ValueError(
            f"{where} has a log-density of {float(log_prob[~finite].reshape(-1)[0])} at the start; "
            f"check the range of its parameters and their initial values"
        )


def check_support(where: str, fn: Any, value: Tensor, mask: Any = None, numbers: Tensor | None = None) -> None:
    """Raise ValueError, naming the first row, if values that are not masked lie outside a distribution's support.

    ``numbers`` are the numbers of the rows, where they are not 0, 1, ...
    """
    base = innermost(fn)
    try:
        support = base.support
        while isinstance(support, torch.distributions.constraints.independent):  # so that the number that is outside is named
            support = support.base_constraint
        inside = support.check(value)
    except NotImplementedError:
        return  # the distribution does not say what its support is, as pyro.contrib.zuko.ZukoToPyro
    for part in (mask, getattr(fn, "_mask", None)):
        if isinstance(part, (bool, Tensor)):
            seen = torch.as_tensor(part, device=inside.device)
            inside = inside | ~seen.reshape(seen.shape + (1,) * max(0, inside.dim() - seen.dim()))
    if bool(inside.all()):
        return
    first = tuple(int(i) for i in (~inside).nonzero()[0]) if inside.dim() else ()
    bad = value[first]
    got = f"{float(bad):g}" if bad.dim() == 0 else f"values {[round(float(v), 4) for v in bad.reshape(-1)[:4]]}"
    row = first[0] if first else 0
    where_in = ""
    if hasattr(support, "of_column"):  # columns of several kinds
        column = int((~inside[row]).flatten().nonzero()[0, 0])
        support, where_in = support.of_column(column), f", column {column}"
    at = f"{row if numbers is None else int(numbers[row])}{where_in}"
    raise ValueError(
        f"{where}: data row {at} holds {got}, outside the support {support} of "
        f"{type(base).__name__} ({int((~inside).sum())} such values); transform the data or choose another likelihood"
    )


def innermost(fn: Any) -> Any:
    """The distribution of one scalar (or of one indivisible event) under ``to_event``, ``expand`` and ``mask``."""
    expanded = pyro.distributions.torch_distribution.ExpandedDistribution
    wrappers = (torch.distributions.Independent, pyro.distributions.MaskedDistribution, expanded)
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn
