"""What stands after a text has the tokens that it has in the whole."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from examples.llm.instructions.encoding import encode_dialogue
from examples.llm.instructions.formats import one
from examples.llm.models.opening import open_model
from examples.llm.models.tokenizer import SpecialTokens, continuation_tokens, plain_tokens
from examples.llm.tasks.batches import encode
from examples.llm.tasks.example import Example

TEXTS = (("I was", " great"), ("Yes or no?\n", "Yes"), ("I great.", "\nYes"), ("I", ""))
MERGES = ["re", "gre", "grea", "great", "es", "Yes"]
PIECES = ["<unk>", "▁", *"greatYsIwno?.\n", *MERGES, "▁great", "▁Yes", "▁I"]


def in_front(normalizer, pre_tokenizer=None):
    """A tokenizer of a LLaMA, which puts a space in front of a text."""
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(PIECES))}
    merges = [(piece[:1], piece[1:]) for piece in ("re", "gre", "es", "Yes")]
    merges += [("gre", "a"), ("grea", "t"), ("▁", "great"), ("▁", "Yes"), ("▁", "I")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def bytes_alone():
    """One of a GPT-2, with a token for two line ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {
    "normalizer": lambda: in_front(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "metaspace": lambda: in_front(None, pre_tokenizers.Metaspace("▁", prepend_scheme="first")),
    "bytes": bytes_alone,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_has_the_tokens_of_the_whole(name):
    tokenizer = TOKENIZERS[name]()
    for before, after in TEXTS:
        whole = plain_tokens(tokenizer, before + after)
        assert plain_tokens(tokenizer, before) + continuation_tokens(tokenizer, after) == whole


def test_a_token_of_two_line_ends_is_none_of_one():
    tokenizer = bytes_alone()
    line_ends = continuation_tokens(tokenizer, "\n\n")
    assert line_ends == [tokenizer.token_to_id("ĊĊ")]


def test_options_and_answers_of_a_real_model_are_continuations(shared_dir):
    stored = open_model(shared_dir / "data" / "stories260K" / "stories260K.bin")
    tokenizer, special = stored.tokenizer(), SpecialTokens(begin=1, end=2)
    example = encode(Example("it was fun. It was", (" bad", " great"), 1), tokenizer, special, 64)
    assert tokenizer.decode([*example.prompt, *example.options[1]]) == "it was fun. It was great"
    dialogue = encode_dialogue(one("Question: who?\nAnswer:", " Lily"), tokenizer, special, 64)
    whole = plain_tokens(tokenizer, "Question: who?\nAnswer: Lily")
    assert dialogue.tokens == (1, *whole, 2)
