from optax_lowbit.adapters.linen import intercept_linen, linen_kernel_axes
from optax_lowbit.adapters.lora import LoRA
from optax_lowbit.adapters.lora_matrix import LoRAMatrix
from optax_lowbit.adapters.mixtures import mix
from optax_lowbit.adapters.prefix import Prefix, prefix_mask
from optax_lowbit.adapters.prompt import Prompt
from optax_lowbit.adapters.virtual_tokens import prepend

__all__ = (
    "LoRA",
    "LoRAMatrix",
    "Prefix",
    "Prompt",
    "intercept_linen",
    "linen_kernel_axes",
    "mix",
    "prefix_mask",
    "prepend",
)
