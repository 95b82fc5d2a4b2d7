"""The arithmetic floor of one training step of a VAE of `_sides.py`, measured on one core.

Matrix products by formula at measured rates, and Adam's traffic at measured bandwidth. `python _floor.py vae_b20 0` prints
one JSON object; times in seconds, rates in 1/s.
"""

import json
import os
import statistics
import sys
import time


def products(size):
    """(kind, m, k, n) of every product in forward and backward: an (m, k) by (k, n) product costs 2 m k n FLOPs."""
    for depth, (i, o) in enumerate(size.layers):
        yield "forward", size.batch, i, o
        yield "weight gradient", o, size.batch, i
        if depth:  # the data need no gradient
            yield "input gradient", size.batch, o, i


def rate(function, work, seconds=0.02, repeats=5):
    """Work a second of CPU time: the best of some repeats."""
    function()
    start = time.process_time()
    function()
    calls = max(1, round(seconds / (time.process_time() - start)))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            function()
        times.append((time.process_time() - start) / calls)
    return work / min(times)


def gemm_rates(kind, m, k, n):
    """FLOP/s of torch.mm (MKL in the official builds) and of oneDNN, operands laid out as back-propagation has them."""
    import torch

    left = torch.randn(k, m).t() if kind == "weight gradient" else torch.randn(m, k)
    right = torch.randn(n, k).t() if kind == "forward" else torch.randn(k, n)
    flops = 2 * m * k * n
    onednn = torch.ops.mkldnn._linear_pointwise
    return rate(lambda: left @ right, flops), rate(lambda: onednn(left, right.t(), None, "none", [], ""), flops)


def bandwidth(numel):
    """Bytes a second of c = a + b on arrays as long as the parameters: what Adam's state sees, cache or memory."""
    import torch

    a, b, c = (torch.randn(numel) for _ in range(3))
    return rate(lambda: torch.add(a, b, out=c), 12 * numel)


def floor(size):
    """Everything that `svi.py` prints about the floor."""
    parameters = sum(i * o + o for i, o in size.layers)
    square = gemm_rates("plain", 1024, 1024, 1024)
    rows = [(2 * m * k * n, *gemm_rates(kind, m, k, n)) for kind, m, k, n in products(size)]
    flops, peak = sum(row[0] for row in rows), max(square)
    adam_bytes = 7 * 4 * parameters  # reads parameter, gradient and two moments, writes all but the gradient; float32
    stream = bandwidth(parameters)
    return {
        "parameters": parameters,
        "flops": flops,
        "mm_1024": square[0],
        "onednn_1024": square[1],
        "gemm_at_peak_s": flops / peak,
        "gemm_mm_s": sum(work / mm for work, mm, _ in rows),
        "gemm_onednn_s": sum(work / dnn for work, _, dnn in rows),
        "gemm_best_s": sum(work / max(mm, dnn) for work, mm, dnn in rows),
        "mm_at_shapes_median": statistics.median(mm for _, mm, _ in rows),
        "onednn_at_shapes_median": statistics.median(dnn for _, _, dnn in rows),
        "adam_bytes": adam_bytes,
        "bandwidth": stream,
        "adam_s": adam_bytes / stream,
        "floor_s": flops / peak + adam_bytes / stream,
        "reachable_s": sum(work / max(mm, dnn) for work, mm, dnn in rows) + adam_bytes / stream,
    }


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[2])})
    import torch
    from _sides import MODELS

    torch.set_num_threads(1)
    print(json.dumps(floor(MODELS[sys.argv[1]])))
