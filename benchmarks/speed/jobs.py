"""A job: measurements that run in a process of their own.

Neither JAX nor PyTorch is imported here: the process first binds itself to its processors.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks.speed.rounds import Rounds
from benchmarks.speed.workloads import Workload

REPOSITORY = Path(__file__).resolve().parents[2]
GIGABYTE = 10**9


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
      workload: What they step over.
      contestants: By name.
      rounds: How long to time.
      cores: The processors it may use.
      kind: ``"time"`` for contestants in turns, ``"memory"`` for the peak of a single one.
      trial_size: As in `start_jax`.
      bandwidth_bytes: Size of the array whose reading and writing is timed with them.
      instructions: Which of the native kernels' instruction sets they use; empty for the best.
      memory_limit: Bytes of all contestants that are alive at a time, by an estimate.
    """

    workload: Workload
    contestants: tuple[str, ...]
    rounds: Rounds
    cores: tuple[int, ...]
    kind: Literal["time", "memory"] = "time"
    trial_size: int = 2048
    bandwidth_bytes: int = 2**28
    instructions: str = ""
    memory_limit: int = 8 * GIGABYTE

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """What `run` wrote."""
        values = json.loads(text)
        workload = values.pop("workload")
        shapes = tuple(tuple(shape) for shape in workload.pop("shapes"))
        for name in ("contestants", "cores"):
            values[name] = tuple(values[name])
        rounds = Rounds(**values.pop("rounds"))
        return cls(workload=Workload(shapes=shapes, **workload), rounds=rounds, **values)

    def run(self) -> dict[str, Any]:
        """Runs the job in a new process; returns what `measure` does there.

        Raises:
          RuntimeError: If the process fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                # PyTorch's threads would spin while they wait, and with others on the machine
                # steps then take many times as long.
                "OMP_WAIT_POLICY": "passive",
                # Compiling is timed: nothing may come from an earlier run.
                "JAX_ENABLE_COMPILATION_CACHE": "false",
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                "TORCHINDUCTOR_CACHE_DIR": folder,
            }
            if self.instructions:
                environment["LOWBIT_CPU_TARGET"] = self.instructions
            if self.kind == "memory":
                # Freed arrays go back to the system at once, so that they aren't counted.
                environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.speed.worker", str(answer)],
                input=json.dumps(dataclasses.asdict(self)),
                text=True,
                cwd=REPOSITORY,
                env=environment,
                stdout=sys.stderr,
                check=False,
            )
            if process.returncode:
                raise RuntimeError(f"measuring {self.workload.name} failed")
            return json.loads(answer.read_text())
