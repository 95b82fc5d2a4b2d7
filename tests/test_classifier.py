"""Bayes' rule over any family: known posteriors, calibration, files, bad input."""

import json
import math

import numpy as np
import pytest
import torch

import pgen
from pgen import files, plots
from pgen.evaluation.calibration import assess
from pgen.models import VAE, Gaussian, GenerativeClassifier


def normal(n, dim, seed=0, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(scope="module")
def data():
    """Three Gaussians in the plane, of unequal frequency."""
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    y = torch.tensor([0] * 300 + [1] * 150 + [2] * 50)[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    return normal(500, 2) + centres[y], y, centres


@pytest.fixture(scope="module")
def fitted(data):
    x, y, _ = data
    classifier = GenerativeClassifier(lambda k: Gaussian((2,)), num_classes=3)
    runs = classifier.fit(x, y)
    assert len(runs) == 3 and runs[0].num_data == 300
    return classifier


# --- Bayes' rule ---------------------------------------------------------------------------------------------------------


def test_joint_marginal_and_posterior_are_bayes_rule(fitted, data):
    x, y, _ = data
    log_p = torch.stack([model.log_prob(x).value for model in fitted.models], 1)
    prior = torch.tensor([0.6, 0.3, 0.1]).double()
    torch.testing.assert_close(fitted.log_prior.exp(), prior)
    joint = fitted.log_prob(x, y)
    torch.testing.assert_close(joint.value, (log_p + prior.log()).gather(1, y[:, None])[:, 0])
    marginal = fitted.log_prob(x)
    torch.testing.assert_close(marginal.value, (log_p + prior.log()).logsumexp(1))
    assert joint.kind == marginal.kind == "exact" and marginal.measure == "density" and marginal.event_size == 2
    probs = fitted.predict_proba(x)
    torch.testing.assert_close(probs.log().gather(1, y[:, None])[:, 0], joint.value - marginal.value)
    assert torch.equal(fitted.predict(x), probs.argmax(1)) and fitted.kind(x) == "exact"


def test_the_marginal_integrates_to_one_and_the_posterior_is_that_of_discriminant_analysis(fitted, data):
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    x, y, _ = data
    axis = torch.linspace(-9, 11, 201)
    grid = torch.cartesian_prod(axis, axis)
    assert float(fitted.log_prob(grid).value.exp().sum() * 0.1**2) == pytest.approx(1.0, abs=1e-4)
    peer = QuadraticDiscriminantAnalysis(store_covariance=True).fit(x.double().numpy(), y.numpy())
    probs = torch.as_tensor(peer.predict_proba(x.double().numpy()))
    assert float((probs - fitted.predict_proba(x)).abs().max()) < 0.02  # it divides by n - 1
    assert float((probs.argmax(1) == fitted.predict(x)).double().mean()) > 0.99


def test_a_given_prior_stays(data):
    x, y, _ = data
    classifier = GenerativeClassifier([Gaussian((2,)) for _ in range(3)], prior=[0.2, 0.5, 0.3])
    classifier.fit(x, y)
    torch.testing.assert_close(classifier.log_prior.exp(), torch.tensor([0.2, 0.5, 0.3]).double())


def test_a_classifier_that_is_not_fitted_says_so_and_one_set_by_hand_answers():
    x = torch.tensor([[0.0], [2.0], [5.0]])
    unfitted = r"^this classifier is not fitted yet, as the models of classes 0, 1 have seen no data; call fit\(x, y\) first"
    classifier = GenerativeClassifier(lambda k: Gaussian((1,)), num_classes=2)
    for question in (classifier.predict, classifier.predict_proba, classifier.log_prob, classifier.kind):
        with pytest.raises(ValueError, match=rf"{unfitted}$"):
            question(x)
    with pytest.raises(ValueError, match="as its model has seen no data"):
        GenerativeClassifier(Gaussian((1,), context_dim=2)).predict(x)
    low, high = classifier.models
    high.loc.data.fill_(4.0)
    known = torch.sigmoid(4 * x[:, 0].double() - 8)  # log N(x; 4, 1) - log N(x; 0, 1)
    with pytest.warns(UserWarning, match=rf"{unfitted}, or set model.primed = True where"):
        torch.testing.assert_close(classifier.predict_proba(x)[:, 1], known)
    low.primed = high.primed = True
    torch.testing.assert_close(classifier.predict_proba(x)[:, 1], known)


def test_a_model_answers_before_a_fit_and_its_preprocessing_says_what_it_lacks():
    model = Gaussian((2,))
    model.loc.data.fill_(3.0)
    torch.testing.assert_close(model.log_prob(torch.full((1, 2), 3.0)).value, torch.tensor([-math.log(2 * math.pi)]).double())
    with pytest.raises(ValueError, match=r"^Standardize has not seen data yet; call fit\(x\) first"):
        Gaussian((2,), preprocess=pgen.data.Standardize()).log_prob(torch.zeros(1, 2))


def test_one_model_with_the_class_as_context(data):
    x, y, centres = data
    vae = VAE((2,), 2, (16,), likelihood="gaussian", context_dim=3, preprocess=pgen.data.Standardize())
    classifier = GenerativeClassifier(vae)
    assert classifier.num_classes == 3 and classifier.conditional
    (run,) = classifier.fit(x, y, validation=(x[:50], y[:50]), epochs=40, progress=False)
    assert len(run.validation["bound"]) and classifier.kind(x) == "lower_bound"
    joint, marginal = (classifier.log_prob(x[:60], labels, num_samples=20) for labels in (y[:60], None))
    assert joint.kind == marginal.kind == "lower_bound" and marginal.num_samples == 20
    one_hot = torch.nn.functional.one_hot(y[:60], 3).float()
    own = vae.log_prob(x[:60], context=torch.eye(3)[:1], num_samples=20)
    mine = y[:60] == 0
    torch.testing.assert_close(joint.value[mine], own.value[mine] + math.log(0.6))
    torch.testing.assert_close(joint.mc_error[mine], own.mc_error[mine])
    assert one_hot.shape == (60, 3) and bool((marginal.value >= joint.value - 1e-9).all())
    found = classifier.evaluate(x, y, num_samples=20)
    assert found.accuracy > 0.85 and found.kind == "estimate" and "estimates, from bounds" in str(found)
    means = torch.stack([classifier.sample(300, k).mean(0) for k in range(2)])  # of the third there are few data
    assert float((means - centres[:2]).abs().max()) < 1.0


# --- calibration ---------------------------------------------------------------------------------------------------------


def test_calibration_undoes_counting_the_evidence_twice():
    """Every column twice: an independent Gaussian counts each twice, so T = 2 is right."""
    y = (torch.rand(4000, generator=torch.Generator().manual_seed(2)) < 0.5).long()
    half = normal(4000, 2, seed=3) + 1.2 * (y[:, None] - 0.5)
    x = torch.cat([half, half], 1)
    classifier = GenerativeClassifier(lambda k: Gaussian((4,), "diagonal"), num_classes=2)
    classifier.fit(x[:2000], y[:2000])
    before = classifier.evaluate(x[3000:], y[3000:])
    joint = classifier.log_prob(x[:5]).value
    temperature = classifier.calibrate(x[2000:3000], y[2000:3000])
    after = classifier.evaluate(x[3000:], y[3000:])
    assert temperature == pytest.approx(2.0, abs=0.35)
    assert after.ece < before.ece and after.log_loss < before.log_loss and before.ece > 0.05
    assert after.accuracy == pytest.approx(before.accuracy, abs=0.01)
    assert torch.equal(joint, classifier.log_prob(x[:5]).value)  # densities have no temperature
    classifier.fit(x[:2000], y[:2000])
    assert float(classifier.temperature) == 1.0


def test_calibration_error_is_its_definition():
    probs = torch.tensor([[0.95, 0.05], [0.91, 0.09], [0.3, 0.7], [0.35, 0.65]])
    found = assess(probs, torch.tensor([0, 1, 1, 1]), bins=10)
    # Bins (0.9, 1]: right 1/2, confidence 0.93; (0.6, 0.7]: right 1, confidence 0.675.
    assert found.ece == pytest.approx(0.5 * 0.43 + 0.5 * 0.325, abs=1e-6)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert found.accuracy == 0.75 and found.accuracy_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.log_loss == pytest.approx(-(math.log(0.95) + math.log(0.09) + math.log(0.7) + math.log(0.65)) / 4, abs=1e-6)
    assert found.brier == pytest.approx(2 * (0.05**2 + 0.91**2 + 0.3**2 + 0.35**2) / 4, abs=1e-6)
    sure = assess(torch.eye(3), torch.arange(3))
    assert sure.ece == 0 and sure.log_loss == 0
    truth = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    y = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < truth).long()
    assert assess(torch.stack([1 - truth, truth], 1), y).ece < 0.015


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_loaded_classifier_gives_the_same_bits(data, tmp_path):
    x, y, _ = data
    classifier = GenerativeClassifier(lambda k: Gaussian((2,), preprocess=pgen.data.Standardize()), num_classes=3)
    classifier.fit(x, y)
    classifier.calibrate(x, y)
    classifier.save(tmp_path / "c.pgen")
    again = pgen.load(tmp_path / "c.pgen")
    assert isinstance(again, GenerativeClassifier)
    assert torch.equal(again.predict_proba(x), classifier.predict_proba(x))
    assert torch.equal(again.log_prob(x).value, classifier.log_prob(x).value)
    conditional = GenerativeClassifier(VAE((2,), 2, (4,), likelihood="gaussian", context_dim=3))
    conditional.fit(x, y, steps=2, progress=False)
    conditional.save(tmp_path / "v.pgen")
    assert torch.equal(pgen.load(tmp_path / "v.pgen").predict_proba(x[:9]), conditional.predict_proba(x[:9]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["members"][1].update(family="os"), "unknown family 'os'"),
        (lambda s: s["members"].pop(), "2|settings do not fit"),
        (lambda s: s.update(members=[3, 4, 5]), "unknown family"),
        (lambda s: s.update(members=None), "settings do not fit a classifier"),
        (lambda s: s["members"][0]["settings"].update(event_shape=[3]), "should have shape"),
        (lambda s: s.update(num_classes=10**6), "one model a class"),
    ],
)
def test_a_changed_file_is_refused_in_one_line(fitted, tmp_path, change, message):
    fitted.save(tmp_path / "c.pgen")
    tensors, metadata = files.read(tmp_path / "c.pgen")
    settings = json.loads(json.dumps(metadata["settings"]))
    change(settings)
    files.write(tmp_path / "c.pgen", tensors, {"family": "classifier", "settings": settings})
    with pytest.raises(ValueError, match=message):
        pgen.load(tmp_path / "c.pgen")


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_one_line(fitted, data):
    x, y, _ = data
    make = lambda k: Gaussian((2,))  # noqa: E731
    with pytest.raises(ValueError, match="`num_classes` is missing"):
        GenerativeClassifier(make)
    with pytest.raises(ValueError, match="needs context_dim=3, got 0"):
        GenerativeClassifier(Gaussian((2,)), num_classes=3)
    with pytest.raises(ValueError, match="one model a class, 3, got 2"):
        GenerativeClassifier([make(0), make(1)], 3)
    with pytest.raises(ValueError, match="two classes share one model"):
        GenerativeClassifier([make(0)] * 2)
    with pytest.raises(TypeError, match="the model of class 1 should be a family with a density, got Autoencoder"):
        GenerativeClassifier([make(0), pgen.models.Autoencoder((2,), 1)])
    with pytest.raises(ValueError, match=r"the model of class 1 has event shape \(3,\), that of class 0 \(2,\)"):
        GenerativeClassifier([make(0), Gaussian((3,))])
    with pytest.raises(ValueError, match="`prior` should be 2 positive probabilities"):
        GenerativeClassifier(make, 2, prior=[0.5, 0.6])
    classifier = GenerativeClassifier(make, 3)
    with pytest.raises(ValueError, match=r"`y` has . in row 0; classes are 0 to 2"):
        classifier.fit(x, y + 3)
    with pytest.raises(ValueError, match="`y` has no data of class 2"):
        classifier.fit(x, y.clamp(max=1))
    with pytest.raises(ValueError, match="`validation` has no data of class 2"):
        classifier.fit(x, y, validation=(x[y < 2], y[y < 2]))
    with pytest.raises(ValueError, match=r"one class for each of 500 data, shape \(500,\), got \(499,\)"):
        classifier.fit(x, y[1:])
    with pytest.raises(ValueError, match=r"`y` has 0\.5 in row 0"):
        fitted.log_prob(x, torch.full((500,), 0.5))
    with pytest.raises(ValueError, match="class 0: the covariance of `data` is singular"):
        classifier.fit(torch.zeros(6, 2), torch.arange(6) % 3)
    with pytest.raises(ValueError, match="`probs` should be rows of probabilities"):
        assess(torch.ones(3, 2), [0, 1, 0])


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_show_boundaries_and_reliability(fitted, data):
    x, y, _ = data
    figure = plots.decision_boundary(fitted.predict_proba, x, y, grid=40)
    ax = figure.axes[0]
    assert ax.images[0].get_array().shape == (40, 40, 3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["class 0", "class 1", "class 2"]
    lines = [part for part in ax.collections if hasattr(part, "levels")]
    ends = np.concatenate([path.vertices for part in lines for path in part.get_paths()])
    probs = fitted.predict_proba(torch.as_tensor(ends, dtype=torch.get_default_dtype())).sort(1).values
    assert len(lines) == 3 and float((probs[:, -1] - probs[:, -2]).max()) < 0.2  # on the boundary two classes are alike
    found = fitted.evaluate(x, y)
    marks = plots.reliability(found).axes[0].collections[-1].get_offsets()
    assert len(marks) == int((found.counts > 0).sum())
    with pytest.raises(ValueError, match="should lie in a plane"):
        plots.decision_boundary(fitted.predict_proba, normal(4, 3), y[:4])
