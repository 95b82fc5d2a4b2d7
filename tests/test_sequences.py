"""Families of sequences: causal, exact, with lengths, prefixes and completions."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.base import GenerativeModel
from pgen.data import mu_law, mu_law_inverse, pad, windows
from pgen.distributions import Autoregressive, Bernoulli, stepping
from pgen.evaluation.steps import Steps
from pgen.models import CausalTransformer, WaveNet
from pgen.programs import isolated

T, K, CONTEXT, LOCAL, HOP = 7, 4, 2, 5, 3


def wavenet(shape=(T,), likelihood="categorical", num_classes=K, **options):
    return WaveNet(shape, likelihood, num_classes, **{"channels": 6, "dilations": (1, 2), **options}).double()


def transformer(shape=(T,), likelihood="categorical", num_classes=K, **options):
    return CausalTransformer(shape, likelihood, num_classes, **{"width": 8, "layers": 2, "heads": 2, **options}).double()


def slow_wavenet(shape=(T,), likelihood="categorical", num_classes=K, **options):
    return wavenet(shape, likelihood, num_classes, local_hop=HOP, **options)


families = pytest.mark.parametrize("make", [wavenet, transformer])
conditioned = pytest.mark.parametrize("make", [wavenet, slow_wavenet, transformer])


def conditions(model, n, t=T, seed=7):
    """Local conditions of n sequences of t positions."""
    shape = (n, -(-t // model.local_hop), model.local_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symbols(n, t=T, values=K):
    return torch.randint(0, values, (n, t), generator=torch.Generator().manual_seed(3))


def shaken(model):
    """With weights that are not near their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


# --- networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reach"),
    [
        (wavenet, 4),
        (lambda **o: wavenet(dilations=(1, 3), kernel_size=3, **o), 9),
        (lambda **o: wavenet(dilations=(2, 1, 1), **o), 5),
        (transformer, 12),
    ],
)
def test_outputs_see_what_came_before_and_nothing_else(make, reach):
    model = shaken(make(shape=(12,), likelihood="gaussian", num_classes=None))
    x = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: model.network(x, None)[0].sum(-1), x)[:, 0]
    seen = jacobian.abs() > 0
    expected = torch.tensor([[t - reach <= s < t for s in range(12)] for t in range(12)])
    assert torch.equal(seen, expected)
    if isinstance(model, WaveNet):
        assert model.receptive_field == reach


@families
@pytest.mark.parametrize(
    ("shape", "likelihood", "num_classes"),
    [((T,), "categorical", K), ((T, 3), "bernoulli", None), ((T, 2), "categorical", K), ((T,), "gaussian_mixture", None)],
)
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
def test_steps_give_the_outputs_of_whole_passes(make, shape, likelihood, num_classes, context_dim):
    model = shaken(make(shape, likelihood, num_classes, context_dim=context_dim))
    context = torch.randn(5, CONTEXT, dtype=torch.float64) if context_dim else None
    x = symbols(5 * math.prod(shape[1:]), values=2).reshape(5, *shape).double()
    state, found = model.network.start(5, context), []
    for t in range(T):
        outputs, state = model.network.step(state, torch.tensor(t), x[:, t - 1] if t else torch.zeros_like(x[:, 0]))
        found.append(outputs)
    torch.testing.assert_close(torch.stack(found, 1), model.network(x, context), rtol=1e-10, atol=1e-10)


@families
def test_cached_samples_are_uncached_samples_symbol_by_symbol(make):
    model = shaken(make())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        cached = model.distribution().expand((6,)).sample()
        torch.manual_seed(5)
        x = torch.zeros(6, T, dtype=torch.float64)
        for t in range(T):
            x[:, t] = model.observation.draw(model.network(x, None)[:, t], torch.tensor(t)).double()
    assert torch.equal(cached, x.long())
    assert torch.equal(model.sample(6, seed=2, compile="graph"), model.sample(6, seed=2, compile="eager"))


def test_a_captured_step_takes_the_place_of_the_layers():
    model = shaken(wavenet())
    steps = Steps([*model.parameters()], compile="graph")
    with isolated(), stepping(steps), torch.random.fork_rng(devices=[]):
        model.distribution().expand((3,)).sample()
    assert steps.tier == "graph"


# --- local conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "hop", "back"),
    [
        (lambda **o: wavenet(dilations=(1, 2), **o), 1, [0, 2]),  # the first layer's past has not seen the condition
        (lambda **o: wavenet(dilations=(2, 1, 3), **o), 1, [0, 1, 3, 4]),
        (lambda **o: wavenet(dilations=(1, 4), local_hop=HOP, **o), HOP, [0, 4]),
        (transformer, 1, range(11)),
    ],
)
def test_outputs_see_the_condition_at_their_own_position_and_before(make, hop, back):
    model = shaken(make(shape=(11,), likelihood="gaussian", num_classes=None, local_dim=LOCAL))
    x, h = torch.randn(1, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), conditions(model, 1, 11)
    jacobian = torch.autograd.functional.jacobian(lambda h: model.network(x, None, h)[0].sum(-1), h)
    seen = [{(t - b) // hop for b in back if t >= b} for t in range(11)]
    expected = torch.tensor([[row in rows for row in range(h.shape[1])] for rows in seen])
    assert torch.equal((jacobian[:, 0].abs() > 0).all(-1), expected)
    assert torch.equal((jacobian[:, 0] != 0).any(-1), expected)


@conditioned
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
def test_cached_samples_are_uncached_samples_under_a_condition(make, context_dim):
    model = shaken(make(local_dim=LOCAL, context_dim=context_dim))
    h, context = conditions(model, 6), torch.randn(6, CONTEXT, dtype=torch.float64) if context_dim else None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        cached = model.distribution(context, local=h).sample()
        torch.manual_seed(5)
        x = torch.zeros(6, T, dtype=torch.float64)
        for t in range(T):
            x[:, t] = model.observation.draw(model.network(x, context, h)[:, t], torch.tensor(t)).double()
    assert torch.equal(cached, x.long())
    eager = model.sample(6, context, local=h, seed=2, compile="eager")
    assert torch.equal(model.sample(6, context, local=h, seed=2, compile="graph"), eager)
    assert not torch.equal(model.sample(6, context, local=-h, seed=2), eager)
    one = model.sample(6, None if context is None else context[:1], local=h[:1], seed=2)
    assert torch.equal(one[0], eager[0]) and not torch.equal(one, eager)


@conditioned
def test_densities_under_a_condition_sum_to_one_and_are_the_product_of_next_symbols(make):
    model = shaken(make((3,), num_classes=3, local_dim=LOCAL, context_dim=CONTEXT))
    h, context = conditions(model, 2, 3), torch.tensor([[0.3, -1.0]])
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    found = [model.log_prob({"x": every, "local": part.expand(27, -1, -1)}, context).value for part in h.split(1)]
    torch.testing.assert_close(torch.stack(found).logsumexp(1), torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=0.1)
    rows = [-(-(t + 1) // model.local_hop) for t in range(3)]
    each = [model.next(every[:, :t], context, local=h[:1, : rows[t]]).log_prob(every[:, t]) for t in range(3)]
    torch.testing.assert_close(torch.stack(each).sum(0), found[0])


def test_a_slow_condition_is_one_that_is_repeated():
    slow, fast = shaken(slow_wavenet(local_dim=LOCAL)), wavenet(local_dim=LOCAL)
    fast.load_state_dict(slow.state_dict())
    x, h = symbols(4), conditions(slow, 4)
    assert h.shape[1] == 3
    repeated = h.repeat_interleave(HOP, 1)[:, :T]
    torch.testing.assert_close(
        slow.log_prob({"x": x, "local": h}).value, fast.log_prob({"x": x, "local": repeated}).value, rtol=1e-12, atol=0
    )
    assert torch.equal(slow.sample(4, local=h, seed=3), fast.sample(4, local=repeated, seed=3))


@conditioned
def test_lengths_go_with_conditions(make):
    model, x = shaken(make(local_dim=LOCAL)), symbols(4)
    h, lengths = conditions(model, 4), torch.tensor([1, 7, 3, 4])
    score = model.log_prob({"x": x, "lengths": lengths, "local": h})
    short = []
    for i, n in enumerate(lengths):
        steps = [(x[i : i + 1, :t], h[i : i + 1, : t // model.local_hop + 1], x[i, t]) for t in range(n)]
        short.append(sum(model.next(past, local=known).log_prob(now) for past, known, now in steps))
    torch.testing.assert_close(score.value, torch.cat(short))


@conditioned
def test_completions_go_on_as_the_next_symbol_does_under_the_condition(make):
    model, prefix = shaken(make(local_dim=LOCAL)), symbols(1, 3)
    h = conditions(model, 2, 4)
    each = h.repeat_interleave(600, 0)
    x = model.complete(prefix.expand(1200, 3), 4, local=each, seed=1)
    assert torch.equal(x[:, :3], prefix.expand(1200, 3))
    for drawn, part in zip(x[:, 3].split(600), h.split(1)):
        probs = model.next(prefix, local=part).probs[0]
        share = (drawn[:, None] == torch.arange(K)).double().mean(0)
        assert bool(((share - probs).abs() < 4.5 * (probs * (1 - probs) / 600).sqrt() + 1e-9).all())


@conditioned
def test_context_and_condition_are_both_heard_and_a_file_keeps_all(make, tmp_path):
    model = shaken(make((T, 2), "gaussian", None, local_dim=LOCAL, context_dim=CONTEXT))
    x = 50 + 9 * torch.randn(3, T, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.prime({"x": x})
    h, context = conditions(model, 3), torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]]).double()
    value = model.log_prob({"x": x, "local": h, "context": context}).value
    for other in ({"local": h + 1, "context": context}, {"local": h, "context": context + 1}):
        assert bool(((model.log_prob({"x": x, **other}).value - value).abs() > 1e-3).all())
    model.save(tmp_path / "m.pgen")
    again = pgen.load(tmp_path / "m.pgen")
    assert again.settings() == model.settings()
    assert torch.equal(again.log_prob({"x": x, "local": h, "context": context}).value, value)
    assert torch.equal(again.sample(3, context, local=h), model.sample(3, context, local=h))


def told(n, t, seed):
    """Sequences that say which class h asks for, but with chance 0.2 another one: x, h, and the entropy of a symbol."""
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randint(0, 3, (n, t), generator=generator)
    other = (asked + 1 + torch.randint(0, 2, (n, t), generator=generator)) % 3
    x = torch.where(torch.rand(n, t, generator=generator) < 0.2, other, asked)
    return x, torch.nn.functional.one_hot(asked, 3).float(), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))


@families
def test_what_the_condition_says_is_learned(make):
    (x, h, entropy), (x_test, h_test, _) = told(2000, 6, 1), told(400, 6, 2)
    options = {"num_classes": 3, "channels": 8} if make is wavenet else {"num_classes": 3}
    quick = {"steps": 150, "optimizer": 0.01, "compile": "graph", "progress": False}
    model, deaf = make((6,), local_dim=3, **options), make((6,), **options)
    model.fit({"x": x, "local": h}, validation={"x": x_test, "local": h_test}, **quick)
    deaf.fit(x, **{**quick, "steps": 30, "compile": "eager"})
    score = model.log_prob({"x": x_test, "local": h_test})
    best = torch.where(h_test.argmax(-1) == x_test, math.log(0.8), math.log(0.1)).sum(1)  # under the law of the data
    assert abs(float(score.value.mean() - best.mean())) / 6 < 0.02
    assert score.mean / 6 == pytest.approx(-entropy, abs=0.05)
    assert deaf.log_prob(x_test).mean / 6 < -math.log(3) + 0.02
    # Beyond the window of T positions each symbol still reads its own row.
    ask = told(30, 20, 3)[1]
    share = (model.complete(x_test[:30, :2], 20, local=ask, seed=1) == ask.argmax(-1))[:, 2:].double().mean()
    assert 0.75 < float(share) < 0.85
    assert model.next(symbols(1, 19, 3), local=ask[:1]).probs.argmax() == ask[0, 19].argmax()


@conditioned
def test_conditions_that_do_not_fit_are_refused_in_one_line(make):
    model, plain, x = make(local_dim=LOCAL), wavenet(), symbols(2)
    h = conditions(model, 2)
    rows = h.shape[1]
    missing = (
        rf"made with local_dim=5; give `local`, shape \(N, {rows}, 5\): with data as {{'x': x, 'local': h}}, else as local=h"
    )
    for call in (lambda: model.log_prob(x), lambda: model.fit(x, steps=1), lambda: model.sample(2), lambda: model.complete(x)):
        with pytest.raises(ValueError, match=missing):
            call()
    with pytest.raises(ValueError, match="made without a local condition; make it with local_dim="):
        plain.sample(2, local=h)
    with pytest.raises(ValueError, match="made without a local condition"):
        plain.log_prob({"x": x, "local": h})
    every = ", one row for each 3" if model.local_hop > 1 else ""
    wrong = rf"`local` should have shape \(N, {rows}, 5\) for 7 positions{every}, got "
    for bad, end in (
        (h[:, 1:], rf"\(2, {rows - 1}, 5\)"),
        (h[..., 1:], rf"\(2, {rows}, 4\)"),
        (h[0], ".*; did you mean local.None"),
    ):
        with pytest.raises(ValueError, match=wrong + end):
            model.sample(2, local=bad)
    with pytest.raises(ValueError, match="`local` has 2 entries for 3 data; give one a datum, or one for all"):
        model.sample(3, local=h)
    with pytest.raises(ValueError, match="`local` has 1 entries for 2 data; give one a datum"):
        model.log_prob({"x": x, "local": h[:1]})
    h[1, 0, 2] = math.nan
    with pytest.raises(ValueError, match=r"local row 1, column \(0, 2\) is nan"):
        model.log_prob({"x": x, "local": h})
    with pytest.raises(
        ValueError, match=r"`local` should have shape \(N, 2, 5\) for 5 positions" if every else "for 5 positions"
    ):
        model.next(x[:, :4], local=h)
    with pytest.raises(ValueError, match=r"did you mean local\[..., None\]"):
        make(local_dim=1).sample(2, local=h[..., 0])


# --- densities --------------------------------------------------------------------------------------------------------------


@families
def test_next_symbols_multiply_to_the_density(make):
    model, x = shaken(make()), symbols(5)
    each = torch.stack([model.next(x[:, :t]).log_prob(x[:, t]) for t in range(T)], 1)
    torch.testing.assert_close(each.sum(1), model.log_prob(x).value)
    torch.testing.assert_close(model.next(x[:, :3]).probs.sum(1), torch.ones(5, dtype=torch.float64))


@families
def test_what_lies_behind_the_length_does_not_count(make):
    model, x = shaken(make()), symbols(5)
    lengths = torch.tensor([1, 7, 3, 4, 2])
    score = model.log_prob({"x": x, "lengths": lengths})
    short = [sum(model.next(x[i : i + 1, :t]).log_prob(x[i : i + 1, t]) for t in range(n)) for i, n in enumerate(lengths)]
    torch.testing.assert_close(score.value, torch.cat(short))
    other = torch.where(torch.arange(T) < lengths[:, None], x, (x + 1) % K)
    torch.testing.assert_close(model.log_prob({"x": other, "lengths": lengths}).value, score.value, rtol=1e-12, atol=0)
    assert score.bits_per_dim == pytest.approx(-score.total / int(lengths.sum()) / math.log(2))


@pytest.mark.parametrize("make", [slow_wavenet, transformer])
def test_fits_see_lengths_and_conditions_and_agree_in_both_tiers(make):
    data = pad([row[: 2 + i % 5] for i, row in enumerate(symbols(20))], length=T)
    data["local"] = conditions(make(local_dim=LOCAL), 20)
    losses = []
    for tier in ("eager", "graph"):
        model = make(local_dim=LOCAL)
        run = model.fit(data, steps=4, batch_size=6, compile=tier, progress=False, validation=data)
        losses.append(run.history["loss"][-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and math.isfinite(losses[0])


@families
def test_a_fit_starts_at_the_frequencies_of_the_symbols_that_count(make):
    data = pad([[0, 0, 0, 1], [0] * 7, [1, 0, 0]])  # 12 zeros and 2 ones; the padding is not counted
    model = make(num_classes=2)
    model.prime({"x": data["x"].double(), "lengths": data["lengths"]})
    torch.testing.assert_close(model.output_bias().softmax(0), torch.tensor([13.0, 3.0]).double() / 16)


def test_a_rule_is_learned():
    """Each symbol is the one before plus one: after a short fit the sequence is all but certain."""
    x = (torch.arange(16)[:, None] % K + torch.arange(T)) % K
    model = WaveNet((T,), num_classes=K, channels=8)
    model.fit(x, steps=200, batch_size=16, optimizer=0.01, compile="graph", progress=False)
    assert model.log_prob(x).mean > -math.log(K) - 0.2
    assert torch.equal(model.complete([[2, 3]], seed=1)[0], (2 + torch.arange(T)) % K)


# --- real numbers -----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(("shape", "likelihood"), [((T,), "gaussian"), ((T, 2), "gaussian_mixture"), ((T, 2), "gaussian")])
def test_real_numbers_may_have_any_units(make, shape, likelihood):
    """Scaled and moved data give the same fit: densities lose log(scale) for each number that counts, and samples follow."""
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).cumsum(1)
    scale, shift = torch.tensor([1000.0, 0.01])[: len(shape)].double(), torch.tensor([300.0, -7.0])[: len(shape)].double()
    scale, shift = (scale, shift) if len(shape) == 2 else (scale[0], shift[0])
    lengths = torch.tensor([7, 1, 2, 3, 4, 5, 6, 7, 7])
    models, found = [], []
    for data in (x, scale * x + shift):
        data = torch.where((torch.arange(T) < lengths[:, None]).reshape(9, T, *[1] * (len(shape) - 1)), data, 0.0)
        model = make(shape, likelihood, None)
        model.fit({"x": data, "lengths": lengths}, steps=4, batch_size=5, compile="eager", progress=False, precision="float64")
        models.append(model)
        found.append(model.log_prob({"x": data, "lengths": lengths}).value)
    each = float(scale.log().sum())
    torch.testing.assert_close(found[1] - found[0], -each * lengths.double(), rtol=1e-8, atol=1e-8)
    for ask in (
        lambda m, x: m.sample(6, seed=1),
        lambda m, x: m.complete(x[:, :3], 2 * T, seed=1),
        lambda m, x: m.next(x[:, :3]).mean,
        lambda m, x: m.predict(x, 2, seed=1, progress=False)["x"],
    ):
        torch.testing.assert_close(ask(models[1], scale * x + shift), scale * ask(models[0], x) + shift)
    sd = [model.next(x[:, :3] if model is models[0] else scale * x[:, :3] + shift).stddev for model in models]
    torch.testing.assert_close(sd[1], scale * sd[0])


@families
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian_mixture"])
def test_the_next_number_has_a_density_in_the_units_of_the_data(make, likelihood):
    model = shaken(make((4,), likelihood, None))
    x = 40 + 20 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.prime({"x": x})
    each = torch.stack([model.next(x[:, :t]).log_prob(x[:, t]) for t in range(4)], 1)
    torch.testing.assert_close(each.sum(1), model.log_prob(x).value)
    fn, grid = model.next(x[:1, :2]), torch.linspace(-4000, 4000, 400_001, dtype=torch.float64)
    density = fn.log_prob(grid).exp() * 0.02
    assert float(density.sum()) == pytest.approx(1, abs=1e-6)
    assert float((density * grid).sum()) == pytest.approx(float(fn.mean), abs=1e-4)
    assert float((density * (grid - fn.mean).square()).sum()) == pytest.approx(float(fn.variance), rel=1e-4)


@families
def test_numbers_are_standardised_by_those_that_count(make):
    data = pad([[5.0, 7.0, 9.0], [7.0], [3.0, 11.0]], length=T)
    model = make((T,), "gaussian", None)
    model.prime({"x": data["x"].double(), "lengths": data["lengths"]})
    assert float(model.observation.shift) == pytest.approx(7) and float(model.observation.scale) == pytest.approx(
        math.sqrt(40 / 6)
    )
    assert not [name for name in make().state_dict() if "shift" in name]  # classes have no units


@families
def test_constant_numbers_are_refused(make):
    good = {"progress": False, "steps": 1}
    message = r"`data` is constant \(0.1 in all 21 positions\), so a Gaussian's density has no bound: give data that vary"
    with pytest.raises(ValueError, match=message):
        make((T,), "gaussian", None).fit(torch.full((3, T), 0.1), **good)
    x = torch.randn(3, T, 2, generator=torch.Generator().manual_seed(1))
    x[..., 1] = -4
    with pytest.raises(ValueError, match=r"number 1 of each position is constant \(-4 in all 21 positions\).*: drop it"):
        make((T, 2), "gaussian_mixture", None).fit(x, **good)


# --- prefixes ---------------------------------------------------------------------------------------------------------------


@families
def test_completions_keep_the_prefix_and_go_on_as_the_next_symbol_does(make):
    model, prefix = shaken(make()), symbols(1, 3).expand(600, 3)
    x = model.complete(prefix, 4, seed=1)
    assert x.shape == (600, 4) and torch.equal(x[:, :3], prefix)
    probs = model.next(prefix[:1]).probs[0]
    share = (x[:, 3, None] == torch.arange(K)).double().mean(0)
    assert bool(((share - probs).abs() < 4.5 * (probs * (1 - probs) / 600).sqrt() + 1e-9).all())
    assert torch.equal(x, model.complete(prefix, 4, seed=1))
    assert not torch.equal(x, model.complete(prefix, 4, seed=2))


@families
def test_completions_may_be_longer_than_what_was_trained_on(make):
    model = shaken(make())
    x = model.complete(symbols(2, 3), 4 * T, seed=1)
    assert x.shape == (2, 4 * T) and int(x.max()) < K
    assert model.next(x).probs.shape == (2, K)


# --- replicates -------------------------------------------------------------------------------------------------------------


@families
def test_replicates_are_drawn_in_one_batched_run_and_follow_their_own_datum(make, monkeypatch):
    model, x = shaken(make(local_dim=LOCAL, context_dim=CONTEXT)), symbols(3)
    context = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
    data = {"x": x, "lengths": torch.tensor([7, 2, 4]), "local": conditions(model, 3), "context": context}
    batches, start = [], model.network.start
    monkeypatch.setattr(model.network, "start", lambda batch, *told: batches.append(batch) or start(batch, *told))
    found = model.predict(data, 300, seed=1, progress=False)["x"]
    assert batches == [900] and found.shape == (300, 3, T)
    assert bool((found[:, 1, 2:] == 0).all() and (found[:, 2, 4:] == 0).all())
    for i in range(3):
        probs = model.next(x[i : i + 1, :0], context[i : i + 1], local=data["local"][i : i + 1, :1]).probs[0]
        share = (found[:, i, 0, None] == torch.arange(K)).double().mean(0)
        assert bool(((share - probs).abs() < 4.5 * (probs * (1 - probs) / 300).sqrt() + 1e-9).all())
    assert len(found[:, 0].unique(dim=0)) > 20
    assert torch.equal(found, model.predict(data, 300, seed=1, compile="graph", progress=False)["x"])
    assert not torch.equal(found, model.predict(data, 300, seed=2, progress=False)["x"])


class Echo(torch.nn.Module):
    """Every symbol says whether the context is positive."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1e4))

    def start(self, batch, context):
        return [context.clone()]

    def step(self, state, t, previous):
        return self.gain * state[0], state


class Latent(GenerativeModel):
    """z ~ N(0, 1), one for each datum or one for all, and four symbols that say its sign."""

    stepwise = True

    def __init__(self, shared):
        super().__init__((4,))
        self.shared, self.network = shared, Echo()

    def guide(self, x=None, context=None):
        with contextlib.nullcontext() if self.shared else self.plate(x, context):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

    def model(self, x=None, context=None):
        z = self.guide(x, context) if self.shared else None
        with self.plate(x, context):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if z is None else z.expand(len(x))
            fn = Autoregressive(self.network, Bernoulli(()), (4,), context=z.unsqueeze(-1))
            return pyro.sample("x", fn, obs=x)


@pytest.mark.parametrize("shared", [False, True])
def test_replicates_have_latents_of_their_own_and_share_those_that_data_share(shared):
    found = Latent(shared).predict(torch.zeros(5, 4), 40, seed=3, progress=False)["x"]
    assert found.shape == (40, 5, 4) and torch.equal(found, found[..., :1].expand_as(found))
    assert len(found[:, 0, 0].unique()) == 2
    assert bool((found == found[:, :1]).all()) is shared


# --- data -------------------------------------------------------------------------------------------------------------------


def test_mu_law_and_back():
    classes = torch.arange(256)
    assert torch.equal(mu_law(mu_law_inverse(classes)), classes)
    x = torch.linspace(-1, 1, 1001)
    assert float((mu_law_inverse(mu_law(x)) - x).abs().max()) < 0.03
    with pytest.raises(ValueError, match=r"`x` should lie in \[-1, 1\], got 40; divide it"):
        mu_law(torch.tensor([3.0, -40.0]))
    with pytest.raises(ValueError, match="should lie in"):
        mu_law(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="`levels` should be 2 or more, got 1"):
        mu_law(torch.zeros(1), levels=1)


def test_padding_and_windows():
    assert pad([[1, 2], [0.5]])["x"].tolist() == [[1.0, 2.0], [0.5, 0.0]]
    found = pad([torch.ones(2, 3), torch.ones(4, 3)])
    assert found["x"].shape == (2, 4, 3) and found["lengths"].tolist() == [2, 4] and float(found["x"].sum()) == 18
    assert windows(torch.zeros(10, 3), 4).shape == (2, 4, 3)
    with pytest.raises(ValueError, match="sequence 1 has length 0, expected 1 to 2"):
        pad([[1.0, 2.0], []])
    with pytest.raises(ValueError, match="sequence 0 has length 3, expected 1 to 2; drop it or cut it"):
        pad([[1, 2, 3]], length=2)
    with pytest.raises(ValueError, match=r"sequence 1 has elements of shape \(2,\), the first \(3,\)"):
        pad([torch.ones(2, 3), torch.ones(2, 2)])
    with pytest.raises(ValueError, match="at least length=4"):
        windows([1, 2, 3], 4)


# --- errors -----------------------------------------------------------------------------------------------------------------


@families
def test_bad_input_is_refused_in_one_line(make):
    model = make()
    good = {"progress": False, "steps": 1}
    ragged = [[1, 2, 3], [1, 2]]
    with pytest.raises(ValueError, match=r"`data` is ragged.*pad them and give the lengths, data=pgen.data.pad"):
        model.fit(ragged, **good)
    with pytest.raises(ValueError, match=r"`data` is ragged.*pgen.data.pad"):
        model.fit([torch.tensor(row) for row in ragged], **good)
    x = symbols(4)
    x[2, 5] = K
    with pytest.raises(ValueError, match=r"data row 2 holds 4, outside the support IntegerInterval\(.*upper_bound=3"):
        model.fit(x, **good)
    with pytest.raises(ValueError, match="data row 2 holds 4, outside the support"):
        model.log_prob(x)
    with pytest.raises(ValueError, match="`prefix` holds 4, outside the support"):
        model.next(x)
    with pytest.raises(ValueError, match=r"`prefix` should have shape \(N, t\), got \(3,\); did you mean prefix\[None\]"):
        model.complete(torch.zeros(3))
    with pytest.raises(ValueError, match="more than length=3; give a larger length"):
        model.complete(torch.zeros(1, 5), 3)
    for lengths, message in (([1, 8], "got 8 at row 1"), ([0, 2], "got 0 at row 0"), ([1.5, 2], "got 1.5 at row 0")):
        with pytest.raises(ValueError, match=f"`lengths` should be whole numbers from 1 to {T}, {message}"):
            model.log_prob({"x": symbols(2), "lengths": torch.tensor(lengths)})
    with pytest.raises(ValueError, match="`lengths` has 3 entries for 2 data"):
        model.log_prob({"x": symbols(2), "lengths": torch.tensor([1, 2, 3])})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WaveNet((5,)), "`num_classes` is missing"),
        (lambda: WaveNet((5, 2, 2), num_classes=2), r"`event_shape` should be \(T,\) or \(T, F\)"),
        (lambda: WaveNet((5,), num_classes=2, dilations=()), "`dilations` should be positive numbers"),
        (lambda: WaveNet((5,), num_classes=2, kernel_size=1), "`kernel_size` should be 2 or more taps"),
        (lambda: WaveNet((5,), num_classes=2, dropout=1.0), r"`dropout` should lie in \[0, 1\)"),
        (lambda: WaveNet((5,), num_classes=2, local_dim=-1), r"`local_dim` should be 0 \(no local condition\) or the size"),
        (lambda: WaveNet((5,), num_classes=2, local_hop=2), "`local_hop` goes with a local condition: give local_dim="),
        (lambda: WaveNet((5,), num_classes=2, local_dim=1, local_hop=0), "`local_hop`"),
        (lambda: CausalTransformer((5,), num_classes=2, width=6, heads=4), "`width` should be a multiple of heads=4"),
        (lambda: CausalTransformer((5,), "nothing"), "`likelihood`"),
    ],
)
def test_constructors_check_their_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dilations_double_until_the_sequence_is_seen():
    assert WaveNet((100,), num_classes=2).dilations == (1, 2, 4, 8, 16, 32, 64)
    assert WaveNet((9000,), num_classes=2).dilations[-1] == 512


@families
def test_dropout_is_off_when_questions_are_asked(make, tmp_path):
    model, x = shaken(make(dropout=0.5)), symbols(3)
    assert torch.equal(model.log_prob(x).value, model.log_prob(x).value)
    model.save(tmp_path / "m.pgen")
    again = pgen.load(tmp_path / "m.pgen")
    assert again.settings() == model.settings() and torch.equal(again.sample(3), model.sample(3))


@families
def test_the_default_recipe_lets_the_user_decide(make):
    _, settings = make()._default_optimizer(pgen.Training())
    assert settings.clip_norm == 1.0 and settings.schedule == "cosine"
    _, settings = make()._default_optimizer(pgen.Training(clip_norm=0.5, schedule="linear"))
    assert settings.clip_norm == 0.5 and settings.schedule == "linear"
    _, settings = make()._default_optimizer(pgen.Training(stop="converged"))
    assert settings.schedule is None
