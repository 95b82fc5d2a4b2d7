"""Diffusion: the bound and the solvers against closed forms for Gaussian data."""

import math
import re

import pytest
import torch
from cases import CASES, CLASSES, CONTEXT, diffusion, noisy, seeded, state
from torch import nn

import pgen
from pgen.distributions.noising import SCHEDULES, Denoising, NoiseSchedule, Noising, alpha_sigma
from pgen.models import Diffusion, FlowMatching
from pgen.samplers.diffusion import FLOWS, SOLVERS

COVARIANCE = torch.tensor([[2.0, 0.8, 0.1], [0.8, 1.0, -0.3], [0.1, -0.3, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
LOW, HIGH = -9.0, 11.0


class Best(nn.Module):
    """The velocity that the best estimate of Gaussian data makes, at the levels between LOW and HIGH."""

    def __init__(self, covariance):
        super().__init__()
        self.covariance = nn.Parameter(covariance)

    def forward(self, z, level, context=None):
        alpha, sigma = (part[:, None, None] for part in alpha_sigma(HIGH - (HIGH - LOW) * level))
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance)).to(z)
        x = alpha[..., 0] * (self.covariance @ torch.linalg.solve(noisy, z.unsqueeze(-1))).squeeze(-1)
        return (alpha[..., 0] * z - x) / sigma[..., 0]


def gaussian(covariance=COVARIANCE, mean=MEAN, **options):
    """A diffusion model of Gaussian data that knows the best estimate."""
    model = Diffusion((len(mean),), Best(covariance), log_snr=(LOW, HIGH), **options).double()
    model.shift.copy_(mean)
    return model


def data(n=400):
    lower = torch.linalg.cholesky(COVARIANCE)
    return seeded(lambda: MEAN + torch.randn(n, 3, dtype=torch.float64) @ lower.T)


def truth(x):
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x)


def exact_bound(num_steps, x):
    """The bound of a chain of T steps for Gaussian data, one number at a time in the eigenbasis, in closed form."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    y = (x - MEAN) @ vectors
    levels = HIGH - (HIGH - LOW) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha, sigma = alpha_sigma(levels[1:, None, None])
    gain = alpha * values / (alpha**2 * values + sigma**2)  # (T, 1, D): the estimate is gain times z
    error = ((1 - gain * alpha) * y).square() + (gain * sigma).square()
    weight = 0.5 * (levels[:-1].exp() - levels[1:].exp())
    low, high = torch.sigmoid(levels[-1]), torch.sigmoid(levels[0])
    prior = 0.5 * (low * y.square() - low - (1 - low).log()).sum(1)
    spread = (1 - high) / high
    end = -0.5 * (1 + math.log(2 * math.pi) + spread.log()) * 3
    return end - prior - (weight[:, None, None] * error).sum((0, 2))


@pytest.mark.parametrize("num_steps", [3, 50])
def test_the_bound_of_a_chain_of_steps_is_that_of_the_closed_form(num_steps):
    model, x = gaussian(num_steps=num_steps), data(7)
    score = model.log_prob(x, num_samples=4000)
    assert score.kind == "lower_bound" and score.num_samples == 4000
    surprise = (score.value - exact_bound(num_steps, x)) / score.mc_error
    assert float(surprise.abs().max()) < 4.5  # fails once in 20 000 by chance
    assert num_steps == 3 or bool((score.mc_error < 0.4).all())


def test_the_best_estimate_of_normal_data_leaves_no_noise_in_the_bound():
    x, schedule = data(6), NoiseSchedule("linear_log_snr", (LOW, HIGH)).double()

    def best(z, log_snr):
        return alpha_sigma(log_snr)[0][:, None] * z

    chain = Denoising(best, schedule, x, lambda n: x, rows=6, event_shape=(3,))
    value = Noising(x, schedule.ends[1]).sample()
    other = torch.cat([value[:, :3], value[:, 3:6].flip(0) + 1, value[:, 6:]], 1)  # other noise at the same times
    torch.testing.assert_close(chain.log_prob(value), chain.log_prob(other), rtol=1e-6, atol=1e-6)


def test_more_steps_tighten_the_bound_to_the_truth():
    x = data(50)
    means = [float(exact_bound(num_steps, x).mean()) for num_steps in (5, 20, 100)]
    assert means == sorted(means)
    score = gaussian().log_prob(x, num_samples=2000)
    error = float(score.mc_error.square().mean().sqrt()) / math.sqrt(50)
    assert means[-1] < score.mean + 4 * error
    assert abs(score.mean - float(truth(x).mean())) < 4 * error + 0.002  # what the ends of the chain cost


def test_fitting_reaches_the_density_of_gaussian_data():
    x = data(4000)
    model = Diffusion((3,), width=32, blocks=1)
    run = model.fit(x.float(), steps=500, batch_size=200, compile="eager", progress=False)
    assert run.steps == 500
    score = model.log_prob(x[:500].float(), num_samples=64)
    assert abs(score.mean - float(truth(x[:500]).mean())) < 0.15
    drawn = model.sample(4000, seed=1).double()
    torch.testing.assert_close(torch.cov(drawn.T), COVARIANCE, atol=0.25, rtol=0)
    torch.testing.assert_close(drawn.mean(0), MEAN, atol=0.12, rtol=0)


# --- schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_run_between_their_ends(kind):
    schedule = NoiseSchedule(kind, (-7.0, 9.0)).double()
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    log_snr, rate = schedule(t)
    (slope,) = torch.autograd.grad(log_snr.sum(), t, retain_graph=True)
    log_snr, rate = log_snr.detach(), rate.detach()
    assert float(log_snr[0]) == pytest.approx(9.0, abs=1e-6) and float(log_snr[-1]) == pytest.approx(-7.0, abs=1e-6)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(-slope, rate)


def test_a_learned_schedule_evens_out_the_loss():
    x = data(500)

    def spread(model):
        return float(model.log_prob(x[:100], num_samples=200).mc_error.mean())

    plain = Diffusion((3,), Best(COVARIANCE), log_snr=(LOW, HIGH), prediction="velocity", schedule="learned").double()
    plain.shift.copy_(MEAN)
    plain.network.covariance.requires_grad_(False)
    plain.schedule.ends.requires_grad_(False)
    plain.primed = True
    with torch.no_grad():  # a schedule that spends most of its time where nothing happens
        plain.schedule.height[:8] = 3.0
    before, bound = spread(plain), plain.log_prob(x, num_samples=400).mean
    plain.fit(x, steps=300, optimizer=0.02, precision="float64", compile="eager", progress=False)
    assert spread(plain) < 0.8 * before
    assert plain.log_prob(x, num_samples=400).mean == pytest.approx(bound, abs=0.1)  # the bound itself knows only the ends


@pytest.mark.parametrize("real", [True, False])
def test_a_learned_schedule_follows_the_gradient_of_the_squared_estimate(real):
    x, schedule = data(6), NoiseSchedule("learned", (LOW, HIGH)).double()
    chain = Denoising(lambda z, log_snr: 0.3 * z, schedule, x, lambda n: x, rows=6, event_shape=(3,), real=real)
    value = Noising(x, schedule.ends[1].detach()).sample()
    found = torch.autograd.grad(-chain.log_prob(value).sum(), schedule.slope)[0]
    log_snr, weight = chain._weighted(value[:, -1], None)
    loss = 0.5 * weight * chain._error(value, log_snr)
    estimate = loss - 0.5 * weight * chain._luck(value, log_snr) if real else loss
    wanted = torch.autograd.grad(estimate.square().sum() / loss.mean().detach(), schedule.slope)[0]
    torch.testing.assert_close(found, wanted)


# --- the probability-flow equation ---------------------------------------------------------------------------------------


def test_the_density_by_the_equation_is_that_of_the_gaussian():
    model, x = gaussian(), data(20)
    score = model.log_prob(x, method="ode")
    assert score.kind == "exact" and score.mc_error is None
    torch.testing.assert_close(score.value, truth(x), atol=2e-3, rtol=0)  # the ends of the chain cost as much
    noisy = model.log_prob(x, method="ode", divergence="hutchinson", num_samples=6, steps=50)
    assert noisy.kind == "estimate" and noisy.num_samples == 6
    assert float(((noisy.value - score.value) / noisy.mc_error).abs().max()) < 30  # of six draws


def test_the_density_by_the_equation_of_levels_is_a_bound_of_their_mass():
    model = Diffusion((2,), width=16, blocks=1, likelihood="categorical", num_classes=3)
    x = seeded(lambda: torch.randint(0, 3, (60, 2))).float()
    model.fit(x, steps=80, optimizer=0.02, compile="eager", progress=False)
    states = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    score = model.log_prob(states, method="ode", num_samples=8, steps=30)
    assert score.kind == "lower_bound" and score.measure == "mass"
    total = float(score.value.exp().sum())
    assert 0.85 < total < 1 + 3 * float(score.mc_error.max())


def start(n=50):
    return seeded(lambda: torch.randn(n, 3, dtype=torch.float64))


def errors(solve, steps):
    """Errors of a solver against the exact map of Gaussian noise to Gaussian data, at two numbers of steps."""
    model, z = gaussian(), start()
    low, high = alpha_sigma(torch.tensor([LOW, HIGH], dtype=torch.float64))
    values, vectors = torch.linalg.eigh(COVARIANCE)
    spread = [(low[i] ** 2 * values + high[i] ** 2).sqrt() for i in (0, 1)]  # at the two ends
    exact = (z @ vectors * spread[1] / spread[0]) @ vectors.T
    times = [torch.linspace(LOW, HIGH, n + 1, dtype=torch.float64) for n in steps]
    with torch.no_grad():
        return [float((solve(lambda z, t: model.denoise(z, t.expand(len(z))), z, t) - exact).norm()) for t in times]


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm", 2)])
def test_solvers_have_their_order(name, order):
    first, second = errors(SOLVERS[name], (80, 160))
    assert math.log2(first / second) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_rules_for_velocities_have_their_order(name, order):
    def solve(denoise, z, times):
        return FLOWS[name](lambda z, t: alpha_sigma(t)[0] / 2 * (denoise(z, t) - alpha_sigma(t)[0] * z), z, times)

    first, second = errors(solve, (10, 20) if name == "rk4" else (40, 80))
    assert math.log2(first / second) == pytest.approx(order, abs=0.35)


def test_ancestral_samples_have_the_moments_of_the_data():
    drawn = gaussian().sample(4000, solver="ancestral", steps=400, seed=3)
    torch.testing.assert_close(torch.cov(drawn.T), COVARIANCE, atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.mean(0), MEAN, atol=0.1, rtol=0)


def test_infilling_draws_from_the_conditional():
    x = MEAN.expand(1500, 3).clone()
    x[:, 0] = 4.0
    x[:, 2] = math.nan
    drawn = gaussian().infill(x, steps=60, repeats=4)
    assert torch.equal(drawn[:, :2], x[:, :2])
    gain = torch.linalg.solve(COVARIANCE[:2, :2], COVARIANCE[:2, 2])
    loc = MEAN[2] + gain @ (x[0, :2] - MEAN[:2])
    spread = (COVARIANCE[2, 2] - gain @ COVARIANCE[:2, 2]).sqrt()
    assert float(drawn[:, 2].mean()) == pytest.approx(float(loc), abs=0.08)
    assert float(drawn[:, 2].std()) == pytest.approx(float(spread), abs=0.08)
    once, often = (abs(float(gaussian().infill(x, steps=60, repeats=r)[:, 2].mean() - loc)) for r in (1, 12))
    assert often < 0.05 < 0.08 < once  # what repeats are for


def test_guidance_of_one_is_the_model_itself():
    case = CASES["diffusion_steps_context"]
    model = case.model()
    case.fit(model, steps=30, optimizer=0.02)
    plain, one, two = (model.sample(4, case.context[:1], steps=4, **given) for given in ({}, {"guidance": 1}, {"guidance": 2}))
    assert torch.equal(plain, one) and not torch.equal(plain, two)
    free = model.sample(4, case.context[:1], steps=4, guidance=0)
    assert torch.equal(free, model.sample(4, case.context[1:2], steps=4, guidance=0))  # the context counts for nothing


# --- other objectives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["noise", "velocity", "data"])
def test_the_simple_loss_is_the_error_of_what_the_network_gives(prediction):
    x, seen = data(6), {}

    def network(z, level):
        seen.update(z=z, level=level)
        return 0.3 * z

    module = nn.Module()
    module.weight, module.forward = nn.Parameter(torch.zeros(1)), network
    model = Diffusion((3,), module, log_snr=(LOW, HIGH), prediction=prediction).double()
    with pgen.programs.keyed_rng(5):
        value, _ = model.loss(pgen.objectives.Simple(), {"x": x}, {"num_data": 6.0})
    alpha, sigma = alpha_sigma(HIGH - (HIGH - LOW) * seen["level"][:, None])
    noise = (seen["z"] - alpha * x) / sigma
    target = {"noise": noise, "velocity": alpha * noise - sigma * x, "data": x}[prediction]
    torch.testing.assert_close(value, 0.5 * (0.3 * seen["z"] - target).square().sum(1).mean())


def test_simple_asks_for_a_regression():
    with pytest.raises(ValueError, match="needs a model with a site that is a regression: Diffusion or FlowMatching"):
        CASES["vae_gaussian"].fit(CASES["vae_gaussian"].model(), objective=pgen.objectives.Simple())
    with pytest.raises(ValueError, match="a learned schedule is trained by the bound"):
        CASES["diffusion_learned"].fit(CASES["diffusion_learned"].model(), objective=pgen.objectives.Simple())


def test_replicates_are_draws_and_not_the_data_again():
    model, x = gaussian(), MEAN.expand(7, 3)
    found = model.predict(x, 400, seed=2, progress=False)["x"]
    assert found.shape == (400, 7, 3) and len(found.flatten(0, 1).unique(dim=0)) <= 2000
    torch.testing.assert_close(found.flatten(0, 1).T.cov(), COVARIANCE, atol=0.25, rtol=0)
    torch.testing.assert_close(found.mean((0, 1)), MEAN, atol=0.12, rtol=0)


class BestVelocity(nn.Module):
    """The velocity of flow matching for standardised Gaussian data."""

    def __init__(self, covariance):
        super().__init__()
        self.covariance = nn.Parameter(covariance)

    def forward(self, z, t, context=None):
        t = t[:, None, None]
        noisy = (1 - t) ** 2 * self.covariance + t**2 * torch.eye(len(self.covariance)).to(z)
        change = t * torch.eye(len(self.covariance)).to(z) - (1 - t) * self.covariance
        return (change @ torch.linalg.solve(noisy, z.unsqueeze(-1))).squeeze(-1)


def test_the_density_of_flow_matching_is_that_of_the_gaussian():
    x = data(20)
    model = FlowMatching((3,), BestVelocity(COVARIANCE)).double()
    model.shift.copy_(MEAN)
    score = model.log_prob(x, steps=60)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, truth(x), atol=1e-4, rtol=0)
    drawn = model.sample(4000, solver="rk4", seed=1)
    torch.testing.assert_close(torch.cov(drawn.T), COVARIANCE, atol=0.2, rtol=0)


def test_the_density_by_the_equation_is_in_the_units_of_the_data():
    x = data(20)
    flow = FlowMatching((3,), BestVelocity(COVARIANCE), preprocess=pgen.data.Standardize()).double()
    flow.shift.copy_(MEAN)
    for model in (gaussian(preprocess=pgen.data.Standardize()), flow):
        model.preprocess.fit(5 + 3 * x)
        y, log_det = model.preprocess.forward_with_log_det(x)
        score = model.log_prob(x, method="ode", steps=60)
        torch.testing.assert_close(score.value, truth(y) + log_det, atol=3e-3, rtol=0)


# --- U-Nets --------------------------------------------------------------------------------------------------------------


UNET = noisy(
    diffusion(
        (3, 2, 4), network="unet", likelihood="categorical", num_classes=CLASSES, schedule="learned", context_dim=CONTEXT,
        dropout=0.1,
    ),
    seeded(lambda: torch.randint(0, CLASSES, (11, 3, 2, 4))),
    seeded(lambda: torch.randn(11, CONTEXT)),
)  # fmt: skip


def test_a_unet_of_levels_in_channels_is_trained_guided_and_loaded(tmp_path):
    model = UNET.model()
    UNET.fit(model, steps=4)
    assert all(bool(g.abs().max() > 0) for g in next(model.gradients({"x": UNET.x, "context": UNET.context})).values())
    again = UNET.reload(model, tmp_path / "model.pgen")
    found = [
        (m.log_prob(UNET.x, UNET.context, num_samples=3).value, m.sample(6, UNET.context[:6], steps=3, guidance=2))
        for m in (model, again)
    ]
    assert found[0][0].shape == (11,) and found[0][1].shape == (6, 3, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert not torch.equal(found[0][0], model.log_prob(UNET.x, UNET.context.flip(0), num_samples=3).value)


def test_a_unet_of_levels_in_channels_gives_their_mean_by_bayes_rule():
    levels, shape = 5, (3, 2, 4)
    model = Diffusion(shape, "unet", width=8, likelihood="categorical", num_classes=levels, log_snr=(LOW, HIGH)).double()
    logits = seeded(lambda: torch.randn(levels, 3, dtype=torch.float64))
    with torch.no_grad():  # weights of the last layer are zero: the logits depend on level and channel alone
        model.network.last.bias.copy_(logits.flatten())
    model.shift.copy_(torch.arange(24.0) / 7)
    model.scale.fill_(1.7)
    z, log_snr = seeded(lambda: (torch.randn(6, *shape, dtype=torch.float64), torch.linspace(-3.0, 3.0, 6).double()))
    found = model.denoise(z, log_snr)
    for b, c, i, j in ((0, 0, 0, 0), (2, 1, 1, 3), (5, 2, 0, 2)):
        alpha, sigma = alpha_sigma(log_snr[b])
        points = (torch.arange(levels) - model.shift.reshape(shape)[c, i, j]) / 1.7
        weight = logits[:, c].exp() * torch.distributions.Normal(alpha * points, sigma).log_prob(z[b, c, i, j]).exp()
        torch.testing.assert_close(found[b, c, i, j], (weight * points).sum() / weight.sum())


def test_a_unet_of_bits_learns_what_a_context_says_and_guidance_presses_on():
    share = torch.tensor([0.2, 0.8])  # of ones, in either class
    classes = torch.arange(400) % 2
    x = seeded(lambda: torch.bernoulli(share[classes][:, None, None].expand(-1, 2, 4)))
    context = torch.eye(2)[classes]
    options = {"network": "unet", "width": 8, "likelihood": "bernoulli", "schedule": "learned", "context_dim": 2}
    model = Diffusion((2, 4), **options)
    model.fit(x, context=context, steps=120, batch_size=50, optimizer=0.01, compile="eager", progress=False)
    score = model.log_prob(x[:200], context[:200], num_samples=8)
    truth = -8 * float(torch.distributions.Bernoulli(share[0]).entropy())
    assert truth - 0.4 < score.mean < truth + 0.2  # in nats a datum; the data's own shares give .1 at most
    told = {"solver": "ddim", "steps": 10, "progress": False}
    ones = [float(model.sample(250, context[1:2], guidance=w, **told).mean()) for w in (0.0, 1.0, 3.0)]
    assert abs(ones[0] - 0.5) < 0.2 and abs(ones[1] - 0.8) < 0.06 and ones[2] > ones[1] + 0.07


# --- the contract of a site whose density is estimated -------------------------------------------------------------------


def test_bounds_that_take_exponentials_are_refused():
    case = CASES["diffusion"]
    model = case.model()
    with pytest.raises(ValueError, match=r"site 'z' estimates its log-density, and IWAE takes the exponential of it: use ELBO"):
        case.fit(model, objective=pgen.IWAE(3))
    with pytest.raises(pgen.NotAvailable, match="nothing to anneal"):
        case.log_prob(model, method="ais")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
def test_tiers_agree():
    case, states = CASES["diffusion_learned"], []
    for tier in ("eager", "graph", "compiled"):
        model = case.model()
        run = case.fit(model, steps=3, compile=tier, unroll=1, batch_size=len(case.x))
        assert run.tier == tier, run.tier_reason
        states.append(state(model))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_learned", {}),
        ("diffusion_learned", {"ema": 0.9}),  # of a model with dropout
        ("unet", {"ema": 0.9}),
        ("flow_matching_context", {}),
        ("flow_matching", {"ema": 0.9}),
    ],
)
def test_a_fit_goes_on_bit_by_bit(name, options, tmp_path):
    case = UNET if name == "unet" else CASES[name]
    whole, parts = case.model(), case.model()
    case.fit(whole, steps=8, schedule="constant", **options)
    case.fit(parts, steps=4, schedule="constant", checkpoint=tmp_path, **options)
    assert not torch.equal(state(whole), state(parts))
    parts = case.model()
    case.fit(parts, steps=8, schedule="constant", checkpoint=tmp_path, **options)
    assert torch.equal(state(whole), state(parts))


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "classes"}, "goes with likelihood='categorical' or 'bernoulli', got 'gaussian'"),
        ({"likelihood": "categorical"}, "`num_classes` goes with likelihood='categorical', and is needed there; got None"),
        ({"log_snr": (5.0, -5.0)}, r"`log_snr` should be the lower end and the higher, such as .*, got \(5.0, -5.0\)"),
        ({"log_snr": (5.0,)}, r"`log_snr` should be the lower end and the higher, .*, got \(5.0,\)"),
        ({"blocks": 10**6}, "`blocks` should be at most 1000, got 1000000"),
        ({"schedule": "cosin"}, "`schedule`"),
        ({"context_dropout": 1.0}, r"`context_dropout` is a share in \[0, 1\), got 1.0"),
        ({"network": "unet", "blocks": 3}, "`blocks` 3 does not go with the network 'unet': it is of 'mlp', leave it out"),
        ({"network": "unet", "octaves": 2}, "`octaves` 2 does not go with the network 'unet': it is of 'mlp', leave it out"),
        ({"network": nn.Linear(3, 3), "width": 8}, "`width` 8 does not go with the network Linear, a module of your own"),
        (
            {"network": nn.Linear(3, 3), "dropout": 0.1},
            "`dropout` 0.1 does not .* a module of your own: it is of 'mlp' or 'unet'",
        ),
        ({"network": nn.Linear(3, 3), "blocks": 1}, "`blocks` 1 does not go with .* a module of your own: it is of 'mlp'"),
        ({"network": "unet"}, r"`event_shape` of a U-Net should be \(H, W\) or \(C, H, W\), got \(3,\)"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion((3,), **options)
    if not options.keys() & {"prediction", "likelihood", "log_snr", "schedule"}:
        with pytest.raises(ValueError, match=message):
            FlowMatching((3,), **options)


def test_questions_are_checked():
    model = Diffusion((3,), width=8, blocks=1)
    with pytest.raises(ValueError, match="`solver`"):
        model.sample(2, solver="euler")
    with pytest.raises(ValueError, match="`guidance` 2 needs a model with context_dim and context_dropout above 0"):
        model.sample(2, guidance=2)
    with pytest.raises(ValueError, match="`context`"):
        Diffusion((3,), width=8, blocks=1, context_dim=CONTEXT).sample(2)
    with pytest.raises(TypeError, match="unknown option 'num_temps' of method='ode'"):
        model.log_prob(torch.zeros(2, 3), method="ode", num_temps=3)


class Own(nn.Module):
    """A network that sees the levels beside z, and gives ``size`` numbers."""

    def __init__(self, size=3):
        super().__init__()
        self.linear = nn.Linear(4, size)

    def forward(self, z, level):
        return self.linear(torch.cat([z, level[:, None]], -1))


BRIEF = {"steps": 2, "batch_size": 5, "compile": "eager", "progress": False}


def test_data_that_do_not_suit_a_network_of_ones_own_are_named():
    model = Diffusion((3,), Own(), likelihood="categorical", num_classes=4, prediction="velocity")
    with pytest.raises(ValueError, match=r"outside the support.*: the largest value is 6, for which num_classes=7 would do"):
        model.fit(torch.arange(33.0).reshape(11, 3) % 7, **BRIEF)
    with pytest.raises(ValueError, match=r"site 'x' .*has a log-density of .* rescale x"):
        Diffusion((3,), Own()).fit(data(11).float() * 1e30, **BRIEF)


@pytest.mark.parametrize("family", [Diffusion, FlowMatching])
def test_a_network_of_ones_own_is_resumed_but_not_saved(family, tmp_path):
    x, whole = data(11).float(), seeded(lambda: family((3,), Own()))
    whole.fit(x, schedule="constant", **{**BRIEF, "steps": 4})
    for steps in (2, 4):
        parts = seeded(lambda: family((3,), Own()))
        parts.fit(x, schedule="constant", checkpoint=tmp_path / "kept", **{**BRIEF, "steps": steps})
    assert torch.equal(state(whole), state(parts))
    for kept in (parts, pgen.models.GenerativeClassifier([parts, whole])):
        with pytest.raises(ValueError, match=f"a {family.__name__} with a network of your own cannot be saved whole"):
            kept.save(tmp_path / "model.pgen")


@pytest.mark.parametrize(
    ("family", "options", "size", "wanted"),
    [
        (Diffusion, {}, 1, (5, 3)),  # which would be spread over all of z
        (Diffusion, {"prediction": "noise"}, 6, (5, 3)),
        (Diffusion, {"likelihood": "categorical", "num_classes": 4}, 3, (5, 3, 4)),
        (FlowMatching, {}, 1, (5, 3)),
    ],
)
def test_what_a_network_of_ones_own_gives_has_the_shape_of_z(family, options, size, wanted):
    model, x = family((3,), Own(size), **options), torch.arange(33.0).reshape(11, 3) % 4
    message = re.escape(f"`network` should give shape {wanted} for z of shape (5, 3), got (5, {size})")
    with pytest.raises(ValueError, match=message):
        model.fit(x, **BRIEF)
