"""Scores of strangeness: known answers, p-values at their level, the failure of the density alone and its fixes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import PRECISION, VARIANCE, W, gaussian_model

import pgen
from pgen import plots
from pgen.evaluation import ood
from pgen.models import VAE, Gaussian


def normal(n, dim, scale=1.0, seed=0, shift=0.0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(scope="module")
def gaussian():
    """N(0, I) in 20 dimensions, fitted."""
    model = Gaussian((20,), "diagonal")
    model.fit(normal(4000, 20, seed=1))
    return model


# --- arithmetic ----------------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs_and_ties():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    inside, outside = (torch.randint(0, 8, (n,), generator=generator).double() + s for n, s in ((70, 0), (40, 1)))
    value, _ = ood.auroc(inside, outside)
    truth = roc_auc_score([0] * 70 + [1] * 40, torch.cat([inside, outside]).numpy())
    assert value == pytest.approx(truth, abs=1e-12)
    assert ood.auroc(outside, inside)[0] == pytest.approx(1 - truth, abs=1e-12)


def test_the_error_of_auroc_is_its_spread():
    found = [ood.auroc(normal(60, 1, seed=s)[:, 0], normal(40, 1, seed=s + 999, shift=1.0)[:, 0]) for s in range(300)]
    values, errors = torch.tensor(found).T
    assert float(values.mean()) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.01)  # Phi(1 / sqrt 2) = 0.760
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.12)


def test_conformal_p_values_hold_their_level():
    rejected = []
    for seed in range(100):
        values = normal(120, 1, seed=seed)[:, 0]
        rejected.append(float((ood.conformal(values[:60], values[60:]) <= 0.1).double().mean()))
    assert 0.07 < sum(rejected) / 100 < 0.115  # floor(0.1 * 61) / 61 = 0.098
    assert float(ood.conformal(torch.tensor([9e9]), torch.zeros(9))) == pytest.approx(0.1)


def test_perturbed_data_keep_the_rest():
    x = torch.randint(0, 5, (400, 7), generator=torch.Generator().manual_seed(0)).float()
    y = ood.perturbed(x, 0.3, levels=5, seed=1)
    assert float((x != y).double().mean()) == pytest.approx(0.3 * 0.8, abs=0.03)
    assert set(y.unique().tolist()) == set(range(5))
    real = normal(400, 3, seed=2) * torch.tensor([1.0, 10.0, 100.0])
    mixed = ood.perturbed(real, 0.5, seed=1)
    assert float((real != mixed).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert all(bool(torch.isin(mixed[:, i], real[:, i]).all()) for i in range(3))
    assert torch.equal(mixed, ood.perturbed(real, 0.5, seed=1)) and not torch.equal(mixed, ood.perturbed(real, 0.5, seed=2))
    with pytest.raises(ValueError, match="`rate` should lie strictly between 0 and 1"):
        ood.perturbed(x, 1.0)


# --- the failure and its fixes -------------------------------------------------------------------------------------------


def test_data_at_the_mode_fool_the_density_and_not_typicality(gaussian):
    """Points near the mode of a Gaussian have the highest density and are yet nothing like its samples."""
    found = ood.report(gaussian, normal(500, 20, seed=2), normal(500, 20, 0.3, seed=3), null=normal(800, 20, seed=4))
    assert found.rows["likelihood"]["auroc"] < 0.01 and found.rows["typicality"]["auroc"] > 0.99
    assert found.rows["likelihood"]["detected"] == 0 and found.rows["typicality"]["detected"] > 0.95
    assert "The density alone fails here" in str(found) and "known to fail" in str(found)
    assert set(found.rows) == {"likelihood", "typicality"}
    for row in found.rows.values():
        assert row["false_alarms"] == pytest.approx(0.05, abs=0.04)


def test_typicality_is_its_definition(gaussian):
    x, null = normal(9, 20, seed=5), normal(10, 20, seed=6)
    log_p, held = gaussian.log_prob(x).value, gaussian.log_prob(null).value
    entropy = -held[:5].mean()
    found = ood.detect(gaussian, x, null=null, method="typicality")
    torch.testing.assert_close(found.statistic, (-log_p - entropy).abs())
    torch.testing.assert_close(found.null, (-held[5:] - entropy).abs())
    torch.testing.assert_close(found.p_value, ood.conformal(found.statistic, found.null))


def test_a_background_removes_what_all_data_share(gaussian):
    """In-data: the last column repeats the first. Out-data: it does not, but all is tamer, so the density is higher."""

    def data(n, seed, scale=1.0, repeat=True):
        x = scale * normal(n, 20, seed=seed)
        x[:, -1] = (x[:, 0] if repeat else scale * normal(n, 1, seed=seed + 1)[:, 0]) + 0.3 * normal(n, 1, seed=seed + 2)[:, 0]
        return x

    train = data(4000, 10)
    model, background = Gaussian((20,)), Gaussian((20,))
    model.fit(train), background.fit(ood.perturbed(train, 0.5))
    inside, outside, null = data(500, 20), data(500, 30, 0.5, repeat=False), data(500, 40)
    found = ood.report(model, inside, outside, null=null, background=background)
    assert found.rows["ratio"]["auroc"] > found.rows["likelihood"]["auroc"] + 0.2
    expected = -(model.log_prob(outside).value - background.log_prob(outside).value)
    torch.testing.assert_close(found.outside["ratio"], expected)


class Shifted(pgen.GenerativeModel):
    """The linear-Gaussian model with a guide that is off by a known amount."""

    def __init__(self, shift, scale):
        super().__init__((5,))
        self.shift, self.guide_scale = torch.tensor(shift).double(), scale
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x=None, context=None):
        gaussian_model(x)

    def guide(self, x=None, context=None):
        loc = x @ torch.linalg.solve(PRECISION, W.T).T + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, self.guide_scale * math.sqrt(1 / 14)).to_event(1))


def test_regret_is_what_the_guide_loses():
    """KL between the guide and the best independent Gaussian, relative to the posterior: in closed form."""
    x = normal(30, 5, seed=1).double()
    shift, scale = torch.tensor([0.5, -0.25]).double(), 1.5
    truth = float(0.5 * shift @ (PRECISION / VARIANCE) @ shift) + 2 * (0.5 * (scale**2 - 1) - math.log(scale))
    found = Shifted(shift.tolist(), scale).likelihood_regret(x, steps=300, learning_rate=0.02, num_samples=2000)
    assert found.kind == "estimate" and found.measure == "ratio" and found.num_samples == 2000
    assert bool(((found.value - truth).abs() < 5 * found.mc_error + 0.02).all()) and abs(found.mean - truth) < 0.04
    best = Shifted([0.0, 0.0], 1.0).likelihood_regret(x, steps=100, learning_rate=0.01, num_samples=2000)
    assert abs(best.mean) < 0.03
    again = Shifted(shift.tolist(), scale).likelihood_regret(x, steps=300, learning_rate=0.02, num_samples=2000)
    assert torch.equal(found.value, again.value)


def test_regret_says_where_it_cannot_be_had(gaussian):
    with pytest.raises(pgen.NotAvailable, match="this one has no latent variables"):
        gaussian.likelihood_regret(normal(3, 20))
    full = VAE((4,), 2, (5,), likelihood="gaussian", encoder="full_covariance")
    with pytest.raises(pgen.NotAvailable, match=r"that of 'z' is none .*make the VAE with encoder='gaussian'"):
        full.likelihood_regret(normal(3, 4))
    with pytest.raises(ValueError, match="`steps` should be a positive integer"):
        full.likelihood_regret(normal(3, 4), steps=0)


# --- one call ------------------------------------------------------------------------------------------------------------


def test_a_vae_gets_every_row_and_a_picture(tmp_path):
    bits = torch.bernoulli(torch.full((200, 6), 0.3), generator=torch.Generator().manual_seed(0))
    vae, background = VAE((6,), 2, (8,)), VAE((6,), 2, (8,))
    vae.fit(bits, epochs=2, progress=False), background.fit(ood.perturbed(bits), epochs=2, progress=False)
    found = ood.report(vae, bits[:40], 1 - bits[:30], null=bits[40:100], background=background, num_samples=5)
    assert list(found.rows) == ["likelihood", "typicality", "ratio", "regret"]
    assert found.to_frame().loc["ratio", "auroc"] == found.rows["ratio"]["auroc"]
    text = found.to_markdown(tmp_path / "ood.md")
    assert text == (tmp_path / "ood.md").read_text() and "| likelihood |" in text and repr(found) == str(found)
    assert set(found.to_dict()) == {"level", "methods", "warnings"}
    figure = plots.out_of_distribution(found)
    told = [f"{name} [nats]" for name in found.rows]
    assert [ax.get_xlabel() for ax in figure.axes] == ["minus log-likelihood [nats]", *told[1:]]
    heights = figure.axes[0].patches[0].get_data().values
    assert heights.sum() == pytest.approx(1.0)


def test_null_data_of_another_kind_are_noticed(gaussian):
    found = ood.report(gaussian, normal(500, 20, seed=2), normal(100, 20, 2.0), null=normal(500, 20, 0.7, seed=4))
    assert "they are not like the held-out data" in str(found)
    assert "The ratio was not measured" in str(found)


def test_bad_arguments_are_one_line(gaussian):
    x = normal(10, 20)
    with pytest.raises(ValueError, match="`method` is 'typical', which is unknown; did you mean 'typicality'"):
        ood.detect(gaussian, x, null=x, method="typical")
    with pytest.raises(ValueError, match="`background` is missing"):
        ood.report(gaussian, x, x, null=x, methods=["ratio"])
    with pytest.raises(ValueError, match="`level` should lie between 0 and 1"):
        ood.report(gaussian, x, x, null=x, level=5)
    with pytest.raises(ValueError, match="`null` should hold at least two data"):
        ood.detect(gaussian, x, null=x[:1])
    with pytest.raises(TypeError, match="`model` should be a fitted family, got int"):
        ood.report(3, x, x, null=x)
    with pytest.raises(ValueError, match=r"`inside` should be scores, .* got shape \(10, 20\)"):
        ood.auroc(x, x[:, 0])
    with pytest.raises(ValueError, match=r"`null` should be scores, .* got shape \(0,\)"):
        ood.conformal(x[:, 0], x[:0, 0])
    with pytest.raises(ValueError, match="`x` has no rows"):
        ood.perturbed(x[:0])


@pytest.mark.parametrize("argument", ["in_test", "out_test", "null"])
def test_errors_name_the_argument_that_is_wrong(gaussian, argument):
    lost = normal(10, 20)
    lost[3, 5] = math.nan
    wrong = {
        f"^`{argument}` should have shape \\(N, 20\\), got \\(10, 7\\)$": normal(10, 7),
        f"^`{argument}` has no rows$": normal(0, 20),
        f"^{argument} row 3, column 5 is nan; drop": lost,
        f"^`{argument}` is one number": torch.tensor(1.0),
    }
    for message, value in wrong.items():
        data = dict.fromkeys(("in_test", "out_test", "null"), normal(10, 20)) | {argument: value}
        with pytest.raises(ValueError, match=message):
            ood.report(gaussian, data["in_test"], data["out_test"], null=data["null"], progress=False)
