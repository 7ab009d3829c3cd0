from typing import TYPE_CHECKING, Any

from optax_lowbit.kernels.quantized_matrix import (
    NF4,
    QuantizedMatrix,
    abstract_matrix,
    quantize_matrix,
)
from optax_lowbit.qlora.base import quantize_model, quantize_params
from optax_lowbit.qlora.bnb_files import BitsAndBytesFiles, read_bitsandbytes, write_bitsandbytes
from optax_lowbit.qlora.peft_adapters import from_peft, to_peft
from optax_lowbit.qlora.peft_config import AdapterConfig
from optax_lowbit.qlora.peft_files import (
    Adapter,
    adapter_leaves,
    adapter_matrices,
    read_adapter,
    write_adapter,
)
from optax_lowbit.qlora.placement import matrix_sharding
from optax_lowbit.qlora.streaming import QuantizedCheckpoint, quantize_checkpoint

if TYPE_CHECKING:
    from optax_lowbit.qlora.layers import QLinear, QLinearGeneral

__all__ = (
    "NF4",
    "Adapter",
    "AdapterConfig",
    "BitsAndBytesFiles",
    "QLinear",
    "QLinearGeneral",
    "QuantizedCheckpoint",
    "QuantizedMatrix",
    "abstract_matrix",
    "adapter_leaves",
    "adapter_matrices",
    "from_peft",
    "matrix_sharding",
    "quantize_checkpoint",
    "quantize_matrix",
    "quantize_model",
    "quantize_params",
    "read_adapter",
    "read_bitsandbytes",
    "to_peft",
    "write_adapter",
    "write_bitsandbytes",
)


def __getattr__(name: str) -> Any:
    """The layers, which need Flax, when they are asked for."""
    if name in ("QLinear", "QLinearGeneral"):
        from optax_lowbit.qlora import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
