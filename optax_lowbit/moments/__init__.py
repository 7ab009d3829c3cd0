"""What optimizers keep for each parameter: which of it in few bits, how stored, where placed."""

__all__ = ()
