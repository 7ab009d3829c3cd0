from optax_lowbit.zo import replay as replay
from optax_lowbit.zo.adam import zo_adam
from optax_lowbit.zo.backpropagation import HybridOptimizer, HybridState, hybrid
from optax_lowbit.zo.blocks import BlockwiseOptimizer, blockwise
from optax_lowbit.zo.conservative import zo_sgd_conservative
from optax_lowbit.zo.diagnostics import Diagnosis, diagnose
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient, OneSided
from optax_lowbit.zo.forward_gradient import forward_grad
from optax_lowbit.zo.fzoo import fzoo
from optax_lowbit.zo.gradient_trees import EstimateGradientState, estimate_gradient, gradient
from optax_lowbit.zo.grid_sgd import zo_sgd_grid
from optax_lowbit.zo.hizoo import hizoo
from optax_lowbit.zo.hyperparameters import InjectedOptimizer, InjectedState, inject_hyperparams
from optax_lowbit.zo.low_rank import LowRank
from optax_lowbit.zo.lozo import lozo
from optax_lowbit.zo.masks import MagnitudeMask, RandomMask
from optax_lowbit.zo.microbatches import microbatched
from optax_lowbit.zo.momentum import zo_sgd_momentum
from optax_lowbit.zo.noise import Gaussian, Noise, Probe, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.parallel import probe_parallel
from optax_lowbit.zo.scales import qzo
from optax_lowbit.zo.sgd import zo_sgd
from optax_lowbit.zo.sign import zo_sgd_scalar_sign, zo_sgd_sign
from optax_lowbit.zo.sphere import Sphere
from optax_lowbit.zo.state import StepInfo, ZeroOrderState
from optax_lowbit.zo.subspace import Subspace

__all__ = (
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
    "LowRank",
    "MagnitudeMask",
    "Noise",
    "OneSided",
    "Probe",
    "Rademacher",
    "RandomMask",
    "Sphere",
    "StepInfo",
    "Subspace",
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
    "lozo",
    "microbatched",
    "probe_parallel",
    "qzo",
    "zo_adam",
    "zo_sgd",
    "zo_sgd_conservative",
    "zo_sgd_grid",
    "zo_sgd_momentum",
    "zo_sgd_scalar_sign",
    "zo_sgd_sign",
)
