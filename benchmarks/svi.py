"""CPU time of one SVI step on one core: Pyro, torch by hand, NumPyro and pgen, interleaved, beside the arithmetic floor.

    python benchmarks/svi.py --json svi.json --markdown docs/benchmarks/svi.md

Every side has a process of its own, held to the same core, and works only when asked: the sides take turns, `--repeats`
times, so that drift of the machine hits all alike. A turn lasts about `--seconds`. Building, capturing and compiling happen
before, and are reported apart. Fetching a shuffled batch by index from 10 000 resident rows belongs to the step. The
objective is the sampled ELBO with one draw everywhere, the optimizer Adam, in float32.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from _sides import MODELS, NOT_IN_NUMPYRO, PGEN_SIDES, SCAN, SCOREBOARD, SIDES, Program

HERE = Path(__file__).parent
PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "jaxlib", "pgen", "numpy")
REFERENCES = ("pyro", "torch by hand", "numpyro scan")
TITLES = {
    "eight_schools": "Eight schools, non-centred, mean-field guide",
    "radon": "Radon, 919 houses in 85 counties, non-centred, mean-field guide",
    "logistic": "Logistic regression, 10 000 x 50, mean-field guide",
    "nsf_density": "Neural spline flow (zuko) as a density, 8 features, batch 256",
    "vae_flow_guide": "VAE 784-200-200-50, tanh, batch 100, conditional flow guide (zuko)",
    "vae_b20": "VAE 784-200-200-50, tanh, batch 20",
    "vae_b100": "VAE 784-200-200-50, tanh, batch 100",
    "b32_h32_z2": "VAE 784-32-2, softplus, batch 32",
    "b128_h400_z10": "VAE 784-400-10, softplus, batch 128",
    "b256_h400_z50": "VAE 784-400-50, softplus, batch 256",
}


class Worker:
    """One side in its own process."""

    def __init__(self, side, model, core):
        self.side = side
        command = [sys.executable, str(HERE / "_sides.py"), side, model, str(core)]
        environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        ready = self.read()
        self.build_s, self.ops = ready["build_s"], ready["ops"]

    def read(self):
        """The side's next answer; anything else that a library prints is passed over."""
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
        raise RuntimeError(f"{self.side} ended with status {self.process.wait()}; its message is above")

    def turn(self, steps):
        """CPU and wall seconds a step."""
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        return answer["cpu"] / answer["steps"], answer["wall"] / answer["steps"]

    def steps_for(self, seconds):
        """How many steps fill a turn, a whole number of scans."""
        steps = SCAN
        while True:
            _, wall = self.turn(steps)
            if wall * steps > seconds / 4:
                return max(SCAN, round(seconds / wall / SCAN) * SCAN)
            steps *= 4

    def close(self):
        """The side's last words: the tier that ran, of a side of pgen."""
        last = self.process.communicate()[0].strip()
        return json.loads(last.splitlines()[-1]) if last.startswith("{") else {}


def available(side):
    package = {"numpyro": "numpyro", "pgen": "pgen"}.get(side.split()[0])
    if package is None or importlib.util.find_spec(package):
        return True
    print(f"{side}: left out, {package} is not installed (benchmarks/requirements.txt)")
    return False


def measure(model, sides, core, repeats, seconds):
    """{side: medians and minima over interleaved turns} of one model."""
    workers, turns, last = [], {}, {}
    try:
        for side in sides:
            if model in NOT_IN_NUMPYRO and side.startswith("numpyro"):
                continue
            workers.append(Worker(side, model, core))
        steps = {worker.side: worker.steps_for(seconds) for worker in workers}
        for _ in range(repeats):
            for worker in workers:
                turns.setdefault(worker.side, []).append(worker.turn(steps[worker.side]))
    finally:
        for worker in workers:
            last[worker.side] = worker.close()
    return {worker.side: summary(worker, turns[worker.side], steps[worker.side]) | last[worker.side] for worker in workers}


def summary(worker, turns, steps):
    cpu, wall = zip(*turns)
    return {
        "cpu_median_s": statistics.median(cpu),
        "cpu_min_s": min(cpu),
        "wall_median_s": statistics.median(wall),
        "wall_min_s": min(wall),
        "steps_a_turn": steps,
        "build_s": worker.build_s,
        "ops": worker.ops,
    }


def floor(model, core):
    """The floor of a plain VAE, measured in a process of its own; None for the other programs."""
    if isinstance(MODELS[model], Program):
        return None
    command = [sys.executable, str(HERE / "_floor.py"), model, str(core)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


# ---------------------------------------------------------------- report
def micro(seconds):
    return f"{seconds * 1e6:.3g}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def table(rows):
    """Markdown table of one model."""
    head = (
        "side",
        "CPU us a step, median",
        "min",
        "wall us, median",
        *(f"x {name}" for name in REFERENCES),
        "torch calls",
        "build s",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for side, row in rows.items():
        times = [micro(row[name]) for name in ("cpu_median_s", "cpu_min_s", "wall_median_s")]
        ratios = [f"{row['cpu_median_s'] / rows[r]['cpu_median_s']:.3g}" if r in rows else "-" for r in REFERENCES]
        calls = str(row["ops"]["calls"]) if row["ops"] else "-"
        lines.append("| " + " | ".join([side, *times, *ratios, calls, f"{row['build_s']:.1f}"]) + " |")
    return "\n".join(lines)


def floor_text(floor):
    """Two sentences on the floor of a VAE."""
    time_of = {name[:-2]: micro(value) for name, value in floor.items() if name.endswith("_s")}
    giga = {name: f"{value / 1e9:.0f}" for name, value in floor.items()}
    return (
        f"Floor {time_of['floor']} us: {floor['flops'] / 1e6:.1f} MFLOP of matrix products at the core's best rate, "
        f"{time_of['gemm_at_peak']} us, and {floor['adam_bytes'] / 1e6:.1f} MB of Adam's traffic at {giga['bandwidth']} GB/s, "
        f"{time_of['adam']} us.\nWith the faster kernel for each product's shape the products take {time_of['gemm_best']} us "
        f"(all by torch.mm {time_of['gemm_mm']}, all by oneDNN {time_of['gemm_onednn']}): today's kernels reach "
        f"{time_of['reachable']} us.\nGFLOP/s: 1024 square, torch.mm {giga['mm_1024']}, oneDNN {giga['onednn_1024']}; "
        f"median over this model's shapes {giga['mm_at_shapes_median']} and {giga['onednn_at_shapes_median']}."
    )


def ops_text(rows):
    """What a step of eight schools consists of, a site (mu, tau, theta_raw, y)."""
    counts = [(side, row["ops"]) for side, row in rows.items() if row["ops"]]
    parts = [f"{side} {ops['calls'] / 4:.0f} calls, {ops['elements'] / 4:.0f} numbers" for side, ops in counts]
    return f"A step has four sites; torch calls and numbers computed a site: {'; '.join(parts)}. All is overhead."


def tier_text(rows):
    """What the sides of pgen said about their tier, where it is not what was asked for or not its fastest form."""
    told = [(side, row) for side, row in rows.items() if row.get("reason") not in (None, "", "as asked")]
    return "".join(f"{side} ran in the {row['tier']} tier: {row['reason']}.\n" for side, row in told)


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def environment(arguments):
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores_of_machine": os.cpu_count(),
        "core_used": arguments.core,
        "threads": 1,
        "python": platform.python_version(),
        "versions": versions,
        "command": "python benchmarks/svi.py " + " ".join(sys.argv[1:]),
        "repeats": arguments.repeats,
        "seconds_a_turn": arguments.seconds,
        "load_at_start": os.getloadavg()[0],
    }


PREFACE = """# CPU time of one SVI step

{date}, {cpu}, one thread on one core; Python {python}, {packages}.
`{command}`

One process a side, all held to the same core, taking turns: {repeats} turns of about {seconds_a_turn} s each. CPU time is the
process's own, all its threads. "x NAME" is the ratio of CPU medians to NAME's: below 1 is faster.

- The step: fetch a shuffled batch by index from 10 000 resident rows (the VAEs), the sampled ELBO with one draw (not the
  closed-form KL), gradients, Adam; float32.
- pyro: `SVI.step`, `Trace_ELBO`, `pyro.optim.Adam`, validation on, which is its default, and off.
- torch by hand: an eager loop with `torch.optim.Adam(fused=True)`.
- numpyro: `jax.jit` of `svi.update`, and `lax.scan` over {scan} of them.
- pgen: `fit`, its loop, row order and logging included.
- torch calls: calls that reach a torch kernel in one step. Build: CPU time from the first import to the end of the first
  {scan} steps, capturing and compiling included (of the C++ compiler, which runs in processes of its own, only the waiting).
- The two flows: zuko's, in eager Pyro, by hand, and the same programs in pgen; there is no NumPyro side.
- Floor: its two parts add, because on one thread Adam starts when the gradients are finished and kernels run one after the
  other. A program that hid the traffic behind the arithmetic could at best reach the larger of the two.
"""


def report(result):
    facts = result["environment"]
    parts = [PREFACE.format(packages=", ".join(f"{k} {v}" for k, v in facts["versions"].items()), scan=SCAN, **facts)]
    for model, entry in result["models"].items():
        parts += [f"## {TITLES[model]}\n", table(entry["sides"]) + "\n"]
        parts.append(tier_text(entry["sides"]))
        if entry["floor"] or model == "eight_schools":
            parts.append((floor_text(entry["floor"]) if entry["floor"] else ops_text(entry["sides"])) + "\n")
    return "\n".join(part for part in parts if part)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name not in SCOREBOARD])
    parser.add_argument("--scoreboard", action="store_true", help="add the three softplus sizes")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *PGEN_SIDES], default=[*SIDES, *PGEN_SIDES])
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args()


def main():
    arguments = parse()
    result = {"environment": environment(arguments), "models": {}}
    sides = [side for side in arguments.sides if available(side)]
    for model in [*arguments.models, *(SCOREBOARD if arguments.scoreboard else ())]:
        print(f"{model} ...", file=sys.stderr, flush=True)
        rows = measure(model, sides, arguments.core, arguments.repeats, arguments.seconds)
        result["models"][model] = {"sides": rows, "floor": floor(model, arguments.core)}
    text = report(result)
    print(text)
    for path, content in ((arguments.json, json.dumps(result, indent=1) + "\n"), (arguments.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


if __name__ == "__main__":
    main()
