"""MADE: what each output may see, what an order and a mixture of orders are, and columns of several kinds."""

import math

import pytest
import torch

import pgen
from pgen.models import MADE
from pgen.nn import MaskedMLP


def masked(residual=False, context_dim=0, hidden=(23, 23), direct=True, places=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MaskedMLP(places, 2, hidden, 3, torch.nn.Tanh, residual=residual, context_dim=context_dim, direct=direct)
    return network.double()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context_dim", [0, 4])
@pytest.mark.parametrize("direct", [False, True])
def test_outputs_see_lower_ranks_alone_and_all_of_them(residual, context_dim, direct):
    network = masked(residual, context_dim, direct=direct)
    ranks = torch.tensor([3, 0, 4, 1, 2])
    context = torch.ones(1, context_dim, dtype=torch.float64) if context_dim else None
    x = torch.randn(1, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, ranks, context)[0], x)[:, :, 0]  # (5, 3, 5, 2)
    seen = (jacobian != 0).any(3).all(1)
    assert torch.equal(seen, ranks[:, None] > ranks)


def test_every_output_sees_the_context():
    network = masked(context_dim=4)
    x = torch.zeros(1, 5, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda c: network(x, torch.arange(5), c)[0], torch.ones(1, 4, dtype=torch.float64)
    )
    assert bool((jacobian != 0).all())


@pytest.mark.parametrize("residual", [False, True])
def test_one_place_at_a_time_gives_what_one_pass_gives(residual):
    network = masked(residual, context_dim=4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator)
    context = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    ranks = torch.tensor([[3, 0, 4, 1, 2], [0, 1, 2, 3, 4]])  # each datum in an order of its own
    whole = torch.cat([network(x[i : i + 1], ranks[i], context[i : i + 1]) for i in range(2)])
    state, rows = network.start(2, context), torch.arange(2)
    for rank in range(5):
        place = ranks.argsort(1)[:, rank]
        torch.testing.assert_close(network.give(state, place, torch.tensor(rank)), whole[rows, place])
        network.take(state, x[rows, place], place, torch.tensor(rank))


def fitted(x, **options):
    made = MADE(x.shape[1:], (32,), **options)
    made.fit(x, steps=60, optimizer=0.01, progress=False, compile="eager", precision="float64")
    return made


BITS = torch.bernoulli(torch.full((40, 2, 3), 0.4), generator=torch.Generator().manual_seed(2))


def test_several_orders_are_an_exact_mixture():
    made = fitted(BITS, num_orders=4)
    each = torch.stack([made.one(k).log_prob(BITS).value for k in range(4)])
    assert float(each.std(0).max()) > 0.01
    score = made.log_prob(BITS)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, each.logsumexp(0) - math.log(4))
    with pytest.raises(ValueError, match="`number` should be one of the 4 orders, 0 to 3, got 4"):
        made.one(4)


def test_values_before_the_next_column_lie_in_their_support():
    made = MADE((3,), columns=["continuous", ("categorical", 3), "binary"], order=[1, 0, 2], num_orders=2)
    made.next([[2.0, -7.5]])  # column 1, then column 0
    with pytest.raises(ValueError, match=r"^`prefix`: data row 1, column 1 holds 3, outside the support IntegerInterval"):
        made.one(0).next([[2.0, -7.5], [3.0, 0.0]])
    with pytest.raises(ValueError, match=r"^prefix row 0, column 1 is nan"):
        made.next([[2.0, math.nan]])
    with pytest.raises(ValueError, match="`number` should be one of the 2 orders, 0 to 1, got 2"):
        made.next([[2.0]], number=2)


@pytest.mark.parametrize("order", ["natural", "random", [5, 0, 3, 1, 4, 2]])
def test_a_conditional_of_an_order_is_that_of_its_columns(order):
    made = fitted(BITS, order=order)
    columns = made.orders[0].tolist()
    assert (columns == list(range(6))) == (order == "natural")
    x = BITS[:1].repeat(2, 1, 1).flatten(1)
    x[1, columns[3]] = 1 - x[0, columns[3]]  # what comes after the third is summed out: its conditional sums to one
    rest = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    rows = x.repeat_interleave(4, 0)
    rows[:, columns[4:]] = rest.repeat(2, 1)
    pair = made.log_prob(rows.reshape(-1, 2, 3)).value.reshape(2, 4).logsumexp(1)
    with torch.no_grad():
        inputs = made.table.encode(x[:1].double(), made.table.which(x.device))
        logit = made.network(inputs, made.orders[0].argsort())[0, columns[3], 0]
    expected = torch.where(x[0, columns[3]] == 1, logit, -logit)
    torch.testing.assert_close(pair[0] - pair[1], expected)


def test_cached_samples_are_those_of_whole_passes():
    made = fitted(BITS, order="random")
    drawn = made.sample(9, seed=3)
    steps, size = made.places, 6
    from pgen.data.batches import key
    from pgen.programs import keyed_rng

    order = made.orders[0]
    with keyed_rng(key(3, "sample", 0)), torch.no_grad():
        torch.rand(9, device="cpu")  # the choice of an order
        x = torch.zeros(9, size, dtype=torch.float64)
        for t in range(size):
            outputs = made.network(made.table.encode(x, made.table.which(x.device)), order.argsort())
            x[:, order[t]] = steps.table.parts[0].draw(outputs[:, order[t]], torch.tensor(t))
    assert torch.equal(drawn.flatten(1), x)
    assert 0 < float(x.mean()) < 1


STATES = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).reshape(-1, 2, 3).double()


def test_missing_columns_are_drawn_from_the_conditional_of_an_order():
    alike = torch.cat([BITS[:, :1], BITS[:, :1]], 1)  # two rows that are equal, so that each tells the other
    made = fitted(torch.where(torch.rand(40, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.1, 1 - alike, alike),
                  order=[3, 4, 5, 0, 1, 2], num_orders=2)  # fmt: skip
    nan = float("nan")
    given = torch.tensor([[nan, nan, nan], [1.0, 0.0, 1.0]], dtype=torch.float64)
    log_prob = made.one(0).log_prob(STATES).value  # in whose order the second row comes first: exact with one particle
    fits = (STATES[:, 1] == given[1]).all(1)
    expected = (log_prob[fits] - log_prob[fits].logsumexp(0)).exp()
    drawn = made.infill(given.expand(3000, 2, 3), num_particles=1, seed=1)
    counts = torch.stack([(drawn == row).flatten(1).all(1).double().mean() for row in STATES[fits]])
    assert float(counts.sum()) == pytest.approx(1) and float(expected.max()) > 0.3
    assert bool(((counts - expected).abs() < 4.5 * (expected * (1 - expected) / 3000).sqrt() + 1e-9).all())
    first = made.next(torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), number=0)
    share = expected[STATES[fits][:, 0, 0] == 1].sum()
    torch.testing.assert_close(first.probs[0], share)


def test_conditionals_of_real_columns_are_in_their_units():
    x = 50 + 10 * torch.randn(60, 2, generator=torch.Generator().manual_seed(3))
    made = fitted(x, likelihood="gaussian_mixture", num_components=2)
    x = x.double()
    total = made.next(x[:, :0]).log_prob(x[:, 0]) + made.next(x[:, :1]).log_prob(x[:, 1])
    torch.testing.assert_close(total, made.log_prob(x).value)
    with pytest.raises(ValueError, match=r"`prefix` should have shape \(N, t\) with t below 2, got \(60, 2\)"):
        made.next(x)


def test_tiers_draw_and_score_the_same():
    made = fitted(BITS, num_orders=2)
    drawn = [made.sample(5, seed=1, compile=tier) for tier in ("eager", "graph")]
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(made.log_prob(BITS, compile="eager").value, made.log_prob(BITS, compile="graph").value)


def test_training_on_several_orders_is_the_same_in_every_tier():
    found = []
    for tier in ("eager", "graph"):
        made = MADE((2, 3), (16,), num_orders=3, dropout=0.2)
        run = made.fit(BITS, steps=5, batch_size=8, compile=tier, progress=False, precision="float64")
        found.append(torch.tensor(run.history["loss"]))
    torch.testing.assert_close(*found)


def test_columns_of_several_kinds_are_drawn_in_the_models_precision():
    made = MADE((2,), (8,), likelihood="gaussian", columns=["continuous", ("categorical", 3)]).double()
    drawn = made.sample(20, seed=0)
    assert drawn.dtype == torch.float64 and bool((drawn[:, 0] != drawn[:, 0].float()).any())


def test_columns_of_several_kinds():
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 3, (400,), generator=generator)
    length = 100.0 + 20 * kind + 3 * torch.randn(400, generator=generator)
    heavy = (length > 120).float()
    x = torch.stack([kind.float(), length, heavy], 1)
    made = MADE((3,), (64,), columns=[("categorical", 3), "continuous", "binary"], num_components=3, num_orders=2)
    made.fit(x, epochs=60, optimizer=0.01, progress=False)
    drawn = made.sample(2000, seed=1)
    assert set(drawn[:, 0].tolist()) == {0.0, 1.0, 2.0} and set(drawn[:, 2].tolist()) == {0.0, 1.0}
    middle = drawn[drawn[:, 0] == 1, 1]
    assert abs(float(middle.mean()) - 120) < 1.5 and abs(float(middle.std()) - 3) < 1.5
    assert float(((drawn[:, 1] > 120).float() == drawn[:, 2]).float().mean()) > 0.9
    # The marginal of the real column, by a sum over the others and a quadrature: in the units of the data.
    grid = torch.linspace(60, 190, 1301)
    total = sum(
        made.log_prob(torch.stack([torch.full_like(grid, k), grid, torch.full_like(grid, b)], 1)).value.exp().sum() * 0.1
        for k in range(3)
        for b in range(2)
    )
    assert float(total) == pytest.approx(1, abs=1e-3)


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"a kind for each of the 6 numbers of a datum, got \['binary'\]"):
        MADE((2, 3), columns=["binary"])
    with pytest.raises(ValueError, match=r"`columns\[1\]` should be \('categorical', K\) with K values"):
        MADE((2,), columns=["binary", "categorical"])
    with pytest.raises(ValueError, match=r"`columns\[0\]` is 'poisson', which is unknown"):
        MADE((1,), columns=["poisson"])
    with pytest.raises(ValueError, match="`order` should hold each column 0 to 2 once"):
        MADE((3,), order=[0, 1, 1])
    with pytest.raises(ValueError, match="`hidden` should be equal sizes where residual=True"):
        MADE((3,), (4, 5), residual=True)
    with pytest.raises(ValueError, match="`hidden` should be one or more positive sizes"):
        MADE((3,), ())
    with pytest.raises(ValueError, match="`dropout` should be a probability"):
        MADE((3,), dropout=1.0)
    made = MADE((2,), columns=["binary", ("categorical", 3)])
    x = torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    with pytest.raises(ValueError, match=r"data row 1, column \d+ holds 3, outside the support IntegerInterval"):
        made.fit(x, progress=False)
    with pytest.raises(ValueError, match=r"data row 1(, column \d+)? holds 0\.5, outside the support"):
        MADE((2, 1)).fit(torch.tensor([[[0.0], [1.0]], [[0.5], [1.0]]]), progress=False)


def test_orders_are_saved(tmp_path):
    made = MADE((2, 3), (8,), order="random", num_orders=2, seed=5)
    made.save(tmp_path / "made.pgen")
    assert torch.equal(pgen.load(tmp_path / "made.pgen").orders, made.orders)
