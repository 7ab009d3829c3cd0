"""The byte-level BPE tokenizer that a GGUF file carries."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.llm.errors import UsageError
from examples.llm.gguf_files import GGUFModel

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def read_tokenizer(model: GGUFModel) -> Tokenizer:
    """Build the tokenizer of a model: SmolLM's, which splits digits and then byte-level words."""
    kind, splitter = model.field("tokenizer.ggml.model"), model.field("tokenizer.ggml.pre")
    if (kind, splitter) != ("gpt2", "smollm"):
        raise UsageError(
            f"--model: the tokenizer is {kind}/{splitter}, only gpt2/smollm is supported"
        )
    tokens = model.required_field("tokenizer.ggml.tokens")
    merges = model.field("tokenizer.ggml.merges") or []
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = model.required_field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer
