"""Digits, one pixel after another: a PixelCNN draws new ones, finishes half-given ones, and fills in what is missing.

    python examples/pixels.py            # about a minute; one picture in demo/pixels

A density that is a product of conditionals answers three questions at once: how probable is this image (exactly), what comes
next, and what goes where something is missing. Finishing an image whose first rows are given is exact; where pixels are missing
in the middle, a particle filter weighs what was drawn by how well it goes with what comes later.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pgen

ROWS = 8  # digits in a picture, twice as many columns of them


def mosaic(images: Tensor, columns: int) -> Tensor:
    """Images side by side, a grey line between them; NaN stays NaN."""
    framed = torch.nn.functional.pad(images.float(), (0, 1, 0, 1), value=0.5)
    height, width = framed.shape[1:]
    return framed.reshape(-1, columns, height, width).permute(0, 2, 1, 3).reshape(-1, columns * width)


def draw(panels: dict[str, Tensor], columns: int) -> Figure:
    """Mosaics with titles; missing pixels are blue."""
    import matplotlib

    figure = Figure(figsize=(3.0 * len(panels), 3.6), layout="constrained")
    colours = matplotlib.colormaps["gray"].with_extremes(bad="steelblue")
    for axes, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(mosaic(images, columns).numpy(), cmap=colours, vmin=0, vmax=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_axis_off()
    return figure


def main(
    out: str | Path = "demo/pixels", *, epochs: int = 40, channels: int = 32, seed: int = 0, progress: bool = True
) -> list[Path]:
    """Fit, print exact likelihoods, draw; returns the files written."""
    x = pgen.data.digits(binarize=True)
    model = pgen.models.PixelCNN((8, 8), channels, layers=4, dropout=0.3, seed=seed)
    run = model.fit(x.train, validation=x.validation, epochs=epochs, seed=seed, progress=progress)
    print(run)
    score = model.log_prob(x.test, progress=progress)
    pixels = x.train.flatten(1).mean(0).clamp(0.001, 0.999)
    apart = torch.distributions.Bernoulli(pixels).log_prob(x.test.flatten(1)).sum(1).mean()
    print(f"test digits: {score} (independent pixels: {float(apart):.2f} nats)")

    given = x.test[:ROWS]
    half = given.clone()
    half[:, 4:] = float("nan")
    finished = model.complete(given.flatten(1)[:, :32].repeat_interleave(ROWS, 0), seed=seed, progress=progress)
    holes = given.clone()
    holes[:, 2:6, 2:6] = float("nan")
    filled = model.infill(holes.repeat_interleave(ROWS, 0), num_particles=32, seed=seed, progress=progress)
    panels = {
        "new": model.sample(ROWS * ROWS, seed=seed, progress=progress),
        "upper half given (first column)": torch.cat([half[:, None], finished.reshape(ROWS, ROWS, 8, 8)], 1)[:, :ROWS].flatten(
            0, 1
        ),
        "middle missing (first column)": torch.cat([holes[:, None], filled.reshape(ROWS, ROWS, 8, 8)], 1)[:, :ROWS].flatten(
            0, 1
        ),
    }
    sure = model.next(given.flatten(1)[:, :32]).probs
    print(f"P(pixel 33 is on | the 32 before), digit by digit: {', '.join(f'{p:.2f}' for p in sure.tolist())}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = [pgen.plots.save(draw(panels, ROWS), out / "pixels.png")]
    print(f"picture: {files[0]}")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Digits, one pixel after another.")
    parser.add_argument("--out", default="demo/pixels", help="folder for the picture (default: demo/pixels)")
    torch.set_num_threads(1)
    main(parser.parse_args().out)
