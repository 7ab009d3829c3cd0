from optax_lowbit.optimizers.adam4bit import adam4bit, adamw4bit, scale_by_adam4bit
from optax_lowbit.optimizers.adam8bit import adam8bit, adamw8bit, scale_by_adam8bit
from optax_lowbit.optimizers.any_state import quantize_state
from optax_lowbit.optimizers.descent import fused_apply
from optax_lowbit.optimizers.describe import Description, describe
from optax_lowbit.optimizers.factor import factor4bit, scale_by_factor4bit
from optax_lowbit.optimizers.muon import muon4bit
from optax_lowbit.optimizers.policy import Policy
from optax_lowbit.optimizers.sgd import Trace4bitState, sgd4bit, sgd8bit, trace4bit
from optax_lowbit.optimizers.stochastic_rounding import apply_updates_stochastic
from optax_lowbit.optimizers.storage import FactoredMoment

__all__ = (
    "Description",
    "FactoredMoment",
    "Policy",
    "Trace4bitState",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "apply_updates_stochastic",
    "describe",
    "factor4bit",
    "fused_apply",
    "muon4bit",
    "quantize_state",
    "scale_by_adam4bit",
    "scale_by_adam8bit",
    "scale_by_factor4bit",
    "sgd4bit",
    "sgd8bit",
    "trace4bit",
)
