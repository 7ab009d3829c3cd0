from optax_lowbit.zo.low_rank import LowRank
from optax_lowbit.zo.lozo import lozo
from optax_lowbit.zo.masks import MagnitudeMask, RandomMask
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.sgd import zo_sgd
from optax_lowbit.zo.sphere import Sphere
from optax_lowbit.zo.subspace import Subspace

__all__ = (
    "Gaussian",
    "LowRank",
    "MagnitudeMask",
    "Noise",
    "Probe",
    "Rademacher",
    "RandomMask",
    "Sphere",
    "StepInfo",
    "Subspace",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "lozo",
    "zo_sgd",
)
