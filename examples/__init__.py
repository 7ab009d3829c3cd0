"""Example applications of optax_lowbit."""
