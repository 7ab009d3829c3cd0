"""Which numbers of a decoder train: all of them, or a small tree beside the frozen ones."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.errors import UsageError
from examples.llm.models.building import build_model
from examples.llm.models.config import EncoderConfig, ModelConfig
from examples.llm.models.decoder import Cache, Decoder, Generator
from examples.llm.models.encoder import Classifier
from examples.llm.models.huggingface_names import CLASS_MODULES, module_names, names_of
from examples.llm.models.parameters import Keep, tensors_of
from optax_lowbit import adapters, qlora

SCHEMES = ("full", "lora", "qlora", "prefix", "prompt")
LORA = adapters.LoRA(rank=8, alpha=16.0, targets=r"(query|value)/kernel$")
# All linear layers, rank and alpha of the QLoRA paper (arXiv 2305.14314, appendix B.2).
QLORA = adapters.LoRA(rank=64, alpha=16.0, targets=r"/(attention|feed_forward)/.*kernel$")
# Linear layers that stay in floats under "qlora": the output layer, or a classifier's.
_IN_FLOATS = r"^head/"
PREFIX, PROMPT = adapters.Prefix(num_tokens=5), adapters.Prompt(num_tokens=10)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TunedModel:
    """A model with virtual tokens that were trained beside it, as losses see it.

    Attributes:
      decoder: frozen; an encoder takes the same tokens.
      virtual: its prefix or its prompt, by the name of the argument.
    """

    decoder: Any
    virtual: dict[str, Any]

    def features(self, tokens: jax.Array, segments: jax.Array | None = None, /) -> jax.Array:
        """See `Decoder.features`."""
        return self.decoder.features(tokens, segments, **self.virtual)

    def logits(self, features: jax.Array, /) -> jax.Array:
        """See `Decoder.logits`."""
        return self.decoder.logits(features)

    def class_logits(self, tokens: jax.Array, mask: jax.Array, /) -> jax.Array:
        """See `Classifier.class_logits`."""
        return self.decoder.class_logits(tokens, mask, **self.virtual)

    def remember(
        self, tokens: jax.Array, segments: jax.Array, /, *, room: int
    ) -> tuple[jax.Array, Cache]:
        """See `Decoder.remember`."""
        return self.decoder.remember(tokens, segments, room=room, **self.virtual)

    def extend(self, tokens: jax.Array, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """See `Decoder.extend`; the cache has the virtual tokens."""
        return self.decoder.extend(tokens, cache)


class Tuning(NamedTuple):
    """A decoder in two trees.

    Attributes:
      trainable: what an optimizer is given; float32, but for full tuning, where it is all of the
        decoder's parameters as they are.
      frozen: the rest, to be passed on to `model` untouched.
      model: `(trainable, frozen) -> model`; the model sees no virtual tokens in what it is given
        or gives. A pure function; it holds no arrays. With a third argument, the int32 number of
        a batch to train on, inputs of adapters drop out where there is dropout.
      lora: which adapters are in `trainable`, if it is these.
    """

    trainable: Any
    frozen: Any
    model: Callable[..., Generator]
    lora: adapters.LoRA | None = None

    def logits(self, trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        """Map int32 `(batch, length)` to float32 `(batch, length, vocabulary_size)`."""
        model = self.model(trainable, frozen)
        return model.logits(model.features(tokens))


def virtual_tokens(scheme: str) -> int:
    """Return how many positions in front of a text are taken by what trains under a scheme."""
    own = {"prefix": PREFIX, "prompt": PROMPT}.get(scheme)
    return 0 if own is None else own.num_tokens


def check_context(config: ModelConfig, sequence_length: int, scheme: str) -> None:
    """Raise a `UsageError` if a model does not take texts of so many tokens.

    Args:
      config: of the model.
      sequence_length: tokens of a text.
      scheme: one of `SCHEMES`, which may put virtual tokens in front.
    """
    virtual = virtual_tokens(scheme)
    if sequence_length + virtual > config.context_length:
        more = f" and {virtual} virtual ones of {scheme} tuning" if virtual else ""
        raise UsageError(
            f"--sequence-length: the model takes at most {config.context_length} "
            f"tokens, got {sequence_length}{more}"
        )


def adapters_of(
    scheme: str, rank: int | None, alpha: float | None, dropout: float
) -> adapters.LoRA | None:
    """Return the adapters of a scheme, its own but for what is given; None if it has none.

    Args:
      scheme: one of `SCHEMES`.
      rank: of the adapters; None for the scheme's own.
      alpha: the product of the adapters is scaled by `alpha / rank`; None for the scheme's own.
      dropout: share of the adapters' inputs that is dropped in training.
    """
    own = {"lora": LORA, "qlora": QLORA}.get(scheme)
    if own is None:
        return None
    return replace(
        own,
        rank=own.rank if rank is None else rank,
        alpha=own.alpha if alpha is None else alpha,
        dropout=dropout,
    )


def tuned(
    scheme: str,
    graph: nnx.GraphDef[Decoder],
    parameters: Any,
    key: jax.Array | int,
    *,
    lora: adapters.LoRA | None = None,
    prefix: adapters.Prefix = PREFIX,
    prompt: adapters.Prompt = PROMPT,
) -> Tuning:
    """Return what trains under `scheme`, initialized so that training starts from the decoder.

    Args:
      scheme: one of `SCHEMES`.
      graph: structure of the decoder.
      parameters: its parameters, a nested dict of arrays; under "qlora" matrices may be in 4 bits.
      key: a `jax.random.key` or a seed.
      lora: the adapters under "lora" and "qlora"; by default `LORA` and `QLORA`.
      prefix: the virtual tokens under "prefix".
      prompt: the virtual tokens under "prompt".
    """
    if scheme == "full":
        return _full(graph, parameters)
    if scheme == "lora":
        found = _lora(build_model(graph, parameters), key, lora or LORA)
    elif scheme == "qlora":
        base = qlora.quantize_model(build_model(graph, parameters), exclude=_IN_FLOATS)
        found = _lora(base, key, lora or QLORA)
    elif scheme == "prefix":
        found = _prefix(graph, parameters, key, prefix)
    elif scheme == "prompt":
        found = _prompt(graph, parameters, key, prompt)
    else:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    is_classifier = isinstance(nnx.eval_shape(build_model, graph, parameters), Classifier)
    return _with_head(found) if is_classifier else found


def kept_as(scheme: str, dtype: str | None) -> Keep:
    """Return what makes of a tensor of a file, as it is read, what a scheme of tuning needs.

    Of floats of the file, no more is held than of one tensor: they are cast, and under "qlora" the
    matrices are in 4 bits at once. It raises a `UsageError` for a matrix that is in 4 bits already
    under a scheme that is for floats.

    Args:
      scheme: one of `SCHEMES`.
      dtype: of the base; None for float32 on CPUs and where all of it trains, else bfloat16.
    """
    own = jnp.dtype(base_dtype(scheme, dtype))

    def kept(path: str, x: Any) -> Any:
        if isinstance(x, qlora.QuantizedMatrix):
            if scheme != "qlora":
                raise UsageError(
                    f"--tuning: the model's matrices are in 4 bits: needs qlora, got {scheme}"
                )
            return replace(x, rows=replace(x.rows, dtype=own))
        x = x.astype(own, copy=False)
        is_target = path.endswith("/kernel") and not re.search(_IN_FLOATS, path)
        return qlora.quantize_matrix(x) if scheme == "qlora" and is_target else x

    return kept


def base_parameters(parameters: Any, scheme: str, dtype: str | None) -> Any:
    """Return a decoder's parameters, stacks and all, as `kept_as` has them tensor by tensor."""
    keep = kept_as(scheme, dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: keep(jax.tree_util.keystr(path, simple=True, separator="/"), x),
        parameters,
        is_leaf=lambda x: isinstance(x, qlora.QuantizedMatrix),
    )


def base_dtype(scheme: str, dtype: str | None) -> str:
    """Return the dtype of a base for which `kept_as` is given this one."""
    if dtype is not None:
        return dtype
    is_float32 = scheme == "full" or jax.default_backend() == "cpu"
    return "float32" if is_float32 else "bfloat16"


def save_adapter(folder: Path, tuning: Tuning, trainable: Any) -> None:
    """Write adapters in PEFT's files, for the same model in PyTorch.

    Args:
      folder: is created.
      tuning: of the model, with adapters.
      trainable: what `Tuning.trainable` has become.
    """
    assert tuning.lora is not None
    model: Any = tuning.model(trainable, tuning.frozen)
    leaves = tuning.lora.extract(model)
    names = {path: m for path, m in module_names(model.config).items() if path in leaves}
    adapter = qlora.to_peft(tuning.lora, leaves, names)
    if isinstance(model, Classifier):
        adapter = _with_trained_head(adapter, model.config, trainable["head"])
    qlora.write_adapter(folder, adapter)


def whole_model(tuning: Tuning, trainable: Any) -> Any:
    """Return the decoder or encoder that was trained, adapters merged into their matrices."""
    model = tuning.model(trainable, tuning.frozen)
    return model if tuning.lora is None else tuning.lora.unwrap(model)


def _with_trained_head(adapter: qlora.Adapter, config: EncoderConfig, head: Any) -> qlora.Adapter:
    """The files' tensors of a head that was trained whole."""
    others = tensors_of(names_of(config), {"head": head})
    modules = CLASS_MODULES[config.family.name]
    return replace(adapter, config=replace(adapter.config, modules_to_save=modules), others=others)


def _full(graph: nnx.GraphDef[Decoder], parameters: Any) -> Tuning:
    def model(trainable, frozen, number=None):
        return build_model(graph, trainable)

    return Tuning(parameters, {}, model)


def _lora(base: Decoder, key, lora: adapters.LoRA) -> Tuning:
    wrapped = lora.wrap(base, key)
    judged_graph, trainable, frozen = nnx.split(wrapped, nnx.LoRAParam, ...)
    wrapped.train()
    trained_graph = nnx.graphdef(wrapped)

    def model(trainable, frozen, number=None):
        if number is None:
            return nnx.merge(judged_graph, nnx.State(trainable), nnx.State(frozen))
        frozen = jax.tree.map(partial(_of_batch, number), frozen)
        return nnx.merge(trained_graph, nnx.State(trainable), nnx.State(frozen))

    return Tuning(nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen), model, lora)


def _of_batch(number: jax.Array, x: jax.Array) -> jax.Array:
    """A key of dropout, or one of each layer, for a batch; what is no key is the same for all."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(x.reshape(-1), number)
    return keys.reshape(x.shape)


def _with_head(tuning: Tuning) -> Tuning:
    """Train the head of a classifier, too: it may be new."""
    frozen = dict(tuning.frozen)
    trainable = {"beside": tuning.trainable, "head": frozen.pop("head")}

    def model(trainable, frozen, number=None):
        return tuning.model(trainable["beside"], {**frozen, "head": trainable["head"]}, number)

    return tuning._replace(trainable=trainable, frozen=frozen, model=model)


def _prefix(graph, parameters, key, prefix: adapters.Prefix) -> Tuning:
    decoder = build_model(graph, parameters)
    vocabulary_size = len(parameters["embedding"]["embedding"])
    trainable = prefix.init(decoder.keys_and_values, key, vocabulary_size=vocabulary_size)

    def model(trainable, frozen, number=None):
        return TunedModel(build_model(graph, frozen), {"prefix": trainable})

    return Tuning(trainable, parameters, model)


def _prompt(graph, parameters, key, prompt: adapters.Prompt) -> Tuning:
    trainable = {"prompt": prompt.init(parameters["embedding"]["embedding"], key)}

    def model(trainable, frozen, number=None):
        return TunedModel(build_model(graph, frozen), trainable)

    return Tuning(trainable, parameters, model)
