"""Work in a process of its own ends with the process that wanted it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

PROGRAM = """
import os, time
from examples.llm.program.processes import run_in_process

def work(job, tell):
    tell(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    run_in_process(work, None, "sleeping", lambda pid: print(pid, flush=True))
"""


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    root = pathlib.Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, file],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
