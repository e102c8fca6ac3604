"""Child processes that may hang or eat all memory: started apart, watched, and killed with everything they started."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

from sae_lib.study import paths


def environment() -> dict[str, str]:
    """The environment for a child that imports this very library, whatever else is installed or is the current folder."""
    search = os.pathsep.join(filter(None, [str(paths.project()), os.environ.get("PYTHONPATH")]))
    return dict(os.environ) | {"PYTHONPATH": search}


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this library in a child; -P keeps the current folder off its path."""
    return [sys.executable, "-P", "-m", f"sae_lib.study.{name}", *arguments]


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants; a kernel and a browser have sessions of their own, so a group is not enough."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=5)


def memory(pid: int) -> int:
    """Bytes of memory that a process and its descendants hold now."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def run_limited(command: Sequence[str], timeout: float) -> int | None:
    """Exit status of `command`, or None if it took longer than `timeout` seconds and was killed. Its output is dropped."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, env=environment())
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_tree(process.pid)
        process.wait()
