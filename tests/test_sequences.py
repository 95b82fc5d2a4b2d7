"""Families of sequences: causal, exact, with lengths, prefixes and completions."""

import math

import pytest
import torch

import pgen
from pgen.data import mu_law, mu_law_inverse, pad, windows
from pgen.distributions import stepping
from pgen.evaluation.steps import Steps
from pgen.models import CausalTransformer, WaveNet
from pgen.programs import isolated

T, K, CONTEXT = 7, 4, 2


def wavenet(shape=(T,), likelihood="categorical", num_classes=K, **options):
    return WaveNet(shape, likelihood, num_classes, **{"channels": 6, "dilations": (1, 2), **options}).double()


def transformer(shape=(T,), likelihood="categorical", num_classes=K, **options):
    return CausalTransformer(shape, likelihood, num_classes, **{"width": 8, "layers": 2, "heads": 2, **options}).double()


families = pytest.mark.parametrize("make", [wavenet, transformer])


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


@families
def test_fits_see_lengths_and_agree_in_both_tiers(make):
    data = pad([row[: 2 + i % 5] for i, row in enumerate(symbols(20))], length=T)
    losses = []
    for tier in ("eager", "graph"):
        model = make()
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
