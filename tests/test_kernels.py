"""The faster matrix product computes the same product."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pgen.training import kernels
from pgen.training.capture import retrace


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(kernels, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(kernels, "ENOUGH_PRODUCTS", 100)


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def step(x, w, b, v):
    """Forward and backward of two layers: every orientation of operands that training meets."""
    hidden = torch.tanh(torch.addmm(b, x, w.t()))
    out = hidden @ v
    grad = 2 * out
    back = (grad @ v.t()) * (1 - hidden**2)
    return [out, hidden.t() @ grad, back.t() @ x, back @ w]


def test_large_products_go_to_onednn_and_agree(onednn):
    inputs = [torch.randn(n, m) for n, m in ((7, 5), (11, 5))] + [torch.randn(11), torch.randn(11, 3)]
    graph = retrace(step, inputs)
    assert operations(graph).count("pgen.linear.default") == 6
    assert not any("mm" in name for name in operations(graph))
    for fast, plain in zip(graph(*inputs), step(*inputs)):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(onednn, dtype):
    inputs = [torch.randn(n, m).to(dtype) for n, m in ((7, 5), (11, 5))] + [
        torch.randn(11).to(dtype),
        torch.randn(11, 3).to(dtype),
    ]
    assert "pgen.linear.default" not in operations(retrace(step, inputs))


def test_small_products_are_left_alone(onednn, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_PRODUCTS", 10_000)
    inputs = [torch.randn(7, 5), torch.randn(11, 5), torch.randn(11), torch.randn(11, 3)]
    assert "pgen.linear.default" not in operations(retrace(step, inputs))


def test_a_bias_that_is_no_vector_is_left_alone(onednn):
    graph = make_fx(lambda b, x, w: torch.addmm(b, x, w))(torch.randn(7, 1), torch.randn(7, 5), torch.randn(5, 11))
    kernels.faster_products(graph)
    assert operations(graph) == ["aten.addmm.default"]
