"""Figures as PNG outputs of a notebook: still or moving, described, and played by any page."""

import io
from base64 import b64encode
from collections.abc import Callable

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from . import _check as check

Draw = Callable[[int], Figure]


def pixels(figure: Figure, dpi: int) -> Image.Image:
    """The figure as an image; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def display_png(png: bytes, alt: str, **size: int) -> None:
    """Display a PNG with its description, `width` and `height` in pixels of the page."""
    bundle = {"image/png": b64encode(png).decode(), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt} | size})


def show(figure: Figure, alt: str, dpi: int = 130) -> None:
    """Display a figure with its description `alt`, and close it.

    As a PNG of 256 colours, dpi to the inch, shown at 100: sharp on fine screens, and small.
    """
    buffer, image = io.BytesIO(), pixels(figure, dpi)
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(buffer, format="PNG", optimize=True)
    size = {"width": round(100 * image.width / dpi), "height": round(100 * image.height / dpi)}
    display_png(buffer.getvalue(), alt, **size)


def animated_png(
    draw: Draw, frames: int, milliseconds: int = 120, dpi: int = 85, hold: int = 1500
) -> bytes:
    """draw(0), ..., draw(frames - 1) as an animated PNG; the last stays for `hold` milliseconds.

    Where nothing moves the last is shown.
    """
    images = [pixels(draw(i), dpi) for i in range(check.count("frames", frames))]
    sheet = Image.new("RGB", (images[0].width, 3 * images[0].height))  # the palette is theirs
    for i, image in enumerate((images[0], images[frames // 2], images[-1])):
        sheet.paste(image, (0, i * image.height))
    palette = sheet.quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    every = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times, buffer = [milliseconds] * (frames - 1) + [hold], io.BytesIO()
    moving = {"save_all": True, "append_images": every, "duration": times, "loop": 0}
    every[-1].save(buffer, format="PNG", optimize=True, default_image=True, **moving)
    return buffer.getvalue()


def animate(draw: Draw, frames: int, alt: str) -> None:
    """Display `animated_png(draw, frames)` with its description `alt`."""
    display_png(animated_png(draw, frames), alt)
