"""Mixtures against scikit-learn, brute force and hand-made answers."""

import contextlib
import math

import numpy as np
import pytest
import torch
from cases import seeded

import pgen
from pgen.data import Standardize
from pgen.distributions.components import GaussianComponents
from pgen.models import VAE, Gaussian, GaussianMixture, HiddenMarkov, Mixture, MixtureOf

COVARIANCES = ("full", "diagonal", "spherical", "tied")
SKLEARN = {"full": "full", "diagonal": "diag", "spherical": "spherical", "tied": "tied"}


def blobs(n=300, size=3, groups=4, spread=0.4):
    """Groups of points in float64, some stretched."""
    centres = seeded(lambda: torch.randn(groups, size, dtype=torch.float64) * 3, 5)
    noise = seeded(lambda: torch.randn(n, size, dtype=torch.float64), 6) * torch.linspace(spread, 3 * spread, size)
    return centres[torch.arange(n) % groups] + noise


def standardised(x):
    return (x - x.mean(0)) / x.std(0, correction=0)


def by_em(x, count, covariance, **options):
    from sklearn.mixture import GaussianMixture as EM

    return EM(count, covariance_type=SKLEARN[covariance], random_state=0, tol=1e-9, max_iter=2000, **options).fit(x.numpy())


def placed(em, size, covariance, **options):
    model = GaussianMixture((size,), len(em.weights_), covariance, **options).double()
    model.place(em.weights_, em.means_, em.covariances_)
    return model


# --- densities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_densities_are_those_of_scikit_learn_at_the_same_parameters(covariance):
    x = blobs()
    em = by_em(x, 4, covariance)
    model = placed(em, 3, covariance)
    score = model.log_prob(x)
    assert score.kind == "exact"
    np.testing.assert_allclose(score.value.numpy(), em.score_samples(x.numpy()), rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.responsibilities(x).numpy(), em.predict_proba(x.numpy()), atol=1e-9)
    assert model.labels(x).tolist() == em.predict(x.numpy()).tolist()
    np.testing.assert_allclose(model.weights().numpy(), em.weights_, atol=1e-12)
    np.testing.assert_allclose(model.means().numpy(), em.means_, atol=1e-12)


def test_single_precision_is_near_double_far_from_zero():
    x = blobs() + 1000.0
    em = by_em(x, 4, "diagonal")
    model = placed(em, 3, "diagonal").float()
    assert np.abs(model.log_prob(x).value.numpy() - em.score_samples(x.numpy())).max() < 5e-3


def test_low_rank_covariance_is_that_of_factor_analysers():
    model = seeded(lambda: GaussianMixture((5,), 3, "low_rank", rank=2).double())
    x = blobs(50, 5)
    model.fit(x, steps=20, precision="float64", progress=False)
    means, covariances, weights = model.means(), model.covariances(), model.weights()
    each = [torch.distributions.MultivariateNormal(m, c).log_prob(x) for m, c in zip(means, covariances)]
    torch.testing.assert_close(model.log_prob(x).value, torch.logsumexp(torch.stack(each, 1) + weights.log(), 1))
    factor, variance = model.components._factors(model.arrays(None))
    assert torch.linalg.matrix_rank(covariances[0] - variance[0].diag()) == 2 and factor.shape == (3, 5, 2)


def test_bits_are_summed_as_by_hand():
    model = Mixture((2, 2), 3, seed=1).double()
    x = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    p, weights = model.arrays.logits.detach().sigmoid(), model.weights()
    by_hand = [
        math.log(
            sum(
                float(w) * math.prod(float(q) if bit else 1 - float(q) for q, bit in zip(probs, datum.flatten()))
                for w, probs in zip(weights, p)
            )
        )
        for datum in x
    ]
    np.testing.assert_allclose(model.log_prob(x).value.numpy(), by_hand, rtol=1e-12)
    torch.testing.assert_close(model.responsibilities(x).sum(1), torch.ones(2, dtype=torch.float64))


def test_kinds_side_by_side_multiply():
    model = Mixture((3,), 2, columns=["continuous", ("categorical", 4), "binary"], seed=1).double()
    x = torch.tensor([[0.3, 3.0, 1.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    arrays = {name: value.detach() for name, value in model.arrays(None).items()}
    normal = torch.distributions.Normal(arrays["shift_0"][:, 0], (-arrays["log_precision_0"][:, 0]).exp())
    log_p = normal.log_prob(x[:, :1]) + arrays["logits_1"][:, 0].log_softmax(-1)[:, x[:, 1].long()].T
    log_p = log_p + torch.distributions.Bernoulli(logits=arrays["logits_2"][:, 0]).log_prob(x[:, 2:])
    torch.testing.assert_close(model.log_prob(x).value, torch.logsumexp(log_p + model.weights().log(), 1))
    drawn = model.sample(500, seed=1)
    assert set(drawn[:, 1].tolist()) <= {0.0, 1.0, 2.0, 3.0} and set(drawn[:, 2].tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"data row 1, column \d+ holds 4, outside the support"):
        model.log_prob(torch.tensor([[0.0, 1.0, 1.0], [0.0, 4.0, 1.0]], dtype=torch.float64))


def test_models_of_other_families_are_mixed():
    wide, narrow = Gaussian((2,), "diagonal"), GaussianMixture((2,), 2, "full", seed=3)
    mixture = MixtureOf([wide, narrow]).double()
    mixture.arrays.weights.data.copy_(torch.tensor([0.25, 0.75]).log())
    x = blobs(20, 2)
    each = [wide.log_prob(x).value + math.log(0.25), narrow.log_prob(x).value + math.log(0.75)]
    score = mixture.log_prob(x)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, torch.logsumexp(torch.stack(each), 0))


def test_a_component_without_weight_adds_nothing():
    model = GaussianMixture((1,), 2).double()
    model.place([1.0, 0.0], [[0.0], [5.0]], [[[1.0]], [[1.0]]])
    x = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).value, torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 0]).double())
    assert model.sample(100, seed=1).max() < 5 and model.labels(x).tolist() == [0, 0]
    assert bool(torch.isfinite(next(model.gradients(x))["arrays.shift"]).all())


def test_questions_about_latents_point_to_responsibilities():
    model = Mixture((3,), 2)
    for question in (model.posterior, model.encode, model.reconstruct):
        with pytest.raises(pgen.NotAvailable, match=r"its component is summed out; ask for responsibilities\(x\)"):
            question(torch.zeros(2, 3))


# --- fitting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_training_stands_still_where_em_does(covariance):
    x = standardised(blobs())
    em = by_em(x, 3, covariance, reg_covar=0.05)
    model = placed(em, 3, covariance, floor=0.05)
    gradient = next(model.gradients(x))
    assert max(float(g.abs().max()) for g in gradient.values()) < 1e-4
    bare = placed(em, 3, covariance, floor=0.0)
    assert max(float(g.abs().max()) for g in next(bare.gradients(x)).values()) > 1e-2


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_gains_nothing_after_a_fit(covariance):
    x = standardised(blobs()).float()
    model = GaussianMixture((3,), 4, covariance)
    run = model.fit(x, steps=200, compile="graph", progress=False)
    found = model.log_prob(x).mean
    precisions = torch.linalg.inv(model.covariances().double())
    if covariance in ("diagonal", "spherical"):
        precisions = precisions.diagonal(dim1=-2, dim2=-1)
    precisions = {"tied": precisions[0], "spherical": precisions[..., 0]}.get(covariance, precisions).numpy()
    start = {"weights_init": (w := model.weights().double().numpy()) / w.sum(), "means_init": model.means().double().numpy()}
    em = by_em(x.double(), 4, covariance, **start, precisions_init=precisions)
    assert em.score(x.double().numpy()) == pytest.approx(found, abs=1e-3)
    assert run.bound == pytest.approx(found, abs=0.01)
    assert found > by_em(x.double(), 1, covariance).score(x.double().numpy()) + 0.3


def test_units_and_correlations_do_not_slow_a_fit(monkeypatch):
    groups = torch.nn.functional.one_hot(torch.arange(300) % 4).double()
    monkeypatch.setattr(pgen.models.mixture, "memberships", lambda x, count, seed: groups)
    x = blobs()
    turned = x @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 1e-2, 0.0], [100.0, 0.0, 1e3]], dtype=x.dtype) + 1e4
    found = []
    for data in (x, turned):
        model = GaussianMixture((3,), 4, floor=0.0)
        model.fit(data, steps=200, precision="float64", compile="graph", progress=False)
        found.append(model.log_prob(data).mean)
    assert found[0] - found[1] == pytest.approx(math.log(1e-2 * 1e3), abs=0.02)


def test_smoothing_adds_counts():
    x = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    model = Mixture((1,), 1, smoothing=2.0)
    model.fit(x, steps=300, compile="graph", progress=False)
    assert float(model.log_prob(torch.ones(1, 1)).value.exp()) == pytest.approx((3 + 2) / (4 + 4), abs=1e-3)
    model = Mixture((1,), 1, "categorical", num_classes=3, smoothing=1.0)
    model.fit(x, steps=300, compile="graph", progress=False)
    p = model.log_prob(torch.tensor([[0.0], [1.0], [2.0]])).value.exp()
    np.testing.assert_allclose(p.numpy(), np.array([2, 4, 1]) / 7, atol=2e-3)


def test_smoothing_counts_data_that_the_start_has_not_seen(monkeypatch):
    monkeypatch.setattr(pgen.models.mixture, "START_ROWS", 10)
    x = torch.tensor([[1.0], [1.0], [1.0], [0.0]]).repeat(10, 1)
    model = Mixture((1,), 1, smoothing=20.0)
    model.fit(x, steps=300, compile="graph", progress=False)
    assert float(model.log_prob(torch.ones(1, 1)).value.exp()) == pytest.approx((30 + 20) / (40 + 40), abs=1e-3)
    mixed = Mixture((2,), 2, columns=["binary", ("categorical", 2)])
    mixed.fit(x.expand(-1, 2), steps=1, progress=False)
    assert [float(part.num_data) for part in mixed.components.parts] == [40, 40]


class Bits:
    """A source of as many zeros and ones as are asked for."""

    def __init__(self, rows, *event):
        self.shape = (rows, *event)

    def __len__(self):
        return self.shape[0]

    def rows(self, indices):
        return (indices.reshape(-1, *[1] * (len(self.shape) - 1)) % 3 == 0).float().expand(-1, *self.shape[1:])


def test_smoothing_counts_the_rows_of_a_source_that_are_still_to_come():
    model = Mixture((1,), 2)
    model.fit(Bits(9000, 1), steps=1, batch_size=50, progress=False)
    assert float(model.components.num_data) == 9000
    chain = HiddenMarkov((4, 1), 2, likelihood="bernoulli")
    chain.fit(Bits(9000, 4, 1), steps=1, batch_size=50, progress=False)
    assert float(chain.num_data) == 9000 and float(chain.components.num_data) == 36_000


def test_as_many_components_as_data_and_duplicates():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0, -1.0]])
    for model in (GaussianMixture((2,), 4), GaussianMixture((2,), 3, "diagonal")):
        shared = r"`data` has 3 distinct rows for num_components=4: .*; take 3 or fewer, or spread .* with .*Dequantize"
        with pytest.warns(UserWarning, match=shared) if model.num_components == 4 else contextlib.nullcontext():
            model.fit(x, steps=100, progress=False)
        assert bool(torch.isfinite(model.log_prob(x).value).all()) and model.sample(3).shape == (3, 2)


def test_a_constant_number_is_named():
    x = blobs()
    x[:, 1] = 2.5
    with pytest.raises(ValueError, match=r"number 1 of each datum is constant \(2.5 in all 300 data\).*drop it.*Dequantize"):
        GaussianMixture((3,), 4).fit(x, steps=1, progress=False)


def test_minibatches_reach_the_optimum_too():
    x = blobs(2000).float()
    model = GaussianMixture((3,), 4)
    model.fit(x, batch_size=200, steps=300, compile="graph", progress=False)
    assert model.log_prob(x).mean > by_em(x.double(), 4, "full").score(x.double().numpy()) - 0.01


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
@pytest.mark.parametrize("make", [lambda: GaussianMixture((3,), 4), lambda: MixtureOf([Gaussian((3,)), Gaussian((3,))])])
def test_tiers_agree(make):
    x, found = blobs(40).float(), {}
    for tier in ("eager", "graph", "compiled"):
        model = make()
        model.fit(x, steps=3, batch_size=20, compile=tier, progress=False)
        found[tier] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found["eager"], found["graph"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["eager"], found["compiled"], rtol=1e-4, atol=1e-5)


def test_a_mixture_density_network_learns_two_branches():
    c = torch.linspace(-1, 1, 400)[:, None]
    sign = (torch.arange(400) % 2 * 2 - 1.0)[:, None]
    y = sign * (1 + c) + 0.1 * seeded(lambda: torch.randn(400, 1))
    model = GaussianMixture((1,), 2, context_dim=1, hidden=(16,))
    model.fit(y, context=c, steps=400, compile="graph", progress=False)
    truth = 0.5 * math.log(2 * math.pi * math.e * 0.01) + math.log(2)
    assert -model.log_prob(y, context=c).mean < truth + 0.1  # log 2 is a little too much where the branches meet
    assert model.means(torch.tensor([[0.9]])).abs().flatten().tolist() == pytest.approx([1.9, 1.9], abs=0.2)
    assert model.weights(c).shape == (400, 2) and model.responsibilities(y, c).shape == (400, 2)


# --- files and errors ----------------------------------------------------------------------------------------------------


def test_nested_settings_are_saved(tmp_path):
    inner = MixtureOf([Gaussian((2,), "low_rank", rank=1), GaussianMixture((2,), 3, "tied")])
    model = MixtureOf([inner, Mixture((2,), 2, "gaussian")], preprocess=Standardize())
    x = blobs(30, 2).float()
    model.fit(x, steps=2, progress=False)
    model.save(tmp_path / "nested.pgen")
    again = pgen.load(tmp_path / "nested.pgen")
    assert torch.equal(again.log_prob(x).value, model.log_prob(x).value)
    assert again.settings() == model.settings() and model.settings()["components"][0]["family"] == "mixture_of"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture((2,), 0), "`num_components` should be a positive integer, got 0"),
        (lambda: GaussianMixture((2,), 2, "diag"), "`covariance` is 'diag', which is unknown"),
        (lambda: GaussianMixture((2,), 2, rank=1), "`rank` goes with covariance='low_rank'"),
        (lambda: GaussianMixture((2,), 2, floor=-1.0), "`floor` is a share of the data's variances"),
        (lambda: Mixture((2,), 2, "categorical"), "`num_classes` is missing: a category needs"),
        (lambda: Mixture((2,), 2, num_classes=3), "`num_classes` goes with likelihood='categorical'"),
        (lambda: Mixture((2,), 2, ["bernoulli"]), "`columns` says what each is"),
        (lambda: Mixture((2,), 2, columns=["binary"]), "a kind for each of the 2 numbers"),
        (lambda: Mixture((2,), 2, columns=["binary", "normal"]), "'normal', which is unknown"),
        (lambda: Mixture((2,), 2, "bernoulli", columns=["binary"] * 2), "`likelihood` is for numbers that are all alike"),
        (lambda: MixtureOf([]), "`components` is empty"),
        (lambda: MixtureOf([Gaussian((2,)), Gaussian((3,))]), r"about data of shape \(3,\), component 0 of shape \(2,\)"),
        (lambda: MixtureOf([VAE((2,), 1, (2,))]), r"component 0 \(VAE\) has latents that only a guide knows"),
        (lambda: MixtureOf([Gaussian((2,), preprocess=Standardize())]), "give `preprocess` to the mixture"),
        (lambda: MixtureOf([GaussianMixture((2,), context_dim=3)]), "takes a context of size 3, the mixture of 0"),
        (lambda: MixtureOf([{"family": "gausian", "settings": {}}]), "unknown family 'gausian'; did you mean 'gaussian'"),
        (lambda: GaussianMixture((1,), 1).place([1.0], [[0.0]], [[[-1.0]]]), "covariance 0 is not positive definite"),
    ],
)
def test_bad_arguments_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_component_should_be_a_model():
    with pytest.raises(TypeError, match="component 0 should be a model of pgen, got int"):
        MixtureOf([3])


def test_placing_a_low_rank_draws_nothing_from_the_global_generator():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = GaussianMixture((3,), 2, "low_rank", rank=1)
        model.place([0.5, 0.5], torch.zeros(2, 3), torch.ones(2, 3))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.log_prob(torch.ones(1, 3)).value)
    assert torch.equal(*found)


def test_floors_leave_values_alone():
    x = blobs(10)
    values = [placed(by_em(x, 2, "full"), 3, "full", floor=floor).log_prob(x).value for floor in (0.0, 0.3)]
    assert torch.equal(*values) and GaussianComponents(2, 3, floor=0.3).floor == 0.3
