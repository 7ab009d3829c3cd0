"""The log of a zeroth-order run, and the parameters that it leads to.

A run is its base parameters, a key and, for each step, the few numbers that the step was made from.
The log keeps these in 4 bytes for each number that was measured, and 4 for a checksum; from it and
the base the run's parameters follow bit for bit.
"""

from optax_lowbit.zo.replay.files import Log, read
from optax_lowbit.zo.replay.replaying import apply, resume
from optax_lowbit.zo.replay.writer import Writer

__all__ = ("Log", "Writer", "apply", "read", "resume")
