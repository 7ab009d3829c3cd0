from optax_lowbit.checkpoint.files import restore, save, save_args
from optax_lowbit.checkpoint.peers import import_state
from optax_lowbit.checkpoint.states import convert_state

__all__ = (
    "convert_state",
    "import_state",
    "restore",
    "save",
    "save_args",
)
