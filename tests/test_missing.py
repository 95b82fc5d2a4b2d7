"""Mixtures of independent numbers with missing entries: brute force, closed forms, goodness of fit."""

import itertools
import math

import pytest
import torch
from cases import seeded
from torch.distributions import Bernoulli, Categorical, Normal

import pgen
from pgen.data import Standardize, table
from pgen.models import GaussianMixture, Mixture, MixtureOf

COLUMNS = ["continuous", ("categorical", 3), "binary", "continuous"]
KINDS = pytest.mark.parametrize("kind", ["mixed", "bernoulli", "categorical", "gaussian", "context"])


def mixture(kind, components=5, seed=1):
    """A mixture far from uniform, float64, over four numbers; (2, 2) of them where all are alike."""
    options = {
        "mixed": {"columns": COLUMNS},
        "categorical": {"likelihood": "categorical", "num_classes": 3},
        "context": {"columns": COLUMNS, "context_dim": 2, "hidden": (3,)},
    }
    event = (4,) if kind in ("mixed", "context") else (2, 2)
    model = Mixture(event, components, **options.get(kind, {"likelihood": kind}), seed=seed).double()
    for parameter in model.arrays.parameters():
        parameter.data.mul_(4)
    return model


def contexts(kind, n):
    return {"context": seeded(lambda: torch.randn(n, 2, dtype=torch.float64))} if kind == "context" else {}


def holed(x, share=0.3, seed=4):
    """x with entries removed at random; the first row keeps all, the second none."""
    hidden = seeded(lambda: torch.rand(x.shape), seed) < share
    hidden[0], hidden[1] = False, True
    return torch.where(hidden, math.nan, x)


def factors(model, row, context=None):
    """log p_kd(x_d), (K, D), of one datum, written down again."""
    arrays = {name: value.detach() for name, value in model.arrays(context).items()}
    arrays = {name: value[0] if context is not None else value for name, value in arrays.items()}
    kinds = model.columns or [model.likelihood] * len(row)
    first = [kinds.index(kind) for kind in kinds]
    order = sorted(set(first))
    found = []
    for d, kind in enumerate(kinds):
        group, place = order.index(first[d]), [i for i in range(len(kinds)) if first[i] == first[d]].index(d)
        own = lambda name, g=group: arrays[f"{name}_{g}" if model.columns else name]  # noqa: E731
        value = torch.nan_to_num(row[d])
        if kind in ("continuous", "gaussian"):
            fn = Normal(own("shift")[:, place], (-own("log_precision")[:, place]).exp())
        else:
            logits = own("logits")[:, place]
            fn = Bernoulli(logits=logits) if kind in ("binary", "bernoulli") else Categorical(logits=logits)
        found.append(fn.log_prob(value))
    return arrays["weights"].log_softmax(-1), torch.stack(found, -1)


@KINDS
def test_densities_are_those_of_what_is_observed(kind):
    model, given = mixture(kind), contexts(kind, 9)
    x = holed(model.sample(9, **given, seed=2).double())
    score, shares = model.log_prob(x, **given), model.responsibilities(x, **given)
    assert score.kind == "exact" and score.event_size == pytest.approx(float((~x.isnan()).sum()) / 9)
    for i, row in enumerate(x.flatten(1)):
        weights, each = factors(model, row, *(c[i : i + 1] for c in given.values()))
        joint = weights + each[:, ~row.isnan()].sum(1)
        assert float(score.value[i]) == pytest.approx(float(joint.logsumexp(0)), abs=1e-9)
        torch.testing.assert_close(shares[i], joint.softmax(0))
    assert float(score.value[1]) == pytest.approx(0.0, abs=1e-12)  # nothing is observed: the density is one
    assert torch.equal(model.labels(x, **given), shares.argmax(1))
    named = {"x": torch.nan_to_num(x, 7.0), "observed": ~x.isnan(), **given}
    assert torch.equal(model.log_prob(named).value, score.value)


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_a_missing_number_is_summed_out(kind):
    model = mixture(kind)
    x = holed(model.sample(6, seed=2).double())
    values = torch.arange(2.0 if kind == "bernoulli" else 3.0).double()
    for row, found in zip(x, model.log_prob(x).value):
        hidden = row.isnan()
        fillings = itertools.product(values, repeat=int(hidden.sum()))
        each = [row.masked_scatter(hidden, torch.tensor(v).double()) for v in fillings]
        assert float(found) == pytest.approx(float(model.log_prob(torch.stack(each)).value.logsumexp(0)), abs=1e-10)


def truth():
    """Two components, well apart in four numbers."""
    model = Mixture((4,), 2, columns=COLUMNS).double()
    model.arrays.set({
        "weights": torch.tensor([0.3, 0.7]).log(),
        "shift_0": torch.tensor([[-1.0, 2.0], [2.0, -1.0]]),
        "log_precision_0": torch.tensor([[0.0, 0.5], [0.3, -0.3]]),
        "logits_1": torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.2, 0.7]]]).log(),
        "logits_2": torch.logit(torch.tensor([[0.9], [0.2]])),
    })  # fmt: skip
    return model


def test_a_fit_with_holes_finds_what_the_full_data_give():
    known = truth()
    train, test = known.sample(3000, seed=1).float(), known.sample(4000, seed=2).float()
    models = []
    for x in (train, holed(train)):
        model = Mixture((4,), 2, columns=COLUMNS)
        model.fit(x, steps=200, compile="graph", progress=False)
        models.append(model)
    full, some = (model.log_prob(test).value for model in models)
    best = known.double().log_prob(test.double()).mean
    # 17 parameters cost 17 / 2n nats a datum on average, 0.0028 here, and some 1 / 0.7 of that with holes; see Wilks (1938).
    assert 0 < best - float(full.mean()) < 0.01 and abs(float((full - some).mean())) < 0.01
    first, second = (model.weights().sort().values for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=4 * math.sqrt(0.21 / 3000))
    means = [model.impute(torch.full((1, 4), math.nan))[0, [0, 3]] for model in models]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.15)  # 4 standard errors of a mean of 2100 with deviation 1.7


@pytest.mark.parametrize("kind", ["mixed", "bernoulli"])
def test_training_stands_still_where_em_does(kind):
    """After a fit one step of EM with missing entries moves no component's parameters."""
    x = holed(truth().sample(400, seed=3)).float() if kind == "mixed" else holed(mixture(kind).sample(400, seed=3)).flatten(1)
    options = {"columns": COLUMNS, "smoothing": 0.0, "floor": 0.0} if kind == "mixed" else {"smoothing": 0.0}
    model = Mixture((4,), 2, **options)
    model.fit(x, steps=400, precision="float64", compile="graph", progress=False)
    x, bit = x.double(), 2 if kind == "mixed" else 1
    shares, seen = model.responsibilities(x), ~x.isnan()
    torch.testing.assert_close(model.weights(), shares.mean(0), rtol=0, atol=2e-3)
    part = model.components.parts[2] if kind == "mixed" else model.components
    own = model.arrays.logits_2 if kind == "mixed" else model.arrays.logits[:, 1:2]
    ones = (shares[seen[:, bit]].T @ x[seen[:, bit], bit]) / shares[seen[:, bit]].sum(0)
    torch.testing.assert_close(own.detach().sigmoid()[:, 0], ones, rtol=0, atol=5e-3)
    assert float(part.num_data) == 400
    if kind == "mixed":
        arrays = {name: getattr(model.arrays, f"{name}_0").detach() for name in ("shift", "log_precision")}
        gaussians, there = model.components.parts[0], seen[:, 0]
        means = (shares[there].T @ x[there, 0]) / shares[there].sum(0)
        torch.testing.assert_close(gaussians.means(arrays)[:, 0], means, rtol=0, atol=1e-2)
        spread = (shares[there] * (x[there, :1] - means).square()).sum(0) / shares[there].sum(0)
        torch.testing.assert_close(gaussians.roots(arrays)[:, 0].square().reciprocal(), spread, rtol=0.02, atol=0)


def test_the_floor_is_added_where_a_number_was_seen():
    x = torch.tensor([[-1.0, 0.0], [1.0, math.nan], [0.0, math.nan], [0.0, 2.0]], dtype=torch.float64)
    model = Mixture((2,), 1, "gaussian", floor=0.5).double()
    model.fit(x, steps=400, precision="float64", compile="graph", progress=False)
    variances = model.components.roots(model.arrays(None)).detach().square().reciprocal()[0]
    torch.testing.assert_close(variances, torch.tensor([0.5, 1.0]).double() * 1.5, rtol=1e-3, atol=0)


@KINDS
def test_most_probable_values_and_means_are_filled_in(kind):
    model, given = mixture(kind), contexts(kind, 7)
    x = holed(model.sample(7, **given, seed=2).double(), 0.5)
    filled, shares = model.impute(x, **given), model.responsibilities(x, **given)
    seen = ~x.isnan()
    assert filled.shape == x.shape and torch.equal(filled[seen], x[seen])
    kinds = [str(kind) for kind in (model.columns or [model.likelihood] * 4)]
    values = {"binary": 2, "bernoulli": 2}
    arrays = {name: v.detach() for name, v in model.arrays(*given.values() or [None]).items()}
    for i, d in (~seen).flatten(1).nonzero().tolist():
        own = [c[i : i + 1] for c in given.values()]
        row = filled[i].flatten().clone()
        if kinds[d] in ("continuous", "gaussian"):
            means = arrays["shift_0"][..., 0 if d == 0 else 1] if model.columns else arrays["shift"][:, d]
            assert float(row[d]) == pytest.approx(float(shares[i] @ (means[i] if own else means)), abs=1e-9)
            continue
        scores = []
        for value in range(values.get(kinds[d], 3)):
            row[d] = value
            scores.append(float((shares[i].log() + factors(model, row, *own)[1][:, d]).logsumexp(0)))
        assert int(filled[i].flatten()[d]) == max(range(len(scores)), key=scores.__getitem__)


def test_draws_of_missing_entries_have_their_distribution():
    from pyro.distributions.testing.gof import multinomial_goodness_of_fit

    model = truth()
    row = torch.tensor([[0.4, math.nan, math.nan, math.nan]], dtype=torch.float64)
    draws = model.impute(row, num_samples=20_000, seed=5)
    assert draws.shape == (20_000, 1, 4) and bool((draws[..., 0] == 0.4).all())
    cells = torch.tensor(list(itertools.product(range(3), range(2)))).double()
    joint = torch.cat([torch.full((6, 1), 0.4).double(), cells, torch.full((6, 1), math.nan).double()], 1)
    probs = (model.log_prob(joint).value - model.log_prob(row).value).exp()
    assert float(probs.sum()) == pytest.approx(1.0, abs=1e-7)  # parameters were set in single precision
    counts = torch.bincount((draws[:, 0, 1] * 2 + draws[:, 0, 2]).long(), minlength=6)
    assert multinomial_goodness_of_fit(probs, counts, total_count=20_000) > 1e-4  # the share of right models that fail
    shares = model.responsibilities(row)[0]
    fn = Normal(torch.tensor([2.0, -1.0]).double(), (-torch.tensor([0.5, -0.3])).exp().double())
    reals = draws[:, 0, 3]
    uniform = (shares * fn.cdf(reals[:, None])).sum(1)  # whose law is uniform if the draws are right
    bins = torch.bincount((uniform * 20).long().clamp(max=19), minlength=20)
    assert multinomial_goodness_of_fit(torch.full((20,), 0.05), bins, total_count=20_000) > 1e-4
    together = (draws[:, 0, 2] == 1).double()  # a bit and a real of one draw come from one component
    below = (reals < 0).double()
    expected = float((shares * torch.tensor([0.9, 0.2]).double() * fn.cdf(torch.zeros(()).double())).sum())
    assert float((together * below).mean()) == pytest.approx(expected, abs=4.5 * math.sqrt(0.25 / 20_000))
    assert torch.equal(draws, model.impute(row, num_samples=20_000, seed=5))


def test_a_component_that_never_sees_a_number_starts_at_its_mean(monkeypatch):
    groups = torch.nn.functional.one_hot(torch.arange(20) % 2).double()
    monkeypatch.setattr(pgen.models.mixture, "memberships", lambda x, count, seed: groups)
    x = seeded(lambda: torch.randn(20, 3)) + torch.tensor([0.0, 5.0, 1.0])
    x[::2, 1] = math.nan
    model = Mixture((3,), 2, "gaussian")
    model.fit(x, steps=1, optimizer=1e-12, progress=False)
    means = model.components.means(model.arrays(None)).detach()
    torch.testing.assert_close(means[:, 1], torch.full((2,), float(x[1::2, 1].mean())))
    assert bool(torch.isfinite(model.log_prob(x).value).all())


def test_complete_data_are_told_nothing_of_entries():
    """The same bits as where nobody asks which entries are observed, and to rounding those of saying that all are."""
    x = truth().sample(50, seed=1).float()
    plain, said = (Mixture((4,), 2, columns=COLUMNS) for _ in range(2))
    assert "observed" not in plain._batch("x", x) and "observed" not in plain._batch("x", {"x": x, "observed": x == x})
    plain.fit(x, steps=5, progress=False)
    said._checked = lambda *a, **k: super(Mixture, said)._checked(*a, **k)
    said.fit(x, steps=5, progress=False)
    torch.testing.assert_close(said.log_prob(x).value, plain.log_prob(x).value, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.impute(x), x) and plain.impute(x, 3).shape == (3, 50, 4)


class Rows:
    """A source with holes in some rows."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def rows(self, indices):
        return self.x[indices]


def test_sources_standardised_data_files_and_mixtures_of_mixtures(tmp_path):
    x = holed(truth().sample(300, seed=1).float())
    model = Mixture((4,), 2, columns=COLUMNS)
    model.fit(Rows(x), batch_size=50, steps=10, progress=False)
    model.save(tmp_path / "m.pgen")
    again = pgen.load(tmp_path / "m.pgen")
    assert torch.equal(again.log_prob(x).value, model.log_prob(x).value)
    size = 10 + seeded(lambda: torch.randn(300, 1))
    whole = torch.cat([size, 100 * size], 1)
    reals = holed(whole)
    scaled = Mixture.for_data(reals, num_components=2)
    assert isinstance(scaled.preprocess, Standardize) and scaled.likelihood == "gaussian"
    scaled.fit(reals, steps=10, progress=False)
    assert float(scaled.log_prob(reals).value[1]) == pytest.approx(0.0, abs=1e-6)
    filled = scaled.impute(reals, num_samples=50, seed=1).mean(0)
    assert float(filled[1, 1] / filled[1, 0]) == pytest.approx(100, rel=0.1)  # in the units of the data
    assert Mixture.for_data(holed(torch.arange(40.0).reshape(20, 2) % 2)).likelihood == "bernoulli"
    mixed = MixtureOf([Mixture((2,), 2, "gaussian"), Mixture((2,), 3, "gaussian")])
    mixed.fit(whole, steps=2, progress=False)
    assert mixed.log_prob(whole).kind == "exact"
    with pytest.raises(ValueError, match="row 1, column 0 is nan"):
        mixed.log_prob(reals)


def test_tiers_agree():
    x, found = holed(truth().sample(40, seed=1)).float(), []
    for tier in ("eager", "graph"):
        model = Mixture((4,), 2, columns=COLUMNS)
        model.fit(x, steps=3, batch_size=20, compile=tier, progress=False)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_table_with_text_and_empty_cells_is_fitted(tmp_path):
    rows = [f"{'' if i % 7 == 0 else ('red', 'blue')[i % 2]},{'?' if i % 5 == 0 else i % 2 * 9 + i % 3}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["colour,size", *rows]))
    found = table(tmp_path / "t.csv")
    model = Mixture((2,), 2, columns=found.columns)
    model.fit(found.x, steps=100, progress=False)
    asked = torch.tensor([[math.nan, 10.0], [1.0, math.nan]])
    filled = model.impute(asked)
    assert found.rows(filled)[0][0] == "blue" and float(filled[1, 1]) == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda x: Mixture((4,), 2, columns=COLUMNS).fit(torch.where(torch.arange(4) == 2, math.nan, x)), "number 2 of each"),
        (lambda x: Mixture((4,), 2, "gaussian").fit(torch.where(x.isnan(), x, 3.0)), r"number 0 .* constant \(3 in all 30"),
        (lambda x: Mixture((4,), 2, "gaussian").fit(x, context=x), "made without context"),
        (lambda x: Mixture((4,), 2).log_prob(x), "outside the support"),
        (lambda x: Mixture((4,), 2, "gaussian", preprocess=pgen.data.Logit()).fit(x), "which Logit would count as data"),
        (lambda x: Mixture((4,), 2, "gaussian").log_prob(torch.where(x.isnan(), math.inf, x)), "is inf"),
        (lambda x: Mixture((4,), 2, columns=COLUMNS).impute(x, 0), "`num_samples` should be a positive integer"),
        (lambda x: GaussianMixture((4,), 2).fit(x), "data row 1, column 0 is nan; .*or take models.Mixture, which"),
    ],
)
def test_bad_data_are_one_line(ask, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(holed(truth().sample(30, seed=1).float()))
    assert "\n" not in str(caught.value)
