"""A small language-model toolkit in Flax NNX: decoder, weights, text, training, reports."""
