"""Tables with text and missing entries: read, fitted from the command line, and written back."""

import csv
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import pgen
from pgen import cli, runs
from pgen.data import table

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
        (["--model", "made"], "2 of 60 entries are missing in column 'mass', and 1 more columns have some, which made cannot"),
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
