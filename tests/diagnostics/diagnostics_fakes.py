"""Fitted models whose posterior and guide are Gaussians with known answers."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

from pgen.contracts import Draws, Run

W = torch.tensor([[1.0, 1.0], [1.0, -0.5], [0.5, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
VARIANCE = 0.25


def make_draws(values, log_p, log_q, **changes):
    """Draws of shared latents, one vector site each unless said."""
    dims = {name: tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1)) for name, value in values.items()}
    num = len(log_p)
    draws = Draws(
        values=values,
        dims=dims,
        log_p=log_p.double(),
        log_q=log_q.double(),
        log_p_rows=None,
        log_q_rows=None,
        log_likelihood={"y": torch.zeros(num, 3, dtype=torch.float64)},
        likelihood_dims={"y": ("data",)},
        observed={"y": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)},
        has_global=True,
        has_local=False,
    )
    return replace(draws, **changes)


def flat_run(num_steps=1000, slope=0.0, noise=0.1, lr=0.01, num_data=1000, seed=0, ar=0.0):
    """A fit whose loss falls by ``slope`` a step, with (autoregressive) noise."""
    rng = np.random.default_rng(seed)
    innovation = rng.normal(size=num_steps) * noise
    error = np.zeros(num_steps)
    for t in range(num_steps):
        error[t] = (ar * error[t - 1] if t else 0.0) + innovation[t]
    history = {
        "step": np.arange(1, num_steps + 1),
        "loss": 5.0 - slope * np.arange(num_steps) + error,
        "lr": np.full(num_steps, lr),
    }
    return Run(history=history, steps=num_steps, num_data=num_data, stopped="all steps done")


@dataclass
class GaussianFit:
    """Shared latents z ~ q = N(q_mean, q_cov) where the posterior is N(p_mean, p_cov), and y ~ N(0, 1) replicates."""

    p_mean: torch.Tensor
    p_cov: torch.Tensor
    q_mean: torch.Tensor
    q_cov: torch.Tensor
    dtype: torch.dtype = torch.float64
    changes: dict = field(default_factory=dict)
    last_run: Run | None = field(default_factory=flat_run)
    observed: torch.Tensor = field(default_factory=lambda: torch.linspace(-1.5, 1.5, 7, dtype=torch.float64))
    predict_mean: float = 0.0

    def draw(self, data, num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, len(self.q_mean), generator=generator, dtype=torch.float64)
        z = self.q_mean + noise @ torch.linalg.cholesky(self.q_cov).T
        z = z.to(self.dtype)
        p = MultivariateNormal(self.p_mean.to(self.dtype), self.p_cov.to(self.dtype), validate_args=False)
        q = MultivariateNormal(self.q_mean.to(self.dtype), self.q_cov.to(self.dtype), validate_args=False)
        log_p = (p.log_prob(z) - 7.25).double()  # rounded as the dtype rounds
        observed = {"y": self.observed}
        likelihood = {"y": torch.zeros(num_samples, len(self.observed), dtype=torch.float64)}
        draws = make_draws({"z": z}, log_p, q.log_prob(z), observed=observed, log_likelihood=likelihood)
        return replace(draws, **self.changes)

    def predict(self, data, num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, len(self.observed), generator=generator, dtype=torch.float64)
        return {"y": noise + self.predict_mean}


def gaussian_fit(shift, scale, rho=0.0, **fields):
    """Posterior with unit variances and correlation ``rho``; q independent, with the given shifts and sds."""
    shift, scale = torch.as_tensor(shift, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)
    cov = torch.full((len(shift), len(shift)), float(rho), dtype=torch.float64).fill_diagonal_(1.0)
    return GaussianFit(torch.zeros_like(shift), cov, shift, torch.diag(scale**2), **fields)


def mean_field_fit(rho, **fields):
    """The best independent Gaussian for a bivariate posterior with correlation ``rho``: variances 1 - rho^2."""
    return gaussian_fit([0.0, 0.0], [math.sqrt(1 - rho**2)] * 2, rho, **fields)


class PPCAFit:
    """x = W z + noise of variance 1/4; guide N(M^-1 W x, I / 14), the best independent one; each datum has its own z."""

    last_run = None

    def __init__(self, scale=1.0):
        self.scale = scale  # of the guide's sd

    @staticmethod
    def data(num, seed=0):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num, 2, generator=generator, dtype=torch.float64)
        return z @ W.T + math.sqrt(VARIANCE) * torch.randn(num, 5, generator=generator, dtype=torch.float64)

    def draw(self, data, num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        mean = data @ W @ torch.linalg.inv(W.T @ W + VARIANCE * torch.eye(2, dtype=torch.float64))
        sd = self.scale / math.sqrt(14)
        z = mean + sd * torch.randn(num_samples, len(data), 2, generator=generator, dtype=torch.float64)
        log_q = Normal(mean, sd).log_prob(z).sum(-1)
        likelihood = Normal(z @ W.T, math.sqrt(VARIANCE)).log_prob(data).sum(-1)
        log_p = likelihood + Normal(0.0, 1.0).log_prob(z).sum(-1)
        return Draws(
            values={"z": z},
            dims={"z": ("data", "z_dim_0")},
            log_p=log_p.sum(-1),
            log_q=log_q.sum(-1),
            log_p_rows=log_p,
            log_q_rows=log_q,
            log_likelihood={"x": likelihood},
            likelihood_dims={"x": ("data",)},
            observed={"x": data},
            has_global=False,
            has_local=True,
        )

    def predict(self, data, num_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_samples, len(data), 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_samples, len(data), 5, generator=generator, dtype=torch.float64)
        return {"x": z @ W.T + math.sqrt(VARIANCE) * noise}
