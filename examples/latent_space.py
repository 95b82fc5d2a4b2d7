"""Continuity and completeness: the latent space of an autoencoder beside that of a VAE with the same networks.

Both see scikit-learn's handwritten digits, binarised, through a code of two numbers, then of eight. A latent space is
*complete* where whatever is decoded looks like data, and *continuous* where a small step of the code is a small step of the
picture. Both are measured here in units of each model's own code (its standard deviation), which puts two spaces of different
scale side by side, and the autoencoder is given its best chance: codes drawn from a Gaussian fitted to its own.

What comes out at the defaults: with two numbers both spaces are crowded, and nearly all that is decoded is near real digits;
the autoencoder's has ledges 1.7 times as steep. With eight, the codes fill little of their box in both; out there the VAE
still decodes to something near a digit, the autoencoder often does not. The autoencoder reconstructs better, and its walks
between digits are no rougher. Run ``python examples/latent_space.py [--out demo/latent_space]``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Decoder = Callable[[Tensor], Tensor]
"""From codes ``(N, 2)`` to pictures ``(N, 8, 8)`` in [0, 1]."""

CONFIDENT = 0.9
"""A picture is taken for a digit where the classifier gives one class at least this probability."""


def decoders(autoencoder: pgen.models.Autoencoder, vae: pgen.models.VAE) -> dict[str, Decoder]:
    """What each model makes of a code: the decoder's output, and the mean of p(x | z)."""
    return {
        "autoencoder": torch.no_grad()(lambda z: autoencoder.decode(z).clamp(0.0, 1.0)),
        "VAE": torch.no_grad()(lambda z: vae.observation.distribution(vae.decoder(z)).mean),
    }


# --- what is measured ------------------------------------------------------------------------------------------------------


class Judge:
    """Two opinions on whether pictures look like digits, both formed on real training digits.

    A classifier may be sure of nonsense, so its confidence is joined by a distance: the nearest training picture should be no
    farther than that of 95 % of real held-out pictures (Euclidean, pixels).
    """

    def __init__(self, split: pgen.data.Split, labels: Tensor, seed: int) -> None:
        from sklearn.neighbors import NearestNeighbors
        from sklearn.neural_network import MLPClassifier

        train = split.train.flatten(1).numpy()
        self._classifier = MLPClassifier((128,), max_iter=1000, random_state=seed).fit(train, labels.numpy())
        self._neighbours = NearestNeighbors(n_neighbors=1).fit(train)
        self.limit = float(np.quantile(self._distance(split.validation.flatten(1).numpy()), 0.95))

    def _distance(self, x: np.ndarray) -> np.ndarray:
        return self._neighbours.kneighbors(x)[0][:, 0]

    def __call__(self, pictures: Tensor) -> tuple[float, float]:
        """Share that the classifier is confident of, and share that lies as near to real digits as real ones do."""
        x = pictures.round().flatten(1).numpy()
        confidence = self._classifier.predict_proba(x).max(1)
        return float((confidence >= CONFIDENT).mean()), float((self._distance(x) <= self.limit).mean())


def box(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of the smallest box that holds the middle 99 % of the codes along each axis."""
    low, high = codes.quantile(torch.tensor([0.005, 0.995]), dim=0)
    return low, high


def places(codes: Tensor, number: int, seed: int) -> dict[str, Tensor]:
    """Codes to decode: the prior of the VAE, a Gaussian fitted to the codes, anywhere in their box."""
    noise = torch.Generator().manual_seed(seed)
    normal, uniform = (draw(number, codes.shape[1], generator=noise) for draw in (torch.randn, torch.rand))
    low, high = box(codes)
    fitted = codes.mean(0) + normal @ torch.linalg.cholesky(codes.T.cov()).T
    return {"prior": normal, "fitted Gaussian": fitted, "code box": low + uniform * (high - low)}


def gap(codes: Tensor, number: int, seed: int) -> float:
    """Distance from a place in the box of the codes to the nearest code, in standard deviations: median over places."""
    there = places(codes, number, seed)["code box"]
    return float(torch.cdist(there / codes.std(0), codes / codes.std(0)).min(1).values.median())


def lattice(side: int) -> Tensor:
    """Points of [0, 1]^2 in rows from the top left, ``(side * side, 2)``."""
    ticks = torch.linspace(0.0, 1.0, side)
    y, x = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def walks(decode: Decoder, codes: Tensor, number: int, steps: int = 64, seed: int = 0) -> tuple[float, float]:
    """Walk straight between the codes of two random digits.

    Returns:
        The steepest place: the largest change of the picture (Euclidean, pixels) for one standard deviation of the code; and
        the concentration: the share of a walk's whole change that happens in the busiest tenth of it (a tenth if even). Means
        over the walks.
    """
    noise = torch.Generator().manual_seed(seed)
    start, end = (codes[torch.randperm(len(codes), generator=noise)[:number]] for _ in range(2))
    far = ((end - start) / codes.std(0)).norm(dim=1) > 0.5
    start, end = start[far], end[far]
    way = torch.linspace(0.0, 1.0, steps + 1)[:, None, None]
    path = start + way * (end - start)  # (steps + 1, walks, 2)
    pictures = decode(path.flatten(0, 1)).reshape(steps + 1, len(start), -1)
    change = pictures.diff(dim=0).norm(dim=-1)  # (steps, walks)
    length = ((end - start) / codes.std(0)).norm(dim=1) / steps
    busiest = change.sort(0, descending=True).values[: round(steps / 10)].sum(0) / change.sum(0).clamp_min(1e-12)
    return float((change.max(0).values / length).mean()), float(busiest.mean())


# --- pictures --------------------------------------------------------------------------------------------------------------


def mosaic(ax: Axes, pictures: Tensor, rows: int, columns: int, title: str) -> None:
    """Pictures side by side, a grey line between them."""
    framed = torch.nn.functional.pad(pictures, (0, 1, 0, 1), value=0.5)  # (rows * columns, 9, 9)
    tiles = framed.reshape(rows, columns, 9, 9).permute(0, 2, 1, 3).reshape(rows * 9, columns * 9)
    ax.imshow(tiles.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_axis_off()


def draw_grids(decode: dict[str, Decoder], codes: dict[str, Tensor], side: int = 16) -> Figure:
    """The box of the codes, decoded."""
    figure = Figure(figsize=(11.0, 5.8), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), decode):
        low, high = box(codes[name])
        mosaic(ax, decode[name](low + lattice(side) * (high - low)), side, side, f"{name}: its whole code box, decoded")
    return figure


def draw_codes(codes: dict[str, Tensor], labels: Tensor) -> Figure:
    """Where the held-out digits lie."""
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    for ax, (name, points) in zip(figure.subplots(1, 2), codes.items()):
        ax.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab10", s=9, linewidths=0)
        for digit in range(10):
            ax.annotate(str(digit), points[labels == digit].median(0).values.tolist(), weight="bold", ha="center", va="center")
        ax.set_title(f"{name}: codes of held-out digits", loc="left", fontsize=11)
        ax.set_xlabel("code 0")
        ax.set_ylabel("code 1")
    return figure


def draw_walks(decode: dict[str, Decoder], codes: dict[str, Tensor], pairs: Tensor, steps: int = 15) -> Figure:
    """Straight walks between the codes of the same pairs of held-out digits."""
    figure = Figure(figsize=(11.0, 0.42 * len(pairs) + 0.5), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), decode):
        start, end = codes[name][pairs[:, 0]], codes[name][pairs[:, 1]]
        path = start[:, None] + torch.linspace(0.0, 1.0, steps)[:, None] * (end - start)[:, None]
        mosaic(ax, decode[name](path.flatten(0, 1)), len(pairs), steps, f"{name}: from one digit to another")
    return figure


# --- the example -----------------------------------------------------------------------------------------------------------


def fit(
    x: pgen.data.Split, latent_dim: int, epochs: int, seed: int, progress: bool
) -> tuple[dict[str, Decoder], dict[str, Tensor]]:
    """Both models with one code size: their decoders, and the codes of the test digits."""
    autoencoder = pgen.models.Autoencoder((8, 8), latent_dim=latent_dim)
    vae = pgen.models.VAE((8, 8), latent_dim=latent_dim, likelihood="bernoulli")
    for model in (autoencoder, vae):
        model.fit(x.train, validation=x.validation, epochs=epochs, seed=seed, progress=progress)
    return decoders(autoencoder, vae), {"autoencoder": autoencoder.encode(x.test), "VAE": vae.encode(x.test)}


def measure(decode: Decoder, codes: Tensor, real: Tensor, judge: Judge, number: int, seed: int) -> dict[str, str]:
    """Every number of the table for one model, in words."""
    found = {}
    shares = {place: judge(decode(points)) for place, points in places(codes, number, seed).items()}
    for i, opinion in enumerate(OPINIONS):
        found |= {f"{opinion}, {place}": f"{share[i]:.0%}" for place, share in shares.items()}
    steepest, busiest = walks(decode, codes, min(number, len(codes)), seed=seed)
    error = (decode(codes) - real).flatten(1).square().sum(1).mean()
    return found | {
        "gap between codes (sd)": f"{gap(codes, number, seed):.2f}",
        "steepest place of a walk (pixels/sd)": f"{steepest:.1f}",
        "change in the busiest tenth of a walk": f"{busiest:.0%}",
        "price: squared error of a reconstruction": f"{float(error):.1f}",
    }


OPINIONS = ("classifier confident", "as near as real digits")


def main(
    out: str | Path = "demo/latent_space", *, epochs: int = 120, number: int = 1000, seed: int = 0, progress: bool = True
) -> list[Path]:
    """Fit both with two code sizes, print what is measured, draw three pictures; returns the files written."""
    began, console, out = time.perf_counter(), Console(highlight=False), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    x = pgen.data.digits(binarize=True)
    assert x.labels is not None
    judge = Judge(x, x.labels.train, seed)
    fitted = {latent_dim: fit(x, latent_dim, epochs, seed, progress) for latent_dim in (2, 8)}
    measured = {
        f"{name}, {latent_dim}": measure(decode[name], codes[name], x.test, judge, number, seed)
        for latent_dim, (decode, codes) in fitted.items()
        for name in decode
    }
    console.print(report(measured))
    console.print(f"\n[dim]of real held-out digits: {', '.join(f'{n} {s:.0%}' for n, s in zip(OPINIONS, judge(x.test)))}")
    decode, codes = fitted[2]
    pairs = torch.randperm(len(x.test), generator=torch.Generator().manual_seed(seed))[:16].reshape(8, 2)
    figures = {
        "grids": draw_grids(decode, codes),
        "codes": draw_codes(codes, x.labels.test),
        "walks": draw_walks(decode, codes, pairs),
    }
    files = [pgen.plots.save(figure, out / f"{name}.png") for name, figure in figures.items()]
    console.print(f"\npictures of the code of two numbers, in {time.perf_counter() - began:.0f} s:")
    for path in files:
        console.print(f"  {path}")
    return files


def report(measured: dict[str, dict[str, str]]) -> Table:
    """One row a measure, one column a model. An autoencoder has no prior, so that row is the VAE's alone."""
    table = Table("decoded from ...", box=None, pad_edge=False, header_style="dim")
    for name in measured:
        table.add_column(name.replace("autoencoder", "AE"), justify="right", no_wrap=True)
    for row in next(iter(measured.values())):
        table.add_row(
            row, *("" if row.endswith("prior") and "auto" in name else found[row] for name, found in measured.items())
        )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The latent spaces of an autoencoder and a VAE, side by side.")
    parser.add_argument("--out", default="demo/latent_space", help="folder for the pictures (default: demo/latent_space)")
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    main(parser.parse_args().out)
