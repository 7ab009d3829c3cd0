"""LoRA adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.qlora.peft_config import AdapterConfig
from optax_lowbit.qlora.safetensors_files import TensorFiles, json_text, read_json, write_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's name for a tensor of a module -> ours; of linear modules and of embeddings.
_ROLES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
_TABLE_ROLES = {
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}
# Names are matched with patterns of the config. Letters of a name; and names times letters of
# patterns.
_MAX_NAME, _MAX_WORK = 512, 2**26

# "a" `(r, n)`, "b" `(r, m)` and, of DoRA, "magnitude" `(m,)`; of a stack, with an axis in front.
Matrices = Mapping[str, Mapping[str, Any]]
# Leaf of a tree -> its module, or the modules of a stack.
Names = Mapping[str, str | Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is in PEFT's files; see :func:`read_adapter`.

    Attributes:
      config: What PEFT says of the adapters.
      matrices: By module, ``"a"`` ``(r, n)``, ``"b"`` ``(r, m)`` and, under ``config.use_dora``,
        ``"magnitude"`` ``(m,)``, for ``x W`` with ``W`` ``(n, m)``.
      others: By PyTorch name, tensors that are trained whole: of ``modules_to_save``, and biases.
      embeddings: The modules among them whose ``W`` is an embedding's, of ``n`` tokens.
    """

    config: AdapterConfig
    matrices: Matrices
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()


def read_adapter(folder: Any) -> Adapter:
    """LoRA adapters that PEFT has written: plain ones, rsLoRA and DoRA.

    Args:
      folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
      An :class:`Adapter` of NumPy arrays in the dtypes of the file.
      :func:`adapter_leaves` gives the tree for a model.

    Raises:
      ValueError: If a file is not what it has to be, or has what is not read, such as adapters of
        convolutions; it, and the tensor or field, are named.
      FileNotFoundError: If there is no such file.
      ImportError: Without safetensors.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> pair = {"a": jnp.ones((8, 64)), "b": jnp.zeros((8, 32))}
      >>> config = qlora.AdapterConfig(r=8, lora_alpha=16)
      >>> qlora.write_adapter(folder, qlora.Adapter(config=config, matrices={"q_proj": pair}))
      >>> adapter = qlora.read_adapter(folder)
      >>> adapter.config.target_modules, adapter.matrices["q_proj"]["b"].shape
      (('q_proj',), (8, 32))

    References:
      `PEFT <https://github.com/huggingface/peft>`_ 0.21. Its ``lora_B`` is ``(m, r)``.
    """
    folder = pathlib.Path(folder)
    path = folder / CONFIG
    try:
        config = AdapterConfig.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    files = TensorFiles(folder / TENSORS)
    matrices: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    embeddings = set()
    for name in files:
        module, suffix = _place(files.path, name)
        if suffix is None:
            others[module] = files[name]
            continue
        role = {**_ROLES, **_TABLE_ROLES}[suffix]
        if role in matrices.setdefault(module, {}):
            raise ValueError(f"{files.path}: {module!r} must be linear or an embedding, not both")
        matrices[module][role] = files[name].T if role == "b" else files[name]
        if suffix not in _ROLES:
            embeddings.add(module)
    if len(matrices) * sum(map(len, (*config.rank_pattern, *config.alpha_pattern))) > _MAX_WORK:
        raise ValueError(
            f"{path}: 'rank_pattern' and 'alpha_pattern' are too long for {len(matrices)} modules"
        )
    for module, arrays in matrices.items():
        _check_module(module, arrays, config, str(files.path))
    return Adapter(
        config=config, matrices=matrices, others=others, embeddings=frozenset(embeddings)
    )


def write_adapter(folder: Any, adapter: Adapter) -> None:
    """Writes adapters as PEFT does, byte for byte.

    Args:
      folder: Made if need be; without adapters.
      adapter: What to write. Arrays keep their dtypes.

    Returns:
      Nothing, when all is written.

    Raises:
      ValueError: If shapes or ``config`` do not fit the matrices, or adapters are there.
      TypeError: If ``config`` has what can't be written as JSON.
      OSError: If a file can't be written.
      ImportError: Without safetensors.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> pair = {"a": jnp.ones((4, 64)), "b": jnp.zeros((4, 32))}
      >>> config = qlora.AdapterConfig(r=4, lora_alpha=16, use_rslora=True)
      >>> qlora.write_adapter(folder, qlora.Adapter(config=config, matrices={"q_proj": pair}))
      >>> sorted(path.name for path in folder.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder, config = pathlib.Path(folder), adapter.config
    tensors = {}
    for module, arrays in adapter.matrices.items():
        _check_module(module, arrays, config, "adapter.matrices")
        is_table = module in adapter.embeddings
        _check_targeted(module, config, is_table)
        for suffix, role in (_TABLE_ROLES if is_table else _ROLES).items():
            if role in arrays:
                array = np.asarray(arrays[role])
                tensors[f"{_PREFIX}{module}.{suffix}"] = array.T if role == "b" else array
    for name, array in adapter.others.items():
        if _place(pathlib.Path("adapter.others"), _PREFIX + name)[1] is not None:
            raise ValueError(f"adapter.others has {name!r}, which is an adapter's")
        tensors[_PREFIX + name] = np.asarray(array)
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=tuple(sorted(adapter.matrices)))
    text = json_text(config.to_json(), "config")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, TENSORS):
        if (folder / name).exists():
            raise ValueError(f"{folder}: must have no {name} yet")
    write_file(folder / TENSORS, tensors)
    (folder / CONFIG).write_text(text)


def adapter_leaves(matrices: Matrices, names: Names) -> dict[str, dict[str, jax.Array]]:
    """Adapters by the leaves of a tree, those of layers in a stack stacked.

    Args:
      matrices: By module, as :attr:`Adapter.matrices`.
      names: Leaf of the tree, such as ``layers/attention/query/kernel``, -> its PyTorch module, or
        the modules of a stack in their order. Leaves whose modules have no adapters are left out.

    Returns:
      What ``adapters.LoRA.init`` gives for these leaves: ``{"a": ..., "b": ...}``, and
      ``"magnitude"`` of DoRA. The dtypes stay.

    Raises:
      ValueError: If some but not all modules of a stack have adapters, or differ in their ranks; or
        if an adapter's module is no leaf's.

    Examples:
      >>> import numpy as np
      >>> from optax_lowbit import qlora
      >>> pair = {"a": np.ones((8, 64)), "b": np.ones((8, 32))}
      >>> names = {"layers/query/kernel": ["layers.0.q_proj", "layers.1.q_proj"]}
      >>> matrices = {"layers.0.q_proj": pair, "layers.1.q_proj": pair}
      >>> leaves = qlora.adapter_leaves(matrices, names)
      >>> leaves["layers/query/kernel"]["b"].shape
      (2, 8, 32)
    """
    left = set(matrices)
    leaves = {}
    for leaf, modules in names.items():
        if isinstance(modules, str):
            if modules in matrices:
                leaves[leaf] = {role: jnp.asarray(x) for role, x in matrices[modules].items()}
                left.discard(modules)
            continue
        missing = [module for module in modules if module not in matrices]
        if len(missing) == len(modules):
            continue
        if missing:
            raise ValueError(f"{leaf!r} is a stack, of which {missing} have no adapters")
        stack = [matrices[module] for module in modules]
        if len({str({role: x.shape for role, x in arrays.items()}) for arrays in stack}) > 1:
            raise ValueError(f"{leaf!r} is a stack, whose adapters differ in their ranks")
        leaves[leaf] = jax.tree.map(lambda *xs: jnp.stack([*map(jnp.asarray, xs)]), *stack)
        left.difference_update(modules)
    if left:
        raise ValueError(f"names must have the modules of all adapters, and not {sorted(left)}")
    return leaves


def adapter_matrices(leaves: Matrices, names: Names) -> dict[str, dict[str, jax.Array]]:
    """The inverse of :func:`adapter_leaves`: adapters by module.

    Args:
      leaves: By leaf, as ``adapters.LoRA.init`` gives them, trained.
      names: As of :func:`adapter_leaves`.

    Returns:
      What :attr:`Adapter.matrices` is to be.

    Raises:
      ValueError: If a leaf is not in ``names``, or its stack is not as long.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters, qlora
      >>> lora = adapters.LoRA(rank=8, targets="query")
      >>> leaves = lora.init({"query": jnp.ones((2, 64, 32))}, key=0)
      >>> sorted(qlora.adapter_matrices(leaves, {"query": ["layers.0.q", "layers.1.q"]}))
      ['layers.0.q', 'layers.1.q']
    """
    matrices: dict[str, dict[str, jax.Array]] = {}
    for leaf, arrays in leaves.items():
        if leaf not in names:
            raise ValueError(f"names must have all leaves with adapters, and not {leaf!r}")
        modules = names[leaf]
        if isinstance(modules, str):
            matrices[modules] = dict(arrays)
            continue
        for role, x in arrays.items():
            if x.shape[0] != len(modules):
                raise ValueError(
                    f"{leaf!r}: {role!r} must be a stack of {len(modules)}, got shape {x.shape}"
                )
        for i, module in enumerate(modules):
            matrices[module] = {role: x[i] for role, x in arrays.items()}
    return matrices


def modules_of(names: Names, leaf: str) -> list[str]:
    """The modules of a leaf, one or those of a stack."""
    modules = names.get(leaf, ())
    return [modules] if isinstance(modules, str) else [*modules]


def _place(path: pathlib.Path, name: str) -> tuple[str, str | None]:
    """Module and suffix of an adapter's tensor; of others, the tensor's own name and None."""
    if not name.startswith(_PREFIX) or len(name) > _MAX_NAME:
        raise ValueError(
            f"{path}: names must begin with {_PREFIX!r} and have at most {_MAX_NAME} letters, "
            f"has {name[:_MAX_NAME]!r}"
        )
    for suffix in (*_ROLES, *_TABLE_ROLES):
        if name.endswith(f".{suffix}"):
            return name.removeprefix(_PREFIX).removesuffix(f".{suffix}"), suffix
    if "lora_" in name:
        known = [*{**_ROLES, **_TABLE_ROLES}]
        raise ValueError(f"{path}: {name!r} is none of {known}, which are read")
    return name.removeprefix(_PREFIX), None


def _check_module(
    module: str, arrays: Mapping[str, Any], config: AdapterConfig, where: str
) -> None:
    expected = {"a", "b", *(["magnitude"] if config.use_dora else [])}
    if arrays.keys() != expected:
        raise ValueError(
            f"{where}: {module!r} must have {sorted(expected)} for use_dora={config.use_dora}, "
            f"has {sorted(arrays)}"
        )
    rank = config.rank(module)
    a, b = np.shape(arrays["a"]), np.shape(arrays["b"])
    is_right = len(a) == len(b) == 2 and a[0] == b[0] == rank
    if is_right and "magnitude" in arrays:
        is_right = np.shape(arrays["magnitude"]) == b[1:]
    if not is_right:
        shapes = {role: np.shape(x) for role, x in arrays.items()}
        raise ValueError(
            f"{where}: {module!r} must have shapes a ({rank}, n), b ({rank}, m), magnitude (m,), "
            f"has {shapes}"
        )


def _check_targeted(module: str, config: AdapterConfig, is_table: bool) -> None:
    """Raise unless PEFT will look for the module's adapters; so that none is lost silently."""
    if not config.targets(module) or (is_table and config.target_modules == "all-linear"):
        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        given = {field: getattr(config, field) for field in fields if getattr(config, field)}
        raise ValueError(f"config.target_modules must name {module!r}, got {given}")
