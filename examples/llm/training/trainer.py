"""A model, what of it trains, and the method: whatever runs of any seed and rate have in common."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm.models.building import abstract_model
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.opening import open_model
from examples.llm.training.accumulation import AccumulatedLoss
from examples.llm.training.feeding import Feed
from examples.llm.training.judging import Evaluation, Problem, make_judge
from examples.llm.training.layout import Layout, put
from examples.llm.training.methods import METHODS, Hyperparameters, Optimizer
from examples.llm.training.steps import StepMeasurement, TrainState, measured_step, take_step
from examples.llm.training.tuning import Tuning, kept_as, tuned
from optax_lowbit import adapters


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and places of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@contextmanager
def _on_host_if(spread: bool) -> Iterator[None]:
    """Make arrays in the host's memory: a device may have no room for what many share."""
    host = jax.local_devices(backend="cpu")[0] if spread else None
    with jax.default_device(host):
        yield


@dataclass(frozen=True)
class Recipe:
    """What trains, and by what.

    Attributes:
      method: name in `METHODS`.
      hyperparameters: what the method is built with; its learning rate is that of runs which are
        given no other.
      lora: the adapters, where the scheme of tuning has any; None for the scheme's own.
      dtype: of frozen weights, see `kept_as`.
      accumulate: batches that make a step.
      num_classes: of texts, for an encoder that tells them.
    """

    method: str
    hyperparameters: Hyperparameters
    lora: adapters.LoRA | None = None
    dtype: str | None = None
    accumulate: int = 1
    num_classes: int | None = None


class Trainer:
    """Trains a model by a recipe. What it compiles serves all seeds and learning rates."""

    def __init__(self, model: Path, recipe: Recipe, problem: Problem, layout: Layout | None = None):
        """Takes the model on disk; nothing is read of it before it is trained or judged.

        Args:
          model: its file or folder.
          recipe: what trains, and by what.
          problem: what is learnt.
          layout: where all that is; None for one device.
        """
        self.recipe, self.layout = recipe, layout
        self.learn(problem)
        self._path = model
        self._tuning: Tuning | None = None
        self._steps: dict[Any, Any] = {}
        self._judges: dict[int, tuple[Problem, Callable[..., Evaluation]]] = {}

    @property
    def tuning(self) -> Tuning:
        """What has been read: the frozen part, and how to make a model of both."""
        assert self._tuning is not None, "no parameters were read"
        return self._tuning

    def learn(self, problem: Problem) -> None:
        """Take the batches of further steps from a problem that differs in its seed at most."""
        self.problem = problem
        self._feed: Feed | None = None  # made where a step needs it: a plan has no data

    def adopt(self, tuning: Tuning) -> None:
        """Take what trains and what does not, in place of reading it; shapes will do."""
        self._tuning = tuning._replace(trainable=None)

    def parameters(self, seed: int) -> Any:
        """Read the model, and return what trains of it, before any step."""
        with _on_host_if(self.layout is not None):
            read = self._read(seed)
        if self.layout is not None:
            trainable, frozen = (
                put(tree, self.layout.of_parameters(tree)) for tree in (read.trainable, read.frozen)
            )
            read = read._replace(trainable=trainable, frozen=frozen)
        # A pure function, the same for every seed: so what is compiled with it is used again.
        model = read.model if self._tuning is None else self._tuning.model
        # Not held here any longer: steps consume it.
        self._tuning = read._replace(trainable=None, model=model)
        return read.trainable

    def _read(self, seed: int) -> Tuning:
        recipe, stored = self.recipe, open_model(self._path)
        if recipe.num_classes is not None:
            assert isinstance(stored, HuggingFaceModel)  # no other has encoders
            stored = stored.with_classes(recipe.num_classes, seed)
        scheme = recipe.hyperparameters.tuning
        graph, _ = abstract_model(stored.config)
        parameters = stored.parameters(kept_as(scheme, recipe.dtype))
        return tuned(scheme, graph, parameters, seed, lora=recipe.lora)

    def start(self, parameters: Any, seed: int) -> TrainState:
        """Return what a run starts from, which takes over the parameters."""
        return TrainState(parameters, self._init(parameters)(parameters, seed))

    def abstract_start(self, parameters: Any, seed: int) -> TrainState:
        """Return shapes, dtypes and places of what a run starts from."""
        like = abstract(parameters)
        init = self._init(parameters)
        # Compiled for where its results are: a paged state is on the host.
        shardings = init.lower(like, seed).compile().output_shardings
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            init.eval_shape(like, seed),
            shardings,
        )
        return TrainState(like, state)

    def step(
        self, state: TrainState, number: int, rate: float | None = None
    ) -> tuple[TrainState, StepMeasurement]:
        """Take step `number`, which counts from 0; the old state is used up."""
        accumulate, chosen = self.recipe.accumulate, rate
        if chosen is None:
            chosen = self.recipe.hyperparameters.learning_rate
        if self._feed is None:
            self._feed = Feed(self.problem.batches, accumulate)
        batch = self._placed(self._feed.step(number), 0 if accumulate == 1 else 1)
        arguments = (np.float32(chosen), self.tuning.frozen, batch)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._steps:
            shardings = self._shardings_after(state)
            step = jax.jit(self.take_step, donate_argnums=0, out_shardings=shardings)
            self._steps[shapes] = step.lower(state, *arguments).compile()
        return measured_step(self._steps[shapes], state, *arguments)

    def judge(self, parameters: Any, problem: Problem, batches: Iterable[Any]) -> Evaluation:
        """Judge what was trained by batches of a problem, whose model is compiled once."""
        if id(problem) not in self._judges:
            everywhere = None if self.layout is None else self.layout.everywhere
            judge = make_judge(self.tuning.model, problem, everywhere)
            self._judges[id(problem)] = problem, judge
        placed = (self._placed(batch, 0) for batch in batches)
        return self._judges[id(problem)][1](parameters, self.tuning.frozen, placed)

    def _init(self, parameters: Any) -> Any:
        """The jitted beginning of the optimizer's state, `(parameters, seed) -> state`."""
        init, shardings = self.optimizer().init, None
        if self.layout is not None:
            shardings = self.layout.of_state(lambda tree: init(tree, 0), abstract(parameters))
        return jax.jit(init, static_argnums=1, out_shardings=shardings)

    def _shardings_after(self, state: TrainState) -> Any:
        """Those of a step's results: the state stays where it is."""
        if self.layout is None:
            return None
        return jax.tree.map(lambda x: x.sharding, state), self.layout.everywhere

    def _placed(self, batch: Any, axis: int) -> Any:
        if self.layout is None:
            return jax.tree.map(jnp.asarray, batch)
        return put(batch, self.layout.of_batch(batch, axis))

    def optimizer(self, rate: Any = None) -> Optimizer:
        """Build the method, with the recipe's learning rate or another, which may be traced."""
        hyperparameters = self.recipe.hyperparameters
        if rate is not None:
            hyperparameters = replace(hyperparameters, learning_rate=rate)
        return METHODS[self.recipe.method].build(hyperparameters)

    def take_step(self, state: TrainState, rate: jax.Array, frozen: Any, batch: Any) -> Any:
        """Return the state after a step, and the loss: a pure function, to be jitted."""
        loss = self._loss
        if self.recipe.accumulate > 1:
            loss = AccumulatedLoss(loss, lambda batch: self.problem.weight(batch[0]))
        return take_step(loss, self.optimizer(rate), state, frozen, batch)

    def _loss(self, trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        data, number = batch
        return self.problem.loss(self.tuning.model(trainable, frozen, number), data)
