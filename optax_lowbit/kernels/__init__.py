"""Fused steps on moments kept in few bits: a reference for each, and kernels that equal it."""

__all__ = ()
