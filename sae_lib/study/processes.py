"""Child processes that may hang or eat all memory: started apart, watched, and killed with everything they started."""

import contextlib
import subprocess
from collections.abc import Sequence


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants; a kernel and a browser have sessions of their own, so a group is not enough."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


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
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_tree(process.pid)
        process.wait()
