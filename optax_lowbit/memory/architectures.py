"""Language models by the shapes of their parameters: published ones, and those of `config.json`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A transformer, as far as its parameters and a training step depend on it."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    # Inner width of the feed-forward block.
    inner: int
    # Heads of keys and values, each for several query heads; None: as many as there are queries.
    key_value_heads: int | None = None
    # Width of a head; None: width / heads.
    head_size: int | None = None
    # Rows of the table of positions; 0: rotary positions.
    positions: int = 0
    # "rms": a scale; "layer": a scale and a bias.
    norm: Literal["rms", "layer"] = "rms"
    # Whether norms come before the blocks, with another after the last, or after each block.
    norm_first: bool = True
    # Whether the feed-forward block multiplies by a gate.
    gated: bool = True
    # Which matrices of a layer have a bias.
    biases: Literal["none", "qkv", "all"] = "none"
    # Whether the output matrix is the transposed embedding.
    tied: bool = False
    # Width of the embedding, where matrices lead from there to `width` and back.
    embedding_width: int | None = None
    # An encoder: no causal mask, embeddings of segments, normed embeddings, a pooler, no head.
    encoder: bool = False

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head_size or self.width // self.heads)

    @property
    def key_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.query_width // self.heads * (self.key_value_heads or self.heads)


def _llama(vocabulary: int, width: int, layers: int, heads: int, inner: int, **others: Any):
    return Architecture(
        vocabulary=vocabulary, width=width, layers=layers, heads=heads, inner=inner, **others
    )


def _gpt2(width: int, layers: int, heads: int):
    return Architecture(
        vocabulary=50257, width=width, layers=layers, heads=heads, inner=4 * width,
        positions=1024, norm="layer", gated=False, biases="all", tied=True,
    )  # fmt: skip


def _opt(width: int, layers: int, heads: int, **others: Any):
    # The table of positions has two rows that are never used.
    return Architecture(
        vocabulary=50272, width=width, layers=layers, heads=heads, inner=4 * width,
        positions=2050, norm="layer", gated=False, biases="all", tied=True, **others,
    )  # fmt: skip


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama-7b": _llama(32000, 4096, 32, 32, 11008),
    "llama-13b": _llama(32000, 5120, 40, 40, 13824),
    "llama-33b": _llama(32000, 6656, 60, 52, 17920),
    "llama-65b": _llama(32000, 8192, 80, 64, 22016),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 14336, key_value_heads=8),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 28672, key_value_heads=8),
    "mistral-7b": _llama(32000, 4096, 32, 32, 14336, key_value_heads=8),
    "smollm2-135m": _llama(49152, 576, 30, 9, 1536, key_value_heads=3, tied=True),
    "smollm2-360m": _llama(49152, 960, 32, 15, 2560, key_value_heads=5, tied=True),
    "smollm2-1.7b": _llama(49152, 2048, 24, 32, 8192, tied=True),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, norm_first=False, embedding_width=512),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "roberta-large": Architecture(
        vocabulary=50265, width=1024, layers=24, heads=16, inner=4096, positions=514,
        norm="layer", norm_first=False, gated=False, biases="all", encoder=True,
    ),
}  # fmt: skip


def architecture(model: str | os.PathLike[str] | Mapping[str, Any]) -> Architecture:
    """The architecture of a published model, or of a Hugging Face configuration.

    Args:
      model: A name of `ARCHITECTURES`; the path of a ``config.json``; or what stands in one.

    Raises:
      ValueError: If there is no such model, or one of a type that is not known.
    """
    if isinstance(model, Mapping):
        return _from_config(model)
    if isinstance(model, str) and model.lower() in ARCHITECTURES:
        return ARCHITECTURES[model.lower()]
    path = pathlib.Path(model)
    if path.is_file():
        try:
            return _from_config(json.loads(path.read_text()))
        except ValueError as error:  # of its text, too
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(
        f"model must be the path of a config.json or one of {', '.join(ARCHITECTURES)}; "
        f"got {os.fspath(model)!r}"
    )


def _from_config(config: Any) -> Architecture:
    if not isinstance(config, Mapping):
        raise ValueError(f"a config.json must have an object, got {type(config).__name__}")
    kind: Any = config.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(
            f"model_type of a config.json must be one of {', '.join(_READERS)}; got {kind!r}"
        )
    missing = [name for name in _REQUIRED[kind] if name not in config]
    if missing:
        raise ValueError(f"the config.json of a model of type {kind!r} lacks {', '.join(missing)}")
    for name in (*_REQUIRED[kind], *_SIZES):
        value = config.get(name)
        if name in _REQUIRED[kind] or value is not None:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int in a config.json, got {value!r}")
    fixed = _FIXED | _FIXED_OF.get(kind, {})
    for name, needed in fixed.items():
        if name in config and config[name] != needed:
            raise ValueError(f"{name} must be {needed} in a config.json, got {config[name]}")
    return _READERS[kind](config)


def _read_llama(config: Mapping[str, Any]) -> Architecture:
    biases: Any = "qkv" if config["model_type"] == "qwen2" else "none"
    return _llama(
        config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
        config["num_attention_heads"], config["intermediate_size"],
        key_value_heads=config.get("num_key_value_heads"), head_size=config.get("head_dim"),
        tied=config.get("tie_word_embeddings", False), biases=biases,
    )  # fmt: skip


def _read_gpt2(config: Mapping[str, Any]) -> Architecture:
    width = config["n_embd"]
    return dataclasses.replace(
        _gpt2(width, config["n_layer"], config["n_head"]),
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
        inner=config.get("n_inner") or 4 * width,
    )


def _read_opt(config: Mapping[str, Any]) -> Architecture:
    width, embedding_width = config["hidden_size"], config.get("word_embed_proj_dim")
    return dataclasses.replace(
        _opt(width, config["num_hidden_layers"], config["num_attention_heads"]),
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"] + 2,
        inner=config["ffn_dim"],
        norm_first=config.get("do_layer_norm_before", True),
        embedding_width=None if embedding_width == width else embedding_width,
    )


def _read_roberta(config: Mapping[str, Any]) -> Architecture:
    return dataclasses.replace(
        ARCHITECTURES["roberta-large"],
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        inner=config["intermediate_size"],
        positions=config["max_position_embeddings"],
    )


# Where a configuration says otherwise, there are parameters that nobody here knows of.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "add_cross_attention": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "type_vocab_size": 1,
}
_FIXED_OF: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True},
    "opt": {"tie_word_embeddings": True},
}
# What a configuration may leave out, or have null.
_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim")
_COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_READERS: Mapping[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "gpt2": _read_gpt2,
    "opt": _read_opt,
    "roberta": _read_roberta,
}
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "llama": (*_COMMON, "intermediate_size"),
    "mistral": (*_COMMON, "intermediate_size", "num_key_value_heads"),
    "qwen2": (*_COMMON, "intermediate_size"),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
    "opt": (*_COMMON, "ffn_dim", "max_position_embeddings"),
    "roberta": (*_COMMON, "intermediate_size", "max_position_embeddings"),
}


def abstract_params(
    model: str | os.PathLike[str] | Mapping[str, Any] | Architecture,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """The parameters of a model as `jax.ShapeDtypeStruct`: exactly the published number of them.

    Those of the layers are stacked along a first axis, as `jax.lax.scan` over layers wants them;
    an optimizer decides on such a stack as a whole. Matrices are ``(inputs, outputs)``.
    ``roberta-large`` is the encoder with its pooler and without a head of a task.

    Args:
      model: A name, such as ``"llama-7b"``; the path of a Hugging Face ``config.json``; or what
        stands in one (``model_type`` llama, mistral, qwen2, gpt2, opt or roberta).
      dtype: Dtype of all parameters.

    Returns:
      A dict of abstract arrays.

    Raises:
      ValueError: If there is no such model or its type is not known; the message lists what is.

    Examples:
      >>> import jax
      >>> from optax_lowbit.memory import abstract_params
      >>> params = abstract_params("llama-7b", "bfloat16")
      >>> f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
      '6,738,415,616'
      >>> params["layers"]["gate"]
      ShapeDtypeStruct(shape=(32, 4096, 11008), dtype=bfloat16)
    """
    a = model if isinstance(model, Architecture) else architecture(model)
    embedding_width = a.embedding_width or a.width
    shapes: dict[str, Any] = {
        "embedding": (a.vocabulary, embedding_width),
        "layers": _layer_shapes(a),
    }
    if a.positions:
        shapes["positions"] = (a.positions, a.width)
    if a.embedding_width:
        shapes["embedding_in"] = (a.embedding_width, a.width)
        shapes["embedding_out"] = (a.width, a.embedding_width)
    if a.encoder:
        shapes["segments"] = (1, a.width)
        shapes["embedding_norm"] = _norm_shapes(a, (a.width,))
        shapes["pooler"] = (a.width, a.width)
        shapes["pooler_bias"] = (a.width,)
    elif not a.tied:
        shapes["head"] = (embedding_width, a.vocabulary)
    if a.norm_first:
        shapes["final_norm"] = _norm_shapes(a, (a.width,))
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _layer_shapes(a: Architecture) -> dict[str, Any]:
    matrices = {
        "query": (a.width, a.query_width),
        "key": (a.width, a.key_width),
        "value": (a.width, a.key_width),
        "output": (a.query_width, a.width),
        "up": (a.width, a.inner),
        "down": (a.inner, a.width),
    }
    if a.gated:
        matrices["gate"] = (a.width, a.inner)
    biased = {"none": (), "qkv": ("query", "key", "value"), "all": tuple(matrices)}[a.biases]
    shapes: dict[str, Any] = {name: (a.layers, *shape) for name, shape in matrices.items()}
    shapes |= {f"{name}_bias": (a.layers, matrices[name][-1]) for name in biased}
    shapes |= {
        name: _norm_shapes(a, (a.layers, a.width)) for name in ("attention_norm", "inner_norm")
    }
    return shapes


def _norm_shapes(a: Architecture, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"scale": shape} if a.norm == "rms" else {"scale": shape, "bias": shape}
