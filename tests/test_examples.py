"""Every example runs to its end, at small sizes, and writes or returns what it says."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import pgen

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in sorted(EXAMPLES.glob("*.py")) if f'example("{path.stem}")' not in text] == []


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    module = example("demo")
    with module.console.capture() as capture:
        files = module.main(tmp_path_factory.mktemp("demo"), module.QUICK, progress=False)
    return files, capture.get()


def test_demo_writes_what_it_lists(demo):
    files, said = demo
    assert {path.name for path in files} >= {"model.pgen", "digits.html", "eight_schools.html", "khat.png"}
    assert all(path.stat().st_size > 1000 for path in files)
    assert "the same to the last bit" in said and "DIFFERENT" not in said
    assert said.rstrip().endswith("kB")


def test_demo_report_holds_its_pictures_and_its_model_is_loaded(demo):
    files, _ = demo
    page = next(path for path in files if path.name == "digits.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 5 and "src=" in page and "http" not in page.split("<body>")[1][:1000]
    vae = pgen.load(next(path for path in files if path.suffix == ".pgen"))
    assert vae.sample(2).shape == (2, 8, 8)


def test_baseline_of_the_demo_is_a_mass():
    module = example("demo")
    grey = pgen.data.digits(integers=True)
    score = module.pixel_baseline(grey.train, grey.test)
    assert score.kind == "exact" and score.mean == pytest.approx(-106.47, abs=0.01)  # add-one smoothing, by hand in NumPy


def test_eight_schools_compares_four_guides(capsys):
    reports = example("eight_schools").main(steps=200, num_samples=500, progress=False)
    assert list(reports) == ["own", "mean-field", "full rank", "flow"]
    said = capsys.readouterr().out
    assert "4.41" in said and "3.60" in said and said.count("±") >= 8


def test_ladder_climbs_for_both_parameterisations(capsys):
    pairs = example("ladder").main(steps=60, num_samples=500, progress=False)
    said = capsys.readouterr().out
    assert pairs["centred"].ladder.rungs[0].guide == "mean_field"
    assert said.count("k-hat") >= 2 and said.count("reference") == 4


def test_minibatch_regression_resists_gross_errors(capsys):
    found = example("minibatch_regression").main(rows=300, steps=1000, batch_size=100, num_samples=200, progress=False)
    for mean, sd in found.values():
        np.testing.assert_allclose(mean, [-1.0, 2.0, 0.0, -0.5], atol=0.3)  # least squares: intercept -0.2
        assert (sd > 0).all()
    assert "of 500 new answers" in capsys.readouterr().out


def test_bandwidth_draws_and_ranks_three_estimates(tmp_path, capsys):
    module = example("bandwidth")
    files = module.main(tmp_path, number=150, progress=False)
    assert [path.name for path in files] == ["bandwidth.png"] and files[0].stat().st_size > 1000
    said = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[-1]) for line in said[1:5]]
    assert scores == sorted(scores)  # too narrow, the rule, leave-one-out, the truth


def test_geyser_knows_its_density():
    module = example("bandwidth")
    duration, wait = module.torch.linspace(0, 8, 801), module.torch.linspace(10, 160, 601)
    at = module.torch.cartesian_prod(duration, wait)
    assert float(module.log_density(at).double().exp().sum()) * 0.01 * 0.25 == pytest.approx(1, abs=1e-4)


def test_latent_space_draws_three_pictures(tmp_path, capsys):
    files = example("latent_space").main(tmp_path, epochs=2, number=50, progress=False)
    assert [path.name for path in files] == ["grids.png", "codes.png", "walks.png"]
    assert all(path.stat().st_size > 1000 for path in files)
    assert "as near as real digits, code box" in capsys.readouterr().out


def test_mixture_chooses_and_draws(tmp_path, capsys):
    choice, path = example("mixture").main(tmp_path, n=200, most=2, steps=60, progress=False)
    assert choice.name == "2" and path.stat().st_size > 1000
    said = capsys.readouterr().out
    assert "component 0" in said and "the process itself: -4." in said


def test_gaps_of_a_lattice_are_known():
    module = example("latent_space")
    codes = module.lattice(21) * 4 - 2  # spacing 0.2 in a box of side 4
    spacing = 0.2 / float(codes[:, 0].std())
    assert 0.25 * spacing < module.gap(codes, number=500, seed=0) < 0.6 * spacing  # 0.38 of the spacing for a square lattice


def test_walks_of_a_linear_decoder_are_even():
    module = example("latent_space")
    codes = module.lattice(20)
    sd = float(codes[:, 0].std())
    steepest, busiest = module.walks(lambda z: 3.0 * z[:, :1, None], codes[:, :1], number=50)
    assert steepest == pytest.approx(3.0 * sd, rel=1e-3)
    assert busiest == pytest.approx(6 / 64, rel=1e-3)


def test_sequences_learns_to_add(capsys):
    bits, right = example("sequences").main(steps=150, progress=False)
    assert 1.1 < bits < 2.5 and 0 <= right <= 1
    assert "after 3+4= comes" in capsys.readouterr().out


def test_pixels_draws_finishes_and_fills_in(tmp_path, capsys):
    files = example("pixels").main(tmp_path, epochs=1, channels=6, progress=False)
    assert [path.name for path in files] == ["pixels.png"] and files[0].stat().st_size > 1000
    said = capsys.readouterr().out
    assert "exact" in said and "independent pixels: -2" in said and said.count("0.") >= 8


def test_densities_compare_classify_and_detect(tmp_path, capsys):
    files = example("classify_and_detect").main(tmp_path, points=300)
    assert [file.stem for file in files] == ["comparison", "decision_boundary", "ood_1", "ood_2", "reliability"]
    assert all(file.stat().st_size > 1000 for file in files)
    said = capsys.readouterr().out
    assert "mixture of 4" in said and "The density alone fails here" in said and "ECE" in said


def test_flows_are_drawn_beside_their_targets(tmp_path, capsys):
    gaps = example("flow_toys").main(tmp_path, steps=5, hidden=8, progress=False)
    assert gaps["25 Gaussians"] < 1.0 and set(gaps) == {"two moons", "checkerboard", "25 Gaussians"}
    assert (tmp_path / "flow_toys.png").stat().st_size > 1000
    assert "inverse off by" in capsys.readouterr().out


def test_density_basics_prints_its_figures_and_draws_the_plane(tmp_path, capsys):
    example("density_basics").main(tmp_path / "density.png")
    said = capsys.readouterr().out
    assert (tmp_path / "density.png").stat().st_size > 1000
    assert "0.054 0.079 0.114 0.165 0.240 0.347" in said  # Jaynes (1963), Brandeis lectures
    assert "the banana itself: -2.14 nats" in said


def test_denoising_draws_its_path(tmp_path, capsys):
    score = example("denoising").main(tmp_path, epochs=2, width=16, progress=False)
    assert score.kind == "lower_bound" and score.measure == "mass"
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    assert "test digits, classes given" in capsys.readouterr().out


def test_river_paths_are_learned_and_judged(tmp_path, capsys):
    module = example("river_paths")
    heading = module.rivers(50, seed=0)
    assert heading.shape == (50, 24) and bool(module.in_valley(heading).all())
    reports, picture = module.main(tmp_path, paths=300, components=3, steps=60, judged=40, progress=False)
    assert len(reports) == 2 and picture.stat().st_size > 1000
    said = capsys.readouterr().out
    assert said.count("verdict:") >= 2 and "keep to the valley" in said and "courses in place of headings" in said


def test_the_minimax_gradient_vanishes_and_the_cure_moves_on(capsys, tmp_path):
    runs, ends = example("vanishing_gradient").main(tmp_path / "norms.png", steps=300)
    norms = {loss: run.history["generator_grad_norm"][-1] for loss, run in runs.items()}
    assert norms["non_saturating"] > 300 * norms["minimax"]
    assert float(ends["minimax"].norm()) < 1.0 < float(ends["non_saturating"].norm())
    assert "ratio" in capsys.readouterr().out and (tmp_path / "norms.png").stat().st_size > 5000


def test_energies_are_added_and_drawn(tmp_path):
    shares = example("energy").main(tmp_path, steps=3, temps=4, progress=False)
    assert set(shares) == {"eight Gaussians", "two moons", "both", "Gaussians - moons / 5"}
    assert (tmp_path / "energy.png").stat().st_size > 1000
