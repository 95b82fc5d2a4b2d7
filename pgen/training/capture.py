r"""From a function of tensors to a graph of tensor operations, and from there to compiled code.

``capture`` runs the function under ``make_fx``: the handlers' Python, the module calls and autograd are gone afterwards. A
function whose control flow depends on data or on chance must never be frozen silently, so it is captured twice, on other
inputs and other noise, and the graphs are compared; whatever would leave the graph (``.item()``, ``.numpy()``, Python's or
NumPy's random numbers) is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from .kernels import faster_products

__all__ = ["BackgroundCompile", "CaptureRefused", "CompileFailed", "CudaReplay", "capture", "compile_graph", "retrace"]

TensorFunction = Callable[..., Sequence[Tensor]]


class CaptureRefused(Exception):
    """The function cannot be captured without changing what it computes. The message is one line for users."""


class CompileFailed(Exception):
    """There is no compiled code: no compiler on this machine, or an operation that it does not know. One line for users."""


class _NoEscape(TorchFunctionMode):
    """Refuses to hand tensor values to NumPy, where the graph would lose sight of them."""

    _ESCAPES: tuple[Any, ...] = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._ESCAPES:
            raise CaptureRefused(f"the program calls .{func.__name__.strip('_')}() on a tensor")
        return func(*args, **(kwargs or {}))


def _trace(fn: TensorFunction, inputs: Sequence[Tensor]) -> fx.GraphModule:
    python_state, numpy_state = random.getstate(), _numpy_state()
    try:
        with _NoEscape():
            graph = _make_fx(fn, inputs)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(_reason(error)) from error
    if random.getstate() != python_state or _numpy_state() != numpy_state:
        raise CaptureRefused("the program draws from Python's or NumPy's random numbers")
    return graph


def _make_fx(fn: TensorFunction, inputs: Sequence[Tensor], table: dict[Any, Any] | None = None) -> fx.GraphModule:
    """``make_fx`` on real tensors, with one mode for the shapes that it notes down (it would make one for each)."""
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(fn, decomposition_table=table)(*inputs)


SHORT_SUM = 64
"""Cumulative sums over at most so many terms are written as sums, which a compiler can fuse."""


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """A short cumulative sum as sums of masked terms; the compiler has no kernel of its own for it."""
    if x.dim() == 0 or x.shape[dim] > SHORT_SUM or not x.is_floating_point() or dtype not in (None, x.dtype):
        return NotImplemented
    size = x.shape[dim]
    upto = torch.ones(size, size, dtype=x.dtype, device=x.device).tril()
    return (x.movedim(dim, -1).unsqueeze(-2) * upto).sum(-1).movedim(-1, dim)


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return state[0], state[1].tobytes(), *state[2:]


def _reason(error: Exception) -> str:
    text = str(error)
    if "_local_scalar_dense" in text or "data-dependent" in text or ".item()" in text:
        return "the program's control flow depends on tensor values (.item(), if, float() or len() of a tensor)"
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first[:120]}"


def capture(
    fn: TensorFunction, inputs: Sequence[Tensor], other: Sequence[Tensor], reseed: Callable[[int], None]
) -> fx.GraphModule:
    """Capture ``fn`` on ``inputs``, and again on ``other`` with other noise, and insist that the graphs agree.

    Args:
        fn: A function of tensors (modules that it closes over must have their parameters among the inputs).
        inputs: Example inputs; the parameters' own objects, so that they are recognised inside.
        other: Inputs of the same shapes with other data.
        reseed: Seeds the generators, called with 1 and 2.

    Raises:
        CaptureRefused: With one line that says why.
    """
    reseed(1)
    graph = _trace(fn, inputs)
    reseed(2)
    _compare(graph, _trace(fn, other))
    return simplify(graph)


def retrace(fn: TensorFunction, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Capture a function made of captured graphs and plain tensor code, which needs no second look."""
    return simplify(_make_fx(fn, inputs, _CHEAPER))


def _sigmoid(x: Tensor) -> Tensor:
    """From exp(-|x|), which the cross-entropy needs as well: one exponential serves both."""
    if not x.is_floating_point():
        return NotImplemented
    e = torch.exp(-x.abs())
    share = 1 / (1 + e)
    return torch.where(x >= 0, share, e * share)


def _cross_entropy(x: Tensor, y: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1) -> Tensor:
    """With log(1 + exp(-|x|)), right to one rounding of 1 and cheaper than log1p."""
    if weight is not None or pos_weight is not None or reduction != 0:
        return NotImplemented
    return x.clamp(min=0) - x * y + torch.log(1 + torch.exp(-x.abs()))


_CHEAPER = {
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.sigmoid.default: _sigmoid,
    torch.ops.aten.binary_cross_entropy_with_logits.default: _cross_entropy,
}
"""Spellings that compile to fewer or cheaper instructions, of the same values to rounding."""


def _compare(first: fx.GraphModule, second: fx.GraphModule) -> None:
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    same = len(nodes) == len(others) and all(_describe(a) == _describe(b) for a, b in zip(nodes, others))
    if not same:
        raise CaptureRefused("two runs on different batches gave different graphs: control flow depends on data or chance")
    for a, b in zip(nodes, others):
        if a.op == "get_attr":
            x, y = getattr(first, a.target), getattr(second, b.target)
            if isinstance(x, Tensor) and not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
                raise CaptureRefused("a constant of the program differs between two runs: it depends on data or chance")


def _describe(node: fx.Node) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        return value.name if isinstance(value, fx.Node) else value

    target = "constant" if node.op == "get_attr" else str(node.target)
    arguments = repr(torch.utils._pytree.tree_map_only(fx.Node, plain, (node.args, dict(node.kwargs))))
    return node.op, target, arguments


_FILLS = ("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_ones", "aten::new_full")


def _is_operation(node: Any) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _schema(node: Any) -> Any:
    return node.target._schema


def _pure(node: Any) -> bool:
    """Whether a node is an operation without side effect, chance, or undefined memory."""
    if not _is_operation(node) or node.target._schema.is_mutable or "empty" in node.target.name():
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop what has no meaning outside autograd, compute what depends on no input once, and equal things once."""
    written = _written(graph)
    _drop_identities(graph, written)
    _share_equal(graph, written)
    _fold_constants(graph, written)
    faster_products(graph)
    _drop_double_transposes(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return graph


def _written(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose memory an in-place operation changes, with what it is a view of; users of inputs so changed too."""
    written: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if not _is_operation(node) or not node.target._schema.is_mutable:
            continue
        for argument, value in zip(node.target._schema.arguments, node.args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for target in value if isinstance(value, (list, tuple)) else [value]:
                    _mark(target, written)
    return written


def _mark(node: Any, written: set[fx.Node]) -> None:
    while isinstance(node, fx.Node) and node not in written:
        written.add(node)
        view = _is_operation(node) and any(r.alias_info is not None for r in _schema(node).returns)
        if node.op == "placeholder":
            written.update(node.users)
        if not view or not node.args:
            return
        node = node.args[0]


def _shape(node: Any) -> Any:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return None if meta is None or not hasattr(meta, "shape") else (tuple(meta.shape), meta.dtype)


def _same_value(node: Any) -> bool:
    """Whether a node is its first argument under another name."""
    aten, args = torch.ops.aten, node.args
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    if node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default):
        return _shape(node) is not None and _shape(node) == _shape(args[0])
    one = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.pow.Tensor_Scalar)
    zero = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar)
    if node.target not in one + zero or isinstance(args[1], (fx.Node, Tensor)) or args[1] != (node.target in one):
        return False
    return _shape(node) is not None and _shape(node) == _shape(args[0])


def _drop_identities(graph: fx.GraphModule, written: set[fx.Node]) -> None:
    for node in list(graph.graph.nodes):
        shared = _is_operation(node) and any(r.alias_info is not None for r in _schema(node).returns)
        copied = node not in written and (shared or not any(n in written for n in node.all_input_nodes))
        if node.op == "call_function" and copied and _same_value(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _drop_double_transposes(graph: fx.GraphModule) -> None:
    transpose = torch.ops.aten.t.default
    for node in list(graph.graph.nodes):
        inner = node.args[0] if node.op == "call_function" and node.target is transpose else None
        if isinstance(inner, fx.Node) and inner.target is transpose:
            node.replace_all_uses_with(inner.args[0])


def _share_equal(graph: fx.GraphModule, written: set[fx.Node]) -> None:
    seen: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if not _pure(node) or node in written or any(n in written for n in node.all_input_nodes):
            continue
        text = repr(_describe(node))
        if text in seen:
            node.replace_all_uses_with(seen[text])
            graph.graph.erase_node(node)
        else:
            seen[text] = node


def _fold_constants(graph: fx.GraphModule, written: set[fx.Node]) -> None:
    constant: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant[node] = getattr(graph, node.target)
        elif _pure(node) and node not in written:
            value = _constant_value(node, constant)
            if isinstance(value, Tensor) and value.numel() <= 1 << 16:
                constant[node] = value
    _freeze(graph, constant)


def _constant_value(node: Any, constant: dict[fx.Node, Any]) -> Any:
    if all(n in constant for n in node.all_input_nodes):
        args, kwargs = torch.utils._pytree.tree_map_only(fx.Node, constant.__getitem__, (node.args, node.kwargs))
        return node.target(*args, **kwargs)
    meta = node.meta.get("tensor_meta")
    if node.target.name().split(".")[0] in _FILLS and meta is not None:
        like = node.args[0].meta.get("val")
        if isinstance(like, Tensor):
            args = (torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device), *node.args[1:])
            return node.target(*args, **node.kwargs)
    return None


def _freeze(graph: fx.GraphModule, constant: dict[fx.Node, Any]) -> None:
    """Replace computed nodes that others use by attributes."""
    for i, (node, value) in enumerate(constant.items()):
        if node.op == "get_attr" or all(user in constant for user in node.users):
            continue
        name = f"_folded_{i}"
        graph.register_buffer(name, value.contiguous() if value.dim() and 0 in value.stride() else value)
        with graph.graph.inserting_before(node):
            attribute = graph.graph.get_attr(name)
        attribute.meta["val"] = value
        node.replace_all_uses_with(attribute)


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> TensorFunction:
    """Compile a captured graph with inductor; its noise is the eager generator's, and results are cached between processes."""
    from torch._inductor import config, standalone_compile

    options = {"fallback_random": True, "compile_threads": 1, "cpp.use_decompose_tanh": True}
    if any(node.target is torch.ops.aten.native_group_norm.default for node in graph.graph.nodes):
        options["layout_optimization"] = False  # groups lie together where channels come first: 47 ms for 53 to 56 in a U-Net
    try:
        with config.patch(options), torch.no_grad():
            return standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
    except Exception as error:  # whatever a compiler may raise becomes one line, and the graph tier goes on
        raise CompileFailed(f"compilation failed, {_reason(error)}") from error


class BackgroundCompile:
    """Compiles beside training, in a child process that fills inductor's cache; the parent then takes it from there.

    A thread would not do: compilation is Python, and would hold the interpreter's lock against every operation of the loop.
    Where a process cannot be forked safely (a GPU in use, systems other than Linux) it compiles at once.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.reason = ""
        self._graph, self._inputs = graph, list(inputs)
        self._result: TensorFunction | None = None
        self._child = self._fork() if sys.platform == "linux" and not torch.cuda.is_initialized() else None
        if self._child is None:
            self._take()

    def _fork(self) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no thread of the parent's, and ends by _exit
            child = os.fork()
        if child == 0:
            self._in_child()
        _CHILDREN.add(child)
        return child

    def _in_child(self) -> NoReturn:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            torch.set_num_threads(1)
            compile_graph(self._graph, self._inputs)
            code = 0
        finally:
            os._exit(code)

    @property
    def running(self) -> bool:
        """Whether compilation still goes on."""
        return self._child is not None and not self._reap(os.WNOHANG)

    def _reap(self, option: int) -> bool:
        """Look after the child: whether it has ended; if so, take its work over."""
        assert self._child is not None
        ended, status = os.waitpid(self._child, option)
        if ended == 0:
            return False
        _CHILDREN.discard(self._child)
        self._child = None
        if status == 0:
            self._take()
        else:
            self.reason = "compilation failed; compile='compiled' shows why"
        return True

    def _take(self) -> None:
        try:
            self._result = compile_graph(self._graph, self._inputs)
        except CompileFailed as failure:
            self.reason = str(failure)

    def result(self, wait: bool = False) -> TensorFunction | None:
        """The compiled function, or None while it is being made."""
        if self._child is not None:
            self._reap(0 if wait else os.WNOHANG)
        return self._result

    def cancel(self) -> None:
        """End a compilation that nobody waits for."""
        if self._child is not None:
            _kill(self._child)
            self._child = None


_CHILDREN: set[int] = set()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _CHILDREN.discard(child)


@atexit.register
def _kill_children() -> None:
    for child in list(_CHILDREN):
        _kill(child)


class CudaReplay:
    """Replays a function as one CUDA graph: inputs are copied into fixed buffers, outputs are read from fixed buffers.

    The random generator is registered with the graph by torch: seeding it before a replay decides the noise. Not yet run
    on a GPU.

    Args:
        fn: Function of tensors, all on one CUDA device.
        inputs: Its inputs; those of ``moving`` change from call to call, the others stay where they are.
        moving: Positions of the inputs that are given anew at each call.
    """

    def __init__(self, fn: TensorFunction, inputs: Sequence[Tensor], moving: Sequence[int]) -> None:
        self._inputs = [t.clone() if i in moving else t for i, t in enumerate(inputs)]
        self._moving = tuple(moving)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = fn(*self._inputs)

    def __call__(self, *args: Tensor) -> list[Tensor]:
        """Copy the moving inputs, replay, and return copies of the outputs."""
        for i in self._moving:
            self._inputs[i].copy_(args[i], non_blocking=True)
        self._graph.replay()
        return [out.clone() for out in self._outputs]
