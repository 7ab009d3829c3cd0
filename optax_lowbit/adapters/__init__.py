from optax_lowbit.adapters.lora import LoRA, LoRAMatrix
from optax_lowbit.adapters.prefix import init_prefix, prefix_mask
from optax_lowbit.adapters.prompt import init_prompt
from optax_lowbit.adapters.virtual_tokens import prepend

__all__ = (
    "LoRA",
    "LoRAMatrix",
    "init_prefix",
    "init_prompt",
    "prefix_mask",
    "prepend",
)
