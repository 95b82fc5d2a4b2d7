r"""Optimizers as pure updates, so that a whole step can be one graph.

Each has two spellings of one formula: ``update_`` in place with torch's fused kernels (eager and graph tiers) and
``update`` as plain tensor arithmetic that returns new values (compiled tier). Hyperparameters that a schedule may change
come as tensors; everything that depends on the step alone comes in ``scalars``, computed ahead in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..contracts import check_positive

__all__ = ["SGD", "Adam", "AdamW", "External", "Optimizer", "from_torch"]

State = list[list[Tensor]]


class Optimizer(Protocol):
    """What the loop needs of an optimizer."""

    lr: float

    def init(self, params: Sequence[Tensor]) -> State:
        """State at the start, lists of tensors like the parameters."""

    def scalars(self, steps: np.ndarray, lr: np.ndarray) -> np.ndarray:
        """What depends on the step (from 0) alone, ``(len(steps), scalars)``."""

    def update_(self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor) -> None:
        """One step in place."""

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor
    ) -> tuple[list[Tensor], State]:
        """One step as new values."""


@dataclass(frozen=True)
class Adam:
    r"""Adam.

    .. math:: \theta \leftarrow \theta - \eta\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        lr: Step size :math:`\eta`.
        betas: Decay of the first and second moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the parameters, per unit of ``lr`` (Loshchilov and Hutter 2019, arXiv:1711.05101);
            zero for plain Adam.

    References:
        Kingma and Ba (2015), Adam: a method for stochastic optimization, arXiv:1412.6980, algorithm 1.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_positive("lr", self.lr, integer=False)
        check_positive("eps", self.eps, integer=False)
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"`betas` should lie in [0, 1), got {self.betas}")

    def init(self, params: Sequence[Tensor]) -> State:
        """First and second moments, zero."""
        return [[torch.zeros_like(p) for p in params] for _ in range(2)]

    def scalars(self, steps: np.ndarray, lr: np.ndarray) -> np.ndarray:
        r"""lr, step (from 1), :math:`\eta / (1 - \beta_1^t)` and :math:`(1 - \beta_2^t)^{-1/2}`."""
        t = steps + 1.0
        b1, b2 = self.betas
        return np.stack([lr, t, lr / (1 - b1**t), 1 / np.sqrt(1 - b2**t)], 1)

    def update_(self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor) -> None:
        """In place, by torch's fused kernel."""
        b1, b2 = self.betas
        step = s[1].float()
        kernel = torch._fused_adamw_ if self.weight_decay else torch._fused_adam_
        kernel(
            params, grads, state[0], state[1], [], [step] * len(params), lr=s[0], beta1=b1, beta2=b2, eps=self.eps,
            weight_decay=self.weight_decay, amsgrad=False, maximize=False, grad_scale=None, found_inf=skip.float(),
        )  # fmt: skip

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor
    ) -> tuple[list[Tensor], State]:
        """New values; where ``skip`` is true, the old ones."""
        b1, b2 = self.betas
        new: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for p, g, m, v in zip(params, grads, *state):
            lr, rate, root = (s[i].to(p.dtype) for i in (0, 2, 3))
            m1 = m + (1 - b1) * (g - m)
            v1 = b2 * v + (1 - b2) * (g * g)
            p1 = p - p * (lr * self.weight_decay) if self.weight_decay else p
            p1 = p1 - rate * (m1 / (v1.sqrt() * root + self.eps))
            for into, old, value in zip(new, (p, m, v), (p1, m1, v1)):
                into.append(torch.where(skip, old, value))
        return new[0], [new[1], new[2]]


def AdamW(lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2) -> Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return Adam(lr, betas, eps, weight_decay)


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent with momentum.

    .. math:: b_t = \mu b_{t-1} + g_t, \qquad \theta \leftarrow \theta - \eta\, b_t

    Args:
        lr: Step size :math:`\eta`.
        momentum: :math:`\mu`.
    """

    lr: float = 1e-2
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_positive("lr", self.lr, integer=False)

    def init(self, params: Sequence[Tensor]) -> State:
        """Momentum buffers, zero; none without momentum."""
        return [[torch.zeros_like(p) for p in params]] if self.momentum else []

    def scalars(self, steps: np.ndarray, lr: np.ndarray) -> np.ndarray:
        """The step size."""
        return lr[:, None]

    def update_(self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor) -> None:
        """In place."""
        new, new_state = self.update(params, grads, state, s, skip)
        for p, value in zip(params, new):
            p.copy_(value)
        for old, values in zip(state, new_state):
            for b, value in zip(old, values):
                b.copy_(value)

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: State, s: Tensor, skip: Tensor
    ) -> tuple[list[Tensor], State]:
        """New values; where ``skip`` is true, the old ones."""
        if state:
            moved = [self.momentum * b + g for b, g in zip(state[0], grads)]
            state = [[torch.where(skip, b, m) for b, m in zip(state[0], moved)]]
            grads = moved
        return [torch.where(skip, p, p - s[0].to(p.dtype) * g) for p, g in zip(params, grads)], state


class External:
    """Any other torch optimizer: it steps outside the graph, on gradients that the graph gives."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        self._make = make
        self.optimizer: torch.optim.Optimizer | None = make if isinstance(make, torch.optim.Optimizer) else None

    @property
    def lr(self) -> float:
        """The first group's step size."""
        if self.optimizer is None:
            return math.nan
        group = self.optimizer.param_groups[0]
        return float(group.get("initial_lr", group["lr"]))

    def bind(self, params: list[nn.Parameter]) -> None:
        """Construct the optimizer over ``params``."""
        if self.optimizer is None:
            self.optimizer = self._make(params)  # type: ignore[operator]
        if not isinstance(self.optimizer, torch.optim.Optimizer) or isinstance(self.optimizer, torch.optim.LBFGS):
            raise TypeError(f"{_WANTED}, got {type(self.optimizer).__name__}, which does not step on one gradient")
        own = {id(p) for p in params}
        strangers = sum(id(p) not in own for g in self.optimizer.param_groups for p in g["params"])
        if strangers:
            raise ValueError(
                f"`optimizer` holds {strangers} parameters that this model does not train: make it from this model's own "
                f"parameters, or give a function such as lambda p: torch.optim.{type(self.optimizer).__name__}(p)"
            )
        groups = [{n: v for n, v in g.items() if n not in ("params", "lr")} for g in self.optimizer.param_groups]
        self._words = f"{type(self.optimizer).__name__} lr={self.lr} {groups}"

    def __repr__(self) -> str:
        return self._words

    def state_dict(self) -> dict[str, Any]:
        """All that torch's optimizer keeps."""
        assert self.optimizer is not None
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state)

    def step(self, params: list[nn.Parameter], grads: list[Tensor], lr: float) -> None:
        """One step, with the learning rate of every group scaled alike."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * lr / self.optimizer.param_groups[0]["initial_lr"]
        for p, g in zip(params, grads):
            p.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


_WANTED = (
    "`optimizer` should be a learning rate, pgen.training.Adam(...), a torch optimizer or a function of the parameters that "
    "makes one"
)
_FUSABLE = {"amsgrad": False, "maximize": False, "differentiable": False, "nesterov": False, "dampening": 0}


def from_torch(optimizer: Any) -> Any:
    """Our spelling of an optimizer given as None, a learning rate, ours, or torch's (instance or factory of parameters).

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool):
        return Adam(lr=float(optimizer))
    if isinstance(optimizer, (Adam, SGD, External)):
        return optimizer
    foreign = type(optimizer).__module__.startswith("pyro.")
    if isinstance(optimizer, torch.optim.Optimizer) or (callable(optimizer) and not foreign):
        return External(optimizer)
    raise TypeError(f"{_WANTED}, got {type(optimizer).__module__}.{type(optimizer).__name__}")


def internal(external: External, params: list[nn.Parameter]) -> Any:
    """``external`` as one of ours, where it is exactly Adam, AdamW or SGD over all the parameters in one group; else itself."""
    optimizer = external.optimizer
    assert optimizer is not None
    group = optimizer.param_groups[0]
    whole = len(optimizer.param_groups) == 1 and {id(p) for p in group["params"]} == {id(p) for p in params}
    plain = all(group.get(name, value) == value for name, value in _FUSABLE.items()) and not optimizer.state
    if not (whole and plain):
        return external
    decay = group.get("weight_decay", 0.0)
    if type(optimizer) is torch.optim.AdamW or (type(optimizer) is torch.optim.Adam and not decay):
        return Adam(float(group["lr"]), tuple(group["betas"]), group["eps"], decay)
    if type(optimizer) is torch.optim.SGD and not decay:
        return SGD(float(group["lr"]), group["momentum"])
    return external
