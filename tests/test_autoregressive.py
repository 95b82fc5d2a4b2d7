"""Autoregressive distributions: exact, causal, and the same symbols however they are drawn."""

import itertools

import pyro
import pytest
import torch
from torch import nn

from pgen.base import FAMILIES, GenerativeModel
from pgen.distributions import Autoregressive, Bernoulli, Categorical, DiscretizedLogistic, Gaussian, GaussianMixture, stepping
from pgen.evaluation.steps import Steps
from pgen.programs import isolated


class Window(nn.Module):
    """A network that looks ``reach`` positions back, through a ring that its steps write in place."""

    def __init__(self, inputs, outputs, reach=2, context_dim=0):
        super().__init__()
        self.reach, self.inputs = reach, inputs
        self.linear = nn.Linear(inputs * reach + context_dim, outputs, dtype=torch.float64)

    def forward(self, x, context):
        rows = x.reshape(*x.shape[:2], self.inputs)
        padded = torch.cat([rows.new_zeros(len(rows), self.reach, self.inputs), rows], 1)
        seen = [padded[:, self.reach - 1 - i : self.reach - 1 - i + x.shape[1]] for i in range(self.reach)]
        more = [] if context is None else [context.unsqueeze(1).expand(-1, x.shape[1], -1)]
        return self.linear(torch.cat([*seen, *more], -1))

    def start(self, batch, context):
        ring = self.linear.weight.new_zeros(batch, self.reach, self.inputs)
        return [ring] if context is None else [ring, context]

    def step(self, state, t, previous):
        ring, *more = state
        ring.index_copy_(1, (t % self.reach).reshape(1), previous.reshape(len(previous), 1, -1))
        places = (t - torch.arange(self.reach)) % self.reach
        return self.linear(torch.cat([ring[:, places].flatten(1), *more], -1)), state


OBSERVATIONS = {
    "bernoulli": Bernoulli(()), "categorical": Categorical((), 3), "gaussian": Gaussian(()), "notes": Bernoulli((2,)),
    "gaussians": GaussianMixture((), 3), "logistics": DiscretizedLogistic((), 6, 2),
}  # fmt: skip


def made(name, T=5, context=None, **options):
    observation = OBSERVATIONS[name]
    inputs = 2 if name == "notes" else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Window(inputs, observation.outputs * inputs, context_dim=0 if context is None else context.shape[-1])
    options.setdefault("event_shape", (T, *observation.event_shape))
    return Autoregressive(network, observation, context=context, **options)


def seeded(fn):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return fn()


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_steps_draw_what_whole_passes_would(name):
    fn = made(name, context=torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))

    def naive():
        x = torch.zeros(3, *fn.event_shape, dtype=torch.float64)
        for t in range(5):
            x[:, t] = fn.observation.draw(fn.network(x, fn.context)[:, t], torch.tensor(t)).double()
        return x

    torch.testing.assert_close(seeded(fn.sample).double(), seeded(naive), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("compile", ["graph", "compiled"])
def test_tiers_draw_the_same(name, compile):
    fn = made(name, batch_shape=(3,))
    steps = Steps([*fn.network.parameters()], compile=compile)
    with isolated(), stepping(steps):
        found = [seeded(fn.sample) for _ in range(2)]
    assert steps.tier == compile
    for x in found:
        torch.testing.assert_close(x, seeded(fn.sample), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "values"), [("bernoulli", 2), ("categorical", 3), ("logistics", 6)])
def test_masses_sum_to_one_and_are_products_of_the_next_ones(name, values):
    fn = made(name, T=4)
    x = torch.tensor(list(itertools.product(range(values), repeat=4)), dtype=torch.float64)
    torch.testing.assert_close(fn.log_prob(x).exp().sum(), torch.ones((), dtype=torch.float64))
    each = torch.stack([fn.next(x[:, :t]).log_prob(x[:, t]) for t in range(4)], 1)
    torch.testing.assert_close(each, fn.log_probs(x))


def test_positions_behind_the_length_have_no_density_and_are_zero_in_samples():
    lengths = torch.tensor([1, 4, 2])
    fn = made("gaussian", T=4, lengths=lengths)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short = [made("gaussian", T=int(n)).log_prob(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    torch.testing.assert_close(fn.log_prob(x), torch.stack(short))
    drawn = seeded(fn.sample)
    assert ((drawn != 0).sum(1) == lengths).all()


def test_an_order_says_which_numbers_are_at_each_position():
    order = torch.tensor([[5, 2], [1, 0], [3, 4]])
    fn, plain = made("notes", event_shape=(2, 3), order=order), made("notes", T=3)
    x = torch.bernoulli(torch.full((4, 2, 3), 0.5, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fn.log_prob(x), plain.log_prob(x.flatten(1)[:, order]))
    drawn = seeded(lambda: fn.sample((4,)))
    assert torch.equal(drawn.flatten(1)[:, order], seeded(lambda: plain.sample((4,))))


def test_completions_keep_what_is_observed():
    fn = made("categorical", T=5)
    x = torch.tensor([[2.0, 1, 0, 2, 1]]).double().expand(400, 5)
    observed = torch.tensor([1, 1, 0, 0, 1]).bool().expand(400, 5)
    found = seeded(lambda: fn.complete(x, observed))
    assert torch.equal(found[observed], x[observed].long()) and not torch.equal(found, x.long())
    share = (found[:, 2, None] == torch.arange(3)).double().mean(0)
    probs = fn.next(x[:1, :2]).probs[0]
    assert bool(((share - probs).abs() < 4 * (probs * (1 - probs) / 400).sqrt()).all())


def test_it_broadcasts_over_contexts():
    context = torch.randn(3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fn = made("bernoulli", context=context).expand((3, 4))
    x = torch.ones(4, 5, dtype=torch.float64)
    found = fn.log_prob(x)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found[1], made("bernoulli", context=context[1, 0].expand(4, 2)).log_prob(x))
    assert seeded(fn.sample).shape == (3, 4, 5)


class Stepwise(GenerativeModel):
    stepwise = True

    def __init__(self):
        super().__init__((6,))
        with self.initial_weights(0):
            self.network = Window(1, 3).float()

    def model(self, x=None, context=None):
        with self.plate(x, context):
            return pyro.sample("x", Autoregressive(self.network, Categorical((), 3), self.event_shape), obs=x)


def test_a_family_samples_in_every_tier():
    assert "" not in FAMILIES
    model = Stepwise()
    eager = model.sample(7, seed=1, compile="eager")
    assert eager.shape == (7, 6) and eager.unique().tolist() == [0, 1, 2]
    for tier in ("graph", "compiled", "auto"):
        assert torch.equal(model.sample(7, seed=1, compile=tier), eager)
    assert not torch.equal(model.sample(7, seed=2), eager)


def test_a_step_that_looks_at_values_is_refused_in_one_line():
    model = Stepwise()
    looks = model.network.step
    model.network.step = lambda state, t, previous: looks(state, t, previous) if int(t) >= 0 else None
    with pytest.raises(ValueError, match=r"compile='graph' cannot be had.*control flow depends on tensor values"):
        model.sample(2, compile="graph")
    assert model.sample(2).shape == (2, 6)
