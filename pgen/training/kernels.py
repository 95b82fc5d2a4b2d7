r"""The faster matrix product.

On AMD processors torch's products run through MKL at about 45 % of what oneDNN reaches on the same core; elsewhere either may
win. In a captured graph every float32 product on the CPU that is large enough to matter is measured in both libraries, once
for each shape and layout on a machine, and goes to the faster: to oneDNN as the operator ``pgen::linear``, which the compiler
leaves alone. The choices are remembered between processes, so that equal runs on a machine give equal bits; where bits must
not depend on what was measured when (``deterministic=True``), a rule of machine and shape decides instead. Results of the two
libraries differ by rounding (1e-5, relative).

The compiler writes matrix-vector products as loops of its own, several times slower than a library's: they stay calls,
as the operator ``pgen::mv``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..machine import cpu_info
from ..machine import prefers_onednn as _prefers_onednn

__all__ = ["by_rule", "faster_products"]

_LIBRARY = torch.library.Library("pgen", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("mv(Tensor matrix, Tensor vector) -> Tensor")


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _linear_meta(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_LIBRARY.impl("linear", _linear, "CPU")


def _mv(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.mv(matrix, vector)


def _mv_meta(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return vector.new_empty(matrix.shape[0])


_LIBRARY.impl("linear", _linear_meta, "Meta")
_LIBRARY.impl("mv", _mv, "CPU")
_LIBRARY.impl("mv", _mv_meta, "Meta")

ENOUGH_ELEMENTS = 5_000
"""Elements of a matrix above which a library's matrix-vector product beats the compiler's own loop."""
ENOUGH_PRODUCTS = 300_000
"""Multiplications below which a product is not worth a measurement."""
RULE_PRODUCTS = 1_500_000
"""Multiplications above which the rule takes oneDNN on an AMD processor."""
WORTH = 0.95
"""oneDNN is taken where its time is below this share of MKL's."""

_BY_RULE = [False]


@contextmanager
def by_rule(active: bool = True) -> Iterator[None]:
    """Decide by machine and shape alone inside."""
    _BY_RULE.append(active)
    try:
        yield
    finally:
        _BY_RULE.pop()


def faster_products(graph: fx.GraphModule) -> None:
    """Rewrite ``mm`` and ``addmm`` where oneDNN is faster, and keep ``mv`` from being compiled to a slow loop."""
    _keep_matrix_vector(graph)
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
            continue
        bias, left, right = (None, *node.args) if node.target is aten.mm.default else node.args
        if not _large(left, right) or node.kwargs or not _plain_bias(bias, right):
            continue
        if not _onednn_is_faster(_value(left), _value(right), bias is not None):
            continue
        with graph.graph.inserting_before(node):
            left = _in_rows(graph, left)
            weight = graph.graph.call_function(aten.t.default, (right,))
            _copy_meta(weight, right)
            product = graph.graph.call_function(torch.ops.pgen.linear.default, (left, weight, bias))
            product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)


def _keep_matrix_vector(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.mv.default:
            value = _value(node.args[0])
            cpu = getattr(value, "device", torch.device("cpu")).type == "cpu"
            if value is not None and cpu and math.prod(value.shape) >= ENOUGH_ELEMENTS:
                node.target = torch.ops.pgen.mv.default


def _onednn_is_faster(left: Any, right: Any, bias: bool) -> bool:
    if _BY_RULE[-1]:
        return _prefers_onednn() and math.prod(left.shape) * right.shape[1] >= RULE_PRODUCTS
    key = f"{_layout(left)} {_layout(right)} {int(bias)}"
    known = _choices()
    if key not in known:
        known[key] = _measure(left, right, bias)
        _remember(known)
    return known[key]


def _layout(value: Any) -> str:
    return f"{tuple(value.shape)}{tuple(_strides(value))}"


def _strides(value: Any) -> tuple[int, ...]:
    return tuple(value.stride() if callable(value.stride) else value.stride)


def _measure(left: Any, right: Any, bias: bool) -> bool:
    """Whether oneDNN is faster on operands of these shapes: the best of some alternating trials."""
    single = torch.float32  # whatever the default is
    a, b = (torch.empty_strided(tuple(v.shape), _strides(v), dtype=single).fill_(0.5) for v in (left, right))
    c = torch.zeros(b.shape[1], dtype=single) if bias else None
    mkl = (lambda: torch.mm(a, b)) if c is None else (lambda: torch.addmm(c, a, b))
    times = [math.inf, math.inf]
    for trial in range(12):
        for i, product in enumerate((mkl, lambda: _linear(a, b.t(), c))):
            start = time.perf_counter()
            product()
            if trial >= 2:
                times[i] = min(times[i], time.perf_counter() - start)
    return times[1] < WORTH * times[0]


@functools.cache
def _choices() -> dict[str, bool]:
    """What earlier processes measured on this machine with as many threads."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, bool)} if isinstance(found, dict) else {}


def _file() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    machine = f"{platform.machine()} {cpu_info()} {torch.__version__} {torch.get_num_threads()}"
    return Path(cache_dir()) / f"pgen-products-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _remember(choices: dict[str, bool]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is measured again
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(choices))
        os.replace(fresh, path)


def _in_rows(graph: fx.GraphModule, left: Any) -> Any:
    """The left operand row after row, as oneDNN wants it: a copy that the compiler merges with what made it."""
    columns = _value(left).shape[1]
    if _strides(_value(left)) == (columns, 1):
        return left
    copy = graph.graph.call_function(torch.ops.aten.clone.default, (left,), {"memory_format": torch.contiguous_format})
    if isinstance(left.meta.get("val"), torch.Tensor):
        copy.meta["val"] = left.meta["val"].contiguous()
    return copy


def _copy_meta(weight: fx.Node, right: Any) -> None:
    if isinstance(right.meta.get("val"), torch.Tensor):
        weight.meta["val"] = right.meta["val"].t()


def _value(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("tensor_meta")) if isinstance(node, fx.Node) else None


def _large(left: Any, right: Any) -> bool:
    a, b = _value(left), _value(right)
    if a is None or b is None or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    cpu = all(getattr(v, "device", torch.device("cpu")).type == "cpu" for v in (a, b))
    return cpu and math.prod(a.shape) * b.shape[1] >= ENOUGH_PRODUCTS


def _plain_bias(bias: Any, right: Any) -> bool:
    if bias is None:
        return True
    value = _value(bias)
    return value is not None and tuple(value.shape) == (_value(right).shape[1],)
