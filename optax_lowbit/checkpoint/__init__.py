from optax_lowbit.checkpoint.files import restore, save, save_args
from optax_lowbit.checkpoint.states import convert_state

__all__ = (
    "convert_state",
    "restore",
    "save",
    "save_args",
)
