"""Work in a process of its own, so that its memory is its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from examples.llm.errors import UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class _Done:
    result: Any


def run_in_process(
    work: Callable[[Job, Tell], Result], job: Job, name: str, report: Tell
) -> Result:
    """Return `work(job, tell)`, done in a new process.

    Args:
      work: a function of a module; what it tells is passed on.
      job: anything that can be pickled.
      name: what the process is called where it fails.
      report: is given what `work` tells.

    Raises:
      UsageError: the process found something that the user can put right.
      ChildProcessError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, job, sender), name=name)
    with _ctrl_c_ignored():  # the parent hears it and ends the process
        process.start()
    sender.close()
    try:
        while True:
            event = receiver.recv()
            if isinstance(event, _Done):
                return event.result
            if isinstance(event, UsageError):
                raise event
            report(event)
    except EOFError:
        process.join()
        raise ChildProcessError(f"the {name} run {_ending(process.exitcode)}") from None
    finally:
        process.terminate()
        process.join()


def _serve(work: Callable[[Any, Tell], Any], job: Any, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(_Done(work(job, connection.send)))
    except UsageError as error:
        connection.send(error)
    except BrokenPipeError:
        raise SystemExit(1) from None  # nobody listens any more: the parent was killed


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
