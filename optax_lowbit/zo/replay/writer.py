"""Writes a log while a run goes on, and goes on with it after the run was cut off."""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from optax_lowbit.zo.replay import files, records, runs
from optax_lowbit.zo.state import StepInfo


class Writer:
    """Appends a record to a log for each step; a context manager.

    The file appears with the first step. A record is given to the operating system before
    :meth:`append` returns, so a process that is killed loses at most the step in flight; a machine
    that loses its power, ``sync_every`` steps. An existing log is gone on with, and what is left of
    a record that was cut off is cut away.

    The log takes 4 bytes a step and 4 for each number that was measured: 8 bytes for one probe,
    80 KB for 10,000 steps. Learning rate and weight decay take 4 more in steps in which they
    change. The header takes some 20 bytes for each leaf.

    Of several processes each makes a ``Writer``; the first one writes.

    Args:
      path: The file.
      opt: The optimizer, which may be in :func:`~optax_lowbit.zo.blockwise` or
        :func:`~optax_lowbit.zo.inject_hyperparams`.
      params: The parameters that the run begins with; or those of a later step, with its state, if
        there is a log of the run so far. Each leaf is read once, for its checksum.
      state: ``opt.init(params, key)``; or the state of that later step.
      digest_every: After every so many steps the log gets a digest of the parameters, which costs
        one pass over them, and which a replay must meet. 0: never.
      sync_every: After every so many steps the file is forced to disk. 0: only when it is closed.

    Attributes:
      steps: How many steps the log has.

    Raises:
      TypeError: If ``opt`` is no optimizer of :mod:`optax_lowbit.zo`.
      ValueError: If the file is a log of another run, or damaged, or none; if the run is not at its
        beginning and there is no log of it; if an argument is negative.

    Examples:
      The same program begins a run and goes on with one that was killed:

      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.zolog"
      >>> def loss_fn(params):
      ...     return jnp.sum((params["w"] - 1) ** 2)
      >>> opt = zo.zo_sgd(1e-2)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> def run(until):
      ...     params = {"w": jnp.zeros(4)}
      ...     state = opt.init(params, key=0)
      ...     with zo.replay.Writer(path, opt, params, state) as log:
      ...         if log.steps:
      ...             params, state = zo.replay.resume(params, state, path, opt)
      ...         while log.steps < until:
      ...             params, state, info = step(loss_fn, params, state)
      ...             log.append(params, state, info)
      ...     return params
      >>> _ = run(3)
      >>> bool(jnp.array_equal(run(5)["w"], zo.replay.apply({"w": jnp.zeros(4)}, path, opt)["w"]))
      True
    """

    def __init__(
        self,
        path: Any,
        opt: runs.Optimizer,
        params: Any,
        state: runs.State,
        *,
        digest_every: int = 0,
        sync_every: int = 100,
    ):
        for name, value in (("digest_every", digest_every), ("sync_every", sync_every)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        runs.plain(opt)
        self._path, self._opt = pathlib.Path(path), opt
        self._digest_every, self._sync_every = digest_every, sync_every
        self._run = {**runs.facts(opt, params, state), "digest_every": digest_every}
        self._settings = records.no_settings(self._run["settings"])
        self._file: int | None = None
        self.steps, self._end, self._crc = 0, 0, 0
        self._record_size: int | None = None
        count = int(state.count)
        if self._path.exists():
            self._go_on(files.read(self._path), count)
        elif count:
            raise ValueError(
                f"state.count must be 0, as {self._path} is not there and a log begins with its "
                f"run; got {count}"
            )
        elif not self._path.parent.is_dir():
            raise ValueError(f"path must be in a folder that is there, got {self._path}")

    def append(self, params: Any, state: runs.State, info: StepInfo) -> None:
        """Writes what a step gave: ``log.append(*opt.step(loss_fn, params, state))``.

        Waits for the step.

        Args:
          params: After the step.
          state: After the step.
          info: Of the step.

        Raises:
          ValueError: If it is not the step that comes next, or its record is of another size, or
            has a NaN.
          OSError: If it can't be written; the log is then as it was.
        """
        record, count = np.asarray(info.record), int(state.count)
        if count != self.steps + 1:
            raise ValueError(
                f"state.count must be {self.steps + 1} after the step that comes next in "
                f"{self._path}, got {count}; zo.replay.resume brings parameters and state to where "
                "the log ends"
            )
        if record.size != (self._record_size or record.size):
            raise ValueError(
                f"info.record must have {self._record_size} numbers, as every step of the log, "
                f"got {record.size}"
            )
        if np.isnan(record).any():
            raise ValueError(f"info.record must have no NaN, got {record}")
        has_digest = files.is_digested(count, self._digest_every)
        digest = runs.digest(self._opt, params) if has_digest else None
        header = b""
        if self._record_size is None:
            header = files.header_bytes({**self._run, "record_size": record.size})
            self._crc = files.crc_of(header)
        numbers, settings = records.encoded(record, self._settings)
        data = files.step_bytes(numbers, digest, self._crc)
        if jax.process_index() == 0:
            self._write(header + data)
        self.steps, self._record_size, self._settings = count, record.size, settings
        self._end, self._crc = self._end + len(header) + len(data), files.crc_of(data)

    def close(self) -> None:
        """Forces the file to disk and closes it."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _go_on(self, log: files.Log, count: int) -> None:
        runs.check_same(log, self._run, is_base=count == 0)
        if log.run["digest_every"] != self._digest_every:
            raise ValueError(
                f"digest_every must be {log.run['digest_every']}, as in {self._path}, "
                f"got {self._digest_every}"
            )
        if count > log.steps:
            raise ValueError(
                f"state.count must be at most {log.steps}, as {self._path} has no more steps, "
                f"got {count}"
            )
        self.steps, self._end, self._crc = log.steps, log.end, log.crc
        self._settings = log.settings
        self._record_size = log.run["record_size"]
        if jax.process_index() == 0:
            self._open()
            os.truncate(self._path, self._end)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    def _write(self, data: bytes) -> None:
        if self._record_size is None:
            files.create(self._path, data)
            self._open()
            return
        if self._file is None:
            raise ValueError(f"{self._path} is closed")
        written = os.write(self._file, data)
        if written != len(data):
            os.truncate(self._path, self._end)
            raise OSError(f"{self._path}: only {written} of {len(data)} bytes could be written")
        if self._sync_every and self.steps % self._sync_every == 0:
            os.fsync(self._file)
