"""The step's contract: players with losses of their own, scheduled scalars, state in buffers; the same in every tier."""

import gc
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import pgen
from pgen.data.batches import Batches, key, step_keys
from pgen.training import SGD, Adam
from pgen.training.capture import compile_graph, retrace
from pgen.training.native import NativeLoop

INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
TIERS = [pytest.param(tier, marks=INDUCTOR) for tier in ("eager", "graph", "compiled")]
X = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(6, 2)


@dataclass(frozen=True)
class Distance:
    """Half the squared distance of the first number from the second, which is not trained here."""

    mine: str
    other: str
    kind: str = "unnormalised"

    def __call__(self, model, guide, batch, scalars):
        mine, other = getattr(model.__self__, self.mine), getattr(model.__self__, self.other)
        loss = 0.5 * (mine.weight - other.weight).square().sum() + 0.0 * batch["x"].sum()
        return loss, {"gap": (mine.weight - other.weight).abs().sum().detach()}


class Two(pgen.GenerativeModel):
    """Two numbers, each a module of its own."""

    def __init__(self):
        super().__init__((2,))
        self.left, self.right = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.left.weight.fill_(1.0)
            self.right.weight.fill_(4.0)

    def model(self, x=None, context=None):
        with self.plate(x, context):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    def settings(self):
        return {}


@dataclass(frozen=True)
class Game:
    players: dict = field(default_factory=lambda: {"right": Distance("right", "left"), "left": Distance("left", "right")})
    kind: str = "unnormalised"


@pytest.mark.parametrize("tier", TIERS)
def test_players_move_in_turn_from_where_the_one_before_left_things(tier):
    model, left, right, gaps = Two(), 1.0, 4.0, []
    run = model.fit(
        X, objective=Game(), optimizer={"left": SGD(0.5), "right": SGD(0.1)}, steps=5, compile=tier, unroll=1, seed=0,
        precision="float64", progress=False,
    )  # fmt: skip
    for _ in range(5):
        gaps.append(abs(right - left))
        right -= 0.1 * (right - left)
        left -= 0.5 * (left - right)
    assert run.tier == tier
    assert float(model.right.weight.detach()) == pytest.approx(right, abs=1e-12)
    assert float(model.left.weight.detach()) == pytest.approx(left, abs=1e-12)
    np.testing.assert_allclose(run.history["right_gap"], gaps, atol=1e-12)
    np.testing.assert_allclose(run.history["loss"], run.history["right_loss"] + run.history["left_loss"], atol=1e-12)


def test_players_share_an_optimizers_settings_but_not_its_state():
    model = Two()
    model.fit(X, objective=Game(), optimizer=Adam(0.1), steps=1, precision="float64", progress=False)
    assert float(model.right.weight.detach()) == pytest.approx(3.9, abs=1e-6)  # Adam's first step is the rate itself
    assert float(model.left.weight.detach()) == pytest.approx(1.1, abs=1e-6)


def test_a_players_optimizer_and_parameters_must_exist():
    with pytest.raises(ValueError, match="`optimizer` has 'critic', but the objective's players are 'right', 'left'"):
        Two().fit(X, objective=Game(), optimizer={"critic": 0.1}, steps=1, progress=False)
    with pytest.raises(ValueError, match="give one optimizer"):
        Two().fit(X, objective=Distance("left", "right"), optimizer={"left": 0.1}, steps=1, progress=False)
    stray = Game({"critic": Distance("left", "right")})
    with pytest.raises(ValueError, match=r"player 'critic' of the objective has no parameters here.*\(left, right\)"):
        Two().fit(X, objective=stray, steps=1, progress=False)


@dataclass(frozen=True)
class Follows:
    """Half the squared distance of one number from the mean of its batch: an update is a step towards that mean."""

    mine: str
    moves: int = 1
    kind: str = "unnormalised"

    def __call__(self, model, guide, batch, scalars):
        weight = getattr(model.__self__, self.mine).weight
        return 0.5 * (weight - batch["x"].mean()).square().sum(), {"rows": torch.tensor(float(len(batch["x"]))).double()}


@pytest.mark.parametrize("tier", TIERS)
def test_a_player_moves_several_times_each_on_a_share_of_its_own(tier):
    """The other player takes the last share; what does not fill a batch waits for another epoch."""
    x = torch.arange(14.0, dtype=torch.float64).reshape(7, 2)
    game = Game({"right": Follows("right", moves=3), "left": Follows("left")})
    model, left, right = Two(), 1.0, 4.0
    run = model.fit(
        x, objective=game, optimizer=SGD(0.1), batch_size=2, steps=4, compile=tier, unroll=1, seed=3, precision="float64",
        progress=False,
    )  # fmt: skip
    batches = Batches(7, 6, seed=3, whole=True)
    for step in range(4):
        shares = batches.indices(step).reshape(3, 2)
        for rows in shares:
            right -= 0.1 * (right - float(x[rows].mean()))
        left -= 0.1 * (left - float(x[shares[-1]].mean()))
    assert run.tier == tier and run.epochs == 4.0  # one batch of six rows an epoch
    assert float(model.right.weight.detach()) == pytest.approx(right, abs=1e-12)
    assert float(model.left.weight.detach()) == pytest.approx(left, abs=1e-12)
    np.testing.assert_array_equal(run.history["right_rows"], np.full(4, 2.0))


@pytest.mark.parametrize("tier", TIERS)
def test_an_optimizer_counts_the_moves_of_its_player(tier):
    """Adam corrects for the zeros its moments began with by the number of its own updates."""
    game = Game({"right": Follows("right", moves=2), "left": Follows("left")})
    model, weight = Two(), nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
    model.fit(X, objective=game, optimizer=Adam(0.1), steps=5, compile=tier, unroll=1, precision="float64", progress=False)
    adam = torch.optim.Adam([weight], 0.1)
    for _ in range(10):
        weight.grad = (weight - X.mean()).detach()
        adam.step()
    assert float(model.right.weight.detach()) == pytest.approx(float(weight.detach()), abs=1e-9)


def test_micro_batches_are_cut_from_a_moves_own_share():
    x = torch.arange(24.0, dtype=torch.float64).reshape(12, 2)
    found = []
    for micro_batches in (1, 2):
        model = Two()
        model.fit(
            x, objective=Game({"right": Follows("right", moves=3), "left": Follows("left")}), optimizer=SGD(0.1), batch_size=2,
            steps=4, seed=3, precision="float64", micro_batches=micro_batches, deterministic=True, compile="graph",
            progress=False,
        )  # fmt: skip
        found.append(float(model.left.weight.detach()))
    # the loss is quadratic in a batch's mean, and so is the mean of two micro-batches' losses, but for a constant
    assert found[0] == pytest.approx(found[1], abs=1e-12)


class Chain(nn.Module):
    """A chain that begins at a datum and drifts."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("at", x.clone())


@dataclass(frozen=True)
class Drifting:
    """Pulls a number to a chain that moves on by one at every step, and begins at the data's first row."""

    chain: Chain | None = None
    kind: str = "unnormalised"
    selects: bool = False
    divisible: bool = True

    @property
    def state(self):
        return self.chain

    def begin(self, model, guide, batch):
        return replace(self, chain=Chain(batch["x"][0, :1]))

    def __call__(self, model, guide, batch, scalars):
        self.chain.at.add_(1.0)
        return 0.5 * (model.__self__.left.weight - self.chain.at).square().sum(), {}

    def rows(self, model, guide, batch):
        return batch["x"].sum(1) * model.__self__.left.weight.sum(), torch.zeros(())


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_begins_at_the_data_and_is_carried_on(tier):
    model, left, at = Two(), 1.0, -1.0
    model.fit(X, objective=Drifting(), optimizer=SGD(0.1), steps=5, compile=tier, precision="float64", progress=False)
    for _ in range(5):
        at += 1.0
        left -= 0.1 * (left - at)
    assert float(model.left.weight.detach()) == pytest.approx(left, abs=1e-12)


def test_chains_are_not_cut_into_micro_batches():
    with pytest.raises(ValueError, match=r"Drifting moves its chains as a whole.*2 micro-batches; train in one process"):
        Two().fit(X, objective=Drifting(divisible=False), steps=1, micro_batches=2, progress=False)


def test_what_selects_nothing_stops_nothing():
    model = Two()
    run = model.fit(
        X,
        validation=-X,
        objective=Drifting(),
        optimizer=SGD(0.1),
        steps=60,
        validate_every=1,
        precision="float64",
        progress=False,
    )
    assert run.steps == 60 and run.restored is None  # it falls all the time, which a patience of 20 would not bear


@dataclass(frozen=True)
class Pulled:
    """The first number's distance from a target that moves by schedule."""

    kind: str = "unnormalised"

    @property
    def schedules(self):
        return {"target": lambda step, total: step / total, "weight": lambda step, total: 2.0}

    def __call__(self, model, guide, batch, scalars):
        left = model.__self__.left.weight
        return 0.5 * scalars["weight"] * (left - scalars["target"]).square().sum(), {"target": scalars["target"].detach()}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("unroll", [1, 3])
def test_schedules_are_inputs_of_every_step(tier, unroll):
    model, left = Two(), 1.0
    run = model.fit(
        X, objective=Pulled(), optimizer=SGD(0.1), steps=6, compile=tier, unroll=unroll, precision="float64", progress=False
    )
    for step in range(6):
        left -= 0.1 * 2.0 * (left - step / 6)
    assert float(model.left.weight.detach()) == pytest.approx(left, abs=1e-12)
    np.testing.assert_allclose(run.history["target"], np.arange(6) / 6, atol=1e-12)


class Normed(pgen.GenerativeModel):
    """A regression of x on itself through batch normalisation and dropout."""

    def __init__(self, spoiled=False):
        super().__init__((2,))
        self.spoiled = spoiled
        with self.initial_weights(0):
            self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 2))

    def model(self, x=None, context=None):
        with self.plate(x, context):
            loc = self.net(x) / 0 if self.spoiled and self.training else self.net(x)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def settings(self):
        return {}


def normed(tier, **options):
    model = Normed()
    run = model.fit(X, optimizer=SGD(0.01), steps=8, batch_size=3, compile=tier, precision="float64", progress=False, **options)
    assert run.tier == tier
    return model, run


@pytest.mark.parametrize("tier", TIERS[1:])
def test_batch_statistics_and_dropout_are_state_and_noise_of_the_graph(tier):
    reference, model = normed("eager")[0], normed(tier, unroll=1)[0]
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    assert int(model.net[1].num_batches_tracked) == 8


@pytest.mark.parametrize("tier", TIERS)
def test_a_skipped_step_leaves_batch_statistics_alone(tier):
    model = Normed(spoiled=True).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="5 non-finite steps in a row"):
        model.fit(X, steps=8, compile=tier, unroll=1, precision="float64", progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def regression(y):
    """Ten times y's mean and its precision; conjugate, so that nothing is in doubt."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def gamma_guide(y):
    shape = pyro.param("shape", torch.tensor(3.0), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Gamma(shape, 1.0))


Y = torch.linspace(-1.0, 2.0, 7)


def native(steps=40, unroll=8, seed=0, **options):
    pair = pgen.Pair(regression, **options)
    run = pair.fit(Y, steps=steps, compile="compiled", unroll=unroll, seed=seed, optimizer=0.05, progress=False)
    assert run.tier == "compiled"
    return torch.cat([p.detach().reshape(-1) for p in pair.parameters()]), run


@INDUCTOR
def test_compiled_steps_run_natively_and_one_a_call_sees_the_programs_own_noise():
    pair = pgen.Pair(regression)
    eager = pair.fit(Y, steps=40, compile="eager", optimizer=0.05, progress=False)
    run = native(unroll=1)[1]
    assert run.tier_reason == ""
    np.testing.assert_allclose(run.history["loss"], eager.history["loss"], rtol=1e-5)
    assert not np.allclose(native(unroll=8)[1].history["loss"], eager.history["loss"])  # a key of its own


@INDUCTOR
def test_steps_that_share_a_call_do_not_care_where_calls_begin(monkeypatch):
    together = native()
    monkeypatch.setattr(sys.modules["pgen.training.fit"], "BLOCK_SECONDS", 0.0)  # one step a block
    apart = native()
    assert torch.equal(together[0], apart[0])
    np.testing.assert_array_equal(together[1].history["loss"], apart[1].history["loss"])


@INDUCTOR
def test_noise_that_depends_on_parameters_is_drawn_step_by_step():
    _, run = native(guide=gamma_guide)
    assert "random numbers that depend on data" in run.tier_reason
    pair = pgen.Pair(regression, gamma_guide)
    eager = pair.fit(Y, steps=40, compile="eager", optimizer=0.05, progress=False)
    np.testing.assert_allclose(run.history["loss"], eager.history["loss"], rtol=1e-4)


@INDUCTOR
def test_a_step_that_cannot_run_natively_is_called_from_python(monkeypatch):
    whole = native(unroll=4)
    monkeypatch.setattr("pgen.training.native._PRODUCTS", {})
    monkeypatch.setattr("pgen.training.native._Recorder.kernel", lambda self, original: original)
    called = native(unroll=4)
    assert called[1].tier_reason == "one step a call, because no kernel of inductor's was seen"
    assert torch.equal(whole[0], called[0])  # the same noise, the same kernels: the same bits


@INDUCTOR
def test_a_native_loop_that_gave_other_numbers_would_not_be_used(monkeypatch):

    run_natively = NativeLoop.__call__
    monkeypatch.setattr(NativeLoop, "__call__", lambda self, moving: [t + 1 for t in run_natively(self, moving)])
    assert "its native loop gave other numbers" in native()[1].tier_reason


def spline_density(seed=0):
    """A zuko spline flow as a likelihood, the way Pyro's users write it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = zuko.flows.NSF(2, transforms=1, hidden_features=(4,), bins=3)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ZukoToPyro(flow()), obs=x)

    return pgen.Pair(model, lambda x: None)


@INDUCTOR
def test_a_zuko_flow_is_a_likelihood_in_every_tier():
    losses = {}
    for tier in ("eager", "graph", "compiled"):
        run = spline_density().fit(X.float(), steps=5, batch_size=3, optimizer=1e-2, compile=tier, progress=False)
        losses[tier] = run.history["loss"]
        assert (run.tier, run.tier_reason) == (tier, "" if tier == "compiled" else "as asked")  # natively: no cumsum is left
    np.testing.assert_array_equal(losses["graph"], losses["eager"])
    np.testing.assert_allclose(losses["compiled"], losses["eager"], rtol=1e-4)


def test_cheaper_spellings_have_the_same_values():
    def fn(x, y):
        return [
            torch.sigmoid(x),
            torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none"),
            torch.cumsum(x.reshape(5, 8), 0),
        ]

    x = torch.linspace(-60.0, 60.0, 40, dtype=torch.float64)
    y = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)
    graph = retrace(fn, [x, y])
    names = [str(node.target) for node in graph.graph.nodes]
    assert not any(word in name for name in names for word in ("sigmoid", "cross_entropy", "cumsum"))
    for cheap, plain in zip(graph(x, y), fn(x, y)):
        torch.testing.assert_close(cheap, plain, rtol=1e-13, atol=2e-16)


@INDUCTOR
def test_a_native_loop_gives_its_memory_back():
    matrix = torch.randn(6, 4)
    fn = compile_graph(retrace(lambda a, x: [(a @ x).sum()], [matrix, torch.randn(4, 3)]), [matrix, torch.randn(4, 3)])
    loop = NativeLoop(fn, [matrix, torch.randn(4, 3)], 1)
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(loop([x])[0], (matrix @ x).sum((1, 2)))
    storage = StorageWeakRef(matrix.untyped_storage())
    del matrix, fn
    gc.collect()
    assert not storage.expired()  # the loop still works on it
    del loop
    gc.collect()
    assert storage.expired()


def annealed_by_hand(count):
    """A model that narrows its own prior by counting its calls."""

    def model(y):
        count[0] += 1
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0 if count[0] < 100 else 0.05))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return pgen.Pair(model)


def test_a_program_that_changes_python_values_is_not_frozen():
    with pytest.raises(ValueError, match="change the Python value 'count' as they run, which a graph would freeze"):
        annealed_by_hand([0]).fit(Y, steps=5, compile="graph", progress=False)


class Counting(nn.Module):
    calls = 0

    def forward(self, y):
        self.calls += 1
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_a_module_that_counts_is_not_frozen_either(monkeypatch):
    monkeypatch.setattr(sys.modules["pgen.training.fit"], "CAPTURE_WORTH_SECONDS", 0.0)
    run = pgen.Pair(Counting()).fit(Y, steps=20, progress=False)
    assert run.tier == "eager" and "'calls'" in run.tier_reason


@pytest.mark.parametrize(
    ("objective", "words"),
    [("iwae", "got 'iwae'"), (pgen.IWAE, "got 'IWAE': call it"), (pyro.infer.Trace_ELBO(), "got 'Trace_ELBO' of Pyro")],
)
def test_what_is_no_objective_is_named(objective, words):
    with pytest.raises(TypeError, match=f"`objective` should be an objective such as pgen.ELBO.*{words}"):
        pgen.Pair(regression).fit(Y, objective=objective, steps=1, progress=False)


def test_slips_in_arguments_are_one_line(tmp_path):
    with pytest.raises(TypeError, match="`kl_weight` should be a number or a function of"):
        pgen.ELBO(kl_weight=lambda step: step / 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint` should be a folder, got the file"):
        pgen.Pair(regression).fit(Y, steps=1, checkpoint=tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="`optimizer` holds 1 parameters that this model does not train"):
        Two().fit(X.float(), optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), steps=1, progress=False)


def test_a_run_and_a_score_show_themselves_as_they_print():
    run = pgen.Pair(regression).fit(Y, steps=3, progress=False)
    assert repr(run) == str(run) and len(repr(run)) < 1000


def factors(stride):
    """Y = Z W: W from an SVD comes column after column, as torch's factorisations give it."""
    w = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    w = w if stride == "rows" else w.t().contiguous().t()

    def model(y):
        weight = pyro.param("w", w)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y.new_ones(len(y), 4) @ weight, 1.0).to_event(1), obs=y)

    return pgen.Pair(model, lambda y: None)


@pytest.mark.parametrize("tier", TIERS)
def test_parameters_may_lie_column_after_column(tier):
    y = torch.arange(15.0).reshape(5, 3)
    losses = [
        factors(s).fit(y, steps=30, optimizer=0.1, compile=tier, progress=False).history["loss"] for s in ("rows", "cols")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_overlapping_parameters_and_buffers_are_made_whole():
    class Wide(Two):
        def __init__(self):
            super().__init__()
            self.left.weight = nn.Parameter(torch.zeros(1).expand(20).reshape(1, 20)[:, :1].expand(1, 20))
            self.register_buffer("scale", torch.ones(1).expand(3))

        def model(self, x=None, context=None):
            with self.plate(x, context):
                pyro.sample("x", dist.Normal(self.left.weight.sum(), self.scale[0]).expand([2]).to_event(1), obs=x)

    model = Wide()
    model.fit(X.float(), steps=20, optimizer=0.1, progress=False)
    assert model.left.weight.is_contiguous()


@INDUCTOR
@pytest.mark.parametrize("likelihood", [lambda m: dist.Poisson(m.exp()), lambda m: dist.StudentT(3.0, m, 1.0)])
def test_a_special_function_is_not_chance(likelihood):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood(mean), obs=y)

    run = pgen.Pair(model).fit(torch.arange(5.0), steps=4, compile="compiled", progress=False)
    assert (run.tier, run.tier_reason) == ("compiled", "")


@INDUCTOR
def test_dropout_runs_natively():
    run = normed("compiled", unroll=1)[1]
    assert run.tier_reason == ""


@INDUCTOR
def test_a_compilation_that_begins_at_a_short_batch_is_of_whole_ones(tmp_path):
    x = torch.linspace(-1.0, 2.0, 50).reshape(25, 2)

    def fit(steps, folder):
        model = Normed()
        return model.fit(
            x, optimizer=SGD(0.01), steps=steps, batch_size=10, compile="compiled", unroll=2, progress=False, checkpoint=folder
        )

    whole = fit(9, None)
    fit(2, tmp_path)  # the next batch is the short one
    np.testing.assert_array_equal(fit(9, tmp_path).history["loss"], whole.history["loss"])


def test_blocks_have_noise_that_no_single_step_has():
    loop_keys = [{step_keys(key(0, name), t, 1)[0] for t in range(200)} for name in ("noise", "noise of blocks")]
    assert not loop_keys[0] & loop_keys[1]


def test_a_copy_before_a_change_in_place_stays_a_copy():
    def fn(x):
        h = x * 2
        old = h + 0
        h.add_(1)
        return [old, h]

    x = torch.arange(3.0)
    for value, expected in zip(retrace(fn, [x])(x), fn(x)):
        assert torch.equal(value, expected)


def test_an_augmentation_in_place_leaves_the_data_alone():
    x = X.float().clone()
    model, spoil = Two(), lambda v: v.add_(torch.randn_like(v))
    model.fit(x, objective=Distance("left", "right"), steps=3, augment=spoil, progress=False)
    assert torch.equal(x, X.float())


def test_a_parameter_without_a_player_is_named():
    class Both(Distance):
        def __call__(self, model, guide, batch, scalars):
            loss, metrics = super().__call__(model, guide, batch, scalars)
            return loss + getattr(model.__self__, self.other).weight.sum(), metrics

    with pytest.raises(ValueError, match="no player trains: name a player for it"):
        Two().fit(X.float(), objective=Game({"left": Both("left", "right")}), steps=1, progress=False)


def test_too_short_an_average_is_refused():
    with pytest.raises(ValueError, match="16 or more, got 5"):
        pgen.Pair(regression).fit(Y, steps=20, average=5, progress=False)
