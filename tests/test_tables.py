"""Tables with text and missing entries: read, fitted from the command line, and written back."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pgen
from pgen import cli, runs
from pgen.data import ContextColumns, table

TEXT = """species,mass,code,sex,name
Adelie,3.75,2,MALE,a
Gentoo,5.0,10,,b
Adelie,?,2,FEMALE,c
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "t.csv").write_text(TEXT)
    return tmp_path / "t.csv"


def test_text_becomes_categories_in_order_and_back(file):
    found = table(file, ["sex", "species", "mass", "code"])
    expected = torch.tensor([[1.0, 0.0, 3.75, 2.0], [math.nan, 1.0, 5.0, 10.0], [0.0, 0.0, math.nan, 2.0]])
    torch.testing.assert_close(found.x, expected, equal_nan=True)
    assert found.categories == (("FEMALE", "MALE"), ("Adelie", "Gentoo"), (), ())
    assert found.columns == [("categorical", 2), ("categorical", 2), "continuous", "continuous"]
    assert found.missing == {"sex": 1, "mass": 1}
    assert found.words() == "categorical: sex, species; continuous: mass, code"
    assert found.rows(found.x)[1] == ["", "Gentoo", "5", "10"]


def test_numbers_are_categories_where_asked_in_the_order_of_their_values(file):
    found = table(file, ["mass", "code"], categories=["code"])
    assert found.categories == ((), ("2", "10")) and found.x[:, 1].tolist() == [0.0, 1.0, 0.0]


def test_a_table_is_read_again_by_the_categories_of_another(tmp_path, file):
    first = table(file, ["species", "mass"])
    (tmp_path / "new.csv").write_text("mass,extra,species\n1.0,x,Gentoo\n")
    known = {name: texts for name, texts in zip(first.names, first.categories) if texts}
    assert table(tmp_path / "new.csv", first.names, categories=known).x.tolist() == [[1.0, 1.0]]
    (tmp_path / "new.csv").write_text("mass,species\n1.0,Gentoo\n2.0,Gento\n")
    with pytest.raises(ValueError, match=r"row 2 \(line 3\), column 'species': 'Gento' is a category .* did you mean 'Gentoo'"):
        table(tmp_path / "new.csv", first.names, categories=known)


def test_a_data_frame_is_a_table_too():
    frame = pd.DataFrame({"mass": [3.75, None], "sex": [None, "MALE"], "bit": [0, 1]})
    found = table(frame)
    torch.testing.assert_close(found.x, torch.tensor([[3.75, math.nan, 0.0], [math.nan, 0.0, 1.0]]), equal_nan=True)
    assert found.columns == ["continuous", ("categorical", 2), "binary"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT, {"columns": ["mas"]}, "no column 'mas'; did you mean 'mass'"),
        (TEXT, {"categories": ["cod"]}, "`categories` is 'cod', which is unknown; did you mean 'code'"),
        ("a,a\n1,2\n", {}, "two columns are called 'a'"),
        ("a,b\n", {}, "a header but no rows"),
        ("39,State-gov\n50,Private\n", {}, "the first line holds numbers beside words"),
        ("a,b\n1,x\n2\n", {}, r"row 2 \(line 3\) has 1 cells, expected 2"),
        ("a,b\n1,x\ninf,y\n", {}, r"row 2 \(line 3\), column 'a': 'inf' is not finite"),
        ("name\n" + "".join(f"n{i}\n" for i in range(30)), {}, "column 'name' holds 30 texts in 30 rows; an identifier"),
        ("a\nx\n", {"categories": {}}, r"row 1 \(line 2\), column 'a': 'x' is not a number"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, text, options, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        table(tmp_path / "bad.csv", **options)
    assert str(caught.value).startswith(f"{tmp_path / 'bad.csv'}: ") and "\n" not in str(caught.value)


# --- the command line ------------------------------------------------------------------------------------------------------


@pytest.fixture
def penguins(tmp_path, monkeypatch):
    """Sixty rows of two species that differ in mass; the sex of three of them and the mass of two are missing."""
    monkeypatch.chdir(tmp_path)
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for i in range(60):
        species, sex = ("Adelie", "Gentoo")[i % 2], "" if i < 3 else ("FEMALE", "MALE")[i // 2 % 2]
        rows.append([species, "?" if i in (5, 6) else f"{3.7 + i % 2 + 0.2 * noise[i]:.3f}", sex, str(i % 3)])
    with Path("t.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["species", "mass", "sex", "tag"], *rows])
    return Path("t.csv")


def answer(capsys, *arguments, code=0):
    assert cli.run([*map(str, arguments), "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_fit_score_sample_with_text(capsys, penguins):
    got, said = answer(capsys, "fit", penguins, "--model", "mixture", "--set", "num_components=2", "--complete", "--steps", 20)
    words = "categorical: species, sex; continuous: mass, tag (few whole values in tag: categories?)"
    assert f"columns: {words}\n" in said and got["data"]["held"] == words
    assert got["data"]["categories"] == [["Adelie", "Gentoo"], [], ["FEMALE", "MALE"], []]
    assert got["data"]["train"] + got["data"]["validation"] == 55
    scored, said = answer(capsys, "score", "run", penguins)
    assert scored["num_data"] == 55 and "5 of 60 rows have missing entries" in said
    model, record = runs.open_run(Path("run"), None)
    assert scored["mean"] == pytest.approx(model.log_prob(runs.batch("t.csv", record)).mean)
    answer(capsys, "sample", "run", "-n", 30, "--out", "s.csv")
    with Path("s.csv").open() as drawn:
        header, *rows = csv.reader(drawn)
    assert header == ["species", "mass", "sex", "tag"] and len(rows) == 30
    assert {row[0] for row in rows} == {"Adelie", "Gentoo"} and {row[2] for row in rows} == {"FEMALE", "MALE"}
    heavier = [
        sum(float(row[1]) for row in rows if row[0] == s) / sum(row[0] == s for row in rows) for s in ("Adelie", "Gentoo")
    ]
    assert heavier[1] > heavier[0] + 0.5
    Path("new.csv").write_text("sex,species,mass,tag\nMALE,Chinstrap,3.7,1\n")
    assert cli.run(["score", "run", "new.csv"]) == 2
    assert "column 'species': 'Chinstrap' is a category that the fit has not seen" in capsys.readouterr().err


def test_missing_entries_go_to_families_that_know_them(capsys, penguins):
    got, _ = answer(
        capsys, "fit", penguins, "--model", "factor_analysis", "--set", "latent_dim=1", "--columns", "mass,tag", "--steps", 5
    )
    assert got["data"]["train"] + got["data"]["validation"] == 60 and got["data"]["prepared"] == {"standardised": True}
    assert answer(capsys, "score", "run", penguins)[0]["num_data"] == 60


def test_text_and_missing_entries_go_together_in_a_mixture(capsys, penguins):
    options = ["--set", "num_components=2", "--steps", 20]
    got, _ = answer(capsys, "fit", penguins, "--model", "mixture", *options)
    assert got["data"]["train"] + got["data"]["validation"] == 60 and "samples.png" in got["files"] and not got["not_drawn"]
    scored, said = answer(capsys, "score", "run", penguins)
    assert scored["num_data"] == 60 and "left out" not in said
    model, record = runs.open_run(Path("run"), None)
    assert scored["mean"] == pytest.approx(model.log_prob(runs.batch("t.csv", record)).mean)
    answer(capsys, "sample", "run", "-n", 30, "--out", "s.csv")
    assert {row[2] for row in list(csv.reader(Path("s.csv").read_text().splitlines()))[1:]} == {"FEMALE", "MALE"}
    Path("new.csv").write_text("species,mass,sex,tag\n,,,\nAdelie,,,\n")
    assert answer(capsys, "score", "run", "new.csv", code=0)[0]["num_data"] == 2
    Path("never.csv").write_text("a,b\n" + "".join(f"{i},\n" for i in range(60)))
    for family in ("mixture", "gaussian"):
        assert cli.run(["fit", "never.csv", "--model", family, "--overwrite"]) == 2
        assert "column 'b' is missing in all 60 rows; leave it out with --without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gaussian"], "gaussian takes numbers alone, and columns species, sex hold categories: choose"),
        (["--model", "made"], "2 of 60 entries are missing in column 'mass', and 1 more column has some, which made cannot"),
        (["--model", "made", "--columns", "sex"], "3 of 60 entries are missing in column 'sex', which made cannot take"),
        (["--model", "made", "--without", "sexe"], "--without` is 'sexe', which is unknown; did you mean 'sex'"),
    ],
)
def test_what_a_family_cannot_take_is_said_in_one_line(capsys, penguins, options, message):
    assert cli.run(["fit", str(penguins), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    if "made cannot" in message:
        assert "factor_analysis" in error and "--complete" in error


def test_a_table_is_refused_options_only_where_there_are_columns(capsys):
    assert cli.run(["fit", "digits", "--model", "vae", "--columns", "a"]) == 2
    assert "digits is no table with named columns" in capsys.readouterr().err


def test_families_side_by_side_see_the_same(capsys, penguins):
    """Beside a family that takes numbers alone, a binary column is a number for all; text is refused by that family alone."""
    Path("bits.csv").write_text("a,b\n" + "".join(f"{i % 2},{(i * 37 % 60) / 7}\n" for i in range(60)))
    got, said = answer(capsys, "compare", "bits.csv", "--models", "gaussian,mixture", "--set", "mixture.num_components=2")
    assert "columns: continuous: all 2" in said and got["fits"]["mixture"]["settings"]["columns"] is None
    got, _ = answer(capsys, "fit", "bits.csv", "--model", "mixture", "--set", "num_components=2", "--steps", 3)
    assert got["model"]["settings"]["columns"] == ["binary", "continuous"]
    names, options = "gaussian,mixture,kernel_density", ["--complete", "--overwrite", "--epochs", 2]
    got, said = answer(capsys, "compare", penguins, "--models", names, *options, code=1)
    assert list(got["not_fitted"]) == ["gaussian"] and "columns: categorical: species, sex" in said
    assert {row["model"] for row in got["models"]} == {"mixture", "kernel_density"}


def test_a_record_of_categories_makes_the_table_again(capsys, penguins):
    options = ["--columns", "species,mass", "--complete", "--categorical", "species"]
    answer(capsys, "fit", penguins, "--model", "kernel_density", *options)
    found = runs.table_of(runs.read_record(Path("run")))
    assert found.names == ("species", "mass") and found.categories == (("Adelie", "Gentoo"), ())
    assert pgen.load("run/model.pgen").settings()["columns"] == [["categorical", 2], "continuous"]


# --- a context -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """x of two numbers, linear in a category and a number of large units: t.csv, more of the same law in new.csv; and a fit."""
    base = tmp_path_factory.mktemp("lines")
    for name, count, seed in (("t.csv", 80, 0), ("new.csv", 7, 1)):
        noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with (base / name).open("w", newline="") as out:
            write = csv.writer(out)
            write.writerow(["a", "kind", "b", "year"])
            for i in range(count):
                k, year = i % 3, 2000 + i * 7 % 11
                a = 2 * k + 0.3 * (year - 2005) + 0.5 * float(noise[i, 0])
                write.writerow([f"{a:.5f}", "uvw"[k], f"{a - k + float(noise[i, 1]):.5f}", year])
    options = ["--context", "kind,year", "--out", str(base / "run"), "-q"]
    assert cli.run(["fit", str(base / "t.csv"), "--model", "gaussian", *options]) == 0
    return base


@pytest.fixture
def lines(fitted, tmp_path, monkeypatch):
    """A folder of one's own with links to the files and the fit."""
    monkeypatch.chdir(tmp_path)
    for name in ("t.csv", "new.csv", "run"):
        Path(name).symlink_to(fitted / name)
    return tmp_path


def least_squares(path):
    """Design matrix with a column for each kind and the year, and both numbers, in float64."""
    with Path(path).open() as file:
        rows = list(csv.DictReader(file))
    design = [[*(float(row["kind"] == k) for k in "uvw"), float(row["year"]) - 2005] for row in rows]
    x = [[float(row["a"]), float(row["b"])] for row in rows]
    return torch.tensor(design, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)


def test_a_gaussian_given_columns_is_least_squares(capsys, lines):
    got = runs.read_record(Path("run"))
    assert got["data"]["columns"] == ["a", "b"] and got["data"]["shape"] == [2]
    assert got["data"]["context"]["names"] == ["kind", "year"] and got["model"]["settings"]["context_dim"] == 4
    design, x = least_squares("t.csv")
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(0))[8:]  # but for the tenth that is held out
    slope = torch.linalg.lstsq(design[rows], x[rows]).solution
    rest = x[rows] - design[rows] @ slope
    law = torch.distributions.MultivariateNormal(torch.zeros(2).double(), rest.T @ rest / len(rest))
    new, y = least_squares("new.csv")
    expected = law.log_prob(y - new @ slope)
    scored, _ = answer(capsys, "score", "run", "new.csv", "--out", "s.csv")
    found = [float(line) for line in Path("s.csv").read_text().splitlines()[1:]]
    torch.testing.assert_close(torch.tensor(found).double(), expected, atol=2e-4, rtol=0)
    assert scored["kind"] == "exact" and scored["mean"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert cli.run(["info", "run"]) == 0 and "kind (u, v, w), year" in capsys.readouterr().out


def test_the_command_line_scores_and_samples_as_the_library_does(capsys, lines):
    answer(
        capsys, "fit", "t.csv", "--model", "made", "--context", "kind,year", "--steps", 9, "--compile", "eager", "--out", "made"
    )
    x, beside = table("t.csv").split(["kind", "year"])
    columns = ContextColumns.of(beside)
    context = columns.encode(beside.x)
    torch.testing.assert_close(context[:, :3].argmax(1), torch.arange(80) % 3)
    assert float(context[:, 3].mean()) == pytest.approx(0, abs=1e-5)
    assert float(context[:, 3].std(correction=0)) == pytest.approx(1, abs=1e-5)
    model = pgen.load("made/model.pgen")
    got, _ = answer(capsys, "score", "made", "t.csv")
    assert got["mean"] == pytest.approx(model.log_prob(x.x, context).mean, abs=1e-6)
    where = ["--given", "year=2003,kind=v"]
    got, _ = answer(capsys, "sample", "made", "-n", 5, *where, "--seed", 3, "--out", "s.npy")
    one = columns.encode(columns.parse({"kind": "v", "year": "2003"}))
    torch.testing.assert_close(torch.from_numpy(np.load("s.npy")), model.sample(5, one.expand(5, -1), seed=3))
    assert got["num"] == 5 and got["given"] == ["year=2003,kind=v"]


def test_samples_are_drawn_at_each_row_and_written_beside_it(capsys, lines):
    Path("at.csv").write_text("year,other,kind\n2003,x,w\n2009,y,u\n")
    got, _ = answer(capsys, "sample", "run", "--given", "at.csv", "--out", "s.csv")
    header, *rows = csv.reader(Path("s.csv").read_text().splitlines())
    assert header == ["a", "b", "kind", "year"] and [row[2:] for row in rows] == [["w", "2003"], ["u", "2009"]]
    got, _ = answer(capsys, "sample", "run", "--given", "at.csv", "-n", 300, "--out", "s.csv")
    drawn = [[float(cell) for cell in line.split(",")[:1]] for line in Path("s.csv").read_text().splitlines()[1:]]
    mean = torch.tensor(drawn).reshape(2, 300).mean(1)
    assert got["num"] == 600
    torch.testing.assert_close(mean, torch.tensor([4 - 0.6, 1.2]), atol=0.45, rtol=0)


def test_families_are_compared_given_a_column(capsys, lines):
    names = "gaussian,maximum_entropy"
    got, said = answer(capsys, "compare", "t.csv", "--models", names, "--context", "kind", "--without", "year", code=1)
    assert {row["model"] for row in got["models"]} == {"gaussian"} and "context: kind (u, v, w)" in said
    assert "maximum_entropy takes no context: choose causal_transformer, " in got["not_fitted"]["maximum_entropy"]
    parts = runs.Parts.of("t.csv", None, 0, runs.Reading(without=("year",), context=("kind",)), test=True)
    kernels = runs.Subject.of_parts(parts, "kernel_density", {}, 0).model
    assert kernels.settings()["columns"] == ["continuous", "continuous", "binary", "binary", "binary"]
    answer(capsys, "fit", "t.csv", "--model", "gaussian", "--columns", "a,b", "--out", "alone")
    got, _ = answer(capsys, "compare", "alone", "run", "new.csv", "--out", "two")
    assert [row["model"] for row in got["models"]] == ["run", "alone"]
    assert cli.run(["sample", "alone", "--given", "kind=u"]) == 2
    assert "--given does not go with this run, which was fitted without --context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "t.csv", "--model", "rbm", "--context", "kind"], "rbm takes no context: choose "),
        (["fit", "t.csv", "--model", "gaussian", "--context", "knd"], "is 'knd', which is unknown; did you mean 'kind'"),
        (["fit", "t.csv", "--model", "gaussian", "--context", "a,kind,b,year"], "no column but a, kind, b, year; leave one"),
        (["fit", "t.csv", "--model", "gaussian", "--context", "kind", "--without", "kind"], "both name 'kind'"),
        (["fit", "t.csv", "--model", "gaussian", "--context", "kind,year", "--set", "context_dim=2"], "has 4 numbers"),
        (["fit", "gap.csv", "--model", "gaussian", "--context", "c"], "1 of 9 entries are missing in the context column 'c'"),
        (["fit", "gap.csv", "--model", "gaussian", "--context", "d"], "context column 'd' has one value in all 9 rows"),
        (["fit", "digits", "--model", "vae", "--context", "kind"], "has classes to condition on, called 'label'"),
        (["score", "run", "other.csv"], "no column 'year'"),
        (["score", "run", "strange.csv"], "column 'kind': 'z' is a category that the fit has not seen"),
        (["sample", "run"], "the run is conditioned on kind (u, v, w), year; give it, such as --given kind=u,year=0"),
        (["sample", "run", "--given", "kind=u"], "--given says nothing of 'year'; give all of the context"),
        (["sample", "run", "--given", "kind=u,yaer=2001"], "has 'yaer', which is no column of the context; did you mean"),
        (["sample", "run", "--given", "kind=x,year=2001"], "'x' is a category that the fit has not seen"),
        (["sample", "run", "--given", "kind=u,year=old"], "--given, column 'year': 'old' is not a number"),
        (["sample", "run", "--given", "kind=u", "--given", "kind=v"], "--given gives 'kind' twice"),
        (["sample", "run", "--given", "other.csv"], "no column 'year'"),
    ],
)  # fmt: skip
def test_a_context_that_cannot_be_is_one_line(capsys, lines, arguments, message):
    Path("gap.csv").write_text("a,c,d\n" + "".join(f"{i * i},{'' if i == 3 else i},1\n" for i in range(9)))
    Path("other.csv").write_text("a,b,kind\n1,2,u\n")
    Path("strange.csv").write_text("a,b,kind,year\n1,2,z,2001\n")
    assert cli.run([*arguments, *(["--out", "none"] if arguments[0] == "fit" else [])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_arrays_named_x_and_context_are_taken_as_they_are(capsys, lines):
    design, x = least_squares("t.csv")
    context = design[:, 1:].float()
    np.savez("t.npz", x=x.float().numpy(), context=context.numpy())
    got, _ = answer(capsys, "fit", "t.npz", "--model", "gaussian", "--out", "arrays")
    assert got["model"]["settings"]["context_dim"] == 3 and got["data"]["shape"] == [2]
    scored, _ = answer(capsys, "score", "arrays", "t.npz")
    model = pgen.load("arrays/model.pgen")
    assert scored["mean"] == pytest.approx(model.log_prob(x.float(), context).mean)
    assert answer(capsys, "sample", "arrays", "--given", "t.npz", "--out", "s.npy")[0]["shape"] == [80, 2]
    assert answer(capsys, "sample", "arrays", "-n", 3, "--given", "0=1,1=0,2=-2.5", "--out", "s.npy")[0]["shape"] == [3, 2]


def test_a_damaged_context_in_the_record_is_refused(lines):
    whole = json.loads(Path("run/run.json").read_text())
    Path("copy").mkdir()
    for change in ({"scale": [1.0, 0.0]}, {"loc": [1.0]}, {"names": None}, {"categories": [["u"], 3]}):
        damaged = {**whole, "data": {**whole["data"], "context": {**whole["data"]["context"], **change}}}
        Path("copy/run.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is damaged: 'context'"):
            runs.read_record(Path("copy"))
    del whole["data"]["context"]  # as runs had it that knew no contexts
    Path("copy/run.json").write_text(json.dumps(whole))
    assert runs.context_of(runs.read_record(Path("copy"))) is None
