"""How the benchmark talks to its workers, each a process in its own environment: one JSON object a line, there and back.

Nothing but the standard library is imported here, so that every environment can.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent
PROCESSOR_TIME = "BENCHMARK_PROCESSOR_TIME"  # set for workers that are to count processor time


class WorkerError(RuntimeError):
    """A worker could not start, or an operation failed in it."""


def clock() -> float:
    """Seconds; of this process's work alone, if others are to be left out of the account."""
    return time.process_time() if os.environ.get(PROCESSOR_TIME) else time.perf_counter()


class Worker:
    """A process that stays alive between requests, so that what is measured is warm."""

    def __init__(self, module: str, python: str, threads: int, log: Path, path: tuple[str, ...] = ()):
        self.module, self.see = module, f"see benchmarks/{log.name} in the data folder"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "WANDB_MODE": "disabled",
                                    "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
        self._log = open(log, "w")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen([python, "-m", f"benchmarks.{module}"], cwd=FOLDER.parent, env=environment, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def ask(self, operation: str, **arguments: object) -> dict:
        """Run one operation and return what it answers. Raises WorkerError, in one sentence, if it fails."""
        try:
            self._process.stdin.write(json.dumps({"operation": operation} | arguments) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(f"The {self.module} process ended during '{operation}'; {self.see}.")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"'{operation}' failed in the {self.module} process ({answer['error']}); {self.see}.")
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def serve(operations: dict[str, Callable[..., dict]]) -> None:
    """Answer requests from stdin until it is closed. Whatever a library prints goes to stderr, which is the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("operation")](**request)
        except Exception as error:
            traceback.print_exc()
            first_line = next(iter(str(error).splitlines()), "")[:160]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
