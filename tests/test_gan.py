"""Generative adversarial networks: losses against closed forms, the game in every tier, and what it says goes on."""

import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from test_engine import INDUCTOR
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.data import Dequantize, Standardize
from pgen.models import GAN
from pgen.nn.adversaries import ARCHITECTURES, Critic, SpectralNorm, spectral_norm
from pgen.objectives import Adversarial, Linear
from pgen.objectives.adversarial import LOSSES, _moments, _spread_given, gradient_penalty
from pgen.training import SGD, Adam
from pgen.training.callbacks import Callback

D = torch.float64
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=D)
IMAGES = torch.rand(12, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Shift(nn.Module):
    """x = z + b."""

    def __init__(self, size=3, at=0.0):
        super().__init__()
        self.b = nn.Parameter(torch.full((size,), at))

    def forward(self, z):
        return z + self.b


def linear_critic(weight, bias=0.0):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
        layer.bias.fill_(bias)
    return layer


def game(generator=None, critic=None, size=3, **options):
    """A GAN of modules of our own, in double precision."""
    hidden = (7,) if critic is None else None
    return GAN((size,), size, generator=generator or Shift(size), critic=critic, hidden=hidden, **options).double()


def play(model, objective, player, x=X, seed=0, **scalars):
    """One player's loss and metrics."""
    from pgen.programs import keyed_rng

    with keyed_rng(seed):
        return model.loss(objective.players[player], {"x": x}, {"num_data": float(len(x)), **scalars})


def value(loss):
    """A loss as a number."""
    return float(loss.detach())


@pytest.mark.parametrize("context_dim", [0, 2])
def test_draws_in_plain_torch_are_those_of_the_program(context_dim):
    from pgen.programs import keyed_rng

    model = GAN((3,), 5, hidden=(7,), context_dim=context_dim).double()
    given = {"context": torch.randn(40, context_dim, dtype=D)} if context_dim else {}
    with keyed_rng(3), pyro.poutine.trace() as trace:
        program = model.model(X, **given)
    with keyed_rng(3):
        plain = model.made(X, **given)
    assert torch.equal(plain, program) and torch.equal(trace.trace.nodes["x"]["value"], plain)


def test_a_network_with_a_pyro_parameter_is_refused_and_leaves_no_trace():
    class Scaled(Shift):
        def forward(self, z):
            return super().forward(z) * pyro.param("width", torch.tensor(2.0, dtype=D), constraint=constraints.positive)

    model = game(Scaled(), linear_critic([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="that no player trains"):
        model.fit(X, steps=2, batch_size=10, compile="eager", progress=False)
    assert "width" not in dict(pyro.get_param_store().items())


# --- losses --------------------------------------------------------------------------------------------------------------


def test_a_critic_that_knows_nothing_pays_twice_log_two():
    model = game(critic=linear_critic([0.0, 0.0, 0.0]))
    for name, critic, generator in [
        ("minimax", 2 * math.log(2), -math.log(2)),
        ("non_saturating", 2 * math.log(2), math.log(2)),
        ("least_squares", 0.5, 0.5),
        ("hinge", 2.0, 0.0),
    ]:
        loss, _ = play(model, Adversarial(name), "critic")
        assert value(loss) == pytest.approx(critic, abs=1e-12)
        assert value(play(model, Adversarial(name), "generator")[0]) == pytest.approx(generator, abs=1e-12)
    assert float(play(model, Adversarial("hinge"), "critic")[1]["accuracy_real"]) == 0.5
    wasserstein = Adversarial("wasserstein", gradient_penalty=0.0)
    assert value(play(model, wasserstein, "critic")[0]) == 0.0


def test_the_best_critic_of_two_gaussians_is_their_log_ratio_and_its_loss_their_divergence():
    """N(1, 1) against N(0, 1): T(x) = x - 1/2, and the loss is 2 log 2 - 2 JS, here by quadrature."""
    x = torch.linspace(-9, 10, 40_001, dtype=D)
    p, q = (torch.exp(-0.5 * (x - m).square()) / math.sqrt(2 * math.pi) for m in (1.0, 0.0))
    js = 0.5 * torch.trapezoid(torch.xlogy(p, 2 * p / (p + q)) + torch.xlogy(q, 2 * q / (p + q)), x)
    critic = LOSSES["non_saturating"].critic
    best = torch.trapezoid(p * critic(x - 0.5, x * 0 - 60.0) + q * critic(x * 0 + 60.0, x - 0.5), x)
    assert float(best) == pytest.approx(2 * math.log(2) - 2 * float(js), abs=1e-9)
    data = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2)) + 1
    model = game(Shift(1).requires_grad_(False), nn.Linear(1, 1), size=1)
    model.generator.requires_grad_(True)
    run = model.fit(
        data, objective=Adversarial(), optimizer={"critic": Adam(0.03), "generator": SGD(1e-12)}, steps=400, batch_size=1000,
        schedule="linear", progress=False, compile="eager",
    )  # fmt: skip
    assert float(model.critic.weight.detach()) == pytest.approx(1.0, abs=0.12)
    assert float(model.critic.bias.detach()) == pytest.approx(-0.5, abs=0.12)
    assert run.history["critic_loss"][-100:].mean() == pytest.approx(float(best), abs=0.02)


def test_the_minimax_gradient_vanishes_where_the_critic_wins_and_the_cure_does_not():
    """Draws at -a with critic T(x) = x: d/db -softplus(T) = -sigmoid(T), against sigmoid(-T) for the non-saturating loss."""
    norms = {}
    for name in ("minimax", "non_saturating"):
        for far in (1.0, 12.0):
            model = game(Shift(1, -far), linear_critic([1.0]), size=1)
            model.generator.forward = lambda z, b=model.generator.b: 0 * z + b
            loss, _ = play(model, Adversarial(name), "generator", x=X[:, :1])
            (grad,) = torch.autograd.grad(loss, model.generator.b)
            norms[name, far] = abs(float(grad))
    assert norms["minimax", 12.0] == pytest.approx(1 / (1 + math.exp(12)), rel=1e-9)
    assert norms["non_saturating", 12.0] == pytest.approx(1 / (1 + math.exp(-12)), rel=1e-9)
    assert norms["minimax", 1.0] / norms["minimax", 12.0] > 4e4
    assert norms["non_saturating", 12.0] / norms["minimax", 12.0] == pytest.approx(math.exp(12), rel=1e-6)


def test_penalties_of_a_linear_critic():
    """The slope is w everywhere: (|w| - 1)^2 and |w|^2 / 2."""
    w = [3.0, -2.0, 6.0]  # norm 7
    model = game(critic=linear_critic(w, 0.3))
    bare = value(play(model, Adversarial("wasserstein", gradient_penalty=0.0), "critic")[0])
    loss, metrics = play(model, Adversarial("wasserstein", gradient_penalty=2.5), "critic")
    assert float(metrics["penalty"]) == pytest.approx(2.5 * 36, rel=1e-9)
    assert value(loss) == pytest.approx(bare + 90, rel=1e-9)
    _, metrics = play(model, Adversarial(r1=0.2), "critic")
    assert float(metrics["penalty"]) == pytest.approx(0.2 / 2 * 49, rel=1e-9)
    _, metrics = play(model, Adversarial(r1=Linear(1.0, 0.0)), "critic", r1=torch.tensor(0.4))
    assert float(metrics["penalty"]) == pytest.approx(0.4 / 2 * 49, rel=1e-6)


def test_r1_of_a_quadratic_critic_is_taken_at_the_data():
    """T(x) = x^2 has slope 2x: R1 is 2 gamma times the data's mean square."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.square().sum(1)

    model = game(critic=Square())
    loss, metrics = play(model, Adversarial(r1=0.3), "critic")
    assert float(metrics["penalty"]) == pytest.approx(0.3 / 2 * 4 * float(X.square().sum(1).mean()), rel=1e-9)
    (slope,) = torch.autograd.grad(metrics["penalty"].new_zeros(()) + loss, model.critic.scale)  # through both derivatives
    without = torch.autograd.grad(play(model, Adversarial(), "critic")[0], model.critic.scale)[0]
    assert float(slope - without) == pytest.approx(0.3 * 4 * float(X.square().sum(1).mean()), rel=1e-9)


def test_the_gradient_penalty_is_taken_between_data_and_draws():
    """T(x) = x^2 / 2 has slope x, uniform between the datum 1 and the draw 4: the mean of (x - 1)^2 is 3."""
    x = torch.ones(20_000, 1, dtype=D)
    with torch.random.fork_rng():
        found = gradient_penalty(lambda x: 0.5 * x.square().sum(1), {"x": x}, 4 * x, len(x))
    assert float(found.detach()) == pytest.approx(3.0, abs=0.1)  # standard error 0.02


def test_a_penalty_at_a_flat_critic_has_a_gradient():
    model = game(critic=linear_critic([0.0, 0.0, 0.0]))
    penalty = gradient_penalty(model.guide, {"x": X}, X + 1, len(X))
    (grad,) = torch.autograd.grad(penalty, model.critic.weight)
    assert float(penalty.detach()) == pytest.approx(1.0, abs=1e-5) and bool(torch.isfinite(grad).all())


def test_only_its_own_parameters_move_a_player():
    model = game()
    critic_loss, _ = play(model, Adversarial("hinge", r1=1.0, gradient_penalty=1.0), "critic")
    found = torch.autograd.grad(critic_loss, list(model.generator.parameters()), allow_unused=True)
    assert found == (None,)  # no gradient goes through the draws


# --- critics -------------------------------------------------------------------------------------------------------------


def test_a_projection_critic_adds_the_context_along_the_features():
    critic = Critic(nn.Linear(3, 4), 4, context_dim=2).double()
    x, c = X[:5], torch.randn(5, 2, dtype=D)
    h = critic.features(x)
    expected = critic.last(h)[:, 0] + torch.einsum("nc,fc,nf->n", c, critic.projection.weight, h)
    torch.testing.assert_close(critic(x, c), expected)


def test_a_pack_is_judged_as_one():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            seen.append(x)
            return self.w * x.sum(1)

    model = game(critic=Spy(), pack=4)
    numbers = model.criticise(X[:8])
    torch.testing.assert_close(seen[-1], X[:8].reshape(2, 12))
    torch.testing.assert_close(numbers, X[:8].reshape(2, 12).sum(1))
    torch.testing.assert_close(model.criticise(X[:6])[1], torch.cat([X[4:6], X[:2]]).sum())  # filled up from the start
    rows, _ = Adversarial().rows(model.model, model.guide, {"x": X[:10]})
    assert rows.shape == (3,)  # a pack is one trial
    images = GAN((8, 8), 4, (3,), architecture="dcgan", pack=3, batch_norm=False)
    assert images.criticise(IMAGES).shape == (4,)
    assert images.critic.features[0].shape == (3, 8, 8)


@pytest.mark.parametrize(("pack", "context_dim", "one"), [(1, 0, True), (2, 3, True), (3, 0, False)])
def test_data_and_draws_are_judged_in_one_pass_as_in_two(pack, context_dim, one):
    model = GAN((2,), 2, (8,), pack=pack, context_dim=context_dim)
    batch = {"x": torch.randn(10, 2), **({"context": torch.randn(10, context_dim)} if context_dim else {})}
    calls = []
    model.critic.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for whole in (GAN.whole_packs, lambda self, count: False):
        model.whole_packs = whole.__get__(model)
        torch.manual_seed(0)
        loss, metrics = Adversarial().players["critic"](model.made, model.guide, batch, {})
        found.append(torch.stack([loss, *metrics.values()]))
    assert len(calls) == (3 if one else 4)  # ten data are no whole number of packs of three
    torch.testing.assert_close(*found, equal_nan=True)


def test_spectral_normalisation_divides_by_the_largest_singular_value():
    weight = torch.randn(5, 3, 2, 2, dtype=D, generator=torch.Generator().manual_seed(3))
    norm = SpectralNorm(weight.float(), warm_up=0).double()
    for _ in range(200):
        norm(weight)
    singular = torch.linalg.matrix_norm(weight.flatten(1), 2)
    torch.testing.assert_close(norm(weight), weight / singular)
    norm.eval()
    before = norm.u.clone()
    norm(weight)
    assert torch.equal(norm.u, before)
    network = spectral_norm(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Conv2d(2, 3, 3)))
    assert [name for name, _ in network.named_buffers()] == [f"{i}.parametrizations.weight.0.u" for i in (0, 2)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(8, 8), (2, 12, 8)])
def test_architectures_make_and_judge_data_of_their_shape(name, shape):
    model = GAN(shape, 5, (4,), architecture=name, context_dim=3, pack=2, spectral_norm=True)
    c = torch.randn(6, 3)
    x = model.sample(6, c)
    assert x.shape == (6, *shape)
    assert model.criticise(x, c).shape == (3,)


# --- the game in every tier ------------------------------------------------------------------------------------------------

EVERYTHING = Adversarial("wasserstein", r1=Linear(1.0, 0.1)), {"pack": 2, "batch_norm": True, "spectral_norm": True}
GAMES = [
    *((name, {}, "graph") for name in LOSSES),
    (Adversarial("hinge", critic_moves=3), {"spectral_norm": True}, "graph"),
    (*EVERYTHING, "graph"),
    pytest.param(EVERYTHING[0], {}, "compiled", marks=INDUCTOR),
]


@pytest.mark.parametrize(("objective", "options", "tier"), GAMES)
def test_tiers_agree(objective, options, tier):
    objective = Adversarial(objective) if isinstance(objective, str) else objective
    found = []
    for used in ("eager", tier):
        model = GAN((3,), 2, (6,), seed=1, **options)
        run = model.fit(
            X, objective=objective, steps=5, batch_size=8, compile=used, unroll=1, precision="float64", ema=0.8, progress=False
        )
        assert run.tier == used
        found.append(torch.cat([t.detach().double().reshape(-1) for t in model.state_dict().values()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("architecture", ["dcgan", "residual"])
def test_convolutions_are_captured(architecture):
    losses = []
    for tier in ("eager", "graph"):
        model = GAN((8, 8), 3, (3,), architecture=architecture, output="tanh", context_dim=2, seed=2)
        context = torch.eye(2).repeat(6, 1)
        run = model.fit(
            IMAGES, context=context, objective=Adversarial(r1=1.0), steps=3, batch_size=6, compile=tier, precision="float64",
            progress=False,
        )  # fmt: skip
        assert run.tier == tier
        losses.append(run.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-9)


def test_training_tells_what_goes_on():
    model = GAN((3,), 2, (6,), seed=1)
    run = model.fit(X.float(), validation=X[:7].float(), steps=6, batch_size=8, validate_every=3, progress=False)
    for player in ("critic", "generator"):
        assert bool((run.history[f"{player}_grad_norm"] > 0).all()) and len(run.history[f"{player}_loss"]) == 6
    np.testing.assert_allclose(
        run.history["grad_norm"], np.hypot(run.history["critic_grad_norm"], run.history["generator_grad_norm"]), rtol=1e-5
    )
    for name in ("accuracy_real", "accuracy_fake"):
        assert bool(((run.history[f"critic_{name}"] >= 0) & (run.history[f"critic_{name}"] <= 1)).all())
    assert bool((run.history["critic_spread"] > 0).all())
    assert list(run.validation["step"]) == [3, 6] and run.restored is None
    assert run.figure.startswith("validation critic accuracy 0.")
    drawn = pgen.plots.plot_game(run)
    assert [len(ax.lines) for ax in drawn.axes] == [2, 2, 3]
    with pytest.raises(ValueError, match="has no players"):
        pgen.plots.plot_game(pgen.Run(history={"loss": np.zeros(3)}))


def test_stop_and_resume_give_the_same_bits(tmp_path):
    class Halt(Callback):
        def on_log(self, step, metrics):
            if step >= 7:
                raise KeyboardInterrupt

    def fit(folder, callbacks=()):
        model = GAN((3,), 2, (6,), batch_norm=True, spectral_norm=True, seed=1)
        model.fit(
            X, objective=Adversarial("wasserstein", critic_moves=2),
            optimizer={"critic": Adam(1e-2), "generator": SGD(0.1, 0.5)}, steps=15, batch_size=4, compile="graph", ema=0.9,
            checkpoint=folder, checkpoint_every=1, callbacks=callbacks,
            progress=False,
        )  # fmt: skip
        return model.state_dict()

    whole = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", [Halt()])
    resumed = fit(tmp_path / "b")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_averaged_generator_has_statistics_of_its_own():
    """Batch normalisation of averaged weights normalises what those weights give."""
    model = GAN((3,), 4, (6, 5), batch_norm=True, seed=1)
    model.fit(X.float() + 3, steps=60, batch_size=20, optimizer=0.02, ema=0.95, progress=False, compile="eager")
    norm = model.generator.body[4]
    with torch.no_grad():
        z = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(5))
        model.eval()
        h = model.generator.body[:4](z)
    torch.testing.assert_close(norm.running_mean, h.mean(0), atol=0.15, rtol=0.1)
    torch.testing.assert_close(norm.running_var, h.var(0), atol=0.1, rtol=0.3)
    assert norm.momentum == 0.1


# --- what it warns of ------------------------------------------------------------------------------------------------------


def history(steps=400, spread=1.0, accuracy=0.6, norm=1.0, last=1.0, given=math.nan, shift=(0.1, 0.1), loss=0.0):
    norms = np.full(steps, norm)
    norms[steps // 2 :] = last
    return {
        "loss": np.zeros(steps), "critic_spread": np.full(steps, spread), "generator_grad_norm": norms,
        "critic_accuracy_real": np.full(steps, accuracy), "critic_accuracy_fake": np.full(steps, accuracy),
        "critic_spread_given": np.full(steps, given), "critic_shift": np.linspace(*shift, steps),
        "critic_loss": np.broadcast_to(loss, steps), "critic_penalty": np.zeros(steps),
    }  # fmt: skip


def test_concerns_have_a_line_each_with_numbers_and_a_remedy():
    objective = Adversarial("minimax")
    assert objective.concerns(history()) == {}
    assert objective.concerns(history(steps=150, spread=0.0)) == {}  # too early to say
    assert set(objective.concerns(history(spread=0.03))) == {"collapse"}
    assert "3.0% of the data's: the generator has collapsed; try pack=4" in objective.concerns(history(spread=0.03))["collapse"]
    assert set(objective.concerns(history(spread=0.03, given=0.01))) == {"collapse"}  # which says it all
    (line,) = objective.concerns(history(given=0.03)).values()
    assert line.startswith("given a context the draws' standard deviation is 3.0% of the data's")
    line = objective.concerns(history(accuracy=1.0, last=1e-4))["critic wins"]
    assert "right 100.0% of the time" in line and "from 1 to 0.0001" in line and "loss='non_saturating'" in line
    assert "come no nearer" in Adversarial().concerns(history(accuracy=1.0, last=0.5))["critic wins"]
    assert objective.concerns(history(accuracy=1.0, shift=(9.0, 8.0))) == {}  # the draws are on their way
    assert objective.concerns(history(accuracy=0.7, last=1e-4)) == {}


def test_a_wasserstein_critic_may_be_right_while_the_distance_falls():
    objective = Adversarial("wasserstein")
    rises, falls = (np.interp(np.arange(400), [0, 100, 399], [0.0, -8.0, end]) for end in (-8.0, -6.0))
    assert "the draws come no nearer" in objective.concerns(history(accuracy=1.0, loss=rises))["critic wins"]
    assert objective.concerns(history(accuracy=1.0, loss=falls)) == {}
    assert set(Adversarial("hinge").concerns(history(accuracy=1.0, loss=falls))) == {"critic wins"}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_critic_that_wins_is_warned_of(loss):
    """Data far away, and a generator that hardly moves."""
    x = X[:, :2].float() * 0.1 + 5
    rates = {"critic": Adam(1e-2), "generator": Adam(1e-6)}
    options = {"steps": 300, "batch_size": 20, "compile": "eager", "progress": False}
    with pytest.warns(UserWarning, match=r"the critic wins: it is right (99|100)\.\d% of the time and"):
        run = GAN((2,), 2, (16,), seed=0).fit(x, objective=Adversarial(loss), optimizer=rates, **options)
    assert len(run.warnings) == 1 and ("vanishes" in run.warnings[0]) == (loss == "minimax")


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "minimax"])  # whose generator stands still
def test_a_generator_on_its_way_to_far_data_is_not_warned_of(loss):
    """All critics are right, about draws that come nearer."""
    x = X[:, :2].float() + 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = GAN((2,), 2, (16,), generator=Shift(2)).fit(
            x, objective=Adversarial(loss), optimizer={"critic": Adam(1e-2), "generator": Adam(1e-2)}, steps=300, batch_size=20,
            compile="eager", progress=False,
        )  # fmt: skip
    right = (run.history["critic_accuracy_real"] + run.history["critic_accuracy_fake"]) / 2
    assert np.median(right) == 1.0 and run.history["critic_shift"][-1] < 0.9 * run.history["critic_shift"][0]


def test_a_collapse_is_warned_of_while_training_and_told_by_the_run():
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(3))

        def forward(self, z):
            return self.b + 0.0 * z.sum(1, keepdim=True)

    model = GAN((3,), 2, (6,), generator=Point())
    with pytest.warns(UserWarning, match="step .*: the draws' standard deviation is 0.0% of the data's") as caught:
        run = model.fit(X.float(), objective=Adversarial(), steps=300, batch_size=8, compile="eager", progress=False)
    assert len(caught) == 1 and len(run.warnings) == 1
    assert "warning: the draws' standard deviation" in str(run)


def test_spread_and_shift_are_those_of_a_loop_over_pairs():
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(11, 3, 2, generator=g, dtype=D) + at for at in (3.0, 5.0))
    c = torch.eye(4, dtype=D)[torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 3])]
    pairs = [(i, j) for i in range(11) for j in range(i) if torch.equal(c[i], c[j])]
    squares = [sum((t[i] - t[j]).square().sum() for i, j in pairs) for t in (y, x)]
    torch.testing.assert_close(_spread_given(y, x, c), (squares[0] / squares[1]).sqrt())
    torch.testing.assert_close(_spread_given(2 * x, x, c), torch.tensor(2.0, dtype=D))
    assert bool(_spread_given(y, x, torch.arange(11.0, dtype=D)[:, None]).isnan())  # no two of one context
    several = torch.zeros(11, 9)
    several[::2] = torch.eye(9)[0] + torch.eye(9)[3]  # 1 and 4 of one half, 9 of the other: roots that add up
    several[1::2] = torch.eye(9)[8]
    pairs = [(i, j) for i in range(11) for j in range(i) if (i - j) % 2 == 0]
    squares = [sum((t[i] - t[j]).square().sum() for i, j in pairs) for t in (y, x)]
    torch.testing.assert_close(_spread_given(y, x, several), (squares[0] / squares[1]).sqrt())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(_spread_given(y.float(), x.float(), several).to(D), (squares[0] / squares[1]).sqrt())
        assert bool(_spread_given(y.float(), x.float(), torch.randn(11, 3)).isnan())
    assert bool(_spread_given(y, (c @ torch.randn(4, 6, dtype=D))[:, :, None], c).isnan())  # the context says all
    unit = torch.as_tensor(np.var(x.numpy(), 0, ddof=1).sum())
    torch.testing.assert_close(_moments(y, x)["shift"], torch.linalg.vector_norm(y.mean(0) - x.mean(0)) / unit.sqrt())
    torch.testing.assert_close(_moments(y, x)["spread"], (y.var(0).sum() / unit).sqrt())


def test_a_collapse_within_each_class_is_warned_of():
    """One point a class: the spread over all classes is that of the data."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))

        def forward(self, z, context):
            return context @ self.at

    context = torch.eye(2).repeat(20, 1)
    x = context @ torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]) + X.float()
    options = {"steps": 300, "batch_size": 8, "compile": "eager", "progress": False}
    with pytest.warns(UserWarning, match="given a context the draws' standard deviation is 0.0% of the data's") as caught:
        run = GAN((3,), 2, (6,), context_dim=2, generator=Points()).fit(x, context=context, objective=Adversarial(), **options)
    assert len(caught) == len(run.warnings) == 1 and run.history["critic_spread"].mean() > 0.8
    for given in (context, X[:, :2].float()):  # classes that a batch holds once, and contexts of which no two are alike
        run = GAN((3,), 2, (6,), context_dim=2).fit(x, context=given, steps=6, batch_size=2, compile="eager", progress=False)
        spread = run.history["critic_spread_given"]
        assert np.isnan(spread).any() and "collapse given a context" not in Adversarial().concerns(
            {name: np.repeat(column, 50) for name, column in run.history.items()}
        )


def test_a_critic_that_is_not_finite_is_named():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.log(self.w * x.sum(1))

    with pytest.raises(pgen.training.NonFinite, match=r"5 non-finite steps in a row.*the loss is not finite"):
        game(critic=Log()).fit(X, objective=Adversarial(), steps=20, batch_size=8, progress=False, compile="eager")


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "x", "options", "match"),
    [
        (lambda: GAN((8, 8), output="tanh"), IMAGES * 127.5 + 127.5, {}, r"x lies in .* tanh, .*\[-1, 1\].*x / 127.5 - 1"),
        (lambda: GAN((3,), 2, generator=nn.Sequential(nn.Linear(2, 3), nn.Tanh())), 9 * X, {}, r"tanh, .*\[-1, 1\]"),
        (lambda: GAN((8, 8), output="sigmoid"), IMAGES, {}, r"sigmoid, .*\[0, 1\].*x / 255"),
        (lambda: GAN((3,), batch_norm=True), X, {"batch_size": 1}, "batch normalisation over a batch of one.*2 or more"),
        (lambda: GAN((3,)), X[:1], {}, "the spread of draws in a batch of one leaves nothing: give more than one datum"),
        (lambda: GAN((3,), pack=4), X, {"batch_size": 6}, "multiple of pack=4, got 6"),
        (lambda: GAN((3,), context_dim=2), X, {"context": torch.ones(40, 2)}, "every datum has the same context"),
        (lambda: GAN((3,), 2, generator=nn.Linear(2, 4)), X, {}, r"make data of shape \(3,\), got \(4,\)"),
        (lambda: GAN((3,), 2, critic=nn.Linear(3, 2)), X, {}, r"one number a pack, 40 for 40 data, got \(40, 2\)"),
        (
            lambda: GAN((3,), 2, generator=nn.Linear(5, 3)),
            X,
            {},
            r"the generator should take z of shape \(40, 2\): mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            lambda: GAN((3,), 2, critic=nn.Linear(4, 1), context_dim=3, pack=2),
            X,
            {"context": X},
            r"the critic should take x of shape \(20, 6\) and a context of shape \(20, 6\): .* positional argument",
        ),
        (lambda: GAN((3,)), torch.full((4, 3), math.nan), {}, "data row 0, column 0 is nan"),
    ],
)
def test_bad_input_is_told_in_a_line_with_the_remedy(make, x, options, match):
    with pytest.raises(ValueError, match=match) as error:
        make().fit(x, steps=2, progress=False, **options)
    assert "\n" not in str(error.value)


def test_networks_of_ones_own_are_modules_and_options_that_would_do_nothing_are_refused():
    for bad, match in ((lambda z: z[:, :2], "got a function"), ("dense", "got 'dense'; `architecture` names one of pgen's")):
        with pytest.raises(TypeError, match=f"`generator` should be a torch.nn.Module, {match}"):
            GAN((2,), generator=bad)
    with pytest.raises(TypeError, match=r"`critic` should be a torch.nn.Module, got a int"):
        GAN((2,), critic=3)
    own = {"generator": nn.Linear(16, 2)}
    both = {**own, "critic": nn.Linear(2, 1)}
    for name, value, given in (
        ("output", "tanh", own), ("batch_norm", False, own), ("hidden", 3, both), ("architecture", "dcgan", both)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}` does not go with networks of your own"):
            GAN((2,), **{name: value}, **given)
    assert GAN((2,), hidden=3, **own).critic.last.in_features == 3  # the critic is pgen's
    with pytest.raises(ValueError, match="nothing to fit"):
        GAN((2,), 2, generator=nn.Identity(), critic=nn.Flatten())


def test_a_critic_of_ones_own_is_given_spectral_norm():
    critic = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    model = GAN((3,), 2, critic=critic, spectral_norm=True)
    for layer in (critic[0], critic[2]):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, rel=1e-2)
    assert model.critic is critic and GAN((3,), 2, critic=nn.Linear(3, 1)).critic.weight.norm() != 1


def test_a_generator_without_parameters_draws():
    model = GAN((3,), 3, hidden=(4,), generator=nn.Tanh())
    assert bool((model.sample(5).abs() < 1).all())
    with pytest.raises(ValueError, match="generator"):
        model.fit(X.float().tanh(), steps=1, progress=False)


def test_units_that_a_linear_generator_hardly_reaches_are_warned_of():
    x, options = X[:, :2].float(), {"steps": 2, "batch_size": 8, "compile": "eager", "progress": False}
    for bad, words in ((100 * x.abs().clamp(0.1, 2) + 3, r"x lies in \[13, 203\]"), (x * 1e-3, "x lies in")):
        with pytest.warns(UserWarning, match=f"{words}.*preprocess=Standardize") as caught:
            GAN((2,), 2, (4,)).fit(bad, validation=0.2, **options)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GAN((2,), 2, (4,), preprocess=Standardize()).fit(bad, **options)
            GAN((2,), 2, (4,), generator=Shift(2)).fit(bad, **options)  # which may be made for it


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="need images"):
        GAN((9,), architecture="dcgan")
    with pytest.raises(ValueError, match="multiples of 2, 8 or more"):
        GAN((7, 7), architecture="residual")
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        Adversarial("hing")
    with pytest.raises(ValueError, match="cannot rebuild networks of your own"):
        game().save("never.pgen")
    for hidden in ((), (8, 0)):
        with pytest.raises(ValueError, match="`hidden` should be one or more positive sizes"):
            GAN((2,), hidden=hidden)
    with pytest.raises(ValueError, match=r"should be a game such as Adversarial.*, got ELBO"):
        GAN((2,)).fit(torch.zeros(9, 2), objective=pgen.ELBO(), steps=1, progress=False)
    for options in ({"average": 16}, {"stop": "converged"}):
        with pytest.raises(ValueError, match="`stop='converged'` and `average` need one loss"):
            GAN((2,)).fit(torch.randn(9, 2), steps=20, progress=False, **options)
    with pytest.raises(TypeError, match="needs a guide that is a critic"):
        pgen.models.VAE((2,), likelihood="gaussian").fit(torch.randn(9, 2), objective=Adversarial(), steps=1, progress=False)


# --- questions -------------------------------------------------------------------------------------------------------------


def test_there_is_no_density_and_the_blurred_one_has_a_name_of_its_own():
    """G(z) = z + b blurred by s is N(b, (1 + s^2) I)."""
    model = GAN((2,), 2, (3,), generator=Shift(2, 0.7)).double()
    with pytest.raises(pgen.NotAvailable, match=r"no log_prob.*pgen.models.Flow, VAE.*noisy_log_prob"):
        model.log_prob(X[:4, :2])
    score = model.noisy_log_prob(X[:4, :2], scale=0.5, num_temps=300, num_chains=200, progress=False)
    exact = torch.distributions.Normal(torch.full((2,), 0.7, dtype=D), math.sqrt(1.25)).log_prob(X[:4, :2]).sum(1)
    torch.testing.assert_close(score.value, exact, atol=0.15, rtol=0)
    assert score.kind == "lower_bound"
    scaled = GAN((2,), 2, (3,), generator=Shift(2, 0.7), preprocess=Standardize()).double()
    scaled.fit(X[:, :2] * 3, steps=1, optimizer=1e-12, precision="float64", progress=False)
    inside = scaled.noisy_log_prob(X[:4, :2] * 3, scale=0.5, num_temps=50, num_chains=5, seed=1, progress=False)
    y = scaled.preprocess(X[:4, :2] * 3)
    bare = GAN((2,), 2, (3,), generator=scaled.generator).double()
    outside = bare.noisy_log_prob(y, scale=0.5, num_temps=50, num_chains=5, seed=1, progress=False)
    log_det = -scaled.preprocess.forward_with_log_det(X[:4, :2] * 3)[1]
    torch.testing.assert_close(inside.value, outside.value - log_det, atol=1e-6, rtol=0)


def test_the_blurred_density_is_keyed_and_says_that_it_is_another_law():
    x = torch.randint(0, 8, (9, 3), generator=torch.Generator().manual_seed(5))
    model = GAN((3,), 2, (5,), preprocess=Dequantize(8))
    options = {"num_temps": 3, "num_chains": 2, "leapfrog": 1, "compile": "eager", "progress": False}
    state = torch.get_rng_state()
    first, wide = (model.noisy_log_prob(x, scale=s, seed=4, **options) for s in (0.5, 0.7))
    assert torch.equal(state, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(first.value, model.noisy_log_prob(x, scale=0.5, seed=4, **options).value)
    assert not torch.equal(first.value, model.noisy_log_prob(x, scale=0.5, seed=5, **options).value)
    assert first.measure == "mass" and GAN((3,), 2, (5,)).noisy_log_prob(X[:2], scale=0.5, **options).measure == "density"
    assert "(lower bound of draws blurred by s = 0.5, not of the GAN, 2 samples)" in str(first)
    other = GAN((3,), 2, (5,), preprocess=Dequantize(8), seed=1).noisy_log_prob(x, scale=0.5, **options)
    assert set(pgen.compare({"a": first, "b": other}).names) == {"a", "b"}
    flow = pgen.Score(first.value - 1, "exact", 3, measure="mass")
    with pytest.raises(ValueError, match=r"'gan' is of draws blurred by s = 0\.5, not of the GAN, 'flow' of the model itself:"):
        pgen.compare({"gan": first, "flow": flow})
    with pytest.raises(ValueError, match=r"s = 0\.5.*s = 0\.7"):
        first - wide


def test_settings_are_suggested_by_the_data():
    assert GAN.for_data(torch.randn(9, 3)).preprocess is not None
    images = GAN.for_data(IMAGES)
    assert (images.architecture, images.output) == ("dcgan", "tanh")
    assert GAN.for_data(IMAGES.abs()).output == "sigmoid"
    assert GAN.for_data(IMAGES[:, :5]).architecture == "dense"


# --- pictures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_pictures_are_written_and_disturb_nothing(tmp_path, tier):
    states = []
    for pictures in (True, False):
        model = GAN((3,), 2, (6,), batch_norm=True, seed=1)
        callbacks = [pgen.plots.Pictures(model, tmp_path / "shown", every=4, num=9)] if pictures else []
        model.fit(X, steps=10, batch_size=8, compile=tier, ema=0.9, callbacks=callbacks, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == [f"step-{n:06d}.png" for n in (4, 8, 10)]


def test_a_callback_sees_the_averaged_parameters():
    seen = []

    class Look(Callback):
        every = 5

        def on_state(self, step):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    model = GAN((3,), 2, (6,), batch_norm=True, seed=1)
    model.fit(X, steps=5, batch_size=8, ema=0.9, callbacks=[Look()], progress=False, compile="eager")
    assert all(torch.equal(value, seen[0][name]) for name, value in model.state_dict().items())


def test_modes_and_classes_are_watched_while_training():
    grid = pgen.data.toy.gaussian_grid()
    model = GAN((2,), 2, (6,), seed=0)
    watch = pgen.evaluation.Watch.modes(model, grid, every=3, num=50)
    model.fit(grid.sample(200), steps=7, batch_size=20, callbacks=[watch], progress=False, compile="eager")
    assert watch.history["step"] == [3, 6, 7]
    last = pgen.evaluation.samples.mode_coverage(model.sample(50, seed=0), grid)
    assert watch.history["modes"][-1] == last["modes"].value
    x = torch.cat([torch.randn(60, 2, generator=torch.Generator().manual_seed(i)) + 9 * i for i in range(2)])
    labels = torch.arange(2).repeat_interleave(60)
    still = GAN((2,), 2, (6,), generator=Shift(2, 9.0))
    watch = pgen.evaluation.Watch.classes(still, x, labels, every=2, num=40)
    with torch.no_grad():
        watch.on_state(2)
    assert watch.history["modes"] == [1.0]  # all about (9, 9): one class of two, at log 2 from equal shares
    assert watch.history["reverse KL"][0] == pytest.approx(math.log(2), abs=0.02)


def test_nothing_is_warned_of_in_a_healthy_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = GAN((2,), 2, (16,), seed=0).fit(X[:, :2].float(), steps=250, batch_size=20, progress=False, compile="eager")
    assert run.warnings == []


def test_classes_as_context_are_pointed_to_one_hot() -> None:
    with pytest.raises(ValueError, match=r"one_hot\(classes, 3\)"):
        pgen.models.GAN((2,), context_dim=3, hidden=(4,)).fit(torch.randn(20, 2), context=torch.arange(20) % 3, steps=1)


def test_replicates_are_given_each_datums_context():
    class Echo(Shift):
        def forward(self, z, context):
            return context + 0 * super().forward(z)

    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x, context):
            return x @ self.weight

    context = torch.arange(10, dtype=D).reshape(5, 2)
    model = game(Echo(2), Deaf(), size=2, context_dim=2)
    found = model.predict(torch.zeros(5, 2, dtype=D), 3, context=context, progress=False)["x"]
    assert torch.equal(found, context.expand(3, 5, 2))
