r"""The faster matrix product.

The compiler writes matrix-vector products as loops of its own, several times slower than a library's: they stay calls,
as the operator ``pgen::mv``.

On AMD processors torch's products run through MKL at about 45 % of what oneDNN reaches on the same core. In a captured graph
every large float32 product on such a CPU goes to oneDNN, as the operator ``pgen::linear``, which the compiler leaves alone.
The rule depends on the machine and the shape alone, never on a measurement, so that equal runs give equal bits; results
differ from MKL's by rounding (1e-5, relative).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import fx

__all__ = ["faster_products"]

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
ENOUGH_PRODUCTS = 1_500_000
"""Multiplications below which oneDNN's overhead outweighs its speed."""


@functools.cache
def _prefers_onednn() -> bool:
    """Whether this machine's MKL takes its slow path: an AMD processor with both libraries."""
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text(errors="ignore")[:20_000]
    return amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def faster_products(graph: fx.GraphModule) -> None:
    """Rewrite ``mm`` and ``addmm`` in place where oneDNN is faster, and keep ``mv`` from being compiled to a slow loop."""
    _keep_matrix_vector(graph)
    if not _prefers_onednn():
        return
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default):
            continue
        bias, left, right = (None, *node.args) if node.target is aten.mm.default else node.args
        if not _large(left, right) or node.kwargs or not _plain_bias(bias, right):
            continue
        with graph.graph.inserting_before(node):
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
