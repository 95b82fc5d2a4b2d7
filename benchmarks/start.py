"""What a short fit costs: the time to its first step, and ten seconds of work in each way of running it.

    python benchmarks/start.py --markdown docs/benchmarks/start.md

Every fit has a process of its own, held to two cores, with a compiler's cache that is empty at the first run and warm at the
second. The number of steps is what takes about `--seconds` in the eager tier. Times are wall times of `fit`, from the call.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _sides import MODELS, VAESize, pyro_programs, torch_rows

PROGRAMS = ("eight_schools", "radon", "vae_b20", "vae_b100", "b32_h32_z2")
HERE = Path(__file__).parent


def child(model, tier, steps):
    """One fit; says when its first steps ended and when all had."""
    import torch

    import pgen

    torch.set_num_threads(1)
    size = MODELS[model]
    program, guide, fetch = pyro_programs(size)
    data = torch_rows(size) if isinstance(size, VAESize) else fetch()
    guide = guide if isinstance(size, VAESize) else None

    class Clock:
        first = None

        def on_start(self, run): ...

        def on_validation(self, step, bound, std_error): ...

        def on_end(self, run): ...

        def on_log(self, step, metrics):
            self.first = self.first or (time.perf_counter() - began, step)

    clock = Clock()
    began = time.perf_counter()
    run = pgen.Pair(program, guide).fit(
        data, optimizer=pgen.training.Adam(1e-3), steps=steps, batch_size=size.batch, compile=tier, callbacks=[clock],
        progress=False,
    )  # fmt: skip
    total = time.perf_counter() - began
    print(json.dumps({"first": clock.first[0] / clock.first[1], "total": total, "tier": run.tier}), flush=True)


def fit(model, tier, steps, cache):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", model, tier, str(steps)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def libraries(cache):
    """Compiled libraries in a cache."""
    return len(list(Path(cache).rglob("*.so")))


def measure(model, seconds):
    with tempfile.TemporaryDirectory() as cache:
        trial = fit(model, "eager", 100, cache)
        steps = max(100, round(100 * seconds / trial["total"]))
        rows = {"eager": fit(model, "eager", steps, cache), "auto, first run": fit(model, "auto", steps, cache)}
        before = libraries(cache)
        rows["auto, second run"] = fit(model, "auto", steps, cache)
        return {"steps": steps, "rows": rows, "compiled_again": libraries(cache) - before}


def report(results, arguments):
    import torch

    lines = [
        "# What a short fit costs\n",
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, one thread; load at the start {os.getloadavg()[0]:.1f}.",
        f"`python benchmarks/start.py {' '.join(sys.argv[1:])}`\n",
        "Wall seconds of `fit`. The first step is what a person waits for before anything happens (after the imports). The",
        f"steps are those that take about {arguments.seconds:g} s in the eager tier.\n",
        "| program | steps | way | first step s | all steps s | of eager | tier at the end | compiled at the second run |",
        "|---|---:|---|---:|---:|---:|---|---:|",
    ]
    for model, result in results.items():
        eager = result["rows"]["eager"]["total"]
        for way, row in result["rows"].items():
            again = str(result["compiled_again"]) if "second" in way else ""
            times = f"{row['first']:.2f} | {row['total']:.2f} | {row['total'] / eager:.2f}"
            lines.append(f"| {model} | {result['steps']} | {way} | {times} | {row['tier']} | {again} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
    results = {model: measure(model, arguments.seconds) for model in arguments.models}
    text = report(results, arguments)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
