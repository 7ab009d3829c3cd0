"""Several processes that train one model together, as `jax.distributed` connects them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from examples.llm.errors import UsageError

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
# How many processes there are and which this is, as launchers say it.
_NUMBERS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


@dataclass(frozen=True)
class Cluster:
    """The processes, and which of them this is.

    Attributes:
      coordinator: address and port of the first process, None where there is but one.
      size: number of processes.
      number: of this one.
    """

    coordinator: str | None = None
    size: int = 1
    number: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have found."""
        return self.number == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connect this process with the others, for JAX to see the devices of all.

        At the end it waits for the others, which an error would not let come so far.
        """
        if self.coordinator is None:
            yield
            return
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(self.coordinator, self.size, self.number)
        yield
        jax.distributed.shutdown()


def find_cluster(coordinator: str | None, size: int | None, number: int | None) -> Cluster:
    """Return what flags say, or else the environment.

    Raises:
      UsageError: something is missing or impossible.
    """
    coordinator = coordinator or os.environ.get(_COORDINATOR)
    if coordinator is None:
        if size is not None or number is not None:
            raise UsageError("--coordinator: must be given with --num-processes and --process-id")
        return Cluster()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--coordinator: must be such as 10.0.0.1:1234, got {coordinator}")
    for of_size, of_number in _NUMBERS:
        if of_size in os.environ and of_number in os.environ:
            size = int(os.environ[of_size]) if size is None else size
            number = int(os.environ[of_number]) if number is None else number
    if size is None or number is None:
        raise UsageError("--num-processes: must be given with --coordinator and --process-id")
    if not 0 <= number < size:
        raise UsageError(f"--process-id: must be from 0 to {size - 1}, got {number}")
    return Cluster(coordinator, size, number)
