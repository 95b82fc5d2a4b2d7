"""Measures of samples: known answers, tests at their level, plain verdicts, bad input in one line."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

import pgen
from pgen.data import toy
from pgen.evaluation import samples
from pgen.evaluation.features import feature_space, train_classifier
from pgen.evaluation.sample_measures import half_samples

RATE = 1e-4
"""Failure rate of each goodness-of-fit test here, over seeds."""


def draw(n, dim, seed, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def uniform(p_values):
    return stats.kstest(p_values, "uniform").pvalue > RATE


# --- two-sample tests ----------------------------------------------------------------------------------------------------


def test_p_values_of_kernels_are_uniform_where_both_samples_are_of_one_law():
    found = [samples.classifier_test(draw(40, 3, 2 * s), draw(40, 3, 2 * s + 1), permutations=99, seed=s) for s in range(100)]
    assert uniform([f.p_value for f in found])
    inside = [f.chance[0] <= f.value <= f.chance[1] for f in found]
    assert stats.binomtest(sum(inside), 100, 0.95).pvalue > RATE


def test_p_values_without_permutations_are_not_too_small():
    """The plain binomial test rejects at .11 there."""
    p = [
        samples.classifier_test(draw(60, 2, 2 * s), draw(60, 2, 2 * s + 1), classifier="logistic", seed=s).p_value
        for s in range(100)
    ]
    assert stats.binomtest(sum(v <= 0.05 for v in p), 100, 0.05, alternative="greater").pvalue > RATE
    assert sum(v <= 0.2 for v in p) > 5  # it is no test if it never rejects


def test_p_values_of_refits_are_those_of_permutations():
    far = samples.classifier_test(draw(30, 2, 0), draw(30, 2, 1, 3.0), classifier="logistic", permutations=19)
    assert far.p_value == pytest.approx(1 / 20) and far.value > 0.9
    assert far.chance[0] < 0.5 < far.chance[1] < 0.8


@pytest.mark.parametrize("classifier", ["kernel", "forest", "mlp", "logistic"])
def test_accuracy_is_near_the_best_possible(classifier):
    """Of N(0, I) and N(2 e, I) it is Phi(1)."""
    shift = torch.tensor([2.0, 0.0, 0.0])
    found = samples.classifier_test(draw(300, 3, 0), draw(300, 3, 1) + shift, classifier=classifier)
    best = stats.norm.cdf(1.0)
    assert best - 0.08 < found.value < best + 4 * found.std_error and found.p_value < 0.01
    assert found.num_samples == (300, 300)


def test_kernels_see_dependence_and_scale_and_fine_structure():
    x, y = draw(300, 2, 0), draw(300, 2, 1)
    bent = torch.stack([y[:, 0], 0.8 * y[:, 0] + 0.6 * y[:, 1]], 1)
    for other in (bent, 1.6 * y):
        assert samples.classifier_test(x, other).p_value < 0.01
    board, square = (
        toy.checkerboard().sample(400, seed=0),
        torch.rand(400, 2, generator=torch.Generator().manual_seed(1)) * 8 - 4,
    )
    assert samples.classifier_test(board, square).value > 0.6


def test_classifier_test_is_repeatable_and_takes_any_classifier():
    from sklearn.neighbors import KNeighborsClassifier

    x, y = draw(60, 2, 0), draw(50, 2, 1, 1.0)
    near = KNeighborsClassifier(5)
    state = torch.get_rng_state()
    first, again, other = (samples.classifier_test(x, y, classifier=near, seed=s).value for s in (1, 1, 2))
    assert first == again != other and not hasattr(near, "classes_")
    assert torch.equal(state, torch.get_rng_state())


# --- distances and neighbourhoods ------------------------------------------------------------------------------------------


def test_frechet_distance_is_that_of_two_gaussians():
    mean, factor = (
        torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
        torch.tensor([[1.0, 0, 0], [0.5, 2, 0], [0, 1, 0.1]]).double(),
    )
    x, y = draw(40, 3, 0), draw(50, 3, 1) @ factor.T + mean
    a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    from scipy.linalg import sqrtm

    truth = float((x.mean(0) - y.mean(0)).square().sum()) + (a + b - 2 * sqrtm(a @ b)).trace().real
    assert samples.frechet(x, y).value == pytest.approx(truth, rel=1e-9)
    assert samples.frechet(x, x + mean).value == pytest.approx(float(mean.square().sum()), rel=1e-9)
    few = samples.frechet(draw(6, 20, 0), draw(5, 20, 1))  # fewer rows than dimensions
    assert few.value > 0 and math.isfinite(few.value)


def test_frechet_bias_is_what_the_sample_size_adds():
    found = [samples.frechet(draw(100, 5, 2 * s), draw(100, 5, 2 * s + 1), seed=s) for s in range(40)]
    mean = sum(f.value for f in found) / 40
    assert mean > 0.2  # the laws are the same
    assert sum(f.bias for f in found) / 40 == pytest.approx(mean, rel=0.15)


def test_half_samples_give_the_error_of_a_mean_and_of_neighbourhoods():
    x = draw(400, 1, 0)
    value, error, _ = half_samples(lambda rows: x[rows].mean(0), [400], resamples=400)
    assert float(error) == pytest.approx(float(x.std() / 20), rel=0.15) and float(value) == pytest.approx(float(x.mean()))
    found = [samples.neighbourhoods(0.8 * draw(120, 4, 2 * s), draw(120, 4, 2 * s + 1), seed=s) for s in range(60)]
    for name in ("recall", "density", "coverage"):
        spread = torch.tensor([f[name].value for f in found]).std()
        assert 0.75 < sum(f[name].std_error for f in found) / 60 / float(spread) < 1.6


def test_neighbourhoods_of_one_law_are_as_published():
    """Naeem et al. (2020), section 3.3: the mean density is 1, the mean coverage 1 - prod (n - l) / (2n - l)."""
    n, k = 100, 3
    found = [samples.neighbourhoods(draw(n, 2, 2 * s), draw(n, 2, 2 * s + 1), k=k, resamples=2) for s in range(100)]
    coverage = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    for name, truth in (("density", 1.0), ("coverage", coverage)):
        values = torch.tensor([f[name].value for f in found])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 10
    both = [(f["precision"].value + f["recall"].value) / 2 for f in found]
    assert 0.9 < sum(both) / 100 < 1.0


def test_neighbourhoods_tell_collapse_from_strangeness():
    real = draw(200, 3, 0)
    collapsed = samples.neighbourhoods(0.05 * draw(200, 3, 1), real)
    assert collapsed["precision"].value == 1 and collapsed["density"].value > 1
    assert collapsed["recall"].value < 0.05 and collapsed["coverage"].value < 0.3
    strange = samples.neighbourhoods(draw(200, 3, 1, 50.0), real)
    assert all(found.value == 0 for found in strange.values())
    assert strange["precision"].std_error > 0.005  # 0 of 200 is not certain
    wide = samples.neighbourhoods(4.0 * draw(200, 3, 1), real)
    assert wide["precision"].value < 0.7 and wide["recall"].value > 0.9


def test_features_are_named_and_made_from_real_data():
    x = draw(80, 6, 0).reshape(80, 2, 3) * torch.tensor([5.0, 1.0, 0.01])
    space = feature_space("pca", x)
    assert space.name == "PCA" and "2 components" in space.recipe and space.of(x).shape == (80, 2)
    assert float(space.of(x).mean(0).abs().max()) < 1e-9
    assert feature_space("pixels", x).of(x).shape == (80, 6)
    own = feature_space(lambda a: a.flatten(1)[:, :2], x)
    assert own.of(x).shape == (80, 2) and own.name == "<lambda>"
    with pytest.raises(ValueError, match=r"`features` \(<lambda>\) should give shape \(80, F\) to 80 samples, got \(80,\)"):
        feature_space(lambda a: a[:, 0, 0], x).of(x)
    with pytest.raises(ValueError, match="needs `labels`"):
        feature_space("classifier", x)
    with pytest.raises(ValueError, match="did you mean 'pixels'"):
        feature_space("pixel", x)
    with pytest.raises(ValueError, match="all rows of the data are equal"):
        feature_space("pca", torch.ones(10, 3))


def test_a_classifier_of_the_data_says_how_good_it_is():
    labels = torch.arange(300) % 3 + 5
    x = draw(300, 4, 0) + 4.0 * torch.nn.functional.one_hot(labels - 5, 4)
    found = train_classifier(x, labels, seed=1)
    assert found.accuracy > 0.9 and f"accuracy {found.accuracy:.3f} on 60 others" in found.recipe
    assert float((found.classes[found.predict(x)] == labels).double().mean()) > 0.9 and found.features(x).shape == (300, 64)
    again = train_classifier(x, labels, seed=1)
    assert torch.equal(found.features(x), again.features(x))
    with pytest.raises(ValueError, match=r"`labels` should be one class a row, shape \(300,\), got \(299,\)"):
        train_classifier(x, labels[1:])
    with pytest.raises(ValueError, match="1 classes in 300 rows"):
        train_classifier(x, torch.zeros(300))


# --- copies ----------------------------------------------------------------------------------------------------------------


def test_p_values_of_memorisation_are_uniform_for_a_model_that_copies_nothing():
    found = [
        samples.memorisation(draw(60, 3, 3 * s), draw(90, 3, 3 * s + 1), draw(50, 3, 3 * s + 2), permutations=199, resamples=2)
        for s in range(100)
    ]
    assert uniform([f["nearest in train"].p_value for f in found])
    ratios = torch.tensor([f["distance ratio"].value for f in found])
    assert abs(float(ratios.mean()) - 1) < 0.05


def test_memorisation_finds_copies_exact_and_blurred():
    train, held_out = draw(150, 5, 0), draw(150, 5, 1)
    for blur in (0.0, 0.1):
        found = samples.memorisation(train[:80] + blur * draw(80, 5, 2), train, held_out)
        assert found["nearest in train"].p_value < 0.001 and found["nearest in train"].value > 0.95
        assert found["distance ratio"].value < 0.3
    third = torch.cat([train[:30], draw(60, 5, 3)])  # a third are copies
    assert samples.memorisation(third, train, held_out)["nearest in train"].p_value < 0.02


def test_memorisation_shares_ties_of_discrete_data():
    bits = (torch.rand(3, 200, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    found = samples.memorisation(*bits)
    assert found["nearest in train"].p_value > 0.01 and found["distance ratio"].value == 1.0


# --- modes -----------------------------------------------------------------------------------------------------------------


def test_modes_of_the_target_itself():
    for target, modes in ((toy.gaussian_grid(), 25), (toy.gaussian_ring(), 8)):
        found = samples.mode_coverage(target.sample(2500, seed=0), target)
        assert found["modes"].value == modes and found["modes"].std_error == 0
        assert abs(found["good share"].value - (1 - math.exp(-4.5))) < 4 * found["good share"].std_error
        assert found["reverse KL"].bias == pytest.approx((modes - 1) / 5000, rel=0.02)
        assert 0 < found["reverse KL"].value < 3 * found["reverse KL"].bias


def test_modes_by_hand():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = torch.cat([means[[0]].expand(60, 2), means[[1]].expand(20, 2), torch.full((20, 2), 5.0)])
    found = samples.mode_coverage(x, means, sd=0.5)
    assert found["modes"].value == 2 and found["good share"].value == 0.8
    assert found["reverse KL"].value == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1))
    assert found["good share"].std_error == pytest.approx(0.04, rel=0.3)
    lost = samples.mode_coverage(torch.full((20, 2), 5.0), means, sd=0.5)
    assert lost["modes"].value == 0 and math.isinf(lost["reverse KL"].value)


def test_few_good_samples_have_an_error_all_the_same():
    """Two in two of four modes among 60: of resamples with g of them good the divergence is log 4, or log 4 less an entropy."""
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = torch.cat([means[:2], torch.full((58, 2), 5.0)])
    found = samples.mode_coverage(x, means, sd=0.5, resamples=4000)["reverse KL"]
    expected, weight, square = 0.0, 0.0, 0.0
    for g in range(1, 61):
        for a in range(g + 1):  # in the first mode
            p = math.comb(60, g) * (2 / 60) ** g * (58 / 60) ** (60 - g) * math.comb(g, a) * 0.5**g
            entropy = -sum(n / g * math.log(n / g) for n in (a, g - a) if n)
            weight, expected = weight + p, expected + p * (math.log(4) - entropy)
            square += p * (math.log(4) - entropy) ** 2
    assert found.std_error == pytest.approx(math.sqrt(square / weight - (expected / weight) ** 2), rel=0.03)
    assert round(4000 * (58 / 60) ** 60) == pytest.approx(int(found.note.split("without the ")[1].split()[0]), abs=90)
    assert "nan" not in str(found)
    lost = samples.mode_coverage(torch.full((20, 2), 5.0), means, sd=0.5)["reverse KL"]
    assert str(lost).startswith("reverse KL inf,") and math.isnan(lost.std_error)


def test_modes_are_checked():
    with pytest.raises(ValueError, match="`generated` has 3 numbers a row, the modes 2"):
        samples.mode_coverage(draw(9, 3, 0), toy.gaussian_ring())
    with pytest.raises(ValueError, match="`sd` is missing"):
        samples.mode_coverage(draw(9, 2, 0), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="without separate modes"):
        samples.mode_coverage(draw(9, 2, 0), toy.two_moons())


# --- Parzen windows --------------------------------------------------------------------------------------------------------


def test_parzen_windows_prefer_cluster_centres_to_real_data():
    """The reason not to trust them: no sample of the digits looks like a centre, and centres win."""
    from sklearn.cluster import KMeans

    x = pgen.data.digits(split="random")
    centres = torch.from_numpy(KMeans(100, n_init=1, random_state=0).fit(x.train.flatten(1).numpy()).cluster_centers_)
    real = x.train[torch.randperm(len(x.train), generator=torch.Generator().manual_seed(0))[:100]]
    scores = [samples.parzen_estimate(y.reshape(-1, 8, 8), x.test, validation=x.validation) for y in (centres, real)]
    assert all(score.kind == "estimate" and score.measure == "density" for score in scores)
    difference = scores[0] - scores[1]
    assert difference.mean > 5 * difference.std_error


def test_parzen_windows_find_the_bandwidth_and_are_a_kernel_density():
    centres, x = draw(300, 2, 0), draw(200, 2, 1)
    found = samples.parzen_estimate(centres, x, validation=draw(200, 2, 2))
    best = max(float(samples.parzen_estimate(centres, draw(200, 2, 2), bandwidth=h).mean) for h in (0.2, 0.3, 0.4, 0.5))
    assert samples.parzen_estimate(centres, draw(200, 2, 2), validation=draw(200, 2, 2)).mean >= best
    normal = torch.distributions.MultivariateNormal(centres, 0.09 * torch.eye(2, dtype=torch.float64))
    by_hand = normal.log_prob(x[:, None]).logsumexp(1) - math.log(300)
    torch.testing.assert_close(samples.parzen_estimate(centres, x, bandwidth=0.3).value, by_hand)
    assert len(found) == 200
    with pytest.raises(ValueError, match="give `validation`"):
        samples.parzen_estimate(centres, x)


# --- one call --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three():
    """Training, real and generated samples of one law in classes."""
    labels = torch.arange(120) % 3
    shift = 4.0 * torch.nn.functional.one_hot(labels, 4).double()
    return [(draw(120, 4, seed) + shift).reshape(120, 2, 2) for seed in (0, 1, 2)], labels


def test_samples_of_the_law_pass(three):
    (train, real, generated), labels = three
    found = samples.evaluate(generated, real, train=train, labels=labels, features="classifier", progress=False)
    assert len(found.verdict) == 1 and found.verdict[0].startswith("No test tells samples from data (best accuracy 0.")
    assert found["classes"].value == 3 and found["nearest in train"].p_value > 0.01
    assert set(found.rows) == {
        "accuracy, kernel", "accuracy, forest", "MMD²", "Frechet distance", "precision", "recall", "density", "coverage",
        "nearest in train", "distance ratio", "classes", "reverse KL",
    }  # fmt: skip
    assert all(math.isfinite(row.found.std_error) and min(row.found.num_samples[:1]) > 0 for row in found.rows.values())
    assert "accuracy 1.000 on 24 others" in found.features and not found.notes
    assert found.rows["coverage"].floor.value > 0.9 and found.rows["nearest in train"].floor is None


@pytest.fixture(scope="module")
def report(three):
    (train, real, generated), _ = three
    return samples.evaluate(generated + 1.0, real, train=train, progress=False)


def test_a_report_prints_and_is_written(report, tmp_path):
    text = str(report)
    assert "120 samples against 120 real data, 120 training data" in text and "120 + 120" in text
    assert "verdict: A classifier (" in text and "not yet the data's law." in text
    assert report.to_markdown(tmp_path / "a.md") == (tmp_path / "a.md").read_text(encoding="utf-8")
    assert report.to_frame().loc["coverage", "value"] == report["coverage"].value
    dataset = report.to_dataset()
    assert float(dataset["std_error"].sel(measure="density")) == report["density"].std_error
    with pytest.raises(KeyError, match="'FID' was not measured"):
        report["FID"]


def test_a_report_is_repeatable_and_leaves_global_state_alone(report, three):
    (train, real, generated), _ = three
    state = torch.get_rng_state()
    assert str(samples.evaluate(generated + 1.0, real, train=train, progress=False)) == str(report)
    assert torch.equal(state, torch.get_rng_state())


def test_copies_are_named_as_copies(three):
    (train, real, _), _ = three
    found = samples.evaluate(train.clone(), real, train=train, progress=False)
    assert any("the model copies training data" in line for line in found.verdict)
    assert torch.equal(found.shown, found.neighbours) and found.neighbours_of == "training data"


def test_collapse_is_named(three):
    (train, real, _), labels = three
    one = real[labels == 0].repeat(3, 1, 1) * 0 + real[0]
    found = samples.evaluate(one, real, train=train, labels=labels, progress=False)
    assert any("part of the data is missing" in line for line in found.verdict)
    assert found["classes"].value == 1 and found["reverse KL"].value == pytest.approx(math.log(3), abs=0.05)


def test_training_data_of_another_law_are_named(three):
    (train, real, generated), _ = three
    found = samples.evaluate(generated, real, train=train + 1.5, progress=False)
    assert any(line.startswith("Held-out real data differ from the training data") for line in found.verdict)


def test_a_model_is_judged_by_its_own_samples(three):
    (train, real, _), _ = three
    model = pgen.models.Gaussian((2, 2))
    model.fit(train)
    found = samples.evaluate(model, real, progress=False)
    assert found.num_samples == (120, 120, 0) and "give `train`" in found.notes[0]
    assert "not yet the data's law" in found.verdict[0]  # three classes are not one Gaussian
    modes = samples.evaluate(
        toy.gaussian_ring(), toy.gaussian_ring().sample(200, seed=5), modes=toy.gaussian_ring(), progress=False
    )
    assert modes["modes"].value == 8 and modes.rows["good share"].floor is not None


def test_a_conditional_model_draws_at_the_contexts_of_the_data(three):
    class Echo:
        """Draws x about the context."""

        def sample(self, n, context, *, seed=0):
            generator = torch.Generator().manual_seed(seed)
            return torch.as_tensor(context).expand(n, 4) + 0.1 * torch.randn(n, 4, generator=generator, dtype=torch.float64)

    context = draw(60, 4, 0)
    real = context + 0.1 * draw(60, 4, 1)
    of_each, of_one = (samples.evaluate(Echo(), real, context=c, progress=False) for c in (context, context[:1]))
    assert of_each["coverage"].value > 0.9 and of_one["coverage"].value < 0.2
    with pytest.raises(ValueError, match="`context` is for a model that draws, got Tensor"):
        samples.evaluate(real, real, context=context)
    with pytest.raises(ValueError, match="context"):
        samples.evaluate(pgen.models.GAN((4,), hidden=(3,), context_dim=2), real)


def test_the_floor_has_as_many_data_as_there_are_samples(three):
    (train, real, generated), _ = three
    found = samples.evaluate(generated[:40].flatten(1), real[:40].flatten(1), train=train.flatten(1), progress=False)
    assert {row.floor.num_samples for row in found.rows.values() if row.floor} == {(40, 40)}
    assert not found.notes  # 160 numbers that are all different are no levels


def test_other_units_are_noted():
    x, y = (torch.rand(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for pair in ((255 * x, y), (x, 255 * y)):
        notes = samples.evaluate(*pair, progress=False).notes
        assert any("are both in the same units?" in note for note in notes)
    assert not any("units" in note for note in samples.evaluate(x, 10 * y, progress=False).notes)


def test_values_between_levels_are_noticed(three):
    (_, real, generated), _ = three
    found = samples.evaluate(generated, real.round(), progress=False)
    assert any("lie between them" in note and "round the samples" in note for note in found.notes)
    held = samples.evaluate(generated, real, train=real, progress=False)
    assert any("most of the real data are training data" in note for note in held.notes)


def test_bad_input_is_refused_in_one_line(three):
    (train, real, generated), labels = three
    evaluate = samples.evaluate
    with pytest.raises(ValueError, match="`generated` has 1 row, which is too few: give 14 or more"):
        evaluate(generated[:1], real)
    with pytest.raises(ValueError, match="`real` has 9 rows, which is too few"):
        evaluate(generated, real[:9])
    with pytest.raises(ValueError, match=r"`generated` should have the event shape of `real`, \(2, 2\), got \(4,\)"):
        evaluate(generated.flatten(1), real)
    with pytest.raises(ValueError, match=r"generated row 3, column \(0, 1\) is nan"):
        evaluate(
            generated.index_put((torch.tensor(3), torch.tensor(0), torch.tensor(1)), torch.tensor(math.nan).double()), real
        )
    with pytest.raises(ValueError, match="`labels` should be one class a row"):
        evaluate(generated, real, train=train[:100], labels=labels)
    with pytest.raises(ValueError, match="all 120 rows of `real` are equal"):
        evaluate(generated, torch.ones(120, 2, 2))
    with pytest.raises(ValueError, match="one and the same point"):
        samples.classifier_test(torch.ones(20, 2), torch.ones(20, 2))
    with pytest.raises(ValueError, match="`x` has 8 rows, which is too few: give 10 or more"):
        samples.classifier_test(real[:8], real)
    with pytest.raises(TypeError, match="should be one of kernel, forest, mlp, logistic, or have fit and predict, got int"):
        samples.classifier_test(real, real, classifier=3)
    with pytest.raises(ValueError, match="did you mean 'forest'"):
        samples.classifier_test(real, real, classifier="forrest")


def test_pictures_of_samples_and_their_neighbours(report, tmp_path):
    for shape in ((2, 2), (4,), (1,)):
        shown, near = (
            part.reshape(10, 4)[:, : math.prod(shape)].reshape(10, *shape) for part in (report.shown, report.neighbours)
        )
        found = dataclasses.replace(report, shown=shown, neighbours=near)
        path = pgen.plots.save(pgen.plots.samples_and_neighbours(found), tmp_path / "a.png")
        assert path.stat().st_size > 1000


def test_columns_of_different_units_count_alike() -> None:
    g = torch.Generator().manual_seed(0)
    real, wrong = (torch.randn(120, 2, generator=g) * torch.tensor([1.0, 800.0]) for _ in range(2))
    wrong[:, 0] += 6.0  # in the small column alone, which one component would not see
    found = samples.evaluate(wrong, real, progress=False)
    assert found["precision"].value < 0.05
    assert "columns differ in scale by a factor" in str(found)
    assert "columns differ in scale" not in str(
        samples.evaluate(real + 0.1, real, progress=False, modes=None, features=lambda x: x)
    )


def test_labels_that_are_words_are_named() -> None:
    with pytest.raises(TypeError, match="`labels` should hold numbers"):
        samples.evaluate(torch.randn(30, 2), torch.randn(30, 2), labels=["a", "b"] * 15, features="classifier", progress=False)


def test_neighbours_are_found_in_one_scale_and_shown_in_the_datas_own():
    g = torch.Generator().manual_seed(0)
    unit = torch.tensor([1.0, 1000.0])  # the second column alone would decide which is nearest
    train, real, drawn = (unit * torch.randn(n, 2, generator=g) for n in (60, 40, 50))
    found = samples.evaluate(drawn, real, train=train, progress=False)
    assert all((row == drawn).all(1).any() for row in found.shown) and len(found.shown) == 10
    deviation = train.std(0)
    want = train[torch.cdist(found.shown / deviation, train / deviation).argmin(1)]
    assert torch.equal(found.neighbours, want)
    assert not torch.equal(want, train[torch.cdist(found.shown, train).argmin(1)])


def test_a_p_value_near_the_limit_is_told_beside_the_verdict():
    def row(name, p):
        return samples.Row(samples.Finding(name, 0.73, 0.06, (30, 30), p), "data")

    rows = {name: row(name, p) for name, p in (("accuracy, kernel", 0.004), ("accuracy, forest", 0.05), ("MMD²", 0.2))}
    assert samples._told_apart(rows).endswith("more data may: the smallest p is 0.004, and below 0.0033 one would.")
    rows["accuracy, kernel"] = row("accuracy, kernel", 0.06)
    assert samples._told_apart(rows | {"accuracy, forest": row("accuracy, forest", 0.3)}).endswith("more data may.")
