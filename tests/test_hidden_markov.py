"""Hidden Markov models against sums over all paths, Pyro's enumeration and hand-made answers."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded

import pgen
from pgen.data import pad
from pgen.models import HiddenMarkov

STATES, LENGTH, SYMBOLS = 3, 5, 4


def chain(likelihood="categorical", frame=(), length=LENGTH, seed=2, **options):
    options = {"num_classes": SYMBOLS, **options} if likelihood == "categorical" else options
    model = HiddenMarkov((length, *frame), STATES, likelihood, seed=seed, **options).double()
    for parameter in model.parameters():  # far from uniform
        parameter.data.mul_(5)
    return model


def data(model, n=6, seed=1):
    return model.sample(n, seed=seed).double()


def parts(model, x):
    """log initial, log transition, log emission (N, T, K), written down again."""
    arrays = {name: value.detach() for name, value in model.arrays(None).items()}
    if "shift" in arrays:
        each = torch.distributions.Normal(arrays["shift"], (-arrays["log_precision"]).exp())
        emission = each.log_prob(x.flatten(2)[:, :, None]).sum(-1)
    elif model.num_classes:
        table = arrays["logits"].log_softmax(-1)  # (K, 1, classes)
        emission = torch.stack([table[:, 0, int(v)] for v in x.flatten()]).unflatten(0, x.shape)
    else:
        emission = torch.distributions.Bernoulli(logits=arrays["logits"]).log_prob(x.flatten(2)[:, :, None]).sum(-1)
    return arrays["initial"].log_softmax(-1), arrays["transition"].log_softmax(-1), emission


def paths(model, x, length=None):
    """log p(x, z) of every path, (N, K^T), and the paths."""
    initial, transition, emission = parts(model, x)
    length = length or x.shape[1]
    every = list(itertools.product(range(STATES), repeat=length))
    scores = []
    for path in every:
        score = initial[path[0]] + emission[:, 0, path[0]]
        for t in range(1, length):
            score = score + transition[path[t - 1], path[t]] + emission[:, t, path[t]]
        scores.append(score)
    return torch.stack(scores, 1), torch.tensor(every)


def given():
    """A chain with a context."""
    return chain(context_dim=2).float()


KINDS = pytest.mark.parametrize(("likelihood", "frame"), [("categorical", ()), ("gaussian", (2,)), ("bernoulli", (3,))])


@KINDS
def test_the_sum_over_all_paths(likelihood, frame):
    model = chain(likelihood, frame)
    x = data(model)
    score = model.log_prob(x)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, torch.logsumexp(paths(model, x)[0], 1), rtol=1e-10, atol=1e-10)


@KINDS
def test_states_and_most_probable_paths(likelihood, frame):
    model = chain(likelihood, frame)
    x = data(model)
    scores, every = paths(model, x)
    weights = scores.softmax(1)
    marginals = torch.stack([(weights[:, :, None] * (every == k)).sum(1) for k in range(STATES)], -1)
    torch.testing.assert_close(model.states(x), marginals)
    assert torch.equal(model.viterbi(x), every[scores.argmax(1)])


def test_paths_move_where_emissions_say_nothing():
    model = HiddenMarkov((4,), 2, num_classes=1)  # every log-density is zero
    model.place([1.0, 0.0], [[0.0, 1.0], [1.0, 0.0]])
    assert model.viterbi(torch.zeros(2, 4), torch.tensor([4, 3])).tolist() == [[0, 1, 0, 1], [0, 1, 0, -1]]


def test_smoothing_counts_frames_that_the_start_has_not_seen(monkeypatch):
    monkeypatch.setattr(pgen.models.hidden_markov, "START_ROWS", 10)
    model = HiddenMarkov((5,), 2, num_classes=2)
    model.fit({"x": torch.arange(40.0).reshape(8, 5) % 2, "lengths": torch.tensor([5, 4] * 4)}, steps=1, progress=False)
    assert float(model.components.num_data) == 36


def test_the_same_by_enumeration_in_pyro():
    model = chain()
    x = data(model)
    initial, transition, _ = parts(model, x)
    table = model.arrays.logits.detach()[:, 0]

    def program(x):
        with pyro.plate("data", len(x)):
            z = None
            for t in pyro.markov(range(LENGTH)):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=initial if z is None else transition[z]))
                pyro.sample(f"x_{t}", dist.Categorical(logits=table[z]), obs=x[:, t])

    pair = pgen.Pair(program)
    pair.materialize(x, len(x), minibatch=False)
    torch.testing.assert_close(model.log_prob(x).value, pair.log_prob(x).value, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_sums_in_log_space():
    model = chain("bernoulli", (3,), smoothing=0.0)
    x = data(model)
    found = next(model.gradients(x))
    arrays = {name: p.detach().requires_grad_() for name, p in model.arrays.named_parameters()}
    emission = torch.distributions.Bernoulli(logits=arrays["logits"]).log_prob(x[:, :, None]).sum(-1)
    alpha = arrays["initial"].log_softmax(-1) + emission[:, 0]
    for t in range(1, LENGTH):
        alpha = torch.logsumexp(alpha[:, :, None] + arrays["transition"].log_softmax(-1), 1) + emission[:, t]
    (-torch.logsumexp(alpha, 1).mean()).backward()
    for name, array in arrays.items():
        torch.testing.assert_close(found[f"arrays.{name}"], array.grad)


def test_lengths_cut_sequences():
    model = chain()
    x = data(model)
    lengths = torch.tensor([1, 2, 3, 4, 5, 2])
    junk = torch.where(torch.arange(LENGTH) < lengths[:, None], x, torch.tensor(math.nan).double())
    found = model.log_prob({"x": junk, "lengths": lengths})
    states, path = model.states(junk, lengths), model.viterbi(junk, lengths)
    for row, n in enumerate(lengths.tolist()):
        scores, every = paths(model, x[row : row + 1, :n])
        assert float(found.value[row]) == pytest.approx(float(torch.logsumexp(scores, 1)), abs=1e-10)
        assert path[row, :n].tolist() == every[int(scores.argmax())].tolist() and bool((path[row, n:] == -1).all())
        last = torch.stack([(scores.softmax(1)[0] * (every[:, -1] == k)).sum() for k in range(STATES)])
        torch.testing.assert_close(states[row, n - 1], last)
        assert not states[row, n:].any()
    assert found.event_size == pytest.approx(17 / 6)


def test_the_next_symbol_is_a_ratio_of_densities():
    model = chain()
    prefix = data(model)[:, :3]
    probs = model.next(prefix).probs
    longer = HiddenMarkov((4,), STATES, num_classes=SYMBOLS).double()
    longer.load_state_dict(model.state_dict())
    shorter = HiddenMarkov((3,), STATES, num_classes=SYMBOLS).double()
    shorter.load_state_dict(model.state_dict())
    for symbol in range(SYMBOLS):
        ahead = torch.cat([prefix, torch.full((6, 1), float(symbol)).double()], 1)
        ratio = longer.log_prob(ahead).value - shorter.log_prob(prefix).value
        torch.testing.assert_close(probs[:, symbol].log(), ratio)
    first = HiddenMarkov((1,), STATES, num_classes=SYMBOLS).double()
    first.load_state_dict(model.state_dict())
    ahead = torch.arange(SYMBOLS)[:, None].double()
    torch.testing.assert_close(model.next(torch.zeros(1, 0)).probs[0].log(), first.log_prob(ahead).value)


@pytest.mark.parametrize(
    ("likelihood", "frame"), [("gaussian", (2,)), ("bernoulli", (3,)), ("gaussian", ()), ("bernoulli", ())]
)
def test_the_next_frame_has_a_density_and_draws(likelihood, frame):
    model = chain(likelihood, frame)
    x = data(model)
    longer = chain(likelihood, frame, length=4)
    shorter = chain(likelihood, frame, length=3)
    for other in (longer, shorter):
        other.load_state_dict(model.state_dict())
    found = model.next(x[:, :3])
    ratio = longer.log_prob(x[:, :4]).value - shorter.log_prob(x[:, :3]).value
    torch.testing.assert_close(found.log_prob(x[:, 3]), ratio)
    with torch.random.fork_rng(devices=[]):
        assert found.sample().shape == x[:, 3].shape


def test_the_next_frame_of_several_kinds_is_a_ratio_of_densities():
    model = HiddenMarkov((4, 3), 2, columns=["continuous", "binary", ("categorical", 3)], seed=3)
    parts = torch.arange(20).reshape(5, 4)
    x = torch.stack([parts / 10 - 1, parts % 2, parts % 3], -1)
    fn = model.next(x[:, :2])
    assert fn.batch_shape == (5,) and fn.sample((7,)).shape == (7, 5, 3)
    two, three = (model.log_prob({"x": x, "lengths": torch.full((5,), n)}).value for n in (2, 3))
    torch.testing.assert_close(fn.log_prob(x[:, 2]).double(), three - two, rtol=1e-5, atol=1e-5)
    grid = torch.cartesian_prod(torch.arange(-8, 8, 0.05), torch.ones(1), torch.arange(3.0))  # the second number is one
    share = float(fn.log_prob(grid[:, None].expand(-1, 5, -1)).exp().sum(0)[0] * 0.05)
    assert float(fn.sample((4000,))[:, 0, 1].mean()) == pytest.approx(share, abs=0.03)


def test_samples_move_as_the_chain_does():
    model = HiddenMarkov((50,), 2, num_classes=2)
    model.place([1.0, 0.0], [[0.9, 0.1], [0.3, 0.7]])
    model.arrays.set({"logits": torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]])})  # each state says its number
    x = model.sample(400, seed=3)
    before, after = x[:, :-1].flatten(), x[:, 1:].flatten()
    assert not x[:, 0].any()
    assert float(after[before == 0].double().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(after[before == 1].double().mean()) == pytest.approx(0.7, abs=0.02)


def test_long_and_impossible_sequences_stay_finite():
    model = HiddenMarkov((3000,), 2, "gaussian")
    x = torch.zeros(2, 3000)
    x[1] = 1e4
    score = model.log_prob(x)
    assert bool(torch.isfinite(score.value).all()) and float(score.value[1]) < -1e9
    blocked = HiddenMarkov((2,), 2, num_classes=2)
    blocked.place([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    blocked.arrays.set({"logits": torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]])})
    assert -80 < float(blocked.log_prob(torch.tensor([[0.0, 1.0]])).value) < -60  # log 1e-30


def test_a_fit_finds_the_chain_again():
    truth = HiddenMarkov((12,), 2, num_classes=3)
    truth.place([0.5, 0.5], [[0.95, 0.05], [0.1, 0.9]])
    truth.arrays.set({"logits": torch.tensor([[[0.8, 0.1, 0.1]], [[0.1, 0.1, 0.8]]]).log()})
    train, test = truth.sample(800, seed=1), truth.sample(800, seed=2)
    model = HiddenMarkov((12,), 2, num_classes=3)
    model.fit(train, steps=200, compile="graph", progress=False)
    assert model.log_prob(test).mean > truth.log_prob(test).mean - 0.05  # nats a sequence of 12
    order = [0, 1] if float(model.transition()[0, 0]) > float(model.transition()[1, 1]) else [1, 0]
    np.testing.assert_allclose(model.transition()[order][:, order].numpy(), [[0.95, 0.05], [0.1, 0.9]], atol=0.04)


def test_padded_sequences_and_tiers_agree():
    batch = pad([torch.bernoulli(torch.full((n, 3), 0.5)) for n in (4, 6, 2, 5)])
    found = []
    for tier in ("eager", "graph"):
        model = HiddenMarkov((6, 3), 3, "bernoulli")
        model.fit(batch, steps=4, compile=tier, progress=False)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# --- contexts ------------------------------------------------------------------------------------------------------------

CONTEXT = 2


def conditioned(likelihood="categorical", frame=(), n=6, **options):
    """A chain whose network matters, contexts, and for each context the chain without one that has its arrays."""
    model = chain(likelihood, frame, context_dim=CONTEXT, hidden=(7,), **options)
    for parameter in model.arrays.network.parameters():  # of order one
        parameter.data.div_(2)
    context = seeded(lambda: torch.randn(n, CONTEXT, dtype=torch.float64))
    arrays = {name: value.detach() for name, value in model.arrays(context).items()}
    alone = [chain(likelihood, frame, **options) for _ in range(n)]
    for row, one in enumerate(alone):
        one.arrays.set({name: value[row] for name, value in arrays.items()})
    return model, context, alone


@KINDS
def test_each_context_has_a_sum_over_all_paths_of_its_own(likelihood, frame):
    model, context, alone = conditioned(likelihood, frame)
    x = model.sample(6, context, seed=1).double()
    score, states, best = model.log_prob(x, context), model.states(x, context=context), model.viterbi(x, context=context)
    assert score.kind == "exact"
    for row, one in enumerate(alone):
        scores, every = paths(one, x[row : row + 1])
        assert float(score.value[row]) == pytest.approx(float(torch.logsumexp(scores, 1)), abs=1e-10)
        marginals = torch.stack([(scores.softmax(1)[0, :, None] * (every == k)).sum(0) for k in range(STATES)], -1)
        torch.testing.assert_close(states[row], marginals)
        assert torch.equal(best[row], every[scores.argmax()])
    assert not torch.allclose(score.value, model.log_prob(x, context[:1]).value)
    assert model.initial(context).shape == (6, STATES) and model.transition(context).shape == (6, STATES, STATES)
    torch.testing.assert_close(model.transition(context)[4], alone[4].transition())


@pytest.mark.parametrize(
    ("likelihood", "options"),
    [
        ("gaussian", {"covariance": "full"}),
        ("gaussian", {"covariance": "tied"}),
        ("gaussian", {"covariance": "spherical"}),
        (None, {"columns": ["continuous", "binary", ("categorical", 3), "continuous"]}),
    ],
)
def test_each_context_has_the_chain_of_its_arrays(likelihood, options):
    model, context, alone = conditioned(likelihood, (4,), **options)
    x, lengths = model.sample(6, context, seed=1).double(), torch.tensor([5, 1, 2, 5, 4, 3])
    found = model.log_prob({"x": x, "lengths": lengths, "context": context}).value
    states, best = model.states(x, lengths, context), model.viterbi(x, lengths, context)
    after = model.next(x[:, :2], context)
    density = after.log_prob(x[:, 2])
    for row, one in enumerate(alone):
        given = {"x": x[row : row + 1], "lengths": lengths[row : row + 1]}
        torch.testing.assert_close(found[row : row + 1], one.log_prob(given).value)
        torch.testing.assert_close(states[row : row + 1], one.states(*given.values()))
        assert torch.equal(best[row : row + 1], one.viterbi(*given.values()))
        torch.testing.assert_close(density[row], one.next(x[row : row + 1, :2]).log_prob(x[row : row + 1, 2])[0])
    with torch.random.fork_rng(devices=[]):
        assert after.sample((3,)).shape == (3, 6, 4)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_the_next_symbol_depends_on_the_context(likelihood):
    model, context, alone = conditioned(likelihood)
    prefix = model.sample(6, context, seed=1).double()[:, :3]
    for start in (prefix, prefix[:, :0]):
        found = model.next(start, context).probs
        torch.testing.assert_close(found, torch.cat([one.next(s[None]).probs for one, s in zip(alone, start)]))
    torch.testing.assert_close(model.next(prefix, context[:1]).probs[0], model.next(prefix[:1], context[:1]).probs[0])


def test_samples_under_each_context_are_those_of_its_density():
    from pyro.distributions.testing.gof import multinomial_goodness_of_fit

    model = HiddenMarkov((3,), 2, num_classes=2, context_dim=CONTEXT, hidden=(4,), seed=3).double()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    context = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).double()
    x = model.sample(20_000, context.repeat(10_000, 1), seed=5).double()
    probs = [model.log_prob(every, c[None]).value.exp() for c in context]
    assert float((probs[0] - probs[1]).abs().max()) > 0.1
    for row in range(2):
        counts = torch.bincount((x[row::2] @ torch.tensor([4.0, 2.0, 1.0]).double()).long(), minlength=8)
        assert multinomial_goodness_of_fit(probs[row], counts, total_count=10_000) > 1e-4  # the share of right models that fail


def test_two_contexts_get_their_transitions_back():
    moves = torch.tensor([[[0.95, 0.05], [0.1, 0.9]], [[0.1, 0.9], [0.7, 0.3]]])
    classes, truths = torch.arange(1000) % 2, []
    x = torch.zeros(1000, 8)
    for k in range(2):
        truth = HiddenMarkov((8,), 2, num_classes=3)
        truth.place([0.5, 0.5], moves[k])
        truth.arrays.set({"logits": torch.tensor([[[0.98, 0.01, 0.01]], [[0.01, 0.01, 0.98]]]).log()})
        x[classes == k] = truth.sample(500, seed=k).float()
        truths.append(truth)
    classifier = pgen.models.GenerativeClassifier(HiddenMarkov((8,), 2, num_classes=3, context_dim=2))
    classifier.fit(x, classes, steps=150, compile="graph", progress=False)
    model, each = classifier.models[0], torch.eye(2)
    symbols = model.arrays(each)["logits"].detach()[:, :, 0].softmax(-1)
    for k in range(2):
        order = symbols[k, :, 0].argsort(descending=True)  # the state that says 0 comes first
        # Shares of some 500 * 7 / 2 moves have standard errors of at most 0.011; symbols all but show the states.
        torch.testing.assert_close(model.transition(each)[k][order][:, order], moves[k], rtol=0, atol=0.045)
    test = torch.cat([truth.sample(500, seed=7 + k) for k, truth in enumerate(truths)])
    scores = torch.stack([truth.log_prob(test).value for truth in truths], 1)
    own = torch.arange(1000) // 500
    found, best = ((guess == own).double().mean() for guess in (classifier.predict(test), scores.argmax(1)))
    assert float(found) > float(best) - 0.01 > 0.9


@pytest.mark.filterwarnings("ignore:every datum has the same context")
def test_a_fit_with_a_context_starts_at_the_chain_without_one():
    x = torch.bernoulli(torch.full((40, 6, 3), 0.5))
    plain, model = (HiddenMarkov((6, 3), 3, "bernoulli", context_dim=dim) for dim in (0, 1))
    for each, given in ((plain, {}), (model, {"context": torch.ones(40, 1)})):
        each.fit(x, **given, steps=1, optimizer=1e-12, progress=False)
    for name in plain.arrays.shapes:
        torch.testing.assert_close(getattr(model.arrays, name), getattr(plain.arrays, name))
    ahead = model.log_prob(x, context=torch.ones(40, 1)).mean - plain.log_prob(x).mean
    assert abs(ahead) < 0.5  # nats a sequence of 18 bits


def test_smoothing_adds_its_counts_under_every_context():
    model, context, alone = conditioned(num_classes=3)
    x = model.sample(6, context, seed=1).double()
    for each in (model, *alone):
        each.smoothing, each.components.smoothing = 2.0, 2.0
        each.num_data.fill_(6)
        each.components.num_data.fill_(6 * LENGTH)
    arrays = {name: value.detach().requires_grad_() for name, value in model.arrays(context).items()}
    chains = model._chain(arrays["initial"], arrays["transition"])
    symbols = {"logits": arrays["logits"]}
    fn = pgen.distributions.markov.HiddenMarkovChain(*chains, model.components, symbols, (LENGTH,))
    fn.log_prob(x).sum().backward()
    for row, one in enumerate(alone):
        one.distribution().log_prob(x[row : row + 1]).sum().backward()
        for name in ("initial", "transition", "logits"):
            torch.testing.assert_close(arrays[name].grad[row], getattr(one.arrays, name).grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
def test_tiers_agree_with_a_context(tmp_path):
    batch = pad([torch.bernoulli(torch.full((n, 3), 0.5)) for n in (4, 6, 2, 5)])
    context, found = seeded(lambda: torch.randn(4, CONTEXT)), []
    for tier in ("eager", "graph", "compiled"):
        model = HiddenMarkov((6, 3), 3, "bernoulli", context_dim=CONTEXT, hidden=(5,))
        model.fit({**batch, "context": context}, steps=4, compile=tier, progress=False)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "chain.pgen")
    again = pgen.load(tmp_path / "chain.pgen")
    assert again.settings() == model.settings()
    assert torch.equal(again.states(**batch, context=context), model.states(**batch, context=context))


def test_questions_about_latents_point_to_states():
    with pytest.raises(pgen.NotAvailable, match=r"its states are summed out; ask for states\(x\), viterbi\(x\)"):
        chain().float().posterior(torch.zeros(1, LENGTH))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.log_prob(torch.tensor([[0.0, 1.0, 4.0, 0.0, 0.0]])), "data row 0 holds 4, outside the support"),
        (lambda m: m.log_prob({"x": torch.zeros(1, 5), "lengths": torch.tensor([6])}), "whole numbers from 1 to 5, got 6"),
        (lambda m: m.log_prob({"x": torch.zeros(2, 5), "lengths": torch.tensor([5])}), "`lengths` has 1 entries for 2 data"),
        (lambda m: m.next(torch.zeros(3, 2, 2)), "`prefix` should have shape"),
        (lambda m: HiddenMarkov((5,), 3), "`num_classes` is missing"),
        (lambda m: HiddenMarkov((5,), 0, num_classes=2), "`num_states` should be a positive integer"),
        (lambda m: m.fit({"x": torch.zeros(2, 5), "length": torch.ones(2)}), "has 'length', which HiddenMarkov does not take"),
        (lambda m: m.states(torch.zeros(2, 5), context=torch.zeros(2, 1)), "this model was made without context"),
        (lambda m: given().log_prob(torch.zeros(2, 5)), r"made with context_dim=2; give `context`, shape \(N, 2\)"),
        (lambda m: given().sample(2), "give `context`"),
        (lambda m: given().transition(), "give `context`"),
        (lambda m: given().next(torch.zeros(2, 1)), "give `context`"),
        (lambda m: given().viterbi(torch.zeros(2, 5), None, torch.zeros(2, 3)), r"should have shape \(N, 2\), got \(2, 3\)"),
        (lambda m: given().next(torch.zeros(2, 1), torch.zeros(3, 2)), "`context` has 3 rows for 2 data"),
        (lambda m: HiddenMarkov((5,), 3, num_classes=2, context_dim=-1), "`context_dim` should be 0"),
    ],
)
def test_bad_arguments_are_one_line(ask, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(chain().float())
    assert "\n" not in str(caught.value)


def test_seeded_weights_differ():
    first, second = (seeded(lambda s=s: chain(seed=s)) for s in (0, 1))
    assert not torch.equal(first.arrays.logits, second.arrays.logits)
