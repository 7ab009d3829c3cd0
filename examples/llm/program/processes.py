"""Work in a process of its own, so that its memory is its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from examples.llm.errors import UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class _Done:
    result: Any


@dataclass(frozen=True)
class _Failed:
    why: str


class StoppedError(Exception):
    """Work was asked to end, and has saved what it could."""

    def __init__(self, steps: int):
        """`steps` is the number of steps after which work can go on; 0 for none."""
        super().__init__(steps)
        self.steps = steps


def run_in_process(
    work: Callable[[Job, Tell], Result], job: Job, name: str, report: Tell
) -> Result:
    """Return `work(job, tell)`, done in a new process.

    Ctrl-C sends the process a SIGTERM, by which it may save what it has before it ends; another
    Ctrl-C kills it.

    Args:
      work: a function of a module; what it tells is passed on.
      job: anything that can be pickled.
      name: what the process is called where it fails.
      report: is given what `work` tells.

    Raises:
      UsageError: the process found something that the user can put right.
      ChildProcessError: the process died, or could not write or read.
      StoppedError: the process was asked to end.
      KeyboardInterrupt: so was this one, and the other has not saved anything.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, job, sender), name=name)
    with _ctrl_c_ignored():  # the parent hears it and ends the process
        process.start()
    sender.close()
    try:
        return _result(receiver, report)
    except EOFError:
        process.join()
        raise ChildProcessError(f"the {name} run {_ending(process.exitcode)}") from None
    except _FailedError as error:
        raise ChildProcessError(f"the {name} run failed: {error}") from None
    except KeyboardInterrupt:
        _end(process, receiver, report)
        raise
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()


class _FailedError(Exception):
    pass


def _result(receiver: Connection, report: Tell) -> Any:
    while True:
        event = receiver.recv()
        if isinstance(event, _Done):
            return event.result
        if isinstance(event, UsageError | StoppedError):
            raise event
        if isinstance(event, _Failed):
            raise _FailedError(event.why)
        report(event)


def _end(process: BaseProcess, receiver: Connection, report: Tell) -> None:
    """Ask a process to end, and wait for that; raise what it says of it."""
    process.terminate()
    try:
        _result(receiver, report)
    except (EOFError, UsageError, _FailedError):
        pass  # it has nothing to save, or could not
    except KeyboardInterrupt:
        process.kill()
        raise


def _serve(work: Callable[[Any, Tell], Any], job: Any, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(_Done(work(job, connection.send)))
    except (UsageError, StoppedError) as error:
        connection.send(error)
    except BrokenPipeError:
        raise SystemExit(1) from None  # nobody listens any more: the parent was killed
    except OSError as error:
        connection.send(_Failed(": ".join(filter(None, (error.filename, error.strerror)))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C until the block ends; a process started in it ignores it all its life."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"was killed by {name}" + (", out of memory?" if name == "SIGKILL" else "")
    return f"failed with exit code {exit_code}"
