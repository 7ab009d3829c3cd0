from optax_lowbit.zo.adam import zo_adam
from optax_lowbit.zo.conservative import zo_sgd_conservative
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient, OneSided
from optax_lowbit.zo.forward_gradient import forward_grad
from optax_lowbit.zo.fzoo import fzoo
from optax_lowbit.zo.hizoo import hizoo
from optax_lowbit.zo.momentum import zo_sgd_momentum
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.sgd import zo_sgd
from optax_lowbit.zo.sign import zo_sgd_scalar_sign, zo_sgd_sign

__all__ = (
    "Central",
    "Estimator",
    "ForwardGradient",
    "Gaussian",
    "Noise",
    "OneSided",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "forward_grad",
    "fzoo",
    "hizoo",
    "zo_adam",
    "zo_sgd",
    "zo_sgd_conservative",
    "zo_sgd_momentum",
    "zo_sgd_scalar_sign",
    "zo_sgd_sign",
)
