"""How the program ends: an exit code, and one line where something went wrong."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from examples.llm.errors import UsageError
from examples.llm.program.processes import StoppedError

_USAGE_ERROR = 2
_RUN_FAILED = 1
_BY_SIGNAL = 128  # and its number, as shells have it


class TerminatedError(KeyboardInterrupt):
    """The program was sent SIGTERM, and does what it does after Ctrl-C."""


def run_and_report(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code, after one line on what went wrong.

    Args:
      work: may raise what runs raise.
    """
    try:
        with _sigterm_raised():
            work()
    except UsageError as error:
        return _fail(str(error), _USAGE_ERROR)
    except ChildProcessError as error:
        return _fail(str(error), _RUN_FAILED)
    except OSError as error:
        words = ": ".join(filter(None, (error.filename, error.strerror or str(error))))
        return _fail(words, _RUN_FAILED)
    except (StoppedError, KeyboardInterrupt) as error:
        return _interrupted(error)
    return 0


def _interrupted(error: BaseException) -> int:
    saved = ""
    if isinstance(error, StoppedError) and error.steps:
        saved = f": saved after step {error.steps}, --resume goes on from there"
    is_terminated = isinstance(error.__context__ or error, TerminatedError)
    number = signal.SIGTERM if is_terminated else signal.SIGINT
    name = "terminated" if is_terminated else "interrupted"
    return _fail(f"{name}{saved}", _BY_SIGNAL + number)


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raise a `TerminatedError` where SIGTERM comes, until the block ends."""

    def raise_terminated(*_):
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    former = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
