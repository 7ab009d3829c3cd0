from optax_lowbit.zo.adam import zo_adam
from optax_lowbit.zo.blockwise import BlockwiseOptimizer, blockwise
from optax_lowbit.zo.conservative import zo_sgd_conservative
from optax_lowbit.zo.diagnostics import Diagnosis, diagnose
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient, OneSided
from optax_lowbit.zo.forward_gradient import forward_grad
from optax_lowbit.zo.fzoo import fzoo
from optax_lowbit.zo.gradient import EstimateGradientState, estimate_gradient, gradient
from optax_lowbit.zo.hizoo import HESSIAN_8BIT, hizoo
from optax_lowbit.zo.hybrid import HybridOptimizer, HybridState, hybrid
from optax_lowbit.zo.hyperparameters import InjectedOptimizer, InjectedState, inject_hyperparams
from optax_lowbit.zo.microbatches import microbatched
from optax_lowbit.zo.momentum import zo_sgd_momentum
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.sgd import zo_sgd
from optax_lowbit.zo.sign import zo_sgd_scalar_sign, zo_sgd_sign

__all__ = (
    "HESSIAN_8BIT",
    "BlockwiseOptimizer",
    "Central",
    "Diagnosis",
    "EstimateGradientState",
    "Estimator",
    "ForwardGradient",
    "Gaussian",
    "HybridOptimizer",
    "HybridState",
    "InjectedOptimizer",
    "InjectedState",
    "Noise",
    "OneSided",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "blockwise",
    "diagnose",
    "estimate_gradient",
    "forward_grad",
    "fzoo",
    "gradient",
    "hizoo",
    "hybrid",
    "inject_hyperparams",
    "microbatched",
    "zo_adam",
    "zo_sgd",
    "zo_sgd_conservative",
    "zo_sgd_momentum",
    "zo_sgd_scalar_sign",
    "zo_sgd_sign",
)
