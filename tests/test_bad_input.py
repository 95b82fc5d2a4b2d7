"""Mistakes, each refused on the first batch in one line that says what came, what was expected, and the fix."""

import math
import re
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, gaussian_guide, gaussian_model

import pgen
from pgen import models
from pgen.models import VAE, Autoencoder

STEPS = {"steps": 1, "progress": False, "compile": "eager"}


@contextmanager
def refused(match, kind=ValueError):
    """An error in one line that a terminal can hold."""
    with pytest.raises(kind, match=match) as info:
        yield
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 420


def fit(model, guide=None, data=None, **options):
    return pgen.Pair(model, guide).fit(
        torch.linspace(-1.0, 2.0, 7) if data is None else data, steps=2, progress=False, **options
    )


def vae(**options):
    return VAE((2, 3), 4, (5,), **options)


def mean(y, name="data", size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate(name, len(y) if size is None else size):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


# --- values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named_by_row_and_column(bad):
    x = torch.zeros(9, 2, 3)
    x[5, 1, 2] = bad
    with refused(rf"data row 5, column \(1, 2\) is {bad}"):
        vae().fit(x)
    for question in ("log_prob", "encode", "reconstruct", "posterior"):
        with refused(r"(x|data) row 5, column \(1, 2\) is"):
            getattr(vae(), question)(x)
    with refused(r"validation row 5"):
        vae().fit(torch.zeros(4, 2, 3), validation=x)
    y = torch.zeros(9, 4)
    y[3, 2] = bad
    with refused(r"data\[1\] row 3, column 2"):
        fit(lambda x, y: None, data=(torch.zeros(9), y))
    with refused(r"data\['y'\] row 3, column 2"):
        fit(lambda x, y: None, data={"x": torch.zeros(9), "y": y})


def test_context_is_checked_like_data():
    model = vae(context_dim=5)
    with refused("context row 4, column 0 is nan"):
        model.fit(torch.zeros(9, 2, 3), context=torch.tensor([[math.nan if i == 4 else 0.0] * 5 for i in range(9)]))
    with refused(r"`context` should have shape \(N, 5\), got \(9, 4\)"):
        model.fit(torch.zeros(9, 2, 3), context=torch.zeros(9, 4))
    with refused("`context` has 8 rows for 9 data"):
        model.fit(torch.zeros(9, 2, 3), context=torch.zeros(8, 5))
    with refused("give `context`"):
        model.sample(3)
    with refused("made without context"):
        vae().fit(torch.zeros(9, 2, 3), context=torch.zeros(9, 5))


SAME = "every datum has the same context, from which nothing is learnt: leave `context` out of model and fit"


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_steps_context",
        "flow_matching_context",
        "vae_gaussian_context",
        "flow_spline_coupling_context",
        "energy_context",
    ],
)
def test_a_context_in_which_nothing_varies_is_warned_of(name):
    case = CASES[name]
    model, same = case.model(), case.context[:1]
    with pytest.warns(UserWarning, match=SAME):
        run = model.fit(case.x, context=same, **STEPS)
    assert SAME in run.warnings[-1] and SAME in str(run)
    assert not model.fit(case.x, context=case.context, **STEPS).warnings
    assert not model.fit(case.x[:1], context=same, **STEPS).warnings


def test_a_closed_form_given_one_class_alone_is_warned_of():
    model = models.Gaussian((2, 3), context_dim=2)
    with pytest.warns(UserWarning, match=SAME):
        assert SAME in model.fit(CASES["gaussian_full"].x, context=torch.eye(2)[:1], progress=False).warnings[-1]


def test_a_game_without_a_context_that_varies_is_refused():
    case = CASES["gan_packed_context"]
    with refused(SAME):
        case.model().fit(case.x, context=case.context[:1], **STEPS)


@pytest.mark.parametrize(
    ("likelihood", "bad", "support"),
    [
        ({"likelihood": "bernoulli"}, 0.5, "Boolean"),
        ({"likelihood": "bernoulli"}, 2.0, "Boolean"),
        ({"likelihood": "categorical", "num_classes": 7}, 7.0, "IntegerInterval"),
        ({"likelihood": "categorical", "num_classes": 7}, -1.0, "IntegerInterval"),
    ],
)
def test_values_outside_the_support_are_named_by_row(likelihood, bad, support):
    x = torch.zeros(9, 2, 3)
    x[3, 1, 1] = bad
    with refused(rf"model site 'x': data row 3 holds .*{bad:g}.*outside the support {support}.*choose another likelihood"):
        vae(**likelihood).fit(x)


@pytest.mark.parametrize("row", [3, 8], ids=["first batch", "later batch"])
def test_values_outside_the_support_are_found_in_every_batch(row):
    x = torch.zeros(9, 2, 3)
    x[row, 1, 1] = 0.5
    with refused(rf"row {row} holds .*0.5.*outside the support Boolean"):
        vae().fit(x, batch_size=4, steps=2, progress=False)


@pytest.mark.parametrize("question", ["log_prob", "posterior"])
def test_questions_about_values_outside_the_support_are_refused(question):
    with refused("outside the support"):
        getattr(vae(), question)(torch.full((3, 2, 3), 0.5))


@pytest.mark.parametrize("likelihood", [dist.LogNormal(0.0, 1.0), dist.HalfCauchy(1.0), dist.Gamma(1.0, 1.0)])
def test_support_of_transformed_distributions(likelihood):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood.__class__(*(p * mu.exp() for p in parameters(likelihood))), obs=y)

    with refused("model site 'y': data row 1 holds -2, outside the support"):
        fit(model, data=torch.tensor([1.0, -2.0, 3.0]))


def parameters(likelihood):
    return [getattr(likelihood, name) for name in likelihood.arg_constraints if name not in ("logits",)]


def test_masked_values_may_lie_outside_the_support():
    y, seen = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(y, seen):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    assert np.isfinite(fit(model, data=(y, seen)).history["loss"]).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_bits_of_any_dtype_fit(dtype):
    assert vae().fit((torch.rand(9, 2, 3) > 0.5).to(dtype), steps=2, progress=False).steps == 2


# --- shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((9, 6), r"did you mean x.reshape\(-1, 2, 3\)\?"), ((2, 3), r"one datum\? use x\[None\]"), ((9, 3, 2), "reshape")],
)
@pytest.mark.parametrize("question", ["fit", "log_prob", "encode", "posterior", "draw", "predict", "reconstruct"])
def test_a_wrong_event_shape_names_both_shapes(shape, hint, question):
    with refused(rf"should have shape \(N, 2, 3\), got \({', '.join(map(str, shape))}\).*{hint}"):
        getattr(vae(), question)(torch.zeros(shape))


def test_a_transposed_matrix_is_recognised():
    with refused(r"should have shape \(N, 3\), got \(3, 8\); did you mean x.T\?"):
        VAE((3,), 2, (4,)).log_prob(torch.zeros(3, 8))


def test_unequal_lengths_are_listed():
    with refused(r"differ in length along axis 0: data\[0\] 7, data\[1\] 6"):
        fit(mean, data=(torch.zeros(7), torch.zeros(6)))
    with refused(r"differ in length along axis 0: data\['x'\] 7, data\['y'\] 6"):
        fit(mean, data={"x": torch.zeros(7), "y": torch.zeros(6)})


@pytest.mark.parametrize("data", [torch.zeros(0), (), {}, (torch.zeros(0, 3),), []])
def test_empty_data(data):
    with refused("`data` (has no rows|is an empty collection|is empty)"):
        fit(mean, data=data)


def test_empty_data_of_a_family():
    with refused("has no rows|is empty"):
        vae().fit(torch.zeros(0, 2, 3))
    with refused("has no rows|is empty"):
        vae().log_prob(torch.zeros(0, 2, 3))


def test_a_dict_without_x_says_so():
    with refused(r"'x'.*\by\b"):
        vae().fit({"y": torch.zeros(9, 2, 3)})


# --- silent broadcasting -----------------------------------------------------------------------------------------------------

N = 7
X = torch.linspace(-1, 1, N)[:, None]


def column_under_to_event(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x * b, 1.0).to_event(2), obs=y)


def inside_one_plate_too_many(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 5, dim=-2), pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def column_in_a_plate(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x * b, 1.0), obs=y)


def column_of_data(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.expand(len(y)), 1.0), obs=y[:, None])


def no_to_event(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.expand(len(y), 3), 1.0), obs=y[:, None].expand(-1, 3))


def one_value_for_all(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.expand(len(y)), 1.0), obs=y[0])


def latent_without_to_event(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y)


def rows_outside_every_plate(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape), obs=y)


BROADCASTS = {
    column_under_to_event: "site 'y' has shape (7, 1) but its value has shape (7,), .* unsqueeze the value",
    inside_one_plate_too_many: "site 'y' has shape (5, 7) but its value has shape (7,), .* one plate too many",
    column_in_a_plate: "site 'y' has shape (7, 7) but its value has shape (7,), .* does not broadcast",
    column_of_data: "site 'y' has shape (7,) but its value has shape (7, 1), .* squeeze the value",
    no_to_event: "plate|to_event",
    one_value_for_all: "site 'y' has shape (7,) but its value has shape (), .* does not broadcast",
    latent_without_to_event: "site 'b' has an axis of size 3 .* outside every plate; declare it with .to_event(1)",
    rows_outside_every_plate: "site 'y' has an axis of size 7 .* outside every plate; put it into `with pyro.plate(\"data\"",
}


@pytest.mark.parametrize("model", BROADCASTS, ids=lambda model: model.__name__)
def test_shapes_that_pyro_would_broadcast_are_refused(model):
    pattern = ".*".join(map(re.escape, BROADCASTS[model].split(".*"))) if "|" not in BROADCASTS[model] else BROADCASTS[model]

    def guide(x, y):
        if model is column_under_to_event or model is latent_without_to_event:
            size = 1 if model is column_under_to_event else 3
            b = dist.Normal(torch.zeros(size), pyro.param("s", torch.ones(size)))
            pyro.sample("b", b if model is latent_without_to_event else b.to_event(1))
        else:
            pyro.sample("b" if model is column_in_a_plate else "mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with refused(pattern):
        fit(model, guide, (X, X[:, 0]))


# --- plates --------------------------------------------------------------------------------------------------------------


def test_a_plate_of_another_size():
    with refused("site 'y'|Shape mismatch inside plate"):
        fit(lambda y: mean(y, size=5))
    with refused("plate \"data\" of model site 'y' has size 1 but the batch has 7 rows"):
        fit(one_row)


def one_row(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[:1])


def test_a_batch_axis_needs_the_plate_named_data_under_minibatches():
    with refused('needs the plate that holds the rows to be called "data".*or leave batch_size out'):
        fit(lambda y: mean(y, name="rows"), batch_size=3)
    assert fit(lambda y: mean(y, name="rows")).steps == 2


@pytest.mark.parametrize("way", ["subsample_size", "subsample"])
def test_a_plate_that_scales_itself_is_not_scaled_twice(way):
    """Pyro's idiom under minibatches: the plate knows N. Counting each row N / B times over again would be silent."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 9, **{way: len(y) if way == "subsample_size" else torch.arange(len(y))}):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Delta(pyro.param("m", torch.tensor(0.5))))

    y = torch.linspace(-1.0, 2.0, 9)
    exact = float(dist.Normal(0.5, 1.0).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))) / 9
    try:
        run = pgen.Pair(model, guide).fit(y, batch_size=3, epochs=1, optimizer=1e-9, progress=False)
    except ValueError as error:
        assert "subsample" in str(error)
    else:
        assert float(run.history["loss"].mean()) == pytest.approx(-exact, abs=1e-4)


# --- model and guide ---------------------------------------------------------------------------------------------------------


def test_a_guide_that_lacks_a_latent():
    with refused(r"the guide lacks the latent 'mu'; add pyro.sample\('mu', ...\)"):
        fit(mean, lambda y: pyro.param("a", torch.tensor(0.0)))


def test_a_guide_with_one_latent_too_many():
    def guide(y):
        loc = pyro.param("a", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 1.0))
        pyro.sample("mo", dist.Normal(loc, 1.0))

    with refused("the guide samples 'mo', which is no site of the model; did you mean 'mu'"):
        fit(mean, guide)


def test_a_guide_that_samples_what_is_observed():
    def guide(y):
        loc = pyro.param("a", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0))

    with refused("the guide samples 'y', which the model observes"):
        fit(mean, guide)


def test_a_discrete_latent_without_a_guide_site():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(3.0)).expand([len(y)]))
            pyro.sample("y", dist.Normal(z, pyro.param("sd", torch.tensor(1.0))), obs=y)

    with refused("lacks the latent 'z' .it is discrete"):
        fit(model, lambda y: None)


def test_programs_are_callables():
    with refused("`model` should be a Pyro program", TypeError):
        pgen.Pair("model")
    with refused("`guide` should be a Pyro program or one of mean_field", TypeError):
        pgen.Pair(mean, 3)
    with refused("there is nothing to train"):
        pgen.Pair(gaussian_model, gaussian_guide).fit(torch.zeros(3, 5, dtype=torch.float64), precision="float64")


# --- options -------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "compile": ("grph", "`compile` is 'grph', which is unknown; did you mean 'graph'"),
    "precision": ("float46", "`precision` is 'float46', which is unknown; did you mean 'float64'"),
    "schedule": ("cosin", "`schedule` is 'cosin', which is unknown; did you mean 'cosine'"),
    "device": ("gpu", "`device` is 'gpu'"),
    "steps": (0, "`steps` should be a positive integer, got 0"),
    "epochs": (-1, "`epochs` should be a positive number, got -1"),
    "batch_size": (2.5, "`batch_size` should be a positive integer, got 2.5"),
    "clip_norm": (0, "`clip_norm` should be a positive number, got 0"),
    "ema": (1.0, "`ema` is a decay in .0, 1."),
    "max_nonfinite": (0, "`max_nonfinite` should be a positive integer, got 0"),
    "checkpoint_every": (0, "`checkpoint_every` should be a positive integer, got 0"),
    "early_stopping": (-2, "`early_stopping`"),
    "unroll": (0, "`unroll` should be a positive integer"),
    "seed": (None, "`seed`"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked(name):
    value, message = OPTIONS[name]
    with refused(message):
        vae().fit(torch.zeros(9, 2, 3), progress=False, **{"steps": 2, name: value} if name != "epochs" else {name: value})


def test_an_unknown_option_names_the_nearest():
    with refused("unknown option 'earlystopping'; did you mean 'early_stopping'", TypeError):
        vae().fit(torch.zeros(9, 2, 3), earlystopping=3)


def test_epochs_and_steps_exclude_each_other():
    with refused("give either `epochs` or `steps`, not both"):
        vae().fit(torch.zeros(9, 2, 3), epochs=1, steps=2)


@pytest.mark.parametrize("steps", [3.0, np.int64(3)])
def test_whole_numbers_of_any_type_count_steps(steps):
    assert vae().fit(torch.zeros(9, 2, 3), steps=steps, progress=False).steps == 3


def test_constructor_arguments_are_checked():
    with refused("`likelihood` is 'bernouli', which is unknown; did you mean 'bernoulli'"):
        vae(likelihood="bernouli")
    with refused("`activation` is 'slu', which is unknown; did you mean 'silu'"):
        vae(activation="slu")
    with refused("`num_classes` is missing"):
        vae(likelihood="categorical")
    with refused("`num_classes` goes with likelihood='categorical'"):
        vae(num_classes=3)
    with refused("`latent_dim` should be a positive integer"):
        VAE((3,), 0)
    with refused("`event_shape` should be positive sizes"):
        VAE((), 2)


@pytest.mark.parametrize("optimizer", [pyro.optim.Adam({"lr": 0.01}), "adam", torch.optim.LBFGS, True])
def test_what_is_no_optimizer_is_refused(optimizer):
    with refused("`optimizer` should be", TypeError):
        vae().fit(torch.zeros(9, 2, 3), steps=2, optimizer=optimizer, progress=False)


@pytest.mark.parametrize("question", ["log_prob", "draw"])
def test_numbers_of_samples_are_checked(question):
    with refused("`num_samples` should be a positive integer, got 0"):
        getattr(vae(), question)(torch.zeros(3, 2, 3), num_samples=0)


# --- what cannot be asked ----------------------------------------------------------------------------------------------------


def test_an_autoencoder_has_no_density():
    with refused("an autoencoder has no density", pgen.NotAvailable):
        Autoencoder((2, 3), 2, (4,)).log_prob(torch.zeros(3, 2, 3))


def test_data_that_share_a_latent_have_no_density_each():
    y = torch.linspace(-1.0, 2.0, 7)
    pair = pgen.Pair(mean)
    with refused("has not seen data yet; call fit first"):
        pair.log_prob(y)
    pair.fit(y, steps=2, progress=False)
    with refused("data share 'mu'.*posterior", pgen.NotAvailable):
        pair.log_prob(y)


def test_a_pair_without_latents_has_no_posterior():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)

    pair = pgen.Pair(model)
    pair.fit(torch.zeros(7), steps=2, progress=False)
    with refused("latent", pgen.NotAvailable):
        pair.posterior(torch.zeros(7))


def test_a_random_state_of_a_family_without_a_name_is_not_saved(tmp_path):
    class Own(VAE):
        family = ""

    with refused("family"):
        Own((3,), 2, (4,)).save(tmp_path / "own.pgen")


def test_a_subclass_does_not_take_its_parents_place_in_files(tmp_path):
    class Own(VAE):
        """Under no name of its own."""

    VAE((3,), 2, (4,)).save(tmp_path / "vae.pgen")
    assert type(pgen.load(tmp_path / "vae.pgen")) is VAE and pgen.models.REGISTRY["vae"] is VAE
    with refused("Own has no name in the registry of families; set `family = ...` in the class to save it"):
        Own((3,), 2, (4,)).save(tmp_path / "own.pgen")
    assert not (tmp_path / "own.pgen").exists()


def test_a_classifier_with_an_energy_of_ones_own_is_not_saved(tmp_path):
    own = [pgen.models.EnergyBased((2,), energy=torch.nn.Sequential(torch.nn.Linear(2, 1))) for _ in range(2)]
    with refused("the energy Sequential is a module of your own, which no file can hold"):
        pgen.models.GenerativeClassifier(own).save(tmp_path / "own.pgen")


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    case = CASES["vae_standardized"]
    model = case.model()
    case.fit(model)
    model.save(tmp_path / "model.pgen")
    return tmp_path / "model.pgen"


def test_a_damaged_file_is_noticed(saved):
    whole = saved.read_bytes()
    for position in range(9, len(whole), max(1, len(whole) // 40)):
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with refused("model.pgen"):
            pgen.load(saved)
    for cut in (0, 7, 100, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        with refused("model.pgen"):
            pgen.load(saved)


def test_files_of_pairs_and_families_are_told_apart(saved, tmp_path):
    with refused("holds the family 'vae'"):
        pgen.Pair(mean).load(saved)
    pair = pgen.Pair(mean)
    with refused("not been fitted yet"):
        pair.save(tmp_path / "pair.pgen")
    pair.fit(torch.zeros(7), steps=2, progress=False)
    pair.save(tmp_path / "pair.pgen")
    with refused(r"load it with pgen.Pair\(model, guide\).load"):
        pgen.load(tmp_path / "pair.pgen")
    with refused("was saved with the guide 'mean_field', this pair has 'full_rank'"):
        pgen.Pair(mean, "full_rank").load(tmp_path / "pair.pgen")


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    pgen.load(saved)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "family",
    [
        lambda: models.WaveNet((6,), num_classes=3, channels=4, dilations=(1,)),
        lambda: models.CausalTransformer((6,), num_classes=3, width=8, layers=1, heads=2),
        lambda: models.MADE((6,), hidden=(8,), likelihood="categorical", num_classes=3),
        lambda: models.PixelRNN((2, 3), 4, layers=1, likelihood="categorical", num_classes=3),
    ],
    ids=["wavenet", "transformer", "made", "pixel_rnn"],
)
def test_a_class_that_a_network_has_not_is_named_before_it_is_looked_up(family):
    model = family()
    x = torch.zeros(5, *model.event_shape)
    x[4].view(-1)[1] = 3
    with refused(r"model site 'x': data row 4 holds 3, outside the support"):
        model.log_prob(x)
    with refused(r"data row 0 holds 3"):
        model.log_prob(x[4:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.HiddenMarkov((4,), 2, num_classes=3),
        lambda: models.WaveNet((4,), num_classes=3),
        lambda: models.MADE((4,), likelihood="categorical", num_classes=3),
        lambda: models.Mixture((4,), 2, "categorical", num_classes=3),
    ],
    ids=["hidden_markov", "wavenet", "made", "mixture"],
)
def test_a_class_too_high_is_told_with_the_number_of_classes_that_would_do(make):
    x = torch.zeros(200, 4)
    x[1, 2], x[199, 0] = 4.0, 500.0
    advice = r"row 1 holds 4, outside the support .*: the largest value is 500, for which num_classes=501 would do$"
    for question in (lambda: make().fit(x, **STEPS), lambda: make().log_prob(x)):
        with refused(advice):
            question()


def test_a_symbol_before_the_next_one_lies_in_the_support():
    with refused(r"`prefix`: data row 1 holds 3, outside the support"):
        models.HiddenMarkov((4,), 2, num_classes=3).next([[0.0, 2.0], [1.0, 3.0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.HiddenMarkov((6,), 2, num_classes=3),
        lambda: models.WaveNet((6,), num_classes=3),
        lambda: models.CausalTransformer((6,), num_classes=3),
    ],
    ids=["hidden_markov", "wavenet", "causal_transformer"],
)
def test_sequences_of_another_length_are_told_what_to_do(make):
    model = make()
    with refused(r"\(N, 6\), got \(3, 4\); shorter sequences are padded, .* told: data=pgen.data.pad\(sequences, 6\)$"):
        model.fit(torch.zeros(3, 4))
    with refused(r"got \(3, 9\); cut longer .* by pgen.data.windows\(sequence, 6\), or make .* with event_shape=\(9,\)$"):
        model.log_prob(torch.zeros(3, 9))
    with refused(r"row 2, column 5 is nan; .*; if it is padding, put zeros there and tell the lengths, as pgen.data.pad does$"):
        model.fit(torch.tensor([[0.0] * 6, [1.0] * 6, [2.0] * 5 + [math.nan]]))
    with refused(r"got \(6,\); one datum\? use x\[None\]$"):
        model.log_prob(torch.zeros(6))
    padded = pgen.data.pad(list(torch.zeros(3, 4)), 6)
    assert len(model.log_prob(padded)) == 3


HIDDEN = {
    "flow": lambda hidden: models.Flow((2,), hidden=hidden),
    "made": lambda hidden: models.MADE((2,), hidden),
    "vae": lambda hidden: VAE((2,), 1, hidden),
    "autoencoder": lambda hidden: Autoencoder((2,), 1, hidden),
    "gan": lambda hidden: models.GAN((2,), hidden=hidden),
    "energy": lambda hidden: models.EnergyBased((2,), hidden=hidden),
    "gaussian_mixture": lambda hidden: models.GaussianMixture((2,), 3, context_dim=2, hidden=hidden),
    "mixture": lambda hidden: models.Mixture((2,), 3, context_dim=2, hidden=hidden),
    "mixture_of": lambda hidden: models.MixtureOf([models.Gaussian((2,))], context_dim=2, hidden=hidden),
    "hidden_markov": lambda hidden: models.HiddenMarkov((4,), 2, num_classes=3, context_dim=2, hidden=hidden),
}


@pytest.mark.parametrize("family", HIDDEN)
def test_one_number_is_one_hidden_layer_in_every_family(family):
    one, same = HIDDEN[family](8), HIDDEN[family]((8,))
    assert one.settings() == same.settings() and one.settings()["hidden"] == [8]
    assert [p.shape for p in one.parameters()] == [p.shape for p in same.parameters()]
    for bad in (0, (8, 0), 8.5, (8.5,), "8", True, None if family != "gan" else -1):
        with refused(rf"^`hidden` should be .*positive sizes, such as 128 or \(128, 128\), got {re.escape(repr(bad))}$"):
            HIDDEN[family](bad)


def test_a_question_names_its_own_argument():
    model = models.Gaussian((2,))
    with refused("`x` is ragged"):
        model.log_prob([[1.0, 2.0], [3.0]])
    with refused("`x` has no rows"):
        model.log_prob(torch.zeros(0, 2))
    with refused("`data` has no rows"):
        model.fit(torch.zeros(0, 2))


def test_a_classifier_names_its_own_argument():
    classifier = models.GenerativeClassifier(lambda k: models.Gaussian((2,)), 2)
    none, y = torch.zeros(0, 2), torch.zeros(0)
    for question in (classifier.fit, classifier.calibrate, classifier.evaluate):
        with refused("^`x` has no rows$"):
            question(none, y)
    with refused("^`x` has no rows$"):
        classifier.predict(none)
    with refused("^`validation` has no rows$"):
        classifier.fit(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), validation=(none, y))


def test_complex_numbers_are_refused():
    x = torch.zeros(5, 2, dtype=torch.complex64)
    with refused("`data` should hold real numbers, got torch.complex64", TypeError):
        models.Gaussian((2,)).fit(x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (models.MADE((3,), (8,), likelihood="gaussian"), r"^number 1 of each datum is constant \(2.5 in all 20 data\), so"),
        (models.MADE((3,), (8,), columns=["binary", "continuous", "continuous"]), "number 1 of each datum is constant"),
        (models.Gaussian((3,)), "number 1 of each datum is constant"),
        (models.Gaussian((3,), "low_rank", rank=1), "number 1 of each datum is constant"),
        (models.GaussianMixture((3,), 2), "number 1 of each datum is constant"),
        (models.Mixture((3,), 2, columns=["binary", "continuous", "continuous"]), "number 0 of each datum is constant"),
        (models.FactorAnalysis((3,), 1), "number 1 of each datum is constant"),
        (
            models.MixtureOf([models.Gaussian((3,)), models.MADE((3,), likelihood="gaussian")]),
            r"^component 0, which starts at \d+ of the data: .*number [01] of each datum is constant",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, pgen.GenerativeModel) else "",
)
def test_a_constant_number_is_refused_by_every_gaussian_likelihood(model, match):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1] = (x[:, 0] > 0).float(), 2.5
    with refused(match):
        model.fit(x, **STEPS)


def test_a_constant_bit_and_a_constant_pixel_have_a_likelihood_and_a_constant_channel_has_none():
    x = torch.stack([torch.ones(20), torch.linspace(-1.0, 1.0, 20)], 1)
    models.MADE((2,), (8,), columns=["binary", "continuous"]).fit(x, **STEPS)
    images = torch.randn(20, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    images[:, 1, 0, 2] = 0.5

    def pixels():
        return models.PixelCNN((2, 3, 4), 4, 1, likelihood="gaussian", first_kernel=3, kernel=3)

    pixels().fit(images, **STEPS)
    images[:, 1] = 0.5
    with refused(r"^number 1 of each pixel is constant \(0.5 in all 240 pixels\).*: drop that channel, or take another"):
        pixels().fit(images, **STEPS)
    with refused(r"^number 1 of each position is constant \(0.5 in all 120 positions\).*: drop it, or take another"):
        models.WaveNet((6, 2), "gaussian").fit(images.flatten(2)[:, :, :6].mT, **STEPS)


@pytest.mark.parametrize("shape", [2, None])
def test_an_event_shape_is_a_tuple(shape):
    with refused(rf"`event_shape` should be a tuple of sizes such as \(2,\) or \(28, 28\), got {shape}", TypeError):
        models.Gaussian(shape)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: models.ProbabilisticPCA((30,)),
            r"^ProbabilisticPCA\(event_shape, latent_dim, ...\) is missing `latent_dim`: give it, or let "
            r"ProbabilisticPCA.for_data\(x\) choose$",
        ),
        (lambda: models.FactorAnalysis(event_shape=(30,)), r"^FactorAnalysis\(.*\) is missing `latent_dim`"),
        (lambda: models.Gaussian(covariance="full"), r"^Gaussian\(event_shape, ...\) is missing `event_shape`"),
        (lambda: models.MixtureOf(seed=1), r"^MixtureOf\(components, ...\) is missing `components`: give it$"),
    ],
)
def test_an_argument_that_is_missing_is_named_with_the_family(make, match):
    with refused(match, TypeError):
        make()


def test_moments_of_a_number_that_never_varies_are_told_from_others():
    x = torch.stack([torch.linspace(-1.0, 1.0, 20), torch.full((20,), 7.0)], 1)
    with refused("number 1 of each datum is constant, 7 in all 20 data: drop it"):
        models.MaximumEntropy((2,)).fit(x)


# --- names and sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: pgen.models.GaussianMixture((2,), n_components=3), TypeError, "'n_components'; did you mean 'num_components'"),
        (lambda: pgen.models.Flow((2,), transfrom="x"), TypeError, "Flow has no setting 'transfrom'; did you mean 'transform'"),
        (
            lambda: pgen.models.Flow((2,), "MAF"),
            ValueError,
            "is 'MAF', which is called 'affine_autoregressive' here",
        ),
        (lambda: pgen.models.Flow((2,), "spline_coupled"), ValueError, "did you mean 'spline_coupling'"),
    ],
)
def test_a_near_miss_names_what_was_meant(make, kind, match):
    with refused(match, kind):
        make()


@pytest.mark.parametrize("make", [pgen.models.GaussianMixture, pgen.models.Mixture])
def test_more_components_than_data_are_refused(make):
    with refused("`data` has 4 rows for 5 components; give more, or take fewer components"):
        make((2,), 5).fit(torch.arange(8.0).reshape(4, 2) % 2, steps=1)


@pytest.mark.parametrize(
    ("make", "data", "match"),
    [
        (
            lambda: pgen.models.MADE((2,)),
            torch.randn(9, 2),
            "support .* for such data likelihood='gaussian_mixture'",
        ),
        (lambda: vae(likelihood="bernoulli"), torch.randn(9, 2, 3), "for such data likelihood='gaussian'"),
        (lambda: pgen.models.MADE((2,)), torch.arange(8.0).reshape(4, 2), "likelihood='categorical', num_classes=8"),
    ],
)
def test_data_outside_the_support_name_a_likelihood(make, data, match):
    with refused(match):
        make().fit(data, steps=1, progress=False)


def test_a_share_of_the_data_is_held_out():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    run = pgen.models.Flow((2,), hidden=(4,)).fit(x, epochs=2, validation=0.2, progress=False)
    assert (run.num_data, run.held_out) == (40, 10) and "(N = 40, 10 held out)" in str(run)
    run = pgen.models.Gaussian((2,)).fit(x, validation=0.1)
    assert (run.num_data, run.held_out) == (45, 5) and len(run.validation["bound"]) == 1
    with refused("`validation` should be held-out data, or the share of the data to hold out, got 3"):
        pgen.models.Gaussian((2,)).fit(x, validation=3)
    with refused("`validation` is a share of the data, and leave-one-out holds out each in turn"):
        pgen.models.KernelDensity((2,)).fit(x, validation=0.1)


def test_a_flow_that_is_told_nothing_holds_rows_out_and_any_word_of_it_is_heard(monkeypatch):
    monkeypatch.setattr(pgen.models.Flow, "default_epochs", 2)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))

    def fit(**options):
        run = pgen.models.Flow((2,), hidden=(4,)).fit(x, progress=False, **options)
        return run.num_data, run.held_out, len(run.validation.get("bound", ())) > 0

    assert fit() == (45, 5, True)
    assert fit(epochs=2) == fit(steps=2) == fit(validation=0) == (50, 0, False)
    assert fit(validation=x[:7]) == (50, 0, True)


@pytest.mark.parametrize(
    ("preprocess", "bad", "match"),
    [
        (pgen.data.Dequantize(5), 5.0, r"`x` has 5 in row 2; expected whole numbers from 0 to 4$"),
        (
            pgen.data.Compose([pgen.data.Dequantize(5), pgen.data.Standardize()]),
            0.5,
            "`x` has 0.5 in row 2; expected whole numbers",
        ),
        (pgen.data.Logit(0.05), 1.25, r"`x` should lie in \[0, 1\] for Logit, got values from 0 to 1.25; rescale it"),
    ],
)
def test_a_question_is_held_to_the_domain_of_the_preprocessing_as_a_fit_is(preprocess, bad, match):
    x = torch.randint(0, 2, (40, 2), generator=torch.Generator().manual_seed(0)).float()
    model = pgen.models.Gaussian((2,), preprocess=preprocess)
    model.fit(x, progress=False)
    x[2, 1] = bad
    with refused(match):
        model.log_prob(x)


def test_a_fit_names_its_own_argument_where_preprocessing_refuses_it():
    with refused("`data` has 0.5 in row 0; expected whole numbers from 0 to 4; multiply by 4"):
        pgen.models.Gaussian((2,), preprocess=pgen.data.Dequantize(5)).fit(torch.full((9, 2), 0.5))


def test_a_column_outside_its_support_is_named():
    x = torch.tensor([[0.0, 0.3, 1.0], [1.0, -0.7, 2.0], [0.0, 1.2, 0.0]] * 4)
    columns = ["binary", "continuous", ("categorical", 3)]
    mixture, made = pgen.models.Mixture((3,), 2, columns=columns), pgen.models.MADE((3,), columns=columns)
    x[7, 2] = 3.0
    for model in (mixture, made):
        with refused(r"data row 7, column 2 holds 3, outside the support IntegerInterval\(lower_bound=0, upper_bound=2\) of"):
            model.fit(x)


def test_one_datum_has_no_spread():
    with refused("`data` has 1 datum, which has no spread; give two or more"):
        pgen.models.Gaussian((3,)).fit(torch.randn(1, 3))


def test_a_question_of_a_kernel_density_names_its_argument():
    kde = pgen.models.KernelDensity((2,), bandwidth=0.5)
    x = torch.randn(9, 2)
    kde.fit(x)
    for given in ("eruptions", ["a"], 1, [0.5]):
        with refused(r"`given` should be some, not all, of the columns 0 to 1, each once, got"):
            kde.conditional_log_prob(x, given=given)
    with refused("`values` is one number"):
        kde.conditional_sample(3.5, given=[0])
    with refused(r"`group` should be whole numbers, .* got torch.float32 of shape \(9,\)"):
        kde.fit({"x": x, "group": torch.zeros(9)})
    with refused(r"`bandwidth` should be .*, got \['a', 'b'\]"):
        pgen.models.KernelDensity((2,), bandwidth=["a", "b"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, "a"])
def test_moments_are_numbers(bad):
    with refused(f"`moments` should be finite numbers, got {bad} for x"):
        pgen.models.MaximumEntropy((1,), ["x"], values=range(1, 7)).match({"x": bad})


def test_models_to_choose_or_mix_are_models():
    gaussian = pgen.models.Gaussian((2,))
    with refused("`models` should be a dict of models, .* got list"):
        pgen.choose([pgen.models.GaussianMixture((2,), 2)], torch.zeros(3, 2), torch.zeros(3, 2))
    with refused(r"`models\['g'\]` should be a model, got the class Gaussian; did you mean Gaussian\(...\)\?", TypeError):
        pgen.choose({"g": pgen.models.Gaussian}, torch.zeros(3, 2), torch.zeros(3, 2))
    with refused(r"component 1 should be a model of pgen, got the class Gaussian; did you mean Gaussian\(...\)\?", TypeError):
        pgen.models.MixtureOf([gaussian, pgen.models.Gaussian])
    with refused(r"`components` should be a list of models, got Gaussian; did you mean \[Gaussian\(...\), ...\]\?", TypeError):
        pgen.models.MixtureOf(gaussian)


def test_classes_are_numbered():
    def make(k):
        return pgen.models.Gaussian((2,))

    with refused("`y` should hold numbers, got list of <U1; number the classes 0 to 1", TypeError):
        pgen.GenerativeClassifier(make, num_classes=2).fit(torch.randn(4, 2), ["a", "b", "a", "b"])
    with refused("`num_classes` should be two or more, got 1"):
        pgen.GenerativeClassifier(make, num_classes=1)
    with refused("`prefix` should be one tensor or array, got dict", TypeError):
        pgen.models.HiddenMarkov((5, 2), 3, "bernoulli").next({"x": torch.zeros(1, 2, 2)})


def test_smoothing_is_no_negative_count():
    with refused("`smoothing` should be a number from 0 up, got -1"):
        pgen.models.Mixture((3,), 2, smoothing=-1)
