r"""Compiled steps in one native loop: what a CUDA graph is on a GPU, on the CPU.

Inductor's code for a step is a list of kernels and matrix products over buffers of fixed size, called one by one from Python.
Where a step is short, that Python is what takes the time. ``NativeLoop`` runs such a step once, writes down every call with
the memory that it works on, and from then on repeats the list, many steps a call, in a small loop of C++ that never sees
Python. The same kernels do the same arithmetic: the results are the same bits.

Whatever the list cannot hold (an operation that is neither a kernel of inductor's nor a matrix product) is refused, and the
step is called from Python as before.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NativeLoop", "NotNative"]


class NotNative(Exception):
    """The step cannot run in a native loop. The message is one line for users."""


_SOURCE = r"""
#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>

using Handle = void*;
using Word = int64_t;

struct Torch {  // libtorch's C interface, looked up by the caller
  int32_t (*mm)(Handle, Handle, Handle);
  int32_t (*bmm)(Handle, Handle, Handle);
  int32_t (*addmm)(Handle, Handle, Handle, Handle, double, double);
  int32_t (*baddbmm)(Handle, Handle, Handle, Handle, double, double);
  int32_t (*linear)(Handle, Handle, Handle*, const char*, const double**, int64_t, const char**, Handle*);
  int32_t (*from_blob)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, Handle*);
  int32_t (*data)(Handle, void**);
  int32_t (*release)(Handle);
};

template <size_t... I>
void call(Word fn, void** a, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype((void)I, (void*)nullptr)...)>(fn)(a[I]...);
}

// Arguments beyond those that a function takes are passed and not looked at.
void call(Word fn, Word n, void** a) {
  if (n <= 8) call(fn, a, std::make_index_sequence<8>());
  else if (n <= 32) call(fn, a, std::make_index_sequence<32>());
  else if (n <= 128) call(fn, a, std::make_index_sequence<128>());
  else call(fn, a, std::make_index_sequence<MAX_ARGUMENTS>());
}

struct Loop {
  const Torch& torch;
  char** slots;  // where each piece of memory begins
  Handle* held;  // results of products that bring their own memory
  const Word* at;
  int32_t failed = 0;

  char* address() { char* base = slots[at[0]]; char* p = base + at[1]; at += 2; return p; }

  struct Operand { Handle handle; bool own; };

  // A tensor: a handle made beforehand, or, with none, a view of memory that moves from step to step.
  Operand operand() {
    Handle handle = reinterpret_cast<Handle>(at[0]);
    const Word *place = at + 1, dtype = at[3], dim = at[4];
    const Word *sizes = at + 5, *strides = sizes + dim;
    at = strides + dim;
    if (handle) return {handle, false};
    failed |= torch.from_blob(slots[place[0]] + place[1], dim, sizes, strides, 0, dtype, 0, 0, &handle);
    return {handle, true};
  }

  void done(Operand o) { if (o.own) torch.release(o.handle); }

  void kernel() {
    static thread_local void* arguments[MAX_ARGUMENTS];
    Word fn = at[0], n = at[1];
    at += 2;
    for (Word i = 0; i < n; ++i) arguments[i] = address();
    call(fn, n, arguments);
  }

  void product(Word kind) {
    Operand out = operand(), a = operand(), b = operand();
    failed |= (kind == 1 ? torch.mm : torch.bmm)(out.handle, a.handle, b.handle);
    done(out); done(a); done(b);
  }

  void sum_product(Word kind) {
    double beta, alpha;
    std::memcpy(&beta, at, 8);
    std::memcpy(&alpha, at + 1, 8);
    at += 2;
    Operand out = operand(), c = operand(), a = operand(), b = operand();
    failed |= (kind == 3 ? torch.addmm : torch.baddbmm)(out.handle, c.handle, a.handle, b.handle, beta, alpha);
    done(out); done(c); done(a); done(b);
  }

  void linear() {
    Word result = at[0], with_bias = at[1];
    at += 2;
    Operand x = operand(), weight = operand(), bias{nullptr, false};
    if (with_bias) bias = operand();
    if (held[result]) torch.release(held[result]);
    held[result] = nullptr;
    failed |= torch.linear(x.handle, weight.handle, with_bias ? &bias.handle : nullptr, "none", nullptr, 0, nullptr,
                           &held[result]);
    void* data = nullptr;
    if (!failed) failed |= torch.data(held[result], &data);
    slots[result] = static_cast<char*>(data);
    done(x); done(weight);
    if (with_bias) done(bias);
  }

  void step(const Word* program, Word operations) {
    at = program;
    for (Word i = 0; i < operations && !failed; ++i) {
      Word kind = *at++;
      if (kind == 0) kernel();
      else if (kind <= 2) product(kind);
      else if (kind <= 4) sum_product(kind);
      else linear();
    }
  }
};

// moving: (slot, base, bytes a step); outputs: (slot, offset, bytes, destination)
extern "C" const char* run_steps(const Torch* torch, char** slots, Handle* held, const Word* program, Word operations,
                                 Word steps, const Word* moving, Word num_moving, const Word* outputs, Word num_outputs) {
  static thread_local char message[256];
  Loop loop{*torch, slots, held, program};
  try {
    for (Word t = 0; t < steps; ++t) {
      for (Word i = 0; i < num_moving; ++i)
        slots[moving[3 * i]] = reinterpret_cast<char*>(moving[3 * i + 1]) + t * moving[3 * i + 2];
      loop.step(program, operations);
      if (loop.failed) return "a matrix product failed";
      for (Word i = 0; i < num_outputs; ++i) {
        const Word* o = outputs + 4 * i;
        std::memcpy(reinterpret_cast<char*>(o[3]) + t * o[2], slots[o[0]] + o[1], o[2]);
      }
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return message;
  }
  return nullptr;
}
"""
MAX_ARGUMENTS = 1024
_FUNCTIONS = (
    "aoti_torch_cpu_mm_out", "aoti_torch_cpu_bmm_out", "aoti_torch_cpu_addmm_out", "aoti_torch_cpu_baddbmm_out",
    "aoti_torch_cpu__linear_pointwise", "aoti_torch_create_tensor_from_blob", "aoti_torch_get_data_ptr",
    "aoti_torch_delete_tensor_object",
)  # fmt: skip


def _driver() -> tuple[Any, Any]:
    """The C++ loop, compiled once and cached by inductor, and the table of libtorch's functions that it calls."""
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(_SOURCE.replace("MAX_ARGUMENTS", str(MAX_ARGUMENTS)))
    run = library.run_steps
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_void_p, ctypes.c_int64] * 2
    folder = Path(torch.__file__).parent / "lib"
    torch_cpu = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
    table = (ctypes.c_void_p * len(_FUNCTIONS))(
        *(ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in _FUNCTIONS)
    )
    return run, table


_PRODUCTS = {
    torch.ops.aten.mm.out: 1,
    torch.ops.aten.bmm.out: 2,
    torch.ops.aten.addmm.out: 3,
    torch.ops.aten.baddbmm.out: 4,
    torch.ops.pgen.linear.default: 5,
}
_HARMLESS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.detach.default)


class _Recorder(TorchDispatchMode):
    """Writes down the kernels and products of one run, with their tensors, which stay alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.pgen.mv.default:
            matrix, vector = args
            self.calls.append((1, {}, (result.unsqueeze(1), matrix, vector.unsqueeze(1))))
        elif func in _PRODUCTS:
            self.calls.append((_PRODUCTS[func], kwargs, (result, *args)))
        elif not (func.is_view or func in _HARMLESS):
            raise NotNative(f"{func} runs outside inductor's kernels")
        return result

    def kernel(self, original: Any) -> Callable[..., None]:
        """``original``, overheard."""
        entry = ctypes.cast(ctypes.CDLL(original.__self__.__file__).kernel, ctypes.c_void_p).value

        def overheard(*args: Any) -> None:
            if not all(isinstance(a, Tensor) for a in args) or len(args) > MAX_ARGUMENTS:
                raise NotNative("a kernel takes sizes, or too many tensors")
            original(*args)
            self.calls.append((0, entry, args))

        return overheard

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overhear every kernel that inductor has loaded."""
        from torch._inductor.codecache import PyCodeCache

        places = [(m, n, f) for m in PyCodeCache.modules for n, f in vars(m).items() if n.startswith("cpp_fused")]
        places = [(m, n, f) for m, n, f in places if isinstance(f, BuiltinFunctionType) and hasattr(f.__self__, "__file__")]
        try:
            for module, name, function in places:
                setattr(module, name, self.kernel(function))
            with self:
                yield
        finally:
            for module, name, function in places:
                setattr(module, name, function)


class NativeLoop:
    """A compiled step, repeated natively.

    Args:
        fn: Inductor's function of tensors, all on the CPU, of fixed shapes.
        inputs: Its inputs. Those that do not move stay where they are and may be changed in place by the step.
        num_moving: How many of the last inputs are given anew for each step.

    Raises:
        NotNative: With one line that says why.

    Making one runs ``fn`` once: the caller gives the inputs their values back.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], num_moving: int) -> None:
        recorder = _Recorder()
        with torch.no_grad(), recorder.listening():
            outputs = list(fn(*inputs))
        if not recorder.calls:
            raise NotNative("no kernel of inductor's was seen")
        self._run, self._torch = _driver()
        self._alive: list[Any] = [recorder.calls, list(inputs), outputs]
        self._slots: dict[int, int] = {}
        self._bases: list[int] = []
        self._unsteady: set[int] = set()
        self._handles: list[int] = []
        moving = list(inputs[len(inputs) - num_moving :])
        self._moving = [self._slot(t, steady=False) for t in moving]
        self._step_bytes = [t.numel() * t.element_size() for t in moving]
        self._shapes = [(t.shape, t.dtype) for t in moving]
        for kind, _, tensors in recorder.calls:
            if kind == 5:
                self._slot(tensors[0], steady=False)
        program = [word for call in recorder.calls for word in self._encode(*call)]
        self._outputs = [(*self._place(t), t.numel() * t.element_size(), t) for t in outputs]
        self._operations = len(recorder.calls)
        self._program = (ctypes.c_int64 * len(program))(*program)
        self._table = (ctypes.c_void_p * len(self._bases))(*self._bases)
        self._held = (ctypes.c_void_p * len(self._bases))()
        weakref.finalize(self, _release, self._torch, self._handles, self._held)

    # -- writing the program ------------------------------------------------------------------------------------------

    def _slot(self, tensor: Tensor, steady: bool = True) -> int:
        """The number of the memory that a tensor lies in."""
        base = tensor.untyped_storage().data_ptr()
        if base not in self._slots:
            self._slots[base] = len(self._bases)
            self._bases.append(base)
            if not steady:
                self._unsteady.add(self._slots[base])
        return self._slots[base]

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        return self._slot(tensor), int(tensor.storage_offset()) * tensor.element_size()

    def _encode(self, kind: int, what: Any, tensors: tuple[Any, ...]) -> Iterator[int]:
        yield kind
        if kind == 0:
            yield from (what, len(tensors))
            for tensor in tensors:
                yield from self._place(tensor)
            return
        if kind in (3, 4):
            for name in ("beta", "alpha"):
                yield struct.unpack("q", struct.pack("d", float(what.get(name, 1))))[0]
        if kind == 5:
            result, x, weight, bias = tensors
            yield from (self._slot(result), int(bias is not None))
            tensors = (x, weight, *([] if bias is None else [bias]))
        for tensor in tensors:
            yield from self._operand(tensor)

    def _operand(self, tensor: Tensor) -> Iterator[int]:
        slot, offset = self._place(tensor)
        handle = 0
        if slot not in self._unsteady:
            handle = _address(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor))
            self._handles.append(handle)
        if tensor.dtype not in _DTYPES:
            raise NotNative(f"a product of {tensor.dtype} runs in it")
        yield from (handle, slot, offset, _DTYPES[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride())

    # -- running it ---------------------------------------------------------------------------------------------------

    def __call__(self, moving: Sequence[Tensor]) -> list[Tensor]:
        """As many steps as the moving inputs have rows, ``(steps, *shape)`` each; returns outputs of that form."""
        steps = len(moving[0])
        for (shape, dtype), tensor in zip(self._shapes, moving, strict=True):
            if tensor.shape != (steps, *shape) or tensor.dtype != dtype or not tensor.is_contiguous():
                raise RuntimeError(
                    f"a native step takes {tuple(shape)} of {dtype}, got {tuple(tensor.shape[1:])}, {tensor.dtype}"
                )
        words: list[int] = []
        for slot, size, tensor in zip(self._moving, self._step_bytes, moving):
            words += [slot, tensor.data_ptr(), size]
        results = [t.new_empty((steps, *t.shape)) for *_, t in self._outputs]
        copies: list[int] = []
        for (slot, offset, size, _), result in zip(self._outputs, results):
            copies += [slot, offset, size, result.data_ptr()]
        error = self._run(
            self._torch, self._table, self._held, self._program, self._operations, steps,
            (ctypes.c_int64 * len(words))(*words), len(self._moving),
            (ctypes.c_int64 * len(copies))(*copies), len(self._outputs),
        )  # fmt: skip
        if error is not None:
            raise RuntimeError(error.decode())
        return results


def _release(table: Any, handles: list[int], held: Any) -> None:
    """Give back the handles of tensors, and the results that the last step left."""
    delete = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(table[_FUNCTIONS.index("aoti_torch_delete_tensor_object")])
    for handle in [*handles, *held]:
        if handle:
            delete(handle)


def _address(capsule: Any) -> int:
    """The pointer in a capsule."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, None))


_DTYPES = {torch.float32: 6, torch.float64: 7, torch.int64: 4, torch.int32: 3, torch.bool: 11, torch.bfloat16: 15}
