import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pgen
from pgen import cli, runs
from pgen.contracts import Run
from pgen.evaluation.normalizer import LogNormalizer

MEAN = """
import pyro
import pyro.distributions as dist
import torch

def model(y, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

def guide(y, scale):
    loc = pyro.param("loc", torch.tensor(0.0))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, sd))

def broken(y, scale):
    print("printed by the program")
    return missing_name
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short fit of a VAE to the digits."""
    out = tmp_path_factory.mktemp("cli") / "digits"
    assert (
        cli.run(
            [
                "fit",
                "digits",
                "--model",
                "vae",
                "--steps",
                "40",
                "--latent-dim",
                "3",
                "--compile",
                "eager",
                "-q",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mean.py").write_text(MEAN)
    Path("y.csv").write_text("y,scale\n" + "".join(f"{y},2.0\n" for y in (1.0, 2.0, 6.0)))
    return tmp_path


def answer(capsys, *arguments, code=0):
    """The JSON object that a command prints."""
    assert cli.run([*map(str, arguments), "--json"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


# --- a family --------------------------------------------------------------------------------------------------------------


def test_fit_writes_the_model_the_record_and_pictures(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [runs.MODEL, runs.RECORD, *(name for name in runs.PICTURES if name not in ("density.png", "game.png"))]
    )
    model, record = runs.open_run(folder, None)
    assert record["model"]["settings"]["latent_dim"] == 3
    assert record["data"]["prepared"] == {"binarised_at": 0.5}
    assert (record["data"]["train"], record["data"]["validation"]) == (1000, 350)
    assert model.last_run.steps == 40
    assert record["run"]["bound"] == model.last_run.bound and record["run"]["word"] == model.last_run.word == "bound"


def test_what_fit_saved_is_what_the_library_fits(folder):
    x = pgen.data.digits(binarize=True)
    torch.manual_seed(0)
    vae = pgen.models.VAE((8, 8), latent_dim=3, likelihood="bernoulli")
    vae.fit(x.train, validation=x.validation, steps=40, seed=0, compile="eager", progress=False)
    saved, _ = runs.open_run(folder, None)
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], value)


def test_score_is_a_bound_on_the_test_digits_and_agrees_with_the_library(folder, capsys, tmp_path):
    got = answer(capsys, "score", folder, "digits", "--num-samples", 7, "--seed", 3, "--out", tmp_path / "each.npy")
    x = pgen.data.digits(binarize=True).test
    want = pgen.load(folder / runs.MODEL).log_prob(x, num_samples=7, seed=3)
    assert (got["kind"], got["num_data"], got["event_size"]) == ("lower_bound", 447, 64)
    assert got["mean"] == pytest.approx(want.mean)
    np.testing.assert_allclose(np.load(tmp_path / "each.npy"), want.value.numpy())


def test_sample_writes_rows_and_a_picture_keyed_by_the_seed(folder, capsys, tmp_path):
    for name, seed in (("a.npy", 1), ("b.npy", 1), ("c.npy", 2)):
        got = answer(
            capsys, "sample", folder, "-n", 5, "--seed", seed, "--out", tmp_path / name, "--png", tmp_path / "grid.png"
        )
    assert got["shape"] == [5, 8, 8]
    a, b, c = (np.load(tmp_path / name, allow_pickle=False) for name in ("a.npy", "b.npy", "c.npy"))
    assert (a == b).all() and (a != c).any() and set(np.unique(a)) <= {0.0, 1.0}
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    answer(capsys, "sample", folder, "-n", 5, "--out", tmp_path / "a.csv")
    assert np.loadtxt(tmp_path / "a.csv", delimiter=",", skiprows=1).shape == (5, 64)


def test_info_shows_the_record_and_refuses_a_damaged_model(folder, capsys, tmp_path):
    got = answer(capsys, "info", folder)
    assert got["model"]["family"] == "vae" and got["run"]["steps"] == 40
    assert cli.run(["info", str(folder)]) == 0
    assert "binarised at 0.5" in capsys.readouterr().out
    for name in (runs.RECORD, runs.MODEL):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damaged = bytearray((tmp_path / runs.MODEL).read_bytes())
    damaged[-5] ^= 1
    (tmp_path / runs.MODEL).write_bytes(damaged)
    assert cli.run(["info", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A Gaussian fitted to a table, its data, and data of the same law."""
    base = tmp_path_factory.mktemp("tables")
    for seed, name in enumerate(("train.csv", "new.csv")):
        rows = np.random.default_rng(seed).normal(size=(150, 3)) * [1.0, 2.0, 0.5]
        np.savetxt(base / name, rows, delimiter=",", header="a,b,c", comments="")
    assert cli.run(["fit", str(base / "train.csv"), "--model", "gaussian", "-q", "--out", str(base / "run")]) == 0
    return base


def test_evaluate_judges_samples_beside_the_likelihood(tables, capsys, tmp_path):
    files = [str(tmp_path / name) for name in ("near.png", "table.md")]
    run, new = str(tables / "run"), str(tables / "new.csv")
    assert cli.run(["evaluate", run, new, "--json", "--png", files[0], "--markdown", files[1], "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"][0].startswith("No test tells samples from data") and found["files"] == files
    assert found["measures"]["nearest in train"]["p_value"] > 0.01 and found["train"].endswith("train.csv (135)")
    assert found["sizes"] == {"generated": 150, "real": 150, "train": 135} and found["log_prob"]["kind"] == "exact"
    assert all(Path(file).stat().st_size > 500 for file in files)
    assert "| accuracy, kernel | data |" in Path(files[1]).read_text(encoding="utf-8")


def test_evaluate_on_the_fitted_file_takes_the_rows_that_were_held_out(tables, capsys):
    assert cli.run(["evaluate", str(tables / "run"), str(tables / "train.csv"), "-q", "-n", "15"]) == 0
    said = capsys.readouterr().out
    assert "that the fit held out (15)" in said and "15 + 15" in said and "verdict: " in said


def test_a_constant_column_is_named(tables, capsys, tmp_path):
    rows = np.column_stack([np.random.default_rng(0).normal(size=(40, 2)), np.full(40, 5.0)])
    np.savetxt(tmp_path / "t.csv", rows, delimiter=",", header="a,b,same", comments="")
    assert cli.run(["fit", str(tmp_path / "t.csv"), "--model", "gaussian", "--out", str(tmp_path / "run"), "-q"]) == 2
    said = capsys.readouterr().err
    assert "constant in column 2" in said and "that is column 'same': leave it out with --without same" in said
    with pytest.raises(ValueError, match=r"^another$"), runs.columns_named(["a"]):
        raise ValueError("another")


def test_rows_with_empty_cells_are_counted_and_refused_by_name(tables, capsys, tmp_path):
    lines = (tables / "new.csv").read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ","
    (tmp_path / "gaps.csv").write_text("\n".join(lines))
    assert cli.run(["score", str(tables / "run"), str(tmp_path / "gaps.csv")]) == 2
    said = capsys.readouterr().err
    assert "1 of 150 entries are missing in column 'c', which gaussian cannot take: leave such rows out of" in said
    options = ["--model", "gaussian", "--complete", "-q", "--out", str(tmp_path / "run")]
    assert cli.run(["fit", str(tmp_path / "gaps.csv"), *options]) == 0
    assert capsys.readouterr().err.startswith("note: 1 of 150 rows have missing entries and are left out")


@pytest.mark.parametrize("command", ["score", "diagnose", "evaluate"])
def test_data_of_another_shape_are_refused(tables, capsys, command):
    assert cli.run([command, str(tables / "run"), "digits"]) == 2
    assert "a datum of digits has shape (8, 8), and those of the fit had (3,)" in capsys.readouterr().err


def test_a_folder_that_lost_its_model_says_so(tables, capsys, tmp_path):
    shutil.copy(tables / "run" / runs.RECORD, tmp_path)
    for command in (["info", str(tmp_path)], ["sample", str(tmp_path)]):
        assert cli.run(command) == 2
        assert "has no model.pgen, which `pgen fit` wrote beside run.json" in capsys.readouterr().err


def test_settings_are_shown_in_few_words():
    assert cli._short({"name": "gaussian"}) == "gaussian" and cli._short([4, 5]) == "[4, 5]" and cli._short(1e-6) == "1e-06"
    assert cli._short({"name": "student", "df": 3}) == "student(df=3)"
    assert cli._short(["continuous"] * 30) == "[30 values]"


def test_evaluate_says_what_is_missing(tables, capsys, folder, program):
    moved = runs.read_record(tables / "run")
    moved["data"]["source"] = "gone.csv"
    held = runs.held_out(str(tables / "new.csv"), None, moved)
    assert held.train is None and "not at hand" in held.about_train and "--train" in held.about_train
    again = runs.held_out(str(tables / "new.csv"), str(tables / "train.csv"), moved)
    assert again.train is not None and len(again.train) == 150
    assert cli.run(["fit", "mean.py:model", "--data", "y.csv", "--steps", "5", "-q", "--out", "mean"]) == 0
    assert cli.run(["evaluate", "mean", "y.csv"]) == 2
    assert "is of a program of your own: give replicates" in capsys.readouterr().err
    assert cli.run(["evaluate", str(tables / "run"), str(tables / "new.csv"), "--png", "nowhere/near.png"]) == 2
    assert "is in 'nowhere', which is no folder" in capsys.readouterr().err
    assert cli.run(["evaluate", str(tables / "run"), str(tables / "new.csv"), "--features", "classifier", "-q"]) == 2
    assert "--features classifier needs training data with classes" in capsys.readouterr().err


def test_diagnose_exits_1_on_a_problem_and_writes_the_report(folder, capsys, monkeypatch):
    from pgen import diagnostics

    class Fake:
        overall = "problem found: 2 importance weights"
        about = ["1000 draws"]

        def to_dict(self):
            return {"overall": self.overall}

        def to_html(self, path):
            path.write_text("<html>")
            return path

    asked = {}

    def report(model, data, level, seed):
        asked.update(data=data, level=level, seed=seed, last=model.last_run)
        return Fake()

    monkeypatch.setattr(diagnostics, "report", report)
    got = answer(capsys, "diagnose", folder, "digits", "--level", "standard", "--seed", 4, "--html", code=1)
    assert got["overall"].startswith("problem found")
    assert (asked["data"].shape, asked["level"], asked["seed"]) == ((447, 8, 8), "standard", 4)
    assert len(asked["last"].history["loss"]) == 40
    assert (folder / runs.REPORT).exists()
    assert Fake.about == [f"run {folder} on digits", "1000 draws"]
    Fake.overall = "no problem found by: 1"
    answer(capsys, "diagnose", folder, "digits")


def test_models_lists_the_registry(capsys):
    got = answer(capsys, "models")
    assert {row["model"] for row in got["models"]} == set(pgen.models.REGISTRY)
    settings = {row["model"]: row["settings"] for row in got["models"]}
    assert "latent_dim" in settings["vae"] and "tempering" in settings["energy"] and "log_snr" in settings["diffusion"]
    assert not {"generator", "critic", "seed"} & set(settings["gan"]) and "num_labels" not in settings["energy"]


def test_a_table_is_standardised_and_sampled_in_its_own_units(capsys, tmp_path):
    table = np.random.default_rng(0).normal(size=(60, 3)) * [1.0, 50.0, 0.1] + [0.0, 1000.0, -3.0]
    np.savetxt(tmp_path / "t.csv", table, delimiter=",", header="a,b,c", comments="")
    got = answer(
        capsys, "fit", tmp_path / "t.csv", "--model", "vae", "--steps", 30, "--compile", "eager", "--out", tmp_path / "run"
    )
    assert got["model"]["settings"]["likelihood"] == "gaussian"
    assert got["data"]["prepared"] == {"standardised": True} and got["data"]["columns"] == ["a", "b", "c"]
    assert (got["data"]["train"], got["data"]["validation"]) == (54, 6)
    answer(capsys, "sample", tmp_path / "run", "-n", 400, "--out", tmp_path / "s.csv")
    drawn = np.loadtxt(tmp_path / "s.csv", delimiter=",", skiprows=1)
    assert (tmp_path / "s.csv").read_text().startswith("a,b,c\n")
    assert abs(drawn[:, 1].mean() - 1000) < 50


def test_an_autoencoder_says_which_pictures_it_cannot_draw(capsys, tmp_path):
    got = answer(
        capsys, "fit", "digits", "--model", "autoencoder", "--steps", 5, "--compile", "eager", "--out", tmp_path / "run"
    )
    assert list(got["not_drawn"]) == ["samples.png"]
    assert "autoencoder" in got["not_drawn"]["samples.png"]
    assert cli.run(["sample", str(tmp_path / "run")]) == 2


def test_a_density_in_the_plane_is_drawn_and_a_family_without_latents_lacks_no_picture(capsys, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="height,weight", comments="")
    got = answer(capsys, "fit", tmp_path / "t.csv", "--model", "gaussian", "--out", tmp_path / "run")
    assert got["files"] == ["model.pgen", "run.json", "density.png", "samples.png"] and got["not_drawn"] == {}
    assert (tmp_path / "run" / "density.png").stat().st_size > 1000


def test_a_fit_is_not_overwritten_unless_asked(folder, capsys, tmp_path):
    before = (folder / runs.MODEL).read_bytes()
    assert cli.run(["fit", "digits", "--model", "vae", "--out", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / runs.MODEL).read_bytes() == before


# --- without a normaliser, or without a likelihood --------------------------------------------------------------------------

SHORT = {
    "energy": ["--set", "hidden=[4]", "--set", "tempering=[4,2,2]"],
    "gan": ["--set", "hidden=[5]", "--set", "latent_dim=2"],
    "diffusion": ["--set", "width=6", "--set", "blocks=1", "--set", "log_snr=[-5.5,8]"],
}  # fmt: skip


@pytest.fixture
def fit_short(tables, tmp_path, monkeypatch):
    """Fit a small network of a family to a table for a few steps, in a folder of its name."""
    monkeypatch.chdir(tmp_path)

    def fit(name, *more, source=tables / "train.csv"):
        options = [*SHORT[name], "--steps", "8", "--batch-size", "20", "--compile", "eager", "-q", *map(str, more)]
        return cli.run(["fit", str(source), "--model", name, "--out", name, *options])

    return fit


def test_the_normaliser_of_an_energy_is_estimated_where_it_is_scored_or_compared(fit_short, tables, capsys, monkeypatch):
    found, asked = LogNormalizer(1.25, 0.5, 1.0, 2.0, 7, 3), []

    def quick(self, **options):
        asked.append(options["seed"])
        self.log_z.copy_(torch.tensor([found.value, found.error]))
        return found

    monkeypatch.setattr(pgen.models.EnergyBased, "log_normalizer", quick)
    assert fit_short("energy") == 0 and not asked
    got = answer(capsys, "score", "energy", tables / "new.csv", "--seed", 5)
    x = torch.from_numpy(np.loadtxt(tables / "new.csv", delimiter=",", skiprows=1)).float()
    raw = pgen.load("energy/model.pgen").log_prob(x)
    assert (got["kind"], got["normalizer"], raw.kind) == ("estimate", str(found), "unnormalised")
    assert got["mean"] == pytest.approx(raw.mean - 1.25) and got["bits_per_dim"] is not None
    said = runs.likelihood(pgen.load("energy/model.pgen"), x, progress=False)
    assert said["kind"] == "estimate" and said["text"].endswith(f"; {found}")

    options = ["--models", "energy,gaussian", "--epochs", "1", "--set", "energy.hidden=[4]", "--seed", "3"]
    assert cli.run(["compare", str(tables / "new.csv"), *options]) == 0
    out, err = capsys.readouterr()
    assert f"; {found}" in err and "unnormalised" not in out and "estimate" in out
    assert cli.run(["compare", "energy", str(tables / "run"), str(tables / "new.csv"), "--out", "two"]) == 0
    out, err = capsys.readouterr()
    assert err == f"energy: {found}\n" and "unnormalised" not in out and asked == [5, 0, 3, 0]

    given = pgen.models.EnergyBased((3,), hidden=(4,), context_dim=1)
    said = runs.likelihood(given, {"x": x, "context": x[:, :1]}, progress=False)
    assert (said["kind"], said["bits_per_dim"], len(asked)) == ("unnormalised", None, 4)
    assert "each context has a normaliser of its own" in said["text"]
    monkeypatch.setattr(pgen.models.EnergyBased, "log_normalizer", lambda self, **options: log_z_is_not_a_number())
    said = runs.likelihood(pgen.models.EnergyBased((3,), hidden=(4,)), x)
    assert (said["kind"], said["text"]) == (None, "not available: log Z is not a number")


def log_z_is_not_a_number():
    raise FloatingPointError("log Z is not a number")


@pytest.mark.parametrize(
    ("name", "number", "code", "more", "other"),
    [
        ("energy", signal.SIGTERM, 143, (), "persistent:steps=3"),
        ("gan", signal.SIGINT, 130, ("--objective", "adversarial:loss=hinge,r1=[0.1,0]"), "adversarial"),
        ("diffusion", signal.SIGINT, 130, ("--objective", "simple"), "elbo"),
    ],
)
def test_an_interrupted_fit_goes_on_to_the_same_bits(fit_short, monkeypatch, capsys, name, number, code, more, other):
    drawn = []
    monkeypatch.setattr(pgen.plots, "save", lambda figure, path: drawn.append(Path(path).stem))
    assert fit_short(name, *more) == 0 and "samples" in drawn
    whole, record = runs.open_run(Path(name), None)
    assert record["run"]["steps"] == 8 and record["model"]["family"] == name
    assert record["model"]["settings"].get("log_snr", [-5.5, 8]) == [-5.5, 8]
    shutil.rmtree(name)

    class Stopped(pgen.plots.Pictures):
        def on_state(self, step):
            super().on_state(step)
            if step == 3:
                signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(pgen.plots, "Pictures", Stopped)
        assert fit_short(name, *more, "--pictures", 3) == code
    assert runs.read_record(Path(name))["run"]["stopped"].startswith("interrupted")
    half = runs.open_run(Path(name), None)[0]
    assert half.last_run.steps == 3 and set(drawn[drawn.index("step-000003") :]) == {"step-000003"}
    assert any((half.state_dict()[k] != v).any() for k, v in whole.state_dict().items())
    assert fit_short(name) == 2 and "add --resume" in capsys.readouterr().err
    drawn.clear()
    assert fit_short(name, "--resume", "--objective", other) == 2 and "holds a run with objective = " in capsys.readouterr().err
    assert fit_short(name, "--pictures", 3, "--resume") == 0  # the objective is that of the record
    again, record = runs.open_run(Path(name), None)
    assert record["run"]["steps"] == 8 and record["model"]["objective"] == (more[1] if more else None)
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert [stem for stem in drawn if stem.startswith("step")] == ["step-000006", "step-000008"]  # not from the start
    assert not runs.has_checkpoint(Path(name))


def test_objectives_are_named_and_given_their_arguments():
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    adversarial = pgen.objectives.Adversarial("hinge", critic_moves=2, r1=pgen.objectives.Linear(0.1, 0))
    assert runs.objective("adversarial:loss=hinge,critic_moves=2,r1=[0.1,0]", x, 0) == adversarial
    assert runs.objective("persistent:num_temps=4,step_size=0.5", x, 0) == pgen.objectives.PersistentContrastiveDivergence(
        num_temps=4, step_size=0.5
    )
    noise = runs.objective("noise_contrastive:ratio=3,noise=gmm", x, 0)
    assert (noise.ratio, noise.noise.family, noise.noise.event_shape) == (3, "gaussian_mixture", (3,))
    assert runs.objective("noise_contrastive:noise=made", (x > 0).float(), 0).noise.likelihood == "bernoulli"
    assert runs.objective("noise_contrastive", x, 0).noise.preprocess is None and runs.objective(None, x, 0) is None
    for name, made in runs.OBJECTIVES.items():
        assert type(runs.objective(name, x, 0)) is made
    known = {made for made in vars(pgen.objectives).values() if isinstance(made, type) and hasattr(made, "rows")}
    assert set(runs.OBJECTIVES.values()) == known - {pgen.objectives.Objective}
    for text, said in [
        ("noise_contrastive:noise=mixture_of", "mixture_of needs a value of 'components'; take gaussian"),
        ("noise_contrastive:noise=no", "noise` is 'no', which is unknown"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            runs.objective(text, x, 0)


def test_info_names_the_pictures_of_progress_and_evaluate_says_which_rows_are_too_few(tables, capsys, tmp_path):
    lines = (tables / "train.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:61]))
    few, run = str(tmp_path / "few.csv"), str(tmp_path / "run")
    assert cli.run(["fit", few, "--model", "gaussian", "-q", "--out", run]) == 0
    assert "progress/" not in answer(capsys, "info", run)["files"]
    (tmp_path / "run" / runs.PROGRESS).mkdir()
    (tmp_path / "run" / runs.PROGRESS / "step-000003.png").touch()
    assert answer(capsys, "info", run)["files"][-1] == "progress/"
    assert cli.run(["evaluate", run, few, "-q"]) == 2
    assert f"`real` is the rows of {few} that the fit held out (6)" in capsys.readouterr().err


# --- side by side ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table whose first two columns are strongly correlated."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 1))
    x = np.hstack([z + 0.1 * rng.normal(size=z.shape), 50 * z, rng.normal(size=z.shape)])
    np.savetxt("t.csv", x, delimiter=",", header="a,b,c", comments="")
    return tmp_path


def test_compare_fits_ranks_and_writes(table, capsys):
    got = answer(
        capsys, "compare", "t.csv", "--models", "gaussian,vae", "--epochs", 2, "--set", "vae.latent_dim=2", "--set",
        "vae.hidden=[6]", "--out", "out",
    )  # fmt: skip
    assert [row["model"] for row in got["models"]] == ["gaussian", "vae"]
    assert [row["kind"] for row in got["models"]] == ["exact", "lower_bound"] and got["num_data"] == 60
    assert got["fits"]["gaussian"]["steps"] == 0 and got["fits"]["vae"]["epochs"] == pytest.approx(2, abs=0.5)
    assert got["fits"]["vae"]["settings"]["hidden"] == [6] and not got["not_fitted"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(got["files"])
    assert json.loads(Path("out/comparison.json").read_text()) == got
    assert "| 1 | gaussian |" in Path("out/comparison.md").read_text()
    gaussian = pgen.load("out/gaussian.pgen")
    parts = runs.Parts.of("t.csv", None, 0, test=True)
    assert [len(x) for x in parts.x] == [210, 30, 60]
    assert gaussian.log_prob(parts.x[2]).mean == pytest.approx(got["models"][0]["mean"])
    assert cli.run(["compare", "t.csv", "--models", "gaussian", "--out", "out"]) == 2
    assert "already holds a comparison" in capsys.readouterr().err
    assert cli.run(["compare", "t.csv", "--models", "gaussian", "--out", "out", "--overwrite", "-q"]) == 0
    assert "rank  model" in capsys.readouterr().out


def test_a_family_that_cannot_be_fitted_is_told_and_the_others_are_compared(table, capsys):
    x = np.loadtxt("t.csv", delimiter=",", skiprows=1)
    np.savetxt("s.csv", np.hstack([x, x[:, :1]]), delimiter=",")  # a column twice
    got = answer(capsys, "compare", "s.csv", "--models", "gaussian,vae", "--epochs", 1, code=1)
    assert [row["model"] for row in got["models"]] == ["vae"]
    assert "the covariance of `data` is singular" in got["not_fitted"]["gaussian"]
    assert cli.run(["compare", "s.csv", "--models", "gaussian", "--out", "other"]) == 2
    assert "error: gaussian: the covariance" in capsys.readouterr().err


def test_fitted_runs_are_compared_on_data_that_both_see_alike(table, capsys):
    for name, covariance in (("full", "full"), ("flat", "diagonal")):
        fitted = answer(capsys, "fit", "t.csv", "--model", "gaussian", "--set", f"covariance={covariance}", "--out", name)
        assert fitted["run"]["steps"] == 0 and fitted["model"]["settings"]["covariance"] == covariance
    got = answer(capsys, "compare", "flat", "full", "t.csv")
    assert [row["model"] for row in got["models"]] == got["best"] + ["flat"] == ["full", "flat"]
    # What independence throws away: minus half the log of 1 - rho^2, with rho^2 = 1 / 1.01.
    assert got["pairs"][0]["difference"] == pytest.approx(-0.5 * math.log(1 - 1 / 1.01), abs=0.15)


KINDS = {"real": "density", "counts": "mass", "bits": "mass"}
FAMILIES = [name for name, family in pgen.models.REGISTRY.items() if family.has_density and "event_shape" in
            inspect.signature(family).parameters and "tests" not in family.__module__]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_finds_its_settings_in_the_data(name):
    """Real numbers get a density and whole numbers a mass, so that families can be compared."""
    shape = {"pixel_cnn": (8, 8), "pixel_rnn": (8, 8), "maximum_entropy": (2,), "glow": (4, 4)}.get(name, (4,))
    x = 2 * torch.randn(30, *shape, generator=torch.Generator().manual_seed(0))
    for kind, data in (("real", x), ("counts", x.round().clamp(-3, 3) + 3), ("bits", (x > 0).float())):
        model = pgen.models.REGISTRY[name].for_data(data, seed=1)
        model.fit(data, **({} if model.solvable else {"steps": 1, "compile": "eager", "progress": False}))
        score = model.log_prob(data[:5], num_samples=2)
        assert score.measure == KINDS[kind] and score.event_size == x[0].numel()
        assert bool(torch.isfinite(score.value).all())


def test_models_made_of_others_say_so(table, capsys):
    assert cli.run(["compare", "t.csv", "--models", "mixture_of"]) == 2
    assert "mixture_of is made of other models" in capsys.readouterr().err


def test_pixels_are_seen_alike_by_densities_and_masses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    got = answer(capsys, "compare", "digits", "--models", "vae,gaussian", "--epochs", 1, "--set", "vae.hidden=[8]")
    assert {(row["kind"], row["measure"]) for row in got["models"]} == {("lower_bound", "mass")}
    grey = answer(capsys, "fit", "digits", "--model", "gaussian", "--likelihood", "categorical", "--set", "covariance=diagonal")
    assert grey["data"]["prepared"] == {"levels": 17, "standardised": True, "dequantised": 17}
    answer(capsys, "score", "run", "digits")


GREY = torch.tensor([[[0.5, 0.25], [0.1, 0.9]]])
"""A grey image on no grid of levels."""


@pytest.mark.parametrize(
    ("families", "seen", "prepared"),
    [
        ({"energy": {}}, "real", {}),
        ({"rbm": {}}, "bits", {"binarised_at": 0.5}),
        ({"rbm": {"visible": "gaussian"}}, "real", {}),
        ({"gaussian": {}}, "levels", {"levels": 17}),
        ({"gaussian": {}, "energy": {}}, "levels", {"levels": 17}),
        ({"vae": {}, "energy": {}}, "bits", {"binarised_at": 0.5}),
        ({"gan": {}}, "", None),
    ],
)
def test_grey_images_are_bits_for_those_alone_that_have_bits(families, seen, prepared):
    assert runs.grey_of(families) == seen
    if prepared is not None:
        assert runs._observation(torch.tensor([[[0.0, 3 / 16], [1.0, 0.5]]]), None, seen)[1] == prepared
        assert runs._observation(GREY, None, seen)[1] == (prepared if seen == "bits" else {})
        assert runs._observation(GREY.round(), None, seen) == ("bernoulli", {})
    assert "gaussian keeps" in runs.note_of({"prepared": {"binarised_at": 0.5}}, list(families))


def test_an_energy_of_grey_images_is_of_their_values_and_what_is_taken_as_bits_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = torch.rand(40, 4, 3, generator=torch.Generator().manual_seed(0))
    np.save("grey.npy", x.numpy())
    options = ["--steps", "2", "--compile", "eager"]
    assert cli.run(["fit", "grey.npy", "--model", "energy", "--set", "hidden=[4]", *options, "--out", "energy"]) == 0
    model, record = runs.open_run(Path("energy"), None)
    assert record["data"]["prepared"] == {} and model.preprocess is None and "note: grey" not in capsys.readouterr().err
    assert torch.equal(runs.batch("grey.npy", record), x)
    assert cli.run(["fit", "grey.npy", "--model", "vae", "--latent-dim", "2", *options, "--out", "vae"]) == 0
    said = "note: grey images are taken as bits, 1 from 0.5 on; --likelihood categorical or gaussian keeps their values\n"
    assert said in capsys.readouterr().err
    assert cli.run(["compare", "digits", "--models", "gaussian", "--set", "gaussian.covariance=diagonal"]) == 0
    assert "note: grey images are taken as levels 0 to 16\n" in capsys.readouterr().err


# --- a program of one's own ------------------------------------------------------------------------------------------------


def test_a_program_takes_another_bound(program, capsys):
    options = ["--data", "y.csv", "--steps", "2", "--compile", "eager", "--objective", "iwae:num_samples=3"]
    found = answer(capsys, "fit", "mean.py:model", *options)
    assert found["model"]["objective"] == "iwae:num_samples=3" and found["run"]["word"] == "bound"


@pytest.mark.parametrize("guide", [["mean.py:guide"], ["--guide", "full_rank"], []])
def test_a_program_is_fitted_saved_and_found_again(program, capsys, guide):
    fitted = answer(capsys, "fit", "mean.py:model", *guide, "--data", "y.csv", "--steps", 60, "--compile", "eager", "--seed", 2)
    assert fitted["data"]["given"] == "by name"
    assert fitted["model"]["names"] == ["model", "guide"][: 1 + (guide == ["mean.py:guide"])]
    again = ["mean.py:model", *(guide if len(guide) == 1 else [])]
    own = runs.Program.load(again).functions
    pair = pgen.Pair(own[0], own[1] if len(own) > 1 else "full_rank" if guide else None)
    data = {"y": torch.tensor([1.0, 2.0, 6.0]), "scale": torch.full((3,), 2.0)}
    pair.fit(data, steps=60, seed=2, compile="eager", progress=False)
    saved, record = runs.open_run(Path("run"), again)
    mu = [p.draw(d, 50, seed=1).values["mu"] for p, d in ((pair, data), (saved, runs.batch("y.csv", record)))]
    torch.testing.assert_close(*mu)
    options = [part for name in again for part in ("--program", name)]
    drawn = answer(capsys, "sample", "run", "-n", 6, "--data", "y.csv", "--out", "s.npy", *options)
    assert drawn["shape"] == [6, 3]
    assert cli.run(["score", "run", "y.csv", *options]) == 2
    assert "no datum has a density of its own" in capsys.readouterr().err


def test_code_is_loaded_only_from_the_file_that_the_user_names(program, capsys):
    answer(capsys, "fit", "mean.py:model", "--data", "y.csv", "--steps", 3, "--compile", "eager", "--out", "run")
    record = json.loads(Path("run/run.json").read_text())
    record["model"]["file"] = "trap.py"
    Path("trap.py").write_text("open('sprung', 'w')\n")
    Path("run/run.json").write_text(json.dumps(record))
    for command in (["info", "run"], ["score", "run", "y.csv"], ["diagnose", "run", "y.csv"]):
        assert cli.run(command) in (0, 2)
    assert "name it again, --program trap.py:model" in capsys.readouterr().err
    assert not Path("sprung").exists()
    Path("mean.py").write_text(MEAN + "\n# edited\n")
    answer_file = cli.run(["sample", "run", "--data", "y.csv", "--program", "mean.py:model", "-n", "2"])
    assert answer_file == 0
    assert "mean.py has changed since the fit" in capsys.readouterr().err


def test_an_error_in_the_program_names_its_line_and_its_prints_stay_off_the_json(program, capsys):
    assert cli.run(["fit", "mean.py:broken", "--data", "y.csv", "--json"]) == 2
    out, err = capsys.readouterr()
    line = MEAN.splitlines().index("    return missing_name") + 1
    assert json.loads(out) == {"error": f"mean.py:{line}: NameError: name 'missing_name' is not defined"}
    assert "printed by the program" in err


# --- what goes wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "digits"], "--model is missing: name a family (known: autoencoder, "),
        (["fit", "digits", "--model", "vea"], "did you mean 'vae'?"),
        (["fit", "digit", "--model", "vae"], "did you mean 'digits'?"),
        (["fit", "absent.csv", "--model", "vae"], "there is no file or data set 'absent.csv'"),
        (["fit", "digits:tset", "--model", "vae"], "did you mean 'test'?"),
        (["fit", "digits", "--model", "vae", "--data", "y.csv"], "--data does not go with a family"),
        (["fit", "digits", "more", "--model", "vae"], "more does not go with a family"),
        (["fit", "digits", "--model", "vae", "--compile", "fast", "-q"], "`compile` is 'fast'"),
        (["fit", "digits", "--model", "vae", "--epochs", "0", "-q"], "`epochs` should be a positive number, got 0"),
        (["fit", "digits", "--model", "vae", "--epochs", "x"], "Invalid value for '--epochs'"),
        (["fit", "digits", "--model", "autoencoder", "--likelihood", "gaussian"], "--likelihood: autoencoder has no setting"),
        (["fit", "mean.py:model"], "--data is missing"),
        (["fit", "mean.py:model", "--data", "y.csv", "--model", "vae"], "--model does not go with a program of your own"),
        (["fit", "mean.py:modle", "--data", "y.csv"], "mean.py has no callable 'modle'; did you mean 'model'?"),
        (["fit", "none.py:model", "--data", "y.csv"], "none.py is not a file"),
        (["fit", "mean.py:model", "other.py:guide", "--data", "y.csv"], "both from one file"),
        (["fit", "mean.py:model", "mean.py:guide", "--guide", "flow", "--data", "y.csv"], "not both"),
        (
            ["fit", "digits", "--model", "vae", "--set", "latent=3"],
            "--set latent=3: vae has no setting 'latent'; leave it out; did you mean",
        ),
        (["fit", "digits", "--model", "vae", "--set", "latent_dim"], "--set takes key=value, such as --set rank=2"),
        (["fit", "digits", "--model", "vae", "--set", "latent_dim=two"], "'latent_dim' of vae should be int, got 'two'"),
        (["fit", "digits", "--model", "vae", "--set", "latent_dim=true"], "'latent_dim' of vae should be int, got True"),
        (["fit", "digits", "--model", "vae", "--set", "latent_dim=2", "--latent-dim", "3"], "say different things: 2 and 3"),
        (
            ["fit", "digits", "--model", "energy", "--set", "tempering=[3,2]"],
            "should be tuple[int, int, int], such as --set tempering=[3,3,3], got [3, 2]",
        ),
        (
            ["fit", "digits", "--model", "energy", "--set", "tempering=[3,2,0.5]"],
            "such as --set tempering=[3,3,3], got [3, 2, 0.5]",
        ),
        (["fit", "digits", "--model", "diffusion", "--set", "log_snr=5"], "should be tuple[float, float] | None, got 5"),
        (
            ["fit", "digits", "--model", "energy", "--set", "num_labels=10"],
            "'num_labels' of energy needs the class of each datum",
        ),
        (
            ["fit", "digits", "--model", "gan", "--set", "critic=own"],
            "'critic' of gan is nn.Module | None, which the command line",
        ),
        (["fit", "digits", "--model", "gaussian", "--set", "covariance=round"], "`covariance` is 'round', which is unknown"),
        (
            ["fit", "digits", "--model", "gan", "--objective", "adverse"],
            "`--objective` is 'adverse', which is unknown; did you mean 'adversarial'? (known: elbo, ",
        ),
        (["fit", "digits", "--model", "energy", "--objective", "PCD"], "which is called 'persistent' here"),
        (
            ["fit", "digits", "--model", "gan", "--objective", "adversarial:los=hinge"],
            "has no argument 'los'; did you mean 'loss'?",
        ),
        (
            ["fit", "digits", "--model", "gan", "--objective", "adversarial:hinge"],
            "adversarial: takes KEY=VALUE,..., got 'hinge'",
        ),
        (
            ["fit", "digits", "--model", "gan", "--objective", "adversarial:r1=[1,2,3]"],
            "should be float | Schedule, got [1, 2, 3]",
        ),
        (
            ["fit", "digits", "--model", "energy", "--objective", "contrastive:exact=true"],
            "has no argument 'exact' (known: steps",
        ),
        (["fit", "digits", "--model", "flow_matching", "--objective", "simple:x=2"], "simple takes no arguments, got 'x'"),
        (
            ["fit", "mean.py:model", "--data", "y.csv", "--objective", "simple"],
            "--objective simple does not go with a program of your own; take elbo, iwae, dreg, vimco or renyi",
        ),
        (["fit", "digits", "--model", "gan", "--pictures", "0"], "--pictures should be a positive number of steps, got 0"),
        (["fit", "mean.py:model", "--data", "y.csv", "--set", "rank=2"], "--set does not go with a program of your own"),
        (["compare", "digits", "--models", "gaussian,nothing"], "`--models` is 'nothing', which is unknown"),
        (["compare", "digits", "--models", "vae,vae"], "each once"),
        (["compare", "digits", "--models", "autoencoder"], "autoencoder has no density"),
        (["compare", "digits"], "name families, `pgen compare DATA --models"),
        (["compare", "a", "b", "--models", "vae"], "b does not go with --models"),
        (["compare", "digits", "--models", "vae", "--set", "latent_dim=2"], "--set takes MODEL.KEY=VALUE"),
        (["compare", "a", "b", "digits", "--epochs", "3"], "--epochs does not go with fitted runs"),
        (["compare", "a", "a", "digits"], "a run is named twice"),
        (["score", "absent", "digits"], "absent has no run.json"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(program, capsys, arguments, message):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and not out
    assert not Path("run").exists()


def test_a_defect_is_exit_70_with_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(pgen.models, "REGISTRY", None)
    assert cli.run(["models"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_fit_after_saving_it(program, number, code):
    Path("mean.py").write_text(MEAN.replace("def model(y, scale):", "def model(y, scale):\n    open('started', 'w').close()"))
    command = [
        sys.executable,
        "-m",
        "pgen",
        "fit",
        "mean.py:model",
        "--data",
        "y.csv",
        "--steps",
        "10000000",
        "--compile",
        "eager",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(pgen.__file__).parents[1])}
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 60
        while not Path("started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    stopped = json.loads(out)["run"]["stopped"]
    assert stopped.startswith("interrupted") and ("SIGTERM" in stopped) == (code == 143)
    assert runs.open_run(Path("run"), ["mean.py:model"])[0].last_run.steps > 0


# --- pieces ----------------------------------------------------------------------------------------------------------------


def test_the_record_keeps_means_of_a_long_history(tmp_path):
    loss = np.arange(10_000.0)
    run = Run(
        history={"step": np.arange(1, 10_001), "loss": loss}, validation={"step": [10], "bound": [-2.0], "std_error": [np.nan]}
    )
    data = {"source": "x", "train": 1, "validation": 0, "shape": None, "columns": None, "prepared": {}, "given": "whole"}
    data |= {"categories": None, "held": ""}
    runs.write_record(tmp_path, {"schema": 2, "model": {}, "data": data, "run": runs.summary(run)}, run)
    back = runs.run_of(runs.read_record(tmp_path))
    assert len(back.history["loss"]) == 2000
    np.testing.assert_allclose(back.history["loss"], loss.reshape(2000, 5).mean(1))
    np.testing.assert_allclose(back.history["step"], np.arange(5, 10_001, 5))
    assert back.bound == -2.0 and np.isnan(back.validation["std_error"][0])


@pytest.mark.parametrize(
    ("section", "name", "value"), [("run", "steps", "ten"), ("data", "train", None), ("history", "loss", [[1], [2, 3]])]
)
def test_a_record_with_a_wrong_value_is_refused(folder, tmp_path, capsys, section, name, value):
    record = runs.read_record(folder)
    record[section][name] = value
    (tmp_path / runs.RECORD).write_text(json.dumps(record))
    (tmp_path / runs.MODEL).write_bytes((folder / runs.MODEL).read_bytes())
    assert cli.run(["sample", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 99, "model": {}}', "[" * 100_000])
def test_a_damaged_record_is_refused_in_one_line(tmp_path, capsys, text):
    (tmp_path / runs.RECORD).write_text(text)
    assert cli.run(["info", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("x", "asked", "likelihood", "prepared", "first"),
    [
        (torch.tensor([[0, 1], [1, 1]]), None, "bernoulli", {}, 0),
        (torch.tensor([[0, 3], [1, 1]]), None, "categorical", {"counts": True}, 0),
        (torch.tensor([[0.5, 3.0]]), None, "gaussian", {}, 0.5),
        (torch.tensor([[[0.5, 0.25]]]), None, "bernoulli", {"binarised_at": 0.5}, 1.0),
        (torch.tensor([[[8 / 16, 1 / 16]]]), "categorical", "categorical", {"levels": 17}, 8),
        (torch.tensor([[[51 / 255, 1.0]]]), "categorical", "categorical", {"levels": 256}, 51),
        (torch.tensor([[[200, 255]]]), "bernoulli", "bernoulli", {"binarised_at": 127.5}, 1.0),
        (torch.tensor([[[0.5, 0.25]]]), "gaussian", "gaussian", {}, 0.5),
    ],
)
def test_the_data_choose_the_likelihood_unless_one_is_asked_for(x, asked, likelihood, prepared, first):
    assert runs._observation(x, asked) == (likelihood, prepared)
    assert float(runs._prepare(x, prepared).flatten()[0]) == first


def test_a_likelihood_that_the_data_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"--likelihood bernoulli needs zeros and ones, the data lie in \[0.5, 3\]"):
        runs._observation(torch.tensor([[0.5, 3.0]]), "bernoulli")
    with pytest.raises(ValueError, match="--likelihood categorical needs counts"):
        runs._observation(torch.tensor([[0.3, 3.0]]), "categorical")


def test_plain_has_no_number_that_json_has_not():
    assert runs.plain({"a": float("nan"), "b": np.float32(2), "c": torch.arange(2), "d": Path("x")}) == {
        "a": None,
        "b": 2.0,
        "c": [0, 1],
        "d": "x",
    }


def test_a_record_keeps_which_parameters_were_restored(tmp_path):
    bounds = np.array([-9.0, -7.0, -8.0])
    run = Run(validation={"step": np.arange(3), "bound": bounds, "std_error": np.array([0.1, 0.2, 0.3])}, restored=-7.0)
    outcome = runs.summary(run)
    assert (outcome["bound"], outcome["bound_std_error"], outcome["restored"]) == (-7.0, 0.2, -7.0)
    runs.write_record(tmp_path, {"run": outcome}, run)
    again = runs.run_of(json.loads((tmp_path / runs.RECORD).read_text()))
    assert again.bound == -7.0 and again.bound_std_error == 0.2
