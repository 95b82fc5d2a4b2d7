r"""Eight schools, stated in two ways, each with a ladder of guides that climbs until importance weights can repair one.

.. math::

    \mu \sim \mathcal{N}(0, 5^2), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad
    y_j \sim \mathcal{N}(\theta_j, \sigma_j^2), \quad \theta_j \sim \mathcal{N}(\mu, \tau^2) \text{ or }
    \theta_j = \mu + \tau \eta_j,\ \eta_j \sim \mathcal{N}(0, 1)

Data: Rubin (1981), doi:10.3102/10769986006004377. The first way (centred) makes the scale of a latent a latent: a funnel, which
no Gaussian follows. The second (non-centred) is the same model without it. Run ``python examples/ladder.py``.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pgen

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
REFERENCE = {"mu": (4.41, 3.3), "tau": (3.60, 3.2)}  # posterior mean and sd; means published in posteriordb, eight_schools


def centred(y: Tensor) -> None:
    """Effects around mu with spread tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA.to(y)), obs=y)


def non_centred(y: Tensor) -> None:
    """The same, with standard normal effects that are scaled and shifted afterwards."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, SIGMA.to(y)), obs=y)


def main(steps: int = 1500, num_samples: int = 40_000, seed: int = 1, progress: bool = True) -> dict[str, pgen.Pair]:
    """Climb for both parameterisations and print what was found; returns the fitted pairs."""
    pairs = {}
    for name, model in {"centred": centred, "non-centred": non_centred}.items():
        pairs[name] = pair = pgen.Pair(model, "ladder")
        pair.fit(EFFECT, steps=steps, seed=seed, progress=progress)
        print(f"{name}\n\n{pair.ladder}\n")
        draws = pair.posterior(EFFECT, num_samples, seed=seed)
        weighted = pgen.diagnostics.psis_expectation(draws, list(REFERENCE))
        for latent, (mean, sd) in REFERENCE.items():
            raw, repaired = float(draws["posterior"][latent].mean()), float(weighted[latent].sel(statistic="mean"))
            print(
                f"{latent:<4} raw {raw:.2f}, weighted {repaired:.2f}, reference {mean:.2f}: "
                f"off by {abs(raw - mean) / sd:.2f} and {abs(repaired - mean) / sd:.2f} sd"
            )
        print()
    return pairs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A ladder of guides on eight schools, centred and non-centred.")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps for each guide (default: 1500)")
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    main(parser.parse_args().steps)
