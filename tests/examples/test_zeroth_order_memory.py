"""What a zeroth-order step of the decoder needs, as the compiler counts it."""

import jax
import jax.numpy as jnp
import pytest

from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.config import DecoderConfig
from examples.llm.training.steps import next_token_loss
from optax_lowbit import zo


@pytest.mark.slow
def test_language_model_of_135_million_parameters():
    config = DecoderConfig(
        vocabulary_size=49152, hidden_size=576, feed_forward_size=1536, num_layers=30, num_heads=9,
        num_key_value_heads=3, head_size=64, context_length=8192, rotary_base=1e5,
        norm_epsilon=1e-5, tied_embeddings=True,
    )  # fmt: skip
    graph, params = abstract_model(config)
    sizes = [4 * leaf.size for leaf in jax.tree.leaves(params)]
    windows = jax.ShapeDtypeStruct((1, 129), jnp.int32)

    def loss(params, windows):
        return next_token_loss(build_model(graph, params), windows)

    def temporaries(function, *arguments, donated=()):
        program = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    def beside_the_loss(opt):
        state = jax.eval_shape(lambda p: opt.init(p, 0), params)
        step = temporaries(
            lambda p, s, x: opt.step(loss, p, s, x), params, state, windows, donated=(0, 1)
        )
        return step - plain

    plain = temporaries(loss, params, windows)
    # The tied embedding is perturbed whole for the output head, and by rows for the look-up.
    bar = 1.5 * max(sizes) + 0.10 * sum(sizes)
    assert beside_the_loss(zo.zo_sgd(1e-6)) <= bar
    assert beside_the_loss(zo.zo_sgd(1e-6, estimator=zo.OneSided())) <= bar
    assert beside_the_loss(zo.zo_sgd_momentum(1e-6)) <= bar
    assert beside_the_loss(zo.forward_grad(1e-6)) <= 0.35 * sum(sizes)
