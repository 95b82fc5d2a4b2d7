"""The training loop, its execution tiers, its optimizers and its callbacks."""

from .callbacks import Callback, JsonLines, TensorBoard
from .fit import NonFinite, Training, fit
from .optim import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "Callback", "JsonLines", "NonFinite", "TensorBoard", "Training", "fit"]
