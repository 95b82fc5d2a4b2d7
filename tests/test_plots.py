import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

import pgen
from pgen import plots
from pgen.contracts import Run


def make_run(bound, validation=None, errors=None):
    steps = np.arange(1, len(bound) + 1)
    run = Run(history={"step": steps, "loss": -np.asarray(bound, dtype=float)})
    if validation is not None:
        at = np.linspace(1, len(bound), len(validation))
        run.validation = {
            "step": at,
            "bound": np.asarray(validation, dtype=float),
            "std_error": np.asarray(errors, dtype=float),
        }
    return run


def line(ax, label):
    return next(line for line in ax.lines if str(line.get_label()).startswith(label))


def test_bound_draws_minus_the_loss_and_its_running_mean():
    bound = np.where(np.arange(400) % 2, -1.0, -3.0)
    ax = plots.plot_bound(make_run(bound)).axes[0]
    np.testing.assert_allclose(line(ax, "training, raw").get_ydata(), bound)
    smooth = line(ax, "training, smoothed").get_ydata()
    np.testing.assert_allclose(smooth[10:-10], -2.0, atol=0.1)  # windows of 11: 5 or 6 of each value
    assert "nats" in ax.get_ylabel()


def test_bound_draws_validation_with_a_band_of_one_standard_error():
    ax = plots.plot_bound(make_run(np.linspace(-5, -2, 50), validation=[-4.0, -3.0, -2.5], errors=[0.5, 0.25, 0.125])).axes[0]
    np.testing.assert_allclose(line(ax, "validation").get_ydata(), [-4.0, -3.0, -2.5])
    assert ax.get_yscale() == "linear"
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-4.5)
    assert band[:, 1].max() == pytest.approx(-2.375)
    assert line(ax, "validation").get_label().endswith("last −2.50")


def test_bound_compresses_a_steep_start_and_says_so():
    bound = -20.0 - 1e4 * np.exp(-np.arange(500) / 3.0) + 0.1 * np.sin(np.arange(500))
    ax = plots.plot_bound(make_run(bound)).axes[0]
    assert "log scale below" in ax.get_ylabel()
    low, high = ax.transAxes.inverted().transform(ax.transData.transform([(250, -20.1), (250, -19.9)]))[:, 1]
    assert high - low > 0.03  # the last stretch stays visible: on a linear axis it would take 2e-5 of the height
    assert min(ax.get_yticks()) < -1000
    assert plots.plot_bound(make_run(bound)).axes[0].get_ylim()[0] <= bound.min()


def test_bound_skips_what_is_not_finite_and_refuses_an_empty_run():
    ax = plots.plot_bound(make_run([-3.0, np.nan, -2.0])).axes[0]
    np.testing.assert_allclose(line(ax, "training, raw").get_xdata(), [1, 3])
    with pytest.raises(ValueError, match="`run` should have a history with finite losses"):
        plots.plot_bound(Run())


def test_a_game_and_an_energy_are_not_said_to_be_better_higher():
    run = pgen.models.GAN((2,), hidden=(4,)).fit(torch.randn(20, 2), validation=torch.randn(9, 2), steps=2, progress=False)
    assert all("higher" not in ax.get_title(loc=where) for ax in plots.plot_bound(run).axes for where in ("left", "center"))


@pytest.mark.parametrize(
    ("shape", "tile_shape"),
    [
        ((7, 3, 5), (3, 5)),
        ((7, 3, 5, 1), (3, 5)),
        ((7, 1, 3, 5), (3, 5)),
        ((7, 2, 5, 3), (2, 5, 3)),
        ((7, 3, 6, 5), (6, 5, 3)),
        ((7, 2, 5, 4), (2, 5, 4)),
    ],
)
def test_sample_grid_tiles_images_in_reading_order(shape, tile_shape):
    x = np.broadcast_to(np.arange(7.0).reshape(7, *[1] * (len(shape) - 1)) / 7, shape)
    picture = plots.sample_grid(torch.tensor(x.copy()), columns=3).axes[0].images[0].get_array()
    height, width = tile_shape[:2]
    assert picture.shape == (3 * (height + 1) + 1, 3 * (width + 1) + 1, *tile_shape[2:])
    for i in range(7):
        tile = picture[1 + (i // 3) * (height + 1) :, 1 + (i % 3) * (width + 1) :][:height, :width]
        np.testing.assert_allclose(tile, i / 7)


def test_sample_grid_maps_bytes_and_other_ranges_to_black_and_white():
    white = plots.sample_grid(np.full((1, 2, 3), 255, dtype=np.uint8)).axes[0].images[0].get_array()
    assert white[1, 1] == 1.0
    spread = plots.sample_grid(np.array([[[-2.0, 6.0, 0.0]]])).axes[0].images[0].get_array()
    np.testing.assert_allclose(spread[1, 1:4], [0.0, 1.0, 0.25])


def test_sample_grid_sets_the_data_beside_the_samples():
    figure = plots.sample_grid(np.zeros((4, 2, 3)), reference=np.ones((9, 2, 3)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["4 data", "4 samples"]
    assert figure.axes[0].images[0].get_array()[1, 1] == 1.0


def test_sample_grid_of_vectors_pairs_the_first_four_features():
    x = np.random.default_rng(0).normal(size=(50, 6))
    figure = plots.sample_grid(x, reference=2 * x[:20], names=list("abcdef"))
    assert len(figure.axes) == 10
    pair = figure.axes[1]
    np.testing.assert_allclose(pair.collections[1].get_offsets(), x[:, :2])
    np.testing.assert_allclose(pair.collections[0].get_offsets(), 2 * x[:20, :2])
    assert pair.get_ylabel() == "b"
    assert "first 4 of 6" in figure.get_suptitle()


def test_sequences_are_lines_over_time_beside_the_data():
    x, data = np.random.default_rng(0).normal(size=(2, 8, 11, 5))
    figure = plots.sequences(x, reference=data, names=list("abcde"))
    assert len(figure.axes) == 12 and figure.axes[0].get_title(loc="left") == "6 data"
    for place, shown in enumerate((data, x)):  # six sequences a column, four of five numbers
        axes = figure.axes[6 * place : 6 * place + 6]
        found = np.array([[line.get_ydata() for line in ax.lines] for ax in axes])
        np.testing.assert_array_equal(found, shown[:6, :, :4].transpose(0, 2, 1))
        assert len({ax.get_ylim() for ax in axes}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcd")
    whole = plots.sequences(np.arange(12).reshape(3, 4)).axes
    assert len(whole) == 3 and whole[0].lines[0].get_drawstyle() == "steps-mid"
    with pytest.raises(ValueError, match=r"`reference` should have the event shape of `x`, \(11, 5\), got \(11, 4\)"):
        plots.sequences(x, reference=data[..., :4])
    with pytest.raises(ValueError, match=r"`x` should be sequences, \(N, T\) or \(N, T, \*frame\), got shape \(3,\)"):
        plots.sequences(np.zeros(3))


def test_families_whose_first_axis_is_time_are_drawn_as_lines():
    x, names = torch.randn(5, 7), [f"t{i}" for i in range(7)]
    lines = plots.of_samples(pgen.models.WaveNet((7,), "gaussian"), x, names)
    assert len(lines.axes) == 5 and len(lines.axes[0].lines[0].get_ydata()) == 7
    assert len(plots.of_samples(pgen.models.Gaussian((7,)), x, names).axes) == 10  # four features, in pairs


def test_sample_grid_of_scalars_is_a_histogram_of_unit_area():
    ax = plots.sample_grid(np.random.default_rng(0).normal(size=500)).axes[0]
    outline = ax.patches[0].get_xy()
    area = np.sum(np.diff(outline[:, 0]) * outline[:-1, 1])
    assert area == pytest.approx(1.0, abs=1e-9)


def test_reconstructions_stack_data_over_model():
    x, made = np.zeros((5, 2, 3)), np.ones((5, 2, 3))
    figure = plots.reconstructions(x, made, columns=3)
    assert len(figure.axes) == 2
    first = figure.axes[0].images[0].get_array()
    assert (first[1, 1], first[4, 1]) == (0.0, 1.0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["data", "model"]
    last = figure.axes[1].images[0].get_array()  # two data, a gap in the gutter's grey, and their reconstructions
    assert (last[1, 5], last[4, 5]) == (0.0, 1.0)
    assert last[1, 9] == pytest.approx(last[0, 0])


def test_reconstructions_of_vectors_scatter_feature_by_feature():
    x = np.random.default_rng(0).normal(size=(20, 3))
    figure = plots.reconstructions(x, x + 1)
    assert len(figure.axes) == 3
    np.testing.assert_allclose(figure.axes[2].collections[0].get_offsets(), np.column_stack([x[:, 2], x[:, 2] + 1]))
    named = plots.reconstructions(x, x, names=["a", "b", "c"])
    assert [ax.get_xlabel() for ax in figure.axes][1] == "feature 1, data" and named.axes[1].get_xlabel() == "b, data"
    with pytest.raises(ValueError, match="`names` should be one a feature, 3, got 1"):
        plots.reconstructions(x, x, names=["a"])


def test_latent_space_in_two_dimensions_is_drawn_as_it_is():
    z = np.random.default_rng(0).normal(size=(30, 2))
    ax = plots.latent_space(xr.DataArray(z)).axes[0]
    np.testing.assert_allclose(ax.collections[0].get_offsets(), z)
    assert ax.get_xlabel() == "latent 0"


def test_latent_space_projects_on_the_first_two_principal_components():
    g = np.random.default_rng(0)
    z = g.normal(size=(2000, 4)) * np.array([0.1, 3.0, 0.1, 1.0]) + 5.0
    ax = plots.latent_space(torch.tensor(z)).axes[0]
    drawn = np.asarray(ax.collections[0].get_offsets())
    assert abs(np.corrcoef(drawn[:, 0], z[:, 1])[0, 1]) > 0.999
    assert abs(np.corrcoef(drawn[:, 1], z[:, 3])[0, 1]) > 0.99
    assert "(89% of the variance)" in ax.get_xlabel()  # 9 / (9 + 1 + 0.01 + 0.01) = 0.898, and sampling error
    assert "2 principal components of 4" in ax.get_title(loc="left")


def test_latent_space_names_each_class_once():
    z, labels = np.random.default_rng(0).normal(size=(60, 2)), np.repeat(["ash", "oak", "elm"], 20)
    ax = plots.latent_space(z, labels).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ash", "elm", "oak"]
    np.testing.assert_allclose(ax.collections[1].get_offsets(), z[40:])
    assert len({tuple(part.get_facecolor()[0]) for part in ax.collections}) == 3


def test_latent_space_groups_the_classes_past_ten_and_scales_real_labels():
    labels = np.concatenate([np.repeat(np.arange(9), 5), np.arange(9, 14)])
    z = np.random.default_rng(0).normal(size=(50, 3))
    legend = plots.latent_space(z, labels).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["5 others", *map(str, range(9))]
    figure = plots.latent_space(z, np.linspace(0, 1, 50))
    assert figure.axes[1].get_ylabel() == "label"


def test_khat_is_sorted_counted_and_carries_its_errors():
    khat = xr.DataArray([0.9, 0.2, np.nan, 0.5, 1.2])
    ax = plots.plot_khat(khat, [0.3, 0.1, 0.1, 0.2, 0.4]).axes[0]
    good, bad = ax.containers
    np.testing.assert_allclose(good.lines[0].get_xydata(), [[1, 0.2], [2, 0.5]])
    np.testing.assert_allclose(bad.lines[0].get_xydata(), [[3, 0.9], [4, 1.2]])
    np.testing.assert_allclose(bad.lines[2][0].get_segments()[1][:, 1], [0.8, 1.6])
    assert ax.get_title(loc="left") == "2 of 5 above 0.7; 1 not finite, not drawn"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.sample_grid(np.zeros((2, 3, 4, 5, 1))), r"`x` should be images .* got shape \(2, 3, 4, 5, 1\)"),
        (lambda: plots.sample_grid(np.zeros((2, 6, 4, 5))), r"`x` should be images .* got shape \(2, 6, 4, 5\)"),
        (lambda: plots.sample_grid(np.zeros((0, 3))), r"`x` should have at least one datum .* got shape \(0, 3\)"),
        (lambda: plots.sample_grid(np.array(["a"])), "`x` should be numbers, got an array of <U1"),
        (lambda: plots.sample_grid(np.zeros((2, 3, 4)), columns=0), "`columns` should be a positive integer, got 0"),
        (lambda: plots.sample_grid(np.zeros((2, 3)), names=["a"]), "`names` should have one entry a feature, 3, got 1"),
        (lambda: plots.sample_grid(np.zeros((2, 3)), reference=np.zeros((2, 4))), r"`reference` .* \(3,\), got \(4,\)"),
        (lambda: plots.reconstructions(np.zeros((2, 3)), np.zeros((2, 4))), r"`xhat` .* \(2, 3\), got \(2, 4\)"),
        (lambda: plots.latent_space(np.zeros(3)), r"`z` should be a finite matrix \(N, latent\), got shape \(3,\)"),
        (lambda: plots.latent_space(np.zeros((3, 2)), [1, 2]), r"`labels` .* shape \(3,\), got \(2,\)"),
        (lambda: plots.plot_khat([np.nan]), r"`khat` should be a vector with finite entries, got shape \(1,\)"),
        (lambda: plots.plot_khat([0.1], [0.1, 0.2]), r"`khat_se` .* \(1,\), got \(2,\)"),
        (lambda: plots.plot_khat([0.1], threshold=-1), "`threshold` should be a positive number, got -1"),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_save_writes_a_picture_and_refuses_what_it_cannot_write(tmp_path):
    figure = plots.sample_grid(np.zeros((2, 3, 4)))
    path = plots.save(figure, tmp_path / "grid.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`path` should end in one of .*\.png.*, got"):
        plots.save(figure, tmp_path / "grid.xyz")
    with pytest.raises(ValueError, match="which is no folder"):
        plots.save(figure, tmp_path / "missing" / "grid.png")


def test_pictures_leave_global_state_alone_and_ignore_a_dark_style(tmp_path):
    import sys

    with matplotlib.rc_context({"text.color": "white", "axes.labelcolor": "white", "figure.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        figure = plots.plot_bound(make_run(np.linspace(-5, -2, 50)))
        plots.save(figure, tmp_path / "bound.png")
        assert dict(matplotlib.rcParams) == before
    assert isinstance(figure, Figure)
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert figure.axes[0].xaxis.label.get_color() == plots.INK
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_density_encloses_the_mass_that_its_contours_say():
    from pgen.data import toy

    target = toy.gaussian_grid(1, sd=1.0)  # the standard normal, whose 90 % lie within radius sqrt(2 ln 10) = 2.146
    ax = plots.density(target, limits=(-4, 4, -4, 4), num_points=81).axes[0]
    (contours,) = [c for c in ax.collections if hasattr(c, "levels")]
    known = [0.01, 0.1, 0.5]  # p / max p where a share 1 - r of the mass is enclosed
    np.testing.assert_allclose(contours.levels, known, atol=0.01)
    points = plots.density(target, target.sample(50)).axes[0].lines[0].get_xydata()
    assert points.shape == (50, 2)
    with pytest.raises(ValueError, match=r"`data` should be points of the plane, shape \(N, 2\), got \(5, 3\)"):
        plots.density(target, np.zeros((5, 3)))
    named = plots.density(target, limits=(-4, 4, -4, 4), num_points=5, names=("height", "weight")).axes[0]
    assert (named.get_xlabel(), named.get_ylabel()) == ("height", "weight")
    with pytest.raises(ValueError, match="`names` should be two, one for each axis, got 1"):
        plots.density(target, names=("height",))


def test_progress_pictures_name_the_features(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))

    class Model:
        def sample(self, num, context, *, seed, progress):
            return np.zeros((num, 2)) + np.arange(num)[:, None]

    plots.Pictures(Model(), tmp_path, num=5, names=["width", "length"]).on_state(30)
    ((figure, path),) = drawn
    assert path == tmp_path / "step-000030.png"
    assert {"width", "length"} <= {ax.get_xlabel() for ax in figure.axes}
