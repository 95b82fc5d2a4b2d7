"""Estimators of the bound's gradient: where they vanish, what they expect, and what they cost."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import PRECISION, X_KNOWN, W, gaussian_guide, gaussian_model, linear_gaussian, seeded
from torch import nn

import pgen
from pgen import ELBO
from pgen.objectives import Cyclical, Linear
from pgen.programs import isolated
from pgen.training.capture import capture

STL = ELBO(sticking_the_landing=True)
PARTITIONS = {"even": (4, 4, 4), "ragged": (5, 5, 2), "single": (1, 10, 1)}


def evaluate(objective, model, guide, batch, num_data, **scalars):
    with isolated():
        return objective(model, guide, batch, {"num_data": float(num_data), **scalars})


def gradient(objective, model, guide, batch, num_data, parameters):
    loss, _ = evaluate(objective, model, guide, batch, num_data)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


def leaf(value):
    return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()


# --- sticking the landing ------------------------------------------------------------------------------------------------


def one_gaussian():
    loc = leaf(X_KNOWN @ torch.linalg.solve(PRECISION, W.T).T)
    root = leaf(torch.linalg.cholesky(torch.linalg.inv(PRECISION / 0.25)))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    return gaussian_model, guide, X_KNOWN, [loc, root]


def chain():
    """p(z1) p(z2 | z1) p(x | z2) and its posterior as q(z2 | x) q(z1 | z2): the guide draws in the other order."""
    slope, x = 0.8, torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
    precision = torch.tensor([[1 + slope**2, -slope], [-slope, 2.0]], dtype=torch.float64)
    variance = torch.linalg.inv(precision)[1, 1]
    gain, sd, back, rest = (leaf(v) for v in (variance, variance.sqrt(), slope / (1 + slope**2), (1 + slope**2) ** -0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(slope * z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(gain * x, sd))
            pyro.sample("z1", dist.Normal(back * z2, rest))

    return model, guide, x, [gain, sd, back, rest]


def zuko_flow():
    """Prior and guide are the same flow, and nothing is observed."""
    import zuko

    flow = seeded(lambda: zuko.flows.MAF(3, transforms=2, hidden_features=(4,))).double()
    frozen = copy.deepcopy(flow).requires_grad_(False)

    def program(which):
        def run(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", _Wrapped(which(), len(x)))

        return run

    return program(frozen), program(flow), torch.zeros(2, 1, dtype=torch.float64), list(flow.parameters())


class _Wrapped(dist.TorchDistribution):
    has_rsample = True
    arg_constraints = {}

    def __init__(self, flow, rows):
        self.flow = flow
        super().__init__((rows,), flow.event_shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.flow.rsample((*sample_shape, *self.batch_shape))

    def log_prob(self, value):
        return self.flow.log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return self


def pyro_flow():
    """An inverse autoregressive flow of Pyro's, whose transform remembers its last image."""
    import pyro.distributions.transforms as T

    bend = seeded(lambda: T.affine_autoregressive(3, hidden_dims=[5]))  # its inverse knows float32 alone
    frozen = copy.deepcopy(bend).requires_grad_(False)

    def program(transform):
        def run(x):
            base = dist.Normal(x.new_zeros(3), 1.0).expand([len(x), 3]).to_event(1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.TransformedDistribution(base, [transform]))

        return run

    return program(frozen), program(bend), torch.zeros(2, 1), list(bend.parameters())


def two_in_one():
    """A parameter in plates, and a scale."""
    loc, spread = leaf([0.3, -0.2, 0.9]), leaf(0.4)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc.detach(), spread.exp().detach()))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc, spread.exp()))

    return model, guide, torch.zeros(3, dtype=torch.float64), [loc, spread]


AT_THE_POSTERIOR = [one_gaussian, chain, zuko_flow, pyro_flow, two_in_one]


@pytest.mark.parametrize("make", AT_THE_POSTERIOR, ids=lambda f: f.__name__)
@pytest.mark.parametrize("particles", [1, 3])
def test_the_gradient_has_no_variance_at_the_posterior(make, particles):
    model, guide, x, parameters = make()
    objective = ELBO(particles, sticking_the_landing=True)
    zero = 1e-12 if x.dtype == torch.float64 else 1e-5
    for _ in range(3):
        assert float(gradient(objective, model, guide, x, len(x), parameters).abs().max()) < zero
    assert float(gradient(ELBO(particles), model, guide, x, len(x), parameters).abs().max()) > 1e-3


@pytest.mark.parametrize("guide", ["mean_field", "full_rank", "flow"])
def test_automatic_guides_stick_the_landing(guide):
    def model(y):
        a = pyro.sample("a", dist.Normal(y.new_tensor(0.4), 1.5))
        b = pyro.sample("b", dist.LogNormal(y.new_tensor([0.1, 0.2, 0.3]), 0.7).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0 * (a + b.sum()), 1.0), obs=y)

    y = torch.zeros(4, dtype=torch.float64)
    pair = pgen.Pair(model, guide)
    pair.fit(y, steps=1, optimizer=1e-12, progress=False, compile="eager", precision="float64")
    with torch.no_grad():  # at the prior, which is the posterior; a flow's own parameters bend it away from there
        named = dict(pair.named_parameters())
        for name, value in named.items():
            if name.endswith("loc") or ".loc." in name:
                value.copy_(value.new_tensor([0.4, 0.1, 0.2, 0.3] if value.dim() and len(value) == 4 else
                                             0.4 if value.dim() == 0 else [0.1, 0.2, 0.3]))  # fmt: skip
            elif "log_scale" in name:
                value.copy_(value.new_tensor([1.5, 0.7, 0.7, 0.7] if value.dim() and len(value) == 4 else
                                             1.5 if value.dim() == 0 else [0.7, 0.7, 0.7]).log())  # fmt: skip
            elif "flow" in name:
                value.zero_()
    scalars = {"num_data": 4.0}
    for objective, still in ((ELBO(sticking_the_landing=True), True), (ELBO(), False)):
        loss, _ = pair.loss(objective, y, scalars)
        grads = torch.autograd.grad(loss, list(pair.parameters()), allow_unused=True)
        assert (max(float(g.abs().max()) for g in grads if g is not None) < 1e-11) == still


def mismatched():
    """A guide off the posterior, with a chain in the guide's order."""
    model, _, x, _ = chain()
    parameters = [leaf(v) for v in (0.5, 0.9, 0.3, 0.6)]

    def guide(x):
        gain, sd, back, rest = parameters
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(gain * x, sd))
            pyro.sample("z1", dist.Normal(back * z2, rest))

    return model, guide, x, parameters


@pytest.mark.parametrize(
    "objective",
    [ELBO(500, sticking_the_landing=True), ELBO(500, analytic_kl=True), ELBO(500, analytic_kl=True, sticking_the_landing=True)],
    ids=["sticking the landing", "closed form", "both"],
)
@pytest.mark.parametrize("make", [mismatched, one_gaussian], ids=lambda f: f.__name__)
def test_gradients_have_the_same_expectation(objective, make):
    model, guide, x, parameters = make()
    parameters[0].data += 0.2
    drawn = [torch.stack([gradient(o, model, guide, x, 3, parameters) for _ in range(40)]) for o in (ELBO(500), objective)]
    error = (drawn[0].var(0) / 40 + drawn[1].var(0) / 40).sqrt()
    assert bool(((drawn[0].mean(0) - drawn[1].mean(0)).abs() < 4.5 * error + 1e-12).all())
    assert bool((drawn[0].mean(0).abs() > 10 * error).any())


def test_the_value_of_the_bound_is_the_same():
    model, guide, x, _ = mismatched()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain, _ = evaluate(ELBO(4), model, guide, x, 3)
        torch.manual_seed(3)
        other, _ = evaluate(ELBO(4, sticking_the_landing=True), model, guide, x, 3)
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-13)


def test_parameters_of_programs_are_held_wherever_they_live():
    """In pyro.param with a constraint, in a PyroModule, in a module of pyro.module."""
    from pyro.nn import PyroModule, PyroParam

    class Encoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.sd = PyroParam(torch.tensor(0.5), dist.constraints.positive)

        def forward(self, x):
            pyro.sample("a", dist.Normal(torch.zeros(()), self.sd))

    encoder = Encoder()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, x.new_tensor(0.5)))
            pyro.sample("b", dist.Normal(0.0, x.new_tensor(0.25)))

    def guide(x):
        sd = pyro.param("sd", torch.tensor(0.25), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            encoder(x)
            pyro.sample("b", dist.Normal(torch.zeros(()), sd))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return guide(x)

    pair, x = pgen.Pair(model, Both()), torch.zeros(5)
    pair.fit(x, steps=1, optimizer=1e-12, progress=False, compile="eager", precision="float64")
    assert len(list(pair.parameters())) == 2
    loss, _ = pair.loss(STL, x.double(), {"num_data": 5.0})
    assert all(float(g.abs()) < 1e-7 for g in torch.autograd.grad(loss, list(pair.parameters())))  # started in float32
    loss, _ = pair.loss(ELBO(), x.double(), {"num_data": 5.0})
    assert all(float(g.abs()) > 1e-3 for g in torch.autograd.grad(loss, list(pair.parameters())))


def test_dropout_in_the_guide_is_refused():
    network = nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5)).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"random numbers outside its sample sites \(dropout\)"):
        evaluate(STL, gaussian_model, guide, X_KNOWN, 1)
    network.eval()
    evaluate(STL, gaussian_model, guide, X_KNOWN, 1)


def test_batch_statistics_are_taken_in_once():
    network = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    twin = copy.deepcopy(network[1])
    x = torch.randn(6, 5, dtype=torch.float64)
    evaluate(STL, gaussian_model, guide, x, 6)
    twin(network[0](x))
    assert int(network[1].num_batches_tracked) == 1
    torch.testing.assert_close(network[1].running_var, twin.running_var)


def _graph(objective):
    pair, x = seeded(linear_gaussian), torch.randn(7, 6)
    pair.fit(x, steps=1, progress=False, compile="eager")
    parameters = list(pair.parameters())

    def step(*inputs):
        with torch.enable_grad():
            loss, _ = pair.loss(objective, inputs[-1], {"num_data": 7.0})
            return [loss, *torch.autograd.grad(loss, parameters)]

    return capture(step, [*parameters, x], [*parameters, x + 1], torch.manual_seed)


@pytest.mark.parametrize("particles", [1, 3])
def test_the_second_run_of_the_guide_costs_nothing_in_a_graph(particles):
    def products(objective):
        return sum("mm" in str(node.target) for node in _graph(objective).graph.nodes)

    assert products(ELBO(particles, sticking_the_landing=True)) == products(ELBO(particles)) > 3


# --- closed forms --------------------------------------------------------------------------------------------------------


def test_a_closed_form_has_no_variance():
    loc, sd = leaf(0.3), leaf(0.6)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0 * (z.sum(-1) + mu), 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(loc, sd))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(4), 0.5).to_event(1))

    x = torch.ones(3, dtype=torch.float64)
    _, metrics = evaluate(ELBO(analytic_kl=True), model, guide, x, 3)
    kl = [torch.distributions.kl_divergence(dist.Normal(0.3, s), dist.Normal(0.0, p)) for s, p in ((0.6, 2.0), (0.5, 1.0))]
    assert float(metrics["kl"]) == pytest.approx(float(kl[0] / 3 + 4 * kl[1]), abs=1e-7)
    _, sampled = evaluate(ELBO(), model, guide, x, 3)
    assert abs(float(sampled["kl"] - metrics["kl"])) > 1e-3


def test_a_prior_given_what_is_drawn_later_is_not_put_in_closed_form():
    """With q(z2) q(z1 | z2) and p(z1) p(z2 | z1), z2 must keep its draw: its prior's parent is drawn after it."""
    model, guide, x, _ = mismatched()
    torch.manual_seed(0)
    losses = torch.stack([evaluate(ELBO(2000, analytic_kl=True), model, guide, x, 3)[0] for _ in range(20)]).detach()
    plain = torch.stack([evaluate(ELBO(2000), model, guide, x, 3)[0] for _ in range(20)]).detach()
    error = float((losses.var() / 20 + plain.var() / 20).sqrt())
    assert abs(float(losses.mean() - plain.mean())) < 4 * error < 0.02


def test_a_closed_form_honours_masks_and_scales():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(x.new_tensor(0.8), 1.0))

    _, metrics = evaluate(ELBO(analytic_kl=True), model, guide, torch.zeros(3, dtype=torch.float64), 3)
    assert float(metrics["kl"]) == pytest.approx(3 * 2 * 0.32 / 3)


# --- weights and floors --------------------------------------------------------------------------------------------------


def test_schedules_have_the_values_they_say():
    assert [Linear(0.2, 1.0, 4)(t, 100) for t in (0, 2, 4, 90)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert [Linear()(t, 10) for t in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert [Cyclical(cycles=2, ramp=0.5)(t, 40) for t in (0, 5, 10, 19, 20, 25)] == pytest.approx([0, 0.5, 1, 1, 0, 0.5])


@pytest.mark.parametrize(
    ("weight", "kind"), [(1.0, "lower_bound"), (4.0, "lower_bound"), (0.3, "estimate"), (Linear(), "estimate")]
)
def test_a_weight_below_one_is_no_bound(weight, kind):
    assert ELBO(kl_weight=weight).kind == kind


def test_the_weight_multiplies_the_divergence_alone():
    x = X_KNOWN.expand(4, 5)
    loss, metrics = evaluate(ELBO(kl_weight=0.25), gaussian_model, gaussian_guide, x, 4)
    assert float(loss) == pytest.approx(-float(metrics["log_likelihood"] - 0.25 * metrics["kl"]), abs=1e-12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with isolated():
            weighted, _ = ELBO(kl_weight=0.25).rows(gaussian_model, gaussian_guide, x)
        torch.manual_seed(1)
        with isolated():
            plain, _ = ELBO().rows(gaussian_model, gaussian_guide, x)
    assert torch.equal(weighted, plain)


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_a_fit_follows_the_schedule(tier):
    pair, x = seeded(linear_gaussian), torch.randn(7, 6)
    run = pair.fit(x, steps=5, objective=ELBO(kl_weight=Linear(0, 1, 4)), compile=tier, progress=False)
    h = run.history
    expected = -(h["log_likelihood"] - torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).numpy() * h["kl"])
    assert h["loss"] == pytest.approx(expected, rel=1e-5)


def two_latents(kl_a, kl_b):
    """KL divergences of ``kl_a`` and ``kl_b`` nats for two local latents, one of the two given the other's draw."""
    a, b = leaf(math.sqrt(2 * kl_a)), leaf(math.sqrt(2 * kl_b))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("b", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("a", dist.Normal(a, 1.0))
            pyro.sample("b", dist.Normal(z + b, 1.0))

    return model, guide, torch.zeros(3, dtype=torch.float64), [a, b]


def test_free_bits_are_a_floor_for_each_latent():
    model, guide, x, parameters = two_latents(0.5, 2.0)
    objective = ELBO(analytic_kl=True, free_bits=1.5)
    loss, metrics = evaluate(objective, model, guide, x, 3)
    assert float(loss.detach() + metrics["log_likelihood"]) == pytest.approx(1.5 + 2.0, abs=1e-12)
    assert float(metrics["kl"]) == pytest.approx(2.5, abs=1e-12)
    grads = torch.autograd.grad(loss, parameters)
    assert float(grads[0]) == 0.0 and float(grads[1]) == pytest.approx(2.0, abs=1e-12)
    assert objective.kind == "lower_bound"


def test_free_bits_need_latents_drawn_by_themselves():
    pair = pgen.Pair(lambda y: pyro.sample("s", dist.HalfNormal(1.0)))
    with pytest.raises(ValueError, match="`free_bits` needs a guide that draws each latent itself, and 's_unconstrained'"):
        pair.fit(torch.zeros(3), steps=1, objective=ELBO(free_bits=1.0), progress=False)


@pytest.mark.parametrize("lengths", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize(
    "objective", [ELBO(analytic_kl=True), ELBO(kl_weight=0.3, analytic_kl=True), STL], ids=["closed", "weighted", "landing"]
)
def test_mean_over_a_partition_is_the_full_one(lengths, objective):
    loc, noise = leaf([0.3, -0.2]), torch.randn(12, 2, dtype=torch.float64)
    x = torch.randn(12, 5, dtype=torch.float64)

    def model(x, noise):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.5), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(noise @ W.T + mu.detach() * 0 + 0 * z.sum(), 0.5).to_event(1), obs=x)

    def guide(x, noise):
        pyro.sample("mu", dist.Normal(loc[0], 0.7) if objective.analytic_kl else dist.Delta(loc[0]))
        with pyro.plate("data", len(x)):
            scale = torch.ones(2) * 0.4
            q = dist.Normal(x[:, :2] * loc[1], scale).to_event(1)
            pyro.sample("z", q if objective.analytic_kl else dist.Delta(x[:, :2] * loc[1], event_dim=1))

    def both(part):
        loss, _ = evaluate(objective, model, guide, part, 12)
        return torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in torch.autograd.grad(loss, [loc]))])

    parts = sum(n / 12 * both(p) for n, p in zip(lengths, zip(x.split(lengths), noise.split(lengths))))
    torch.testing.assert_close(parts, both((x, noise)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1}, "`kl_weight` should be a number of at least 0, got -1"),
        ({"free_bits": float("nan")}, "`free_bits` should be a number of at least 0, got nan"),
        ({"baseline": 3}, "`baseline` should be DecayingAverage"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ELBO(**options)


def test_schedules_are_checked():
    with pytest.raises(ValueError, match="`end` should be a number of at least 0"):
        Linear(0, -1)
    with pytest.raises(ValueError, match="`ramp` is the share"):
        Cyclical(ramp=0)


# --- tiers ---------------------------------------------------------------------------------------------------------------


def _fit(objective, tier, guide=None):
    if guide is None:
        pair, x = seeded(linear_gaussian), torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    else:
        pair = pgen.Pair(_positive, guide)
        x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    run = pair.fit(x, objective=objective, steps=3, batch_size=5, compile=tier, unroll=1, progress=False)
    assert run.tier == tier
    return torch.cat([p.detach().reshape(-1) for p in pair.parameters()])


def _positive(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, b.sum()), obs=y)


ALL = ELBO(2, sticking_the_landing=True, analytic_kl=True, kl_weight=Linear(0, 1, 2), free_bits=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize(
    ("objective", "guide"),
    [(STL, None), (ELBO(analytic_kl=True), None), (ELBO(free_bits=0.5), None), (ALL, None)]
    + [(ELBO(2, sticking_the_landing=True), guide) for guide in ("mean_field", "low_rank", "full_rank", "flow")],
    ids=["landing", "closed", "floor", "all", "mean_field", "low_rank", "full_rank", "flow"],
)
def test_the_tiers_agree(objective, guide):
    eager = _fit(objective, "eager", guide)
    assert torch.equal(eager, _fit(objective, "graph", guide))
    if objective is ALL:
        torch.testing.assert_close(_fit(objective, "compiled"), eager, rtol=1e-4, atol=1e-5)
