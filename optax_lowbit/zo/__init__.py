from optax_lowbit.zo.grid_sgd import zo_sgd_grid
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import StepInfo, ZeroOrderOptimizer, ZeroOrderState
from optax_lowbit.zo.scales import qzo
from optax_lowbit.zo.sgd import zo_sgd

__all__ = (
    "Gaussian",
    "Noise",
    "Probe",
    "Rademacher",
    "StepInfo",
    "ZeroOrderOptimizer",
    "ZeroOrderState",
    "qzo",
    "zo_sgd",
    "zo_sgd_grid",
)
