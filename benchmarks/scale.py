"""Data larger than memory, and several processes: what they cost, and whether they train the same.

`python benchmarks/scale.py --folder /tmp/scale --markdown docs/benchmarks/scale.md` writes a file of 2 GB to the folder, runs
everything in processes of its own, and prints the tables.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

DATE = "2026-11-21"
MACHINE = "2 cores of an AMD EPYC"
SIZES = {  # event, hidden, latent, batch, rows, steps
    "VAE 784-200-200-50, batch 100": (784, (200, 200), 50, 100, 60_000, 1000),
    "VAE 10-16-2, batch 100": (10, (16,), 2, 100, 200_000, 12_000),
}


def model(name):
    """The VAE of a size."""
    import pgen

    event, hidden, latent, *_ = SIZES[name]
    return pgen.models.VAE((event,), latent, hidden, likelihood="gaussian", activation="tanh", seed=0)


def rows(path, count, width):
    """A file of standard normal numbers, written in parts."""
    import numpy as np

    if not path.exists():
        out = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
        part = np.random.default_rng(0).standard_normal((10_000, width), dtype=np.float32)
        for start in range(0, count, len(part)):
            out[start : start + len(part)] = part[: count - start] + np.float32(start / count)
    return path


def anonymous_megabytes():
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def clock():
    """A callback that notes steps, wall and CPU time (of all threads), and memory, and its notes."""
    import pgen

    notes = []

    class Clock(pgen.training.Callback):
        """Notes at each block."""

        def on_log(self, step, metrics):
            notes.append((step, time.perf_counter(), time.process_time(), anonymous_megabytes()))

    return Clock(), notes


def cost(notes, total):
    """Wall and CPU microseconds a step over the second half of a run."""
    tail = [n for n in notes if n[0] >= total / 2]
    (s0, w0, c0, _), (s1, w1, c1, _) = tail[0], tail[-1]
    return (w1 - w0) / (s1 - s0) * 1e6, (c1 - c0) / (s1 - s0) * 1e6


def feeding(folder, name, tier, kind):
    """One fit on resident rows or on a source; printed as JSON."""
    import numpy as np
    import torch

    import pgen

    torch.set_num_threads(1)
    event, _, _, batch, count, steps = SIZES[name]
    path = rows(folder / f"{event}.npy", count, event)
    if kind == "resident":
        data = torch.from_numpy(np.load(path))
    elif kind == "memory map":
        data = pgen.data.MemoryMapped(path)
    else:
        data = pgen.data.Parquet(parquet(folder, path, event))
    callback, notes = clock()
    run = model(name).fit(data, steps=steps, batch_size=batch, compile=tier, callbacks=[callback], progress=False)
    wall, cpu = cost(notes, steps)
    print(json.dumps({"wall": wall, "cpu": cpu, "loss": float(run.history["loss"][-100:].mean()), "tier": run.tier}))


def parquet(folder, path, event):
    """The same rows as a Parquet file with row groups of 5000."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet as writer

    target = folder / f"{event}.parquet"
    if not target.exists():
        array = np.load(path, mmap_mode="r")
        table = pyarrow.table({f"x{i}": np.ascontiguousarray(array[:, i]) for i in range(event)})
        writer.write_table(table, target, row_group_size=5000)
    return target


def memory(folder):
    """2000 steps on 2 GB; the growth of memory that is no file's."""
    import torch

    import pgen

    torch.set_num_threads(1)
    source = pgen.data.MemoryMapped(rows(folder / "big.npy", 640_000, 784))
    callback, notes = clock()
    before = anonymous_megabytes()
    model("VAE 784-200-200-50, batch 100").fit(
        source, steps=2000, batch_size=320, compile="graph", callbacks=[callback], progress=False
    )
    late = [n[3] for n in notes if n[0] >= 200]
    print(json.dumps({"growth": max(n[3] for n in notes) - before, "late": late[-1] - late[0]}))


def processes(folder, out, exact):
    """What torchrun starts: 100 steps in 4 micro-batches."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    name = "VAE 784-200-200-50, batch 100"
    data = torch.from_numpy(np.load(rows(folder / "784.npy", 60_000, 784))[:20_000])
    callback, notes = clock()
    vae = model(name)
    run = vae.fit(
        data, steps=100, batch_size=400, compile="graph", deterministic=exact == "exact", micro_batches=4, callbacks=[callback],
        progress=False,
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        state = torch.cat([t.double().reshape(-1) for t in vae.state_dict().values()])
        np.savez(out, loss=run.history["loss"], state=state.numpy(), cost=cost(notes, 100), tier=run.tier)


# --- tables --------------------------------------------------------------------------------------------------------------


def ask(*arguments, launcher=()):
    """Run this script's part in a process of its own."""
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.strip().split("\n")[-1]


def feeding_table(folder, repeats):
    """Cost of a step by where the rows are: the least of some turns, taken in turn."""
    yield "| model | tier | rows | wall us a step | CPU us a step | wall x resident | CPU x resident |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for name in SIZES:
        kinds = ["resident", "memory map", "Parquet"] if "10-16" in name else ["resident", "memory map"]
        for tier in ("graph", "compiled"):
            found = {kind: [] for kind in kinds}
            for _ in range(repeats):
                for kind in kinds:
                    found[kind].append(json.loads(ask("feeding", folder, name, tier, kind)))
            best = {kind: (min(f["wall"] for f in runs), min(f["cpu"] for f in runs)) for kind, runs in found.items()}
            for kind, (wall, cpu) in best.items():
                wall0, cpu0 = best["resident"]
                yield f"| {name} | {tier} | {kind} | {wall:.0f} | {cpu:.0f} | {wall / wall0:.2f} | {cpu / cpu0:.2f} |"


def process_table(folder):
    """One, two and four processes on one machine."""
    import numpy as np

    yield "| mode | processes | wall ms a step | its CPU ms a step | largest relative change of loss | parameters |"
    yield "|---|---:|---:|---:|---:|---|"
    for mode in ("fast", "exact"):
        first = None
        for world in (1, 2, 4):
            out = folder / f"{mode}-{world}.npz"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
            ask("processes", folder, out, mode, launcher=launcher)
            with np.load(out) as result:
                now = dict(result)
            first = first or now
            difference = float(np.max(np.abs(now["loss"] / first["loss"] - 1)))
            same = "the same bits" if np.array_equal(now["state"], first["state"]) else "equal to rounding"
            wall, cpu = now["cost"] / 1e3
            yield f"| {mode} | {world} | {wall:.1f} | {cpu:.1f} | {difference:.1e} | {same if world > 1 else '-'} |"


def page(folder, repeats):
    """The whole report."""
    import torch

    load = os.getloadavg()[0]
    yield "# Data larger than memory, and several processes"
    yield ""
    python = platform.python_version().rsplit(".", 1)[0]
    yield f"{DATE}, {MACHINE}, torch {torch.__version__.split('+')[0]} CPU, Python {python}, one thread a process."
    yield "`python benchmarks/scale.py --folder FOLDER --markdown docs/benchmarks/scale.md`"
    yield ""
    yield f"Other jobs ran beside it (load average {load:.1f} on 2 cores at the start), so wall times say little; CPU times"
    yield f"include the thread that fetches rows. Each cost is the least of {repeats} runs, over the second half of the steps."
    yield ""
    yield "## Rows from a file, against the same rows in memory"
    yield ""
    yield from feeding_table(folder, repeats)
    yield ""
    grown = json.loads(ask("memory", folder))
    yield "## Memory"
    yield ""
    yield "2000 steps of 320 random rows of a 2 GB file (640 000 x 784): memory that is no file's grew by"
    yield f"{grown['growth']:.0f} MB in all, capture and optimizer included, and by {grown['late']:.0f} MB after step 200."
    yield ""
    yield "## One, two and four processes, gloo, one script under torchrun"
    yield ""
    yield "VAE 784-200-200-50, 100 steps of 400 rows in 4 micro-batches, graph tier; 2 cores, so four processes share them."
    yield "`fast` adds gradients in one all-reduce, `exact` (`deterministic=True`) gathers and adds them in one order."
    yield ""
    yield from process_table(folder)


def main():
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in page(options.folder, options.repeats):
        print(line, flush=True)
        lines.append(line)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


PARTS = {"feeding": feeding, "memory": memory, "processes": processes}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in PARTS:
        part, folder, *rest = sys.argv[1:]
        PARTS[part](Path(folder), *rest)
    else:
        main()
