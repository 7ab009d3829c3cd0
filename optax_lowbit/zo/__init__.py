from optax_lowbit.zo import replay as replay
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.parallel import probe_parallel
from optax_lowbit.zo.sgd import zo_sgd

__all__ = (
    "Gaussian",
    "Noise",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "probe_parallel",
    "zo_sgd",
)
