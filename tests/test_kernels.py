"""The faster matrix product computes the same product."""

import json
import time

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pgen.training import kernels
from pgen.training.capture import retrace


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL to compare it with")
    monkeypatch.setattr(kernels, "_measure", lambda left, right, bias: True)
    monkeypatch.setattr(kernels, "_choices", dict)
    monkeypatch.setattr(kernels, "_remember", lambda choices: None)
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


def large_step():
    return [torch.randn(7, 5), torch.randn(11, 5), torch.randn(11), torch.randn(11, 3)]


def test_each_shape_and_layout_is_measured_once_and_remembered(onednn, monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(kernels, "_measure", lambda left, right, bias: bool(measured.append(left.shape) or len(measured) % 2))
    for _ in range(2):
        known = json.loads((tmp_path / "choices.json").read_text()) if measured else {}
        monkeypatch.setattr(kernels, "_choices", lambda known=known: known)
        monkeypatch.setattr(kernels, "_remember", lambda choices: (tmp_path / "choices.json").write_text(json.dumps(choices)))
        graph = retrace(step, large_step())
        assert len(measured) == 6
        assert operations(graph).count("pgen.linear.default") == 3


def test_choices_are_kept_in_a_file_that_may_be_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_file", lambda: tmp_path / "cache" / "choices.json")
    kernels._remember({"a": True})
    assert kernels._choices.__wrapped__() == {"a": True}
    (tmp_path / "cache" / "choices.json").write_text('{"a": 1, "b": fal')
    assert kernels._choices.__wrapped__() == {}
    (tmp_path / "cache" / "choices.json").write_text('{"a": 1, "b": false}')
    assert kernels._choices.__wrapped__() == {"b": False}


def test_by_rule_nothing_is_measured(onednn, monkeypatch):
    monkeypatch.setattr(kernels, "_measure", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(kernels, "RULE_PRODUCTS", 100)
    for amd, count in ((True, 6), (False, 0)):
        monkeypatch.setattr(kernels, "_prefers_onednn", lambda amd=amd: amd)
        with kernels.by_rule():
            assert operations(retrace(step, large_step())).count("pgen.linear.default") == count


def test_a_measurement_tells_the_slower_library(monkeypatch):
    left, right = torch.empty(4, 8), torch.empty(8, 3)
    original = kernels._linear
    monkeypatch.setattr(kernels, "_linear", lambda *args: (time.sleep(0.002), original(*args))[1])
    assert kernels._measure(left, right, True) is False
    monkeypatch.setattr(kernels, "_linear", lambda *args: None)
    assert kernels._measure(torch.empty(64, 256), torch.empty(256, 64), False) is True


def test_a_measurement_is_in_single_precision_whatever_the_default(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "_linear", lambda a, b, c: seen.append((a.dtype, b.dtype, c.dtype)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        kernels._measure(torch.zeros(3, 5), torch.zeros(5, 4), True)
    finally:
        torch.set_default_dtype(before)
    assert set(seen) == {(torch.float32,) * 3}


def test_matrix_vector_products_stay_calls():
    def f(a, v):
        return [a @ v, a.t() @ (a @ v)]

    inputs = [torch.randn(200, 50), torch.randn(50)]
    graph = retrace(f, inputs)
    assert operations(graph).count("pgen.mv.default") == 2
    for fast, plain in zip(graph(*inputs), f(*inputs)):
        assert torch.equal(fast, plain)
    assert "pgen.mv.default" not in operations(retrace(f, [torch.randn(7, 5), torch.randn(5)]))
