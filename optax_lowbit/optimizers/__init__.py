from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.storage import FactoredMoment
from optax_lowbit.optimizers.accumulation import accumulate
from optax_lowbit.optimizers.adagrad import ScaleByRssWithCountState, adagrad8bit
from optax_lowbit.optimizers.adam4bit import adam4bit, adamw4bit, scale_by_adam4bit
from optax_lowbit.optimizers.adam8bit import adam8bit, adamw8bit, scale_by_adam8bit
from optax_lowbit.optimizers.ademamix import ademamix4bit
from optax_lowbit.optimizers.any_state import quantize_state
from optax_lowbit.optimizers.corrected_bfloat16 import (
    CorrectedBfloat16State,
    correct_bfloat16,
    join_bfloat16,
    split_bfloat16,
)
from optax_lowbit.optimizers.descent import fused_apply
from optax_lowbit.optimizers.describe import Description, describe
from optax_lowbit.optimizers.diagnostics import DiagnosticsState, with_diagnostics
from optax_lowbit.optimizers.factor import factor4bit, scale_by_factor4bit
from optax_lowbit.optimizers.lion import lion4bit, lion8bit
from optax_lowbit.optimizers.muon import muon4bit
from optax_lowbit.optimizers.rmsprop import rmsprop8bit
from optax_lowbit.optimizers.sgd import Trace4bitState, sgd4bit, sgd8bit, trace4bit
from optax_lowbit.optimizers.stochastic_rounding import apply_updates_stochastic

__all__ = (
    "CorrectedBfloat16State",
    "Description",
    "DiagnosticsState",
    "FactoredMoment",
    "Policy",
    "ScaleByRssWithCountState",
    "Trace4bitState",
    "accumulate",
    "adagrad8bit",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "ademamix4bit",
    "apply_updates_stochastic",
    "correct_bfloat16",
    "describe",
    "factor4bit",
    "fused_apply",
    "join_bfloat16",
    "lion4bit",
    "lion8bit",
    "muon4bit",
    "quantize_state",
    "rmsprop8bit",
    "scale_by_adam4bit",
    "scale_by_adam8bit",
    "scale_by_factor4bit",
    "sgd4bit",
    "sgd8bit",
    "split_bfloat16",
    "trace4bit",
    "with_diagnostics",
)
