"""A learned sampler replaces a hand-written procedural generator, and two-sample tests say whether anybody would notice.

    python examples/river_paths.py --out rivers   # about a minute on one core; with --quick ten seconds

The procedure draws river courses as polylines of 24 steps of one length: a heading that swings like a meander (Langbein and
Leopold 1966, the sine-generated curve) plus noise that remembers itself, and every river that leaves its valley is drawn anew.
The models see headings alone, and know nothing of meanders or valleys; the rule of the valley is kept on top. Held-out
likelihood ranks them; the two-sample tests say what likelihood cannot: whether new rivers can be told from the procedure's.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pgen
from pgen.evaluation.samples import SampleReport, classifier_test, evaluate

STEPS, VALLEY = 24, 3.0
RANGES = ((0.4, 1.5), (7.0, 14.0), (0.0, 2 * math.pi))
"""Of the swing in radians, the wave's length in steps, and its phase."""


def rivers(n: int, seed: int) -> Tensor:
    """The hand-written generator: headings in radians, ``(n, 24)``; a river that leaves the valley is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    while sum(map(len, kept)) < n:
        swing, wave, phase = (low + (high - low) * torch.rand(2 * n, 1, generator=generator) for low, high in RANGES)
        noise = 0.12 * torch.randn(2 * n, STEPS, generator=generator)
        for step in range(1, STEPS):
            noise[:, step] += 0.8 * noise[:, step - 1]
        heading = swing * torch.sin(2 * math.pi * torch.arange(STEPS) / wave + phase) + noise
        kept.append(heading[in_valley(heading)])
    return torch.cat(kept)[:n]


def course(heading: Tensor) -> Tensor:
    """The polyline from the source, ``(n, 25, 2)``, in steps."""
    path = torch.stack([heading.cos(), heading.sin()], -1).cumsum(1)
    return torch.cat([torch.zeros(len(path), 1, 2), path], 1)


def in_valley(heading: Tensor) -> Tensor:
    """Which rivers keep to the valley."""
    return course(heading)[..., 1].abs().amax(1) < VALLEY


def sampled(model: pgen.models.GaussianMixture | pgen.models.MADE, n: int) -> tuple[Tensor, float]:
    """Rivers of a model that keep to the valley, and the share of those that it draws."""
    new = model.sample(2 * n, seed=3)
    inside = in_valley(new)
    return new[inside][:n], float(inside.double().mean())


def draw(panels: dict[str, Tensor]) -> Figure:
    """Ten courses of each kind, one below the other, the valleys' sides dashed."""
    figure = Figure(figsize=(4.6 * len(panels), 6.4), layout="constrained")
    for ax, (name, heading) in zip(figure.subplots(1, len(panels)), panels.items()):
        for row, line in enumerate(course(heading[:10])):
            ax.plot(line[:, 0], line[:, 1] - 7 * row, color="#0072b2", linewidth=1.6)
            for side in (-VALLEY, VALLEY):
                ax.axhline(side - 7 * row, color="#8a8a8a", linewidth=0.5, linestyle="--")
        ax.set(xlim=(-2, 25), xticks=[], yticks=[], title=name, frame_on=False)
    return figure


def main(
    out: Path, paths: int = 20_000, components: int = 100, steps: int = 1500, judged: int = 1000, progress: bool = True
) -> tuple[dict[str, SampleReport], Path]:
    """Learn, rank, judge, draw; returns the reports by name and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    train, validation, real = rivers(paths, 0), rivers(max(paths // 10, 100), 1), rivers(judged, 2)
    made: dict[str, pgen.models.GaussianMixture | pgen.models.MADE] = {
        f"mixture of {components} Gaussians": pgen.models.GaussianMixture((STEPS,), components),
        "autoregressive (MADE)": pgen.models.MADE((STEPS,), (256, 256), likelihood="gaussian_mixture", num_components=5),
    }
    for name, model in made.items():
        options = {"steps": steps, "batch_size": 256} if "MADE" in name else {}
        run = model.fit(train, validation=validation, progress=progress, **options)
        print(f"{name}: fitted in {run.seconds:.0f} s")
    print(pgen.compare(made, real, progress=progress))
    reports, panels = {}, {"the procedure": real}
    for name, model in made.items():
        new, share = sampled(model, judged)
        panels[name], reports[name] = new, evaluate(new, real, train=train, progress=progress)
        print(
            f"\n{name}: {100 * share:.0f} % of its rivers keep to the valley; those that do not are drawn anew\n{reports[name]}"
        )
        print(f"the courses in place of headings: {classifier_test(course(new), course(real), progress=progress)}")
    picture = out / "rivers.png"
    draw(panels).savefig(picture, dpi=150)
    return reports, picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rivers"))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    small = {"paths": 2000, "components": 20, "steps": 200, "judged": 200} if options.quick else {}
    _, picture = main(options.out, **small)
    print(f"\nwritten: {picture}")
