import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import rng
from PIL import Image

import sde_utils as su
from sde_utils import pipeline
from sde_utils import plotting as draw

mpl.use("agg")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()
    plt.close(figure)


def shown(ax):
    return np.asarray(ax.images[0].get_array())


def images(n, channels=1, seed=0):
    return torch.rand(n, channels, 6, 5, generator=rng(seed)) * 2 - 1


def test_images_stand_row_by_row(ax):
    x = images(5)
    draw.draw_images(ax, x, 3)
    grid = shown(ax)
    assert grid.shape == (2 * 8, 3 * 7)
    for i, image in enumerate(x):
        top, left = 8 * (i // 3) + 1, 7 * (i % 3) + 1
        np.testing.assert_array_equal(grid[top : top + 6, left : left + 5], image[0])
    assert (grid[8:, 14:] == 1).all()  # the sixth place is empty


def test_colour_is_kept(ax):
    x = images(1, channels=3)
    draw.draw_images(ax, x, 1)
    np.testing.assert_allclose(shown(ax), (x[0].movedim(0, -1) + 1) / 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_posterior_figure_of_few_draws(channels):
    """Two methods of one and of three draws, four columns: every title stands over its own."""
    truth, few, many = (images(n, channels, n) for n in (1, 1, 3))
    data = torch.arange(12.0).reshape(1, 1, 3, 4)
    figure = draw.posterior_figure(truth, None, {"a": few, "b": many}, draws=4, data=data)
    titles = [ax.get_title() for ax in figure.axes[:9]]
    assert titles == ["truth", "data", *[f"draw {i}" for i in range(1, 5)], "mean", "sd", "|error|"]
    for row, x in zip((figure.axes[:9], figure.axes[9:]), (few, many), strict=True):
        assert [bool(ax.images) for ax in row] == [True] * (2 + len(x)) + [False] * (4 - len(x)) + [
            True
        ] * 3
        sd = x.std(0, correction=0 if len(x) == 1 else 1).mean(0)
        np.testing.assert_allclose(shown(row[7]), sd, atol=1e-6)
        error = (x.mean(0) - truth[0]).abs().mean(0)
        np.testing.assert_allclose(shown(row[8]), error, atol=1e-6)
        assert row[1].images[0].get_clim() == (0, 11)
    figure.canvas.draw()
    plt.close(figure)


def test_posterior_figure_of_one_method():
    figure = draw.posterior_figure(images(1), images(1), {"MMPS": images(6)})
    assert len(figure.axes) == 9
    plt.close(figure)


def test_shares_stand_at_their_pieces(ax):
    """Bins 3 and 4 are one piece, 8 another; what is off is red, and so is much elsewhere."""
    right = torch.tensor([0, 0, 0, 0.2, 0.2, 0, 0.004, 0, 0.596, 0])
    mass = torch.tensor([0.1, 0, 0, 0.19, 0.19, 0, 0, 0, 0.52, 0])
    draw.draw_pieces(ax, torch.randn(20, 2, generator=rng(0)), mass, right, "MMPS")
    assert su.roll_pieces(right) == [slice(3, 5), slice(8, 9)]
    labels = [(t.get_text(), t.get_color()) for t in ax.texts]
    assert labels == [("38", draw.BLACK), ("52", draw.RED)]
    assert ax.get_title() == "MMPS, 10 elsewhere"
    assert ax.title.get_color() == draw.RED
    places = torch.tensor([t.get_position() for t in ax.texts])
    middles = su.swiss_roll_curve(torch.tensor([0.4, 0.85]))
    gaps = (places - middles).norm(dim=1)
    torch.testing.assert_close(gaps, torch.full((2,), 0.4))


def test_maps_points_and_fields(ax):
    mix = su.IsotropicMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.1)
    draw.draw_density(ax, mix, 0.3, n=20, alpha=0.5)
    expected = mix.log_prob(draw.plane(n=20), 0.3).reshape(20, 20).T
    np.testing.assert_allclose(shown(ax), expected)
    draw.draw_points(ax, torch.randn(5, 2).requires_grad_())
    draw.draw_field(ax, su.Denoiser(su.MLP()), 0.5, color=draw.BLACK)
    draw.draw_map(ax, torch.randn(9).double().requires_grad_(), floor=None)


def test_a_map_ends_below_its_floor_and_arrows_point_to_the_data(ax):
    """Arrows are (D - z)/σ up to the length 1, times the grid's spacing 2 LIMIT / n."""
    values = torch.randn(9, generator=rng(1), dtype=torch.float64)
    draw.draw_map(ax, values, floor=1.5)
    top = float(values.max())
    assert ax.images[0].get_clim() == (pytest.approx(top - 1.5), pytest.approx(top))
    mix = su.IsotropicMixture(torch.tensor([[0.5, 0.0]]), 0.1)
    draw.draw_field(ax, mix, 2.0, n=6)
    z, (field,) = draw.plane(n=6), ax.collections
    arrows = (mix(z, 2.0) - z) / 2
    arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1) * 2 * draw.LIMIT / 6
    np.testing.assert_allclose(np.stack([field.U, field.V], axis=1), arrows, atol=1e-6)


def test_a_moving_picture_has_its_frames():
    draw.use_style()

    def frame(i):
        figure, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0, 1], [0, i])
        return figure

    with Image.open(io.BytesIO(draw.animated_png(frame, 3, milliseconds=50, hold=400))) as png:
        durations, pictures = [], []
        for k in range(png.n_frames):  # the first is for those who cannot show the others
            png.seek(k)
            durations.append(png.info.get("duration"))
            pictures.append(np.asarray(png.convert("RGB")))
    assert durations[1:] == [50, 50, 400]
    np.testing.assert_array_equal(pictures[0], pictures[-1])
    assert (pictures[1] != pictures[-1]).any()
    plt.rcdefaults()


def test_greys_of_a_moving_picture_stay_grey():
    """Beside many colours, in few: a grey band on white has no tint in the last frame."""

    def frame(i):
        figure, ax = plt.subplots(figsize=(4, 2))
        ax.set_axis_off()
        ax.axhspan(0.4, 0.6, color="#cccccc")
        ax.scatter(range(40), [i / 3] * 40, c=range(40), cmap="hsv", marker="o", s=30)
        ax.set(ylim=(-0.2, 1.2))
        return figure

    with Image.open(io.BytesIO(draw.animated_png(frame, 4))) as png:
        png.seek(png.n_frames - 1)
        image = np.asarray(png.convert("RGB")).astype(int)
    row = image[image.shape[0] // 2]
    assert (row == 0xCC).all(axis=1).mean() > 0.5
    assert (row.max(axis=1) - row.min(axis=1)).max() <= 3


def test_a_shown_figure_is_described_and_closed(capsys):
    figure = plt.figure(figsize=(1, 1))
    draw.show(figure, "nothing to see")
    assert "nothing to see" in capsys.readouterr().out
    assert not plt.fignum_exists(figure.number)


def test_bad_input_is_named(ax):
    three = su.IsotropicMixture(torch.zeros(1, 3), 1.0)
    x = images(2)
    for call, name in (
        (lambda: draw.draw_density(ax, three), "two-dimensional"),
        (lambda: draw.draw_field(ax, three, 0.5), "two-dimensional"),
        (lambda: draw.draw_field(ax, su.Denoiser(su.MLP(3)), 0.5), "two-dimensional"),
        (lambda: draw.draw_field(ax, su.Denoiser(su.MLP()), 0.0), "sigma"),
        (lambda: draw.draw_points(ax, torch.zeros(4, 3)), "x must have shape"),
        (lambda: draw.draw_map(ax, torch.zeros(4, 4)), "values must have shape"),
        (lambda: draw.draw_images(ax, x.expand(2, 2, 6, 5), 1), "images"),
        (lambda: draw.draw_images(ax, x[0], 1), "images"),
        (lambda: draw.draw_images(ax, x, 0), "columns"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    for call, name in (
        (lambda: draw.draw_images(ax, x.numpy(), 1), "x must be"),
        (lambda: draw.draw_points(ax, np.zeros((4, 2))), "x must be"),
        (lambda: draw.draw_map(ax, np.zeros(4)), "values must be"),
        (lambda: draw.draw_pieces(ax, x, np.ones(4) / 4, torch.ones(4), "MMPS"), "mass must be"),
        (lambda: draw.posterior_figure(x[:1].numpy(), None, {"a": x}), "truth must be"),
        (lambda: draw.posterior_figure(x[:1], None, {"a": x.numpy()}), r"results\['a'\] must be"),
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_shares_are_bars_of_the_first_and_marks_of_the_others(ax):
    shares = {"exact": torch.tensor([0.5, 0.04, 0.46]), "MMPS": torch.tensor([0.0, 1.0, 0.0])}
    shares["DPS"] = torch.tensor([0.3, 0.3, 0.4])
    draw.draw_shares(ax, shares)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], shares["exact"])
    for line, name in zip(ax.lines, ("MMPS", "DPS"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), shares[name])
        np.testing.assert_array_equal(np.round(line.get_xdata()), [0, 1, 2])
        assert line.get_color() == draw.look(name)["color"]
    assert (ax.lines[0].get_xdata() < ax.lines[1].get_xdata()).all()
    assert {t.get_text() for t in ax.get_legend().get_texts()} == set(shares)


def test_each_method_has_a_look_of_its_own():
    """Colour alone tells methods apart; samplers, which no figure mixes with them, likewise."""
    names = list(draw.LOOKS)
    methods = [name for name in names[: names.index("Euler–Maruyama")] if "Algorithm" not in name]
    for group in (methods, names[names.index("Euler–Maruyama") :]):
        looks = [draw.look(name) for name in group]
        assert len({look["color"] for look in looks}) == len(looks)
        assert len({look["marker"] for look in looks}) == len(looks)
    assert draw.RED not in [colour for colour, _, _ in draw.LOOKS.values()]
    with pytest.raises(ValueError, match=r"twisted SMC.*: 'SMC'"):
        draw.look("SMC")


def test_the_pipeline_lights_its_boxes(monkeypatch):
    shown = []
    monkeypatch.setattr(pipeline, "show", lambda figure, alt: shown.append(figure))
    pipeline.pipeline("data", "noise")
    texts = [t for t in shown[0].axes[0].texts if t.get_text()]
    assert len(texts) == len(pipeline.BOXES)
    lit = [t.get_text() for t in texts if t.get_color() == "white"]
    assert lit == ["data $x_0$", "noise $x_1$"]
    plt.close("all")


def test_the_scheme_of_the_network_is_the_network(monkeypatch):
    """Side and channels of each stage are those that a U-Net's layers put out, in their order."""
    net, seen = su.UNet(), [(28, 1)]
    for layer in net.modules():
        if layer in (net.first, net.last) or type(layer).__name__ == "ResidualBlock":
            layer.register_forward_hook(lambda *a: seen.append((a[2].shape[2], a[2].shape[1])))
    net(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    drawn = [stage[:2] for stage in pipeline.STAGES]
    changes = [a for a, b in zip(seen, [*seen[1:], None], strict=True) if a != b]
    named = ("$z$", "block", "block*", "blocks", "conv.")  # the others are no layers, or repeat one
    assert changes == [stage[:2] for stage in pipeline.STAGES if stage[2] in named]
    assert drawn[0] == drawn[-1] == (28, 1)
    shown = []
    monkeypatch.setattr(pipeline, "show", lambda figure, alt: shown.append((figure, alt)))
    pipeline.unet()
    boxes = shown[0][0].axes[0].patches
    assert [round(10 * box.get_height()) for box in boxes] == [side for side, _ in drawn]
    plt.close(shown[0][0])
