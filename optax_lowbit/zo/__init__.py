from optax_lowbit.zo.backpropagation import HybridOptimizer, HybridState, hybrid
from optax_lowbit.zo.blocks import BlockwiseOptimizer, blockwise
from optax_lowbit.zo.diagnostics import Diagnosis, diagnose
from optax_lowbit.zo.gradient_trees import EstimateGradientState, estimate_gradient, gradient
from optax_lowbit.zo.hyperparameters import InjectedOptimizer, InjectedState, inject_hyperparams
from optax_lowbit.zo.microbatches import microbatched
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.sgd import zo_sgd

__all__ = (
    "BlockwiseOptimizer",
    "Diagnosis",
    "EstimateGradientState",
    "Gaussian",
    "HybridOptimizer",
    "HybridState",
    "InjectedOptimizer",
    "InjectedState",
    "Noise",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "blockwise",
    "diagnose",
    "estimate_gradient",
    "gradient",
    "hybrid",
    "inject_hyperparams",
    "microbatched",
    "zo_sgd",
)
