"""What training needs, before it is run: ``plan``, and ``python -m optax_lowbit.memory``."""

from optax_lowbit.memory.architectures import abstract_params
from optax_lowbit.memory.layout import abstract_state
from optax_lowbit.memory.planner import MemoryPlan, plan
from optax_lowbit.memory.sizes import Fit
from optax_lowbit.memory.targets import CompiledStep

__all__ = (
    "CompiledStep",
    "Fit",
    "MemoryPlan",
    "abstract_params",
    "abstract_state",
    "plan",
)
