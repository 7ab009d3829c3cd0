"""What runs need, before any is started: shapes, and steps that are compiled and not run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from examples.llm.errors import UsageError
from examples.llm.models import opening
from examples.llm.models.building import abstract_model
from examples.llm.models.config import DecoderConfig, ModelConfig
from examples.llm.models.config_fields import ConfigFields
from examples.llm.models.huggingface_config import read_config
from examples.llm.models.json_files import read_object
from examples.llm.models.opening import NAMED_MODELS, named_model, open_model
from examples.llm.program.configuration import settings_as_json
from examples.llm.program.settings import Settings, target_of
from examples.llm.text import TokenWindows
from examples.llm.training.layout import AXES, Layout, mesh_sizes
from examples.llm.training.methods import METHODS
from examples.llm.training.problems import TextProblem
from examples.llm.training.steps import TrainState
from examples.llm.training.trainer import Recipe, Trainer
from examples.llm.training.tuning import Tuning, base_parameters, check_context, tuned
from optax_lowbit import qlora
from optax_lowbit.kernels.backends import KERNELS, Backend
from optax_lowbit.memory import plan
from optax_lowbit.memory.targets import platform_of

# Of models whose weights are elsewhere.
_PUBLISHED = Path(opening.__file__).with_name("published")
_UNITS = {"MiB": 2**20, "GiB": 2**30}
_PARTS = ("parameters", "adapters", "state", "gradients", "temporaries", "total")


@dataclass(frozen=True)
class RunPlan:
    """What one device needs for a run of a method, in bytes.

    Attributes:
      method: its name.
      devices: how many share it; each needs this.
      trainable: numbers that train.
      parameters: of the model.
      adapters: of what trains beside it, nothing under full tuning.
      state: of the optimizer.
      gradients: of all gradients at once; none without backpropagation.
      temporaries: of the compiled step: activations, copies, and gradients as far as they are
        there at a time.
      total: all that the compiled step needs.
    """

    method: str
    devices: int
    trainable: int
    parameters: int
    adapters: int
    state: int
    gradients: int
    temporaries: int
    total: int


def show_plans(settings: Settings, console: Console) -> None:
    """Plan a run of every method, show a table, and write `plan.json` to the output folder."""
    config = read_shape(settings.model, settings.data)
    check_context(config, settings.sequence_length, settings.tuning)
    plans = []
    for method in settings.method:
        with console.status(f"compiling a step of {method} for {settings.plan_for}"):
            plans.append(plan_run(settings, config, method))
    console.print(_table(settings, plans))
    console.print("Gradients are all at once; temporaries have those that are there at a time.")
    path = settings.output / "plan.json"
    content = {"settings": settings_as_json(settings), "plans": [asdict(plan) for plan in plans]}
    path.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"Numbers in {path}", soft_wrap=True)


def _table(settings: Settings, plans: Sequence[RunPlan]) -> Table:
    is_large = max(found.total for found in plans) >= _UNITS["GiB"]
    unit = "GiB" if is_large else "MiB"
    table = Table(
        title=f"{settings.model}, {settings.tuning} tuning, {settings.batch_size} x "
        f"{settings.sequence_length} tokens, {settings.plan_for}: {unit} of a device"
    )
    table.add_column("method", no_wrap=True)
    for heading in _PARTS:
        table.add_column(heading, justify="right")
    for found in plans:
        sizes = (getattr(found, part) / _UNITS[unit] for part in _PARTS)
        table.add_row(found.method, *(f"{size:,.2f}" for size in sizes))
    return table


def published_models() -> dict[str, Path]:
    """Return the shapes of published models that can be planned by name: `config.json` files."""
    return {path.stem: path for path in sorted(_PUBLISHED.glob("*.json"))}


def read_shape(model: str, data: Path) -> DecoderConfig:
    """Return the shape of a model that need not be at hand.

    Args:
      model: what `open_model` can open, a published model's name, a `config.json` of Hugging
        Face's, or a folder with one; no weights are read.
      data: see `named_model`.

    Raises:
      UsageError: there is none, or it is no decoder that is known.
    """
    path = published_models().get(model.lower(), Path(model))
    path = path / "config.json" if (path / "config.json").is_file() else path
    if path.suffix == ".json":
        config = _config_of_file(path)
    elif path.exists() or model in NAMED_MODELS:
        config = open_model(named_model(model, data)).config
    else:
        known = ", ".join((*NAMED_MODELS, *published_models()))
        raise UsageError(f"--model: {model} is neither a file, nor a folder, nor one of {known}")
    if not isinstance(config, DecoderConfig):
        raise UsageError(f"--plan: {model} is an encoder, and only decoders can be planned")
    return config


def _config_of_file(path: Path) -> ModelConfig:
    return read_config(ConfigFields(path, read_object(path)))


def plan_run(settings: Settings, config: DecoderConfig, method: str) -> RunPlan:
    """Plan a run on windows of text; nothing is allocated, and nothing run.

    Raises:
      UsageError: there is no such target, or its compiler is missing or gives up.
    """
    target = target_of(settings.plan_for)
    recipe = _recipe_for(settings, method, target)
    tuning, layout = abstract_tuning(config, recipe, target), _abstract_layout(settings)
    recipe = _with_kernels(recipe, _kernels(target), tuning.trainable)
    trainer = Trainer(Path(), recipe, _windows_problem(settings), layout)
    trainer.adopt(tuning)
    optimizer = trainer.optimizer()

    def init(trainable: Any) -> Any:
        return optimizer.init(trainable, 0)

    arguments = _arguments(settings, tuning, init, layout)
    (trainable, _), _, frozen, _ = arguments
    shardings = None if layout is None else _specs(arguments[0])
    is_full = settings.tuning == "full"
    try:
        found = plan(
            trainable if is_full else frozen,
            # Of which only the state is asked for, whatever kind of optimizer it is of.
            optax.identity()._replace(init=init),
            adapters=None if is_full else trainable,
            step=jax.jit(trainer.take_step, donate_argnums=0, out_shardings=shardings),
            arguments=arguments,
            target=target,
        )
    except (ValueError, ModuleNotFoundError, jax.errors.JaxRuntimeError) as error:
        raise UsageError(f"--plan-for: {method}: {str(error).splitlines()[0][:300]}") from error
    assert found.step is not None
    is_backward = METHODS[method].derivative == "backward"
    return RunPlan(
        method=method,
        devices=found.step.devices,
        trainable=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        parameters=found.parameters.device,
        adapters=found.adapters.device,
        state=found.state.device,
        gradients=found.gradients.device if is_backward else 0,
        temporaries=found.step.temporaries,
        total=found.step.nbytes,
    )


def _arguments(settings: Settings, tuning: Tuning, init: Any, layout: Layout | None) -> Any:
    """Those of a step, as shapes, with their places on a mesh."""
    window: tuple[int, ...] = (settings.batch_size, settings.sequence_length + 1)
    if settings.accumulate > 1:
        window = (settings.accumulate, *window)
    batch = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (window, window[:-2]))
    trainable, frozen = tuning.trainable, tuning.frozen
    state, rate = jax.eval_shape(init, trainable), jax.ShapeDtypeStruct((), jnp.float32)
    if layout is not None:
        state = _placed(state, layout.of_state(init, trainable))
        trainable = _placed(trainable, layout.of_parameters(trainable))
        frozen = _placed(frozen, layout.of_parameters(frozen))
        batch = _placed(batch, layout.of_batch(batch, len(window) - 2))
    return TrainState(trainable, state), rate, frozen, batch


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)


def _specs(state: TrainState) -> Any:
    """Of a step's results, a state and a loss: the mesh itself is the target's."""
    return jax.tree.map(lambda x: x.sharding.spec, state), PartitionSpec()


def abstract_tuning(config: DecoderConfig, recipe: Recipe, target: str = "cpu") -> Tuning:
    """Return what trains of a model, and what does not, as shapes and dtypes.

    Matrices in 4 bits are for the kernels of the target.
    """
    graph, parameters = abstract_model(config)
    scheme, found = recipe.hyperparameters.tuning, []

    def trees(parameters: Any) -> tuple[Any, Any]:
        base = base_parameters(parameters, scheme, recipe.dtype)
        found.append(tuned(scheme, graph, base, 0, lora=recipe.lora))
        return found[0].trainable, found[0].frozen

    trainable, frozen = jax.eval_shape(trees, parameters)
    frozen = jax.tree.map(
        lambda x: replace(x, backend=_kernels(target)) if _in_4_bits(x) else x,
        frozen,
        is_leaf=_in_4_bits,
    )
    return found[0]._replace(trainable=trainable, frozen=frozen)


def _in_4_bits(x: Any) -> bool:
    return isinstance(x, qlora.QuantizedMatrix)


def _kernels(target: str) -> Backend:
    """Those of a target, which this process may not have."""
    platform = platform_of(target)
    named: Any = KERNELS[platform]
    return "auto" if platform == "cpu" else named


def _recipe_for(settings: Settings, method: str, target: str) -> Recipe:
    recipe = settings.recipe_of(method)
    is_cpu, is_full = platform_of(target) == "cpu", settings.tuning == "full"
    dtype = settings.dtype or ("float32" if is_cpu or is_full else "bfloat16")
    lora = recipe.lora and replace(recipe.lora, dropout=0.0)  # masks are made anew where needed
    return replace(recipe, lora=lora, dtype=dtype)


def _with_kernels(recipe: Recipe, backend: Backend, trainable: Any) -> Recipe:
    """A recipe with the kernels of a backend, or without any if these do not take all leaves."""
    chosen = replace(recipe.hyperparameters, backend=backend)
    try:
        optimizer = METHODS[recipe.method].build(chosen)
        jax.eval_shape(lambda tree: optimizer.init(tree, 0), trainable)
    except ValueError:
        chosen = replace(chosen, backend="reference")
    return replace(recipe, hyperparameters=chosen)


def _abstract_layout(settings: Settings) -> Layout | None:
    sizes = mesh_sizes(settings.mesh)
    if not sizes:
        return None
    axes = tuple(sizes.get(name, 1) for name in AXES)
    return Layout(AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * 2), settings.fsdp)


def _windows_problem(settings: Settings) -> TextProblem:
    """Of which only the loss is asked for."""
    nothing = TokenWindows((), Tokenizer(models.BPE()), settings.sequence_length, 0)
    return TextProblem(nothing, nothing, nothing, settings.batch_size, 1)
