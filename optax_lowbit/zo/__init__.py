from optax_lowbit.zo.estimators import Central, ForwardGradient, OneSided
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.sgd import zo_sgd

__all__ = (
    "Central",
    "ForwardGradient",
    "Gaussian",
    "Noise",
    "OneSided",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "zo_sgd",
)
