r"""Does a run survive ``kill -9``? Kill it at random moments and inside saves, resume it, compare the last parameters.

    python benchmarks/kills.py            # about five minutes on an idle core
    python benchmarks/kills.py --kills 4  # a short look

Small runs: a VAE on the handwritten digits, a checkpoint every five steps, killed at moments drawn uniformly from the training
and resumed by the same call until it ends. Large run: a network whose checkpoint has 120 MB, killed while a temporary file
lies in its folder. A run passes if its final parameters are bit for bit those of the run that nobody killed. Besides: the
most checkpoints and temporary files found after a kill, and what is left in the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["main"]

SHARES = {"eager": 1.0, "graph": 0.5, "compiled": 0.25}
"""Of the kills, by tier: a compiled run takes longer to start."""
SMALL = {"hidden": (64,), "steps": 1500, "checkpoint_every": 5}
LARGE = {"hidden": (2200, 2200), "steps": 14, "checkpoint_every": 1}


def train(folder: Path, tier: str, size: str) -> None:
    """What is killed: one fit that resumes where it can, and writes its parameters when it is done."""
    import torch

    import pgen

    torch.set_num_threads(1)

    class Ready(pgen.training.Callback):
        """Says that training has begun."""

        def on_log(self, step: int, metrics: dict[str, float]) -> None:
            """At the first block."""
            if os.environ.pop("PGEN_SAY_READY", ""):
                print("ready", flush=True)

    options = SMALL if size == "small" else LARGE
    x = pgen.data.digits(binarize=True).train
    model = pgen.models.VAE((8, 8), latent_dim=4, hidden=options["hidden"], likelihood="bernoulli")
    run = model.fit(
        x, steps=options["steps"], batch_size=50, seed=3, compile=tier, ema=0.99, progress=False,
        unroll=2 if tier == "compiled" else None, checkpoint=folder, checkpoint_every=options["checkpoint_every"],
        callbacks=[Ready()],
    )  # fmt: skip
    bits = torch.cat([value.detach().double().reshape(-1) for value in model.state_dict().values()])
    (folder / "bits").write_bytes(bits.numpy().tobytes())
    print("done", run.resumed, flush=True)


@dataclass
class Outcome:
    """One run that was killed again and again."""

    kills: int = 0
    in_saves: int = 0
    resumed: list[int] = field(default_factory=list)
    generations: int = 0
    litter: int = 0
    failures: list[str] = field(default_factory=list)


def start(folder: Path, tier: str, size: str) -> subprocess.Popen[str]:
    """A training process that has begun to train, or has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PGEN_SAY_READY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", str(folder), tier, size]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def saving(folder: Path) -> bool:
    """Whether a save is under way."""
    return any(folder.glob("checkpoint*.tmp")) or any(folder.glob("checkpoint.new"))


def whole(folder: Path, tier: str, size: str) -> tuple[bytes, float]:
    """Final bits of the run that nobody kills, and the seconds that it trained."""
    process = start(folder, tier, size)
    began = time.perf_counter()
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err)
    return (folder / "bits").read_bytes(), time.perf_counter() - began


def kill(process: subprocess.Popen[str], folder: Path, delay: float, saves: int) -> bool | None:
    """Kill after a while, or a while into a later save: whether a save was under way, None if training had ended."""
    for _ in range(saves):
        for wanted in (False, True):
            while saving(folder) != wanted and process.poll() is None:
                time.sleep(0.0005)
    time.sleep(delay)
    was_saving = saving(folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return was_saving if process.returncode == -signal.SIGKILL else None


def attack(folder: Path, tier: str, size: str, kills: int, seconds: float, choose: random.Random) -> Outcome:
    """Kill one run until it has been killed often enough or has ended, then let it end."""
    outcome = Outcome()
    while outcome.kills < kills:
        process = start(folder, tier, size)
        delay = choose.uniform(0.0, 0.4) if size == "large" else choose.uniform(0.0, 1.5 * seconds / kills)
        was_saving = kill(process, folder, delay, saves=choose.randint(1, 4) if size == "large" else 0)
        if was_saving is None:
            break
        outcome.kills += 1
        outcome.in_saves += was_saving
        outcome.generations = max(outcome.generations, len(list(folder.glob("checkpoint*.pgen"))))
        outcome.litter = max(outcome.litter, len(list(folder.glob("*.tmp"))))
    process = start(folder, tier, size)
    out, err = process.communicate()
    if process.returncode:
        outcome.failures.append(err.strip().splitlines()[-1])
    outcome.resumed += [int(word) for line in out.splitlines() if line.startswith("done") for word in line.split()[1:]]
    return outcome


def row(folder: Path, tier: str, size: str, kills: int, choose: random.Random) -> str:
    """One line of the table: as many killed runs as it takes to reach the number of kills."""
    bits, seconds = whole(folder / "whole", tier, size)
    done, in_saves, runs, same, generations, litter, left, failures = 0, 0, 0, 0, 0, 0, 0, []
    while done < kills and runs < 10:
        place = folder / f"killed{runs}"
        outcome = attack(place, tier, size, kills - done, seconds, choose)
        done, in_saves, runs = done + outcome.kills, in_saves + outcome.in_saves, runs + 1
        same += (place / "bits").exists() and (place / "bits").read_bytes() == bits
        generations, litter = max(generations, outcome.generations), max(litter, outcome.litter)
        left = max(
            left, len([p for p in place.iterdir() if p.name not in ("bits", "checkpoint.pgen", "checkpoint-before.pgen")])
        )
        failures += outcome.failures
    megabytes = (folder / "whole" / "checkpoint.pgen").stat().st_size / 2**20
    cells = (
        size,
        tier,
        f"{megabytes:.1f} MB",
        done,
        in_saves,
        f"{same} of {runs}",
        generations,
        litter,
        left,
        "; ".join(failures) or "none",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the eager run; others have fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "TIER", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(Path(arguments.child[0]), *arguments.child[1:])
        return
    choose = random.Random(arguments.seed)
    header = ("run", "tier", "checkpoint", "kills", "in a save", "runs with the same bits", "generations", "temporary files",
              "files left over at the end", "failures")  # fmt: skip
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    with tempfile.TemporaryDirectory() as folder:
        for tier, share in SHARES.items():
            print(row(Path(folder) / tier, tier, "small", round(arguments.kills * share), choose), flush=True)
        print(row(Path(folder) / "large", "eager", "large", max(1, arguments.kills * 3 // 5), choose), flush=True)


if __name__ == "__main__":
    main()
