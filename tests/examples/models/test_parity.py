"""Models against transformers' recorded logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from benchmarks.models.parity import at_tokens, logits_of, table_row
from benchmarks.models.recorded import Recorded, weight
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import module_names
from examples.llm.models.rotary import Unscaled
from examples.llm.training.steps import next_token_loss
from optax_lowbit import qlora

pytest.importorskip("safetensors", reason="safetensors is missing")

RECORDED = Recorded()
# One of each family, and every kind of head.
FAMILIES = ("llama", "mistral", "opt post-norm", "roberta mlm", "bert classes")
CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda variant: HuggingFaceModel(RECORDED.write(variant, root / variant))


@pytest.mark.parametrize("variant", RECORDED.variants)
def test_logits_are_those_of_transformers(variant, checkpoint):
    inputs = RECORDED.arrays(variant)
    expected = at_tokens(inputs["logits"], inputs)
    np.testing.assert_allclose(logits_of(checkpoint(variant), inputs), expected, **CLOSE)


@pytest.mark.parametrize("variant", ["llama", "mistral", "opt", "bert mlm"])
def test_logits_in_bfloat16_are_as_near_as_those_of_transformers(variant, checkpoint):
    """To those in float32: both round, but not at the same places.

    Flax rounds a product once more before its bias is added, which at most doubles the variance;
    a tenth is for the few logits that it is estimated from.
    """
    inputs = RECORDED.arrays(variant)
    exact, theirs = (at_tokens(inputs[x], inputs) for x in ("logits", "logits_bfloat16"))
    with jax.numpy_dtype_promotion("standard"):  # which Flax's norms need
        ours = logits_of(checkpoint(variant), inputs, dtype=jnp.bfloat16)
    error, their_error = (np.mean((x - exact) ** 2) for x in (ours, theirs))
    assert 0 < error <= 2.2 * their_error


@pytest.mark.parametrize("variant", FAMILIES)
def test_logits_of_layers_in_a_row(variant, checkpoint):
    inputs = RECORDED.arrays(variant)
    expected = at_tokens(inputs["logits"], inputs)
    logits = logits_of(checkpoint(variant), inputs, scan_layers=False)
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_gradients_of_layers_in_a_row_have_no_loop_and_are_those_of_a_scan(checkpoint):
    stored, tokens = checkpoint("llama"), jnp.ones((1, 5), jnp.int32)
    parameters = stored.parameters()

    def program(scan):
        graph, _ = abstract_model(dataclasses.replace(stored.config, scan_layers=scan))
        loss = jax.grad(lambda p: next_token_loss(build_model(graph, p), tokens))
        return jax.jit(loss).lower(parameters).compile()

    scanned, unrolled = program(True), program(False)
    assert " while(" in scanned.as_text() and " while(" not in unrolled.as_text()
    # The same sums in another order: some roundings of float32, which are 6e-8 of a number.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        scanned(parameters),
        unrolled(parameters),
    )


def test_the_table_has_the_largest_differences(checkpoint):
    recorded = {**RECORDED.arrays("bert classes")}
    recorded.pop("logits_bfloat16")
    recorded["logits"] = recorded["logits"] + np.array([[0, 0, 0], [0, 0.25, 0]])
    row = table_row("name", checkpoint("bert classes"), recorded)
    assert row.startswith("| name | 2.5e-01 | 2.5e-01 |  |  |  | 2.")


@pytest.mark.parametrize(
    ("variant", "other"),
    [
        ("llama linear", "llama"),
        ("llama dynamic", "llama"),
        ("mistral", "mistral no window"),
        ("opt", "opt post-norm"),
    ],
)
def test_what_variants_differ_in_matters(variant, other):
    """To transformers, with the same weights and tokens."""
    one, another = RECORDED.arrays(variant), RECORDED.arrays(other)
    np.testing.assert_array_equal(one["input_ids"], another["input_ids"])
    assert np.abs(at_tokens(one["logits"] - another["logits"], one)).max() > 0.05


def test_recorded_weights_are_numbers_of_16_bits():
    for name, shape in (("a.norm.weight", (999,)), ("a.bias", (999,)), ("a.weight", (99, 99))):
        tensor = weight(name, shape)
        for dtype in (np.float16, jnp.bfloat16):
            np.testing.assert_array_equal(tensor.astype(dtype).astype(np.float32), tensor)


@pytest.mark.parametrize("variant", ["llama", "bert mlm"])
def test_all_files_of_a_model_hold_the_same(variant, checkpoint, tmp_path):
    stored = checkpoint(variant)
    expected = stored.parameters()
    folders = [RECORDED.write(variant, tmp_path / name, name) for name in ("float16", "bfloat16")]
    tensors = dict(qlora.read_bitsandbytes(folders[0]))
    config = qlora.read_bitsandbytes(folders[0]).config

    def old(name):
        """Without a prefix, and as in the first files of BERT."""
        name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        return name.removeprefix("model.")

    for name, renamed in (("several", str), ("old", old)):
        named = {renamed(name): tensor for name, tensor in tensors.items()}
        qlora.write_bitsandbytes(tmp_path / name, named, config=config, max_shard_bytes=2000)
        folders.append(tmp_path / name)
    for folder in folders:
        jax.tree.map(np.testing.assert_array_equal, HuggingFaceModel(folder).parameters(), expected)


@pytest.mark.parametrize("variant", FAMILIES)
def test_modules_of_adapters_are_those_of_transformers(variant, checkpoint):
    stored = checkpoint(variant)
    modules, kernels = module_names(stored.config), flatten_dict(stored.parameters(), sep="/")
    assert set(modules) == {x for x in kernels if re.match("layers/.*/kernel$", x)}
    shapes = RECORDED.shapes(variant)
    for path, names in modules.items():
        for name in names:
            assert shapes[f"{name}.weight"] == [*kernels[path].shape[:0:-1]]


@pytest.mark.parametrize("variant", ["roberta mlm", "bert classes", "roberta classes"])
def test_a_new_head_for_classes(variant, checkpoint):
    stored = checkpoint(variant)
    classes = stored.with_classes(5, seed=1)
    parameters, body = classes.parameters(), stored.parameters()
    head = parameters.pop("head")
    assert head["output"]["kernel"].shape == (16, 5) and not head["output"]["bias"].any()
    assert 0.015 < np.std(head["output"]["kernel"]) < 0.025  # initializer_range
    has_dense = body.pop("head")["dense"]["kernel"]
    is_kept = np.array_equal(head["dense"]["kernel"], has_dense)
    assert is_kept == variant.endswith("classes")
    jax.tree.map(np.testing.assert_array_equal, parameters, body)
    again = stored.with_classes(5, seed=1).parameters()["head"]["output"]["kernel"]
    np.testing.assert_array_equal(again, head["output"]["kernel"])


def test_a_head_for_as_many_classes_is_kept(checkpoint):
    stored = checkpoint("bert classes")
    jax.tree.map(
        np.testing.assert_array_equal, stored.with_classes(3).parameters(), stored.parameters()
    )


# The larger checkpoints beside the repository.


@dataclasses.dataclass(frozen=True)
class Rounded(Unscaled):
    """Of a PyTorch model that was cast to bfloat16, and its frequencies with it."""

    def frequencies(self, base, head_size, length):
        frequencies = super().frequencies(base, head_size, length)
        return frequencies.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.fixture(scope="module")
def models(shared_dir):
    return shared_dir / "golden" / "models"


def io_of(models, name):
    with np.load(models / "io.npz") as archive:
        return {
            k.removeprefix(f"{name}/"): x for k, x in archive.items() if k.startswith(f"{name}/")
        }


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama_bf16",
        "llama_sharded_fp16",
        "mistral",
        "opt",
        "roberta_mlm",
        "roberta_seqcls",
    ],
)
def test_logits_of_larger_models(models, name):
    inputs, stored = io_of(models, name), HuggingFaceModel(models / name)
    change = {"rotary_scaling": Rounded()} if name == "llama_bf16" else {}
    expected = at_tokens(inputs["logits"], inputs)
    np.testing.assert_allclose(logits_of(stored, inputs, **change), expected, **CLOSE)
    if name == "llama_bf16":
        theirs = at_tokens(inputs["logits_bf16_compute"], inputs)
        with jax.numpy_dtype_promotion("standard"):
            ours = logits_of(stored, inputs, dtype=jnp.bfloat16, **change)
        error, their_error = (np.mean((x - expected) ** 2) for x in (ours, theirs))
        assert 0 < error <= 1.5 * their_error


def test_a_larger_model_without_its_window(models):
    inputs = io_of(models, "mistral")
    first = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    stored = HuggingFaceModel(models / "mistral")
    logits = logits_of(stored, first, sliding_window=None)
    np.testing.assert_allclose(logits, inputs["logits_without_sliding_window"][0], **CLOSE)


def test_the_loss_of_a_larger_model(models):
    inputs, stored = io_of(models, "llama"), HuggingFaceModel(models / "llama")
    model = build_model(abstract_model(stored.config)[0], stored.parameters())
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    run = nnx.jit(lambda model, *args: model.logits(model.features(*args)))
    # A text's first token is predicted from padding, whose logits are no model's.
    logits = np.where(mask[:, :, None] == 1, run(model, tokens, mask), inputs["logits"])
    logs = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    found = np.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(-found[mask[:, 1:] == 1].mean(), inputs["loss"], rtol=1e-5)
