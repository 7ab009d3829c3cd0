"""Language models in Flax NNX, and the files their weights come from."""
