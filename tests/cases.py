"""Named models with small data, for the laws that every one of them must fulfil. A new family joins with one line."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pgen
from pgen import models
from pgen.data import Compose, Dequantize, Logit, Standardize
from pgen.models import VAE, Autoencoder

ROWS, EVENT, LATENT, CONTEXT, CLASSES = 11, (2, 3), 4, 5, 7

# The linear-Gaussian model with every answer known: z ~ N(0, I), x | z ~ N(W z, VARIANCE I).
W = torch.tensor([[1.0, 1.0], [1.0, -0.5], [0.5, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
VARIANCE = 0.25
X_KNOWN = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
LOG_EVIDENCE = -4.669880  # of X_KNOWN, in nats
ELBO_GAP = -0.5 * math.log(1 - (2 / 7) ** 2)  # 0.0425789, of every x under MEAN_FIELD
PRECISION = W.T @ W + VARIANCE * torch.eye(2, dtype=torch.float64)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What ``make`` gives when torch's generator is seeded; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def state(model: nn.Module) -> torch.Tensor:
    """All parameters and buffers as one float64 vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in model.state_dict().values()])


def gaussian_model(x: torch.Tensor) -> None:
    """p(x, z) of the linear-Gaussian model."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(W.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, math.sqrt(VARIANCE)).to_event(1), obs=x)


def gaussian_guide(x: torch.Tensor) -> None:
    """The best independent Gaussians: the posterior's mean, and the inverse diagonal of its precision 4 PRECISION."""
    loc = x @ torch.linalg.solve(PRECISION, W.T).T
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, math.sqrt(1 / 14)).to_event(1))


def exact_guide(x: torch.Tensor) -> None:
    """The posterior."""
    loc = x @ torch.linalg.solve(PRECISION, W.T).T
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=PRECISION / VARIANCE))


def log_evidence(x: torch.Tensor) -> torch.Tensor:
    """Exact log p(x) of the linear-Gaussian model, ``(N,)`` in nats."""
    covariance = W @ W.T + VARIANCE * torch.eye(5, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(W.new_zeros(5), covariance).log_prob(x)


def linear_gaussian() -> pgen.Pair:
    """A pair with both networks to train: a linear decoder and an amortized guide."""
    decoder, encoder = nn.Linear(LATENT, 6), nn.Linear(6, 2 * LATENT)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(decoder.weight.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return pgen.Pair(model, guide)


@dataclass(frozen=True)
class Case:
    """A model, data for it, and what it can answer.

    Attributes:
        make: Makes the model from a seed of its initial weights.
        x: Data, ``(ROWS, *event)``.
        context: Context of each datum.
        kind: Kind of ``log_prob``; None where it has none.
        latents: Whether the guide draws anything, so that ``log_prob`` takes samples.
        labels: Class of each datum.
        values: Values that each number of x takes, if finite: 0, ..., ``values`` - 1.
        lacks: Questions that raise NotAvailable.
        tightens: Whether more samples raise a bound on average.
        options: Of every fit.
    """

    make: Callable[[int], Any]
    x: torch.Tensor
    context: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    kind: str | None = "lower_bound"
    latents: bool = True
    values: int = 0
    lacks: tuple[str, ...] = ()
    tightens: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> Any:
        """A fresh model."""
        return self.make(seed)

    @property
    def named(self) -> dict[str, Any]:
        """The context as an argument, where there is one."""
        return {} if self.context is None else {"context": self.context}

    @property
    def data(self) -> Any:
        """What a fit sees beside the context."""
        return self.x if self.labels is None else {"x": self.x, "labels": self.labels}

    def fit(self, model: Any, steps: int = 3, **options: Any) -> pgen.Run:
        """A short fit in minibatches with a ragged last one."""
        given = {"batch_size": 4, "progress": False, "compile": "eager", **self.options, **options}
        return model.fit(self.data, steps=steps, **self.named, **given)

    def sample(self, model: Any, n: int, seed: int = 0) -> torch.Tensor:
        """Draws of x, ``(n, *event)``."""
        if isinstance(model, pgen.Pair):
            return model.sample(n, self.x[:1], seed=seed)["x"][:, 0]
        return model.sample(n, None if self.context is None else self.context[:1], seed=seed)

    def log_prob(self, model: Any, **options: Any) -> pgen.Score:
        """Scores of the data."""
        return model.log_prob(self.x, **self.named, **options)

    def reload(self, model: Any, path: Any) -> Any:
        """The model, saved and loaded."""
        model.save(path)
        return self.model(seed=9).load(path) if isinstance(model, pgen.Pair) else pgen.load(path)


def _draws(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    return seeded(make, seed=3)


_BITS = _draws(lambda: torch.bernoulli(torch.rand(ROWS, *EVENT)))
_COLOURS = _draws(lambda: torch.bernoulli(torch.rand(ROWS, 2, 2, 2)))
_CLASSES = _draws(lambda: torch.randint(0, CLASSES, (ROWS, *EVENT)))
_REALS = _draws(lambda: torch.randn(ROWS, *EVENT) * 2 + 3)
_CONTEXT = _draws(lambda: torch.randn(ROWS, CONTEXT))
_IMAGES = _draws(lambda: torch.randn(ROWS, 1, 2, 4) * 2 + 3)
_NO_LATENTS = ("encode", "reconstruct", "posterior")
_NO_LIKELIHOOD = ("log_prob", "draw", "posterior", "encode", "reconstruct")
_NO_DENSITY = ("log_prob", "sample", "draw", "posterior", "predict")


def exact(make: Callable[[int], Any], x: torch.Tensor, context: torch.Tensor | None = None, **fields: Any) -> Case:
    """A family without latents, whose ``log_prob`` is exact."""
    return Case(make, x, context, **{"kind": "exact", "latents": False, "lacks": _NO_LATENTS, **fields})


def energy(x: torch.Tensor, context: torch.Tensor | None = None, labels: torch.Tensor | None = None, **settings: Any) -> Case:
    """An energy-based model, which does not know its normaliser and draws by chains, short ones here."""

    def make(seed: int) -> Any:
        return models.EnergyBased(EVENT, hidden=(4,), tempering=(3, 2, 1), seed=seed, **settings)

    return Case(make, x, context, labels, kind="unnormalised", latents=False, lacks=_NO_LATENTS)


def latent(make: Callable[[int], Any], x: torch.Tensor, context: torch.Tensor | None = None, **fields: Any) -> Case:
    """A family whose latents are integrated out in closed form: ``log_prob`` is exact, and there is a posterior."""
    return Case(make, x, context, **{"kind": "exact", "latents": True, **fields})


def diffusion(event: tuple[int, ...] = EVENT, **options: Any) -> Callable[[int], models.Diffusion]:
    """Makes a tiny diffusion model."""
    blocks = {} if "network" in options else {"blocks": 1}
    return lambda seed: models.Diffusion(event, width=8, seed=seed, **blocks, **options)


def noisy(make: Callable[[int], Any], x: torch.Tensor, context: torch.Tensor | None = None) -> Case:
    """A diffusion model: latents that are seen at one time, of which no weights are made."""
    return Case(make, x, context, lacks=(*_NO_LATENTS, "draw"), tightens=False)


def sampler(make: Callable[[int], Any], x: torch.Tensor, context: torch.Tensor | None = None, **fields: Any) -> Case:
    """A family that draws data, without a density or an encoder."""
    return Case(make, x, context, **{"kind": None, "latents": False, "lacks": _NO_LIKELIHOOD, **fields})


def vae(likelihood: str, **options: Any) -> Callable[[int], VAE]:
    """Makes a tiny VAE."""
    return lambda seed: VAE(EVENT, LATENT, (6,), likelihood=likelihood, seed=seed, **options)


def flow(transform: str, **options: Any) -> Callable[[int], models.Flow]:
    """Makes a tiny flow."""
    return lambda seed: models.Flow(EVENT, transform, hidden=(5,), bins=3, **{"transforms": 1, "seed": seed, **options})


CASES: dict[str, Case] = {
    "vae_bernoulli": Case(vae("bernoulli"), _BITS),
    "vae_bernoulli_context": Case(vae("bernoulli", context_dim=CONTEXT), _BITS, _CONTEXT),
    "vae_categorical": Case(vae("categorical", num_classes=CLASSES), _CLASSES),
    "vae_categorical_context": Case(vae("categorical", num_classes=CLASSES, context_dim=CONTEXT), _CLASSES, _CONTEXT),
    "vae_gaussian": Case(vae("gaussian"), _REALS),
    "vae_gaussian_context": Case(vae("gaussian", context_dim=CONTEXT), _REALS, _CONTEXT),
    "vae_gaussian_mixture": Case(vae("gaussian_mixture", num_components=2), _REALS),
    "vae_discretized": Case(vae("discretized_logistic_mixture", num_classes=CLASSES, num_components=2), _CLASSES),
    "vae_flow_prior": Case(vae("gaussian", prior="flow"), _REALS),
    "vae_standardized": Case(lambda seed: vae("gaussian", preprocess=Standardize())(seed), _REALS),
    "vae_dequantized": Case(
        lambda seed: vae("gaussian", preprocess=Compose([Dequantize(CLASSES), Logit(0.05)]))(seed), _CLASSES.float()
    ),
    "diffusion": noisy(diffusion(), _REALS),
    "diffusion_steps_context": noisy(
        diffusion(num_steps=7, prediction="noise", schedule="cosine", context_dim=CONTEXT), _REALS, _CONTEXT
    ),
    "diffusion_learned": noisy(diffusion(schedule="learned", prediction="data", dropout=0.1, octaves=2), _REALS),
    "diffusion_standardized": noisy(lambda seed: diffusion(preprocess=Standardize())(seed), _REALS),
    "diffusion_bits": noisy(diffusion(likelihood="bernoulli", schedule="linear"), _BITS),
    "diffusion_classes_context": noisy(
        diffusion(likelihood="categorical", num_classes=CLASSES, schedule="learned", context_dim=CONTEXT), _CLASSES, _CONTEXT
    ),
    "diffusion_classes_velocity": noisy(
        diffusion(likelihood="categorical", num_classes=CLASSES, prediction="velocity"), _CLASSES
    ),
    "diffusion_unet": noisy(diffusion((2, 4), network="unet"), _IMAGES[:, 0]),
    "flow_matching": exact(
        lambda seed: models.FlowMatching((2,), width=8, blocks=1, seed=seed), _REALS[:, 0, :2], lacks=(*_NO_LATENTS, "draw")
    ),
    "flow_matching_context": exact(
        lambda seed: models.FlowMatching((3,), width=8, blocks=1, context_dim=CONTEXT, seed=seed),
        _REALS[:, 0],
        _CONTEXT,
        lacks=(*_NO_LATENTS, "draw"),
    ),
    "autoencoder": Case(lambda seed: Autoencoder(EVENT, LATENT, (6,), seed=seed), _REALS, kind=None, lacks=_NO_DENSITY),
    "gan": sampler(lambda seed: models.GAN(EVENT, LATENT, (6,), batch_norm=True, seed=seed), _REALS),
    "gan_packed_context": sampler(
        lambda seed: models.GAN(EVENT, LATENT, (6,), pack=2, spectral_norm=True, context_dim=CONTEXT, seed=seed),
        _REALS,
        _CONTEXT,
    ),
    "gan_residual": sampler(
        lambda seed: models.GAN((8, 8), LATENT, (2,), architecture="residual", seed=seed),
        _draws(lambda: torch.randn(ROWS, 8, 8)),
    ),
    "kde": exact(lambda seed: models.KernelDensity(EVENT), _REALS),
    "kde_full": exact(lambda seed: models.KernelDensity(EVENT, covariance="full"), _REALS),
    "kde_standardized": exact(
        lambda seed: models.KernelDensity(EVENT, "exponential", covariance="spherical", preprocess=Standardize()), _REALS
    ),
    "kde_adaptive": exact(lambda seed: models.KernelDensity(EVENT, bandwidth=2.0, adaptive="abramson"), _REALS),
    "kde_compact": exact(lambda seed: models.KernelDensity(EVENT, "epanechnikov", bandwidth=14.0), _REALS),
    "kde_context": exact(lambda seed: models.KernelDensity(EVENT, context_dim=CONTEXT), _REALS, _CONTEXT),
    "kde_discrete": exact(lambda seed: models.KernelDensity(EVENT, columns=["binary", ("ordinal", 2)] * 3), _BITS, values=2),
    "flow_affine_autoregressive": exact(flow("affine_autoregressive"), _REALS),
    "flow_spline_autoregressive": exact(flow("spline_autoregressive"), _REALS),
    "flow_neural_autoregressive": exact(flow("neural_autoregressive"), _REALS),
    "flow_affine_coupling": exact(flow("affine_coupling"), _REALS),
    "flow_spline_coupling_context": exact(flow("spline_coupling", context_dim=CONTEXT), _REALS, _CONTEXT),
    "flow_continuous_context": exact(flow("continuous", context_dim=CONTEXT), _REALS, _CONTEXT),
    "glow": exact(lambda seed: models.Glow((1, 2, 4), 1, 1, 3, seed=seed), _IMAGES),
    "glow_dequantized_context": Case(
        lambda seed: models.Glow(
            (4, 4), 2, 1, 3, context_dim=CONTEXT, preprocess=Compose([Dequantize(CLASSES), Logit(0.05)]), seed=seed
        ),
        _draws(lambda: torch.randint(0, CLASSES, (ROWS, 4, 4))).float(),
        _CONTEXT,
        latents=False,
        lacks=_NO_LATENTS,
    ),
    "flow_mixture_base": exact(flow("neural_coupling", base_components=3, permutation="random"), _REALS),
    "flow_dequantized": exact(
        flow("spline_autoregressive", dropout=0.1, preprocess=Dequantize(CLASSES)), _CLASSES.float(), kind="lower_bound"
    ),
    "gaussian_full": exact(lambda seed: models.Gaussian(EVENT, seed=seed), _REALS),
    "gaussian_diagonal": exact(lambda seed: models.Gaussian(EVENT, "diagonal", preprocess=Standardize(), seed=seed), _REALS),
    "gaussian_context": exact(lambda seed: models.Gaussian(EVENT, context_dim=CONTEXT, seed=seed), _REALS, _CONTEXT),
    "gaussian_low_rank": exact(lambda seed: models.Gaussian(EVENT, "low_rank", rank=2, seed=seed), _REALS),
    "made": exact(lambda seed: models.MADE(EVENT, (14,), seed=seed), _BITS, values=2),
    "made_residual": exact(
        lambda seed: models.MADE(EVENT, (13, 13), residual=True, order="random", dropout=0.1, direct=False, seed=seed),
        _BITS,
        values=2,
    ),
    "made_orders_context": exact(
        lambda seed: models.MADE(EVENT, (16, 13), num_orders=3, context_dim=CONTEXT, seed=seed), _BITS, _CONTEXT, values=2
    ),
    "made_categorical": exact(
        lambda seed: models.MADE(EVENT, (15,), likelihood="categorical", num_classes=3, seed=seed), _CLASSES % 3, values=3
    ),
    "made_real": exact(
        lambda seed: models.MADE(EVENT, (15,), likelihood="gaussian_mixture", num_components=2, num_orders=2, seed=seed), _REALS
    ),
    "made_levels": exact(
        lambda seed: models.MADE(
            EVENT, (15,), likelihood="discretized_logistic_mixture", num_classes=3, num_components=2, seed=seed
        ),
        _CLASSES % 3,
        values=3,
    ),
    "pixel_cnn": exact(lambda seed: models.PixelCNN(EVENT, 6, 2, first_kernel=3, head=5, seed=seed), _BITS, values=2),
    "pixel_cnn_categorical_context": exact(
        lambda seed: models.PixelCNN(
            EVENT, 6, 1, head=5, likelihood="categorical", num_classes=3, context_dim=CONTEXT, dropout=0.1, seed=seed
        ),
        _CLASSES % 3,
        _CONTEXT,
        values=3,
    ),
    "pixel_cnn_levels": exact(
        lambda seed: models.PixelCNN(
            EVENT, 6, 1, head=5, likelihood="discretized_logistic_mixture", num_classes=3, num_components=2, seed=seed
        ),
        _CLASSES % 3,
        values=3,
    ),
    "pixel_cnn_colours": exact(
        lambda seed: models.PixelCNN((2, 2, 2), 6, 1, first_kernel=3, head=5, seed=seed), _COLOURS, values=2
    ),
    "pixel_rnn": exact(lambda seed: models.PixelRNN(EVENT, 6, 2, first_kernel=3, head=5, seed=seed), _BITS, values=2),
    "pixel_rnn_categorical_context": exact(
        lambda seed: models.PixelRNN(
            EVENT, 6, 1, head=5, likelihood="categorical", num_classes=3, context_dim=CONTEXT, dropout=0.1, seed=seed
        ),
        _CLASSES % 3,
        _CONTEXT,
        values=3,
    ),
    "pixel_rnn_diagonal_context": exact(
        lambda seed: models.PixelRNN(
            EVENT, 6, 2, lstm="diagonal", first_kernel=3, head=5, context_dim=CONTEXT, dropout=0.1, seed=seed
        ),
        _BITS,
        _CONTEXT,
        values=2,
    ),
    "made_mixed": exact(
        lambda seed: models.MADE(EVENT, (15,), columns=["binary", ("categorical", 2)] * 3, num_orders=2, seed=seed),
        _BITS,
        values=2,
    ),
    "ppca": latent(lambda seed: models.ProbabilisticPCA(EVENT, 2, preprocess=Standardize(), seed=seed), _REALS),
    "factor_analysis": latent(lambda seed: models.FactorAnalysis(EVENT, 2, seed=seed), _REALS),
    "factor_analysis_context": latent(
        lambda seed: models.FactorAnalysis(EVENT, 2, context_dim=CONTEXT, seed=seed), _REALS, _CONTEXT
    ),
    "wavenet_bernoulli": exact(lambda seed: models.WaveNet(EVENT, "bernoulli", channels=4, seed=seed), _BITS, values=2),
    "wavenet_context": exact(
        lambda seed: models.WaveNet(EVENT, num_classes=3, channels=4, kernel_size=3, context_dim=CONTEXT, seed=seed),
        _CLASSES % 3,
        _CONTEXT,
        values=3,
    ),
    "wavenet_gaussian": exact(lambda seed: models.WaveNet(EVENT, "gaussian", channels=4, seed=seed), _REALS),
    "causal_transformer": exact(
        lambda seed: models.CausalTransformer((6,), num_classes=3, width=8, layers=2, heads=2, seed=seed),
        (_CLASSES % 3).flatten(1),
        values=3,
    ),
    "causal_transformer_context": exact(
        lambda seed: models.CausalTransformer(EVENT, "bernoulli", width=8, layers=1, heads=2, context_dim=CONTEXT, seed=seed),
        _BITS,
        _CONTEXT,
        values=2,
    ),
    "gaussian_mixture_full": exact(lambda seed: models.GaussianMixture(EVENT, 3, seed=seed), _REALS),
    "gaussian_mixture_diagonal_context": exact(
        lambda seed: models.GaussianMixture(EVENT, 3, "diagonal", context_dim=CONTEXT, hidden=(4,), seed=seed), _REALS, _CONTEXT
    ),
    "gaussian_mixture_spherical": exact(
        lambda seed: models.GaussianMixture(EVENT, 3, "spherical", preprocess=Standardize(), seed=seed), _REALS
    ),
    "gaussian_mixture_tied": exact(lambda seed: models.GaussianMixture(EVENT, 3, "tied", seed=seed), _REALS),
    "gaussian_mixture_low_rank": exact(lambda seed: models.GaussianMixture(EVENT, 3, "low_rank", rank=2, seed=seed), _REALS),
    "mixture_bernoulli": exact(lambda seed: models.Mixture(EVENT, 3, seed=seed), _BITS, values=2),
    "mixture_categorical_context": exact(
        lambda seed: models.Mixture(EVENT, 3, "categorical", num_classes=2, context_dim=CONTEXT, hidden=(4,), seed=seed),
        _CLASSES % 2,
        _CONTEXT,
        values=2,
    ),
    "hidden_markov_bernoulli": exact(lambda seed: models.HiddenMarkov(EVENT, 3, "bernoulli", seed=seed), _BITS, values=2),
    "hidden_markov_categorical": exact(
        lambda seed: models.HiddenMarkov((6,), 3, num_classes=3, seed=seed), (_CLASSES % 3).flatten(1), values=3
    ),
    "hidden_markov_gaussian": exact(
        lambda seed: models.HiddenMarkov(EVENT, 2, "gaussian", covariance="full", seed=seed), _REALS
    ),
    "hidden_markov_context": exact(
        lambda seed: models.HiddenMarkov(EVENT, 3, "bernoulli", context_dim=CONTEXT, hidden=(4,), seed=seed),
        _BITS,
        _CONTEXT,
        values=2,
    ),
    "mixture_mixed": exact(
        lambda seed: models.Mixture(EVENT, 2, columns=["binary", ("categorical", 2)] * 3, seed=seed),
        _BITS,
        values=2,
    ),
    "mixture_of": exact(
        lambda seed: models.MixtureOf([models.Gaussian(EVENT), models.GaussianMixture(EVENT, 2, seed=seed)], seed=seed), _REALS
    ),
    "maximum_entropy_finite": exact(
        lambda seed: models.MaximumEntropy(EVENT, ["x", "x^2"], values=range(3)), (_CLASSES % 3).float(), values=3
    ),
    "maximum_entropy_line": exact(lambda seed: models.MaximumEntropy((1,), ["x", "x^2", "cos x"]), _REALS[:, 0, :1]),
    "maximum_entropy_plane": exact(lambda seed: models.MaximumEntropy((2,), ["x", "pairs", "x^2"]), _REALS[:, 0, :2]),
    "rbm": exact(lambda seed: models.RBM(EVENT, 4, seed=seed), _BITS, values=2),
    "rbm_wide": exact(lambda seed: models.RBM(EVENT, 9, seed=seed), _BITS, values=2),
    "rbm_gaussian": exact(lambda seed: models.RBM(EVENT, 3, visible="gaussian", preprocess=Standardize(), seed=seed), _REALS),
    "energy": energy(_REALS, preprocess=Standardize()),
    "energy_classes": energy(_REALS, labels=torch.arange(len(_REALS)) % 3, energy="conv", num_labels=3),
    "energy_context": energy(_REALS, _CONTEXT, context_dim=CONTEXT),
    "linear_gaussian_pair": Case(lambda seed: seeded(linear_gaussian, seed), _REALS.flatten(1)),
}
"""Every family in its main variants, and a pair of the user's own."""
