"""Is the fit to be believed? Importance weights, predictive checks, and a report that also says what it did not look at."""

from .claims import Claim
from .convergence import Plateau, iterate_ess, plateau, split_rhat
from .convert import to_datatree
from .figures import plot_posterior_error, plot_weights
from .gradients import GradientSNR, gradient_snr
from .importance import good_khat, importance_ess, importance_resample, pareto_khat, posterior_error, psis, psis_expectation
from .predictive import ppc
from .report import Fitted, Report, report

__all__ = [
    "Claim",
    "Fitted",
    "GradientSNR",
    "Plateau",
    "Report",
    "good_khat",
    "gradient_snr",
    "importance_ess",
    "importance_resample",
    "iterate_ess",
    "pareto_khat",
    "plateau",
    "plot_posterior_error",
    "plot_weights",
    "posterior_error",
    "ppc",
    "psis",
    "psis_expectation",
    "report",
    "split_rhat",
    "to_datatree",
]
