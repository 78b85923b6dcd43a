"""fastdensity: density-guided sampling of flow and diffusion models, exact and fast.

The names below are the whole public interface; README.md opens with an example, docs/architecture.md draws the
house. Formulas: Karczewski, Heinonen and Garg, "Devil is in the Details" (ICML 2025, arXiv 2502.05807).
"""

from fastdensity.alignment import score_alignment
from fastdensity.conversions import from_epsilon, to_epsilon, to_sample, to_score
from fastdensity.divergence import DivergenceEstimate, divergence
from fastdensity.flow import Flow
from fastdensity.guidance import DensityGuidance, HighDensity, ReverseDiffusion, StochasticDensityGuidance
from fastdensity.guide import guide
from fastdensity.jvp import explain, jvp, trace_jvp
from fastdensity.log_density import bits_per_dimension
from fastdensity.mixture import GaussianMixture
from fastdensity.ops.rows import guide_prediction, guided_drift, guided_step
from fastdensity.ops.rows_prior import scale_prior
from fastdensity.ops.rows_result import StepResult
from fastdensity.ops.state import GuidanceState
from fastdensity.probes import probes
from fastdensity.sampling import LogProbResult, SampleResult, log_prob, sample
from fastdensity.schedules import EDM, VE, VP, RectifiedFlow, Schedule, karras_sigmas, lam_from_alpha_sigma

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "VE",
    "VP",
    "DensityGuidance",
    "DivergenceEstimate",
    "Flow",
    "GaussianMixture",
    "GuidanceState",
    "HighDensity",
    "LogProbResult",
    "RectifiedFlow",
    "ReverseDiffusion",
    "SampleResult",
    "Schedule",
    "StepResult",
    "StochasticDensityGuidance",
    "bits_per_dimension",
    "divergence",
    "explain",
    "from_epsilon",
    "guide",
    "guide_prediction",
    "guided_drift",
    "guided_step",
    "jvp",
    "karras_sigmas",
    "lam_from_alpha_sigma",
    "log_prob",
    "probes",
    "sample",
    "scale_prior",
    "score_alignment",
    "to_epsilon",
    "to_sample",
    "to_score",
    "trace_jvp",
]
