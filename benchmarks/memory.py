r"""Is memory flat over many steps, for every objective? Growth from a tenth of the steps to the last, history included.

python benchmarks/memory.py                        # 20 000 steps each
python benchmarks/memory.py --steps 5000 --tier eager
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

import pgen

OBJECTIVES: dict[str, Any] = {
    "ELBO()": pgen.ELBO(),
    "ELBO(5)": pgen.ELBO(5),
    "IWAE(5)": pgen.IWAE(5),
    "DReG(5)": pgen.objectives.DReG(5),
    "Renyi(5)": pgen.objectives.Renyi(5),
    "VIMCO(5)": pgen.objectives.VIMCO(5),
}


class Watch(pgen.training.Callback):
    """Live tensors and resident bytes, from a step on."""

    def __init__(self, start: int) -> None:
        self.start, self.seen = start, []

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """The first look."""
        if step >= self.start and not self.seen:
            self.seen.append(look())


def look() -> tuple[int, int]:
    """Live tensors, resident bytes."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return tensors, int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--tier", default="graph")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    missing = {name for name in pgen.objectives.__all__ if hasattr(getattr(pgen.objectives, name), "rows")}
    missing -= {type(objective).__name__ for objective in OBJECTIVES.values()} | {"Objective"}
    if missing:
        raise SystemExit(f"objectives without a row in this table: {', '.join(sorted(missing))}")
    x = pgen.data.digits(binarize=True).train
    print("| objective | steps | tier | live tensors | resident memory | of which history | bytes of history a step |")
    print("|---|---|---|---|---|---|---|")
    for name, objective in OBJECTIVES.items():
        model, watch = pgen.models.VAE((8, 8), latent_dim=4, hidden=(16,)), Watch(arguments.steps // 10)
        run = model.fit(
            x, steps=arguments.steps, batch_size=20, objective=objective, compile=arguments.tier, progress=False,
            callbacks=[watch],
        )  # fmt: skip
        (tensors, resident), (tensors_after, resident_after) = watch.seen[0], look()
        history = sum(column.nbytes for column in run.history.values())
        cells = (
            name, run.steps, run.tier, f"{tensors_after - tensors:+d}", f"{(resident_after - resident) / 1e6:+.1f} MB",
            f"{history / 1e6:.1f} MB", history // run.steps,
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
