"""Runs one notebook in one process of its own, so that its memory is freed and its death is only its own.

`python -m sae_lib.study.execute JOB.json` writes what happened to the job's "result" file; the runner decides what it means.
"""

import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path


def execute(job: dict) -> dict:
    """Run job["notebook"] with papermill into job["output"]; {"state": "ok" | "cell" | "kernel" | "timeout", ...}."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    with tempfile.TemporaryDirectory() as folder:
        # First on Jupyter's path: "python3" then means this interpreter, whatever kernels the user has installed.
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        try:
            papermill.execute_notebook(
                job["notebook"],
                job["output"],
                parameters=job["parameters"],
                kernel_name="python3",
                cwd=job["cwd"],
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                start_timeout=120,
                execution_timeout=job["cell_timeout"],
                iopub_timeout=60,
            )
        except PapermillExecutionError as error:
            # papermill puts a banner and, before the failing cell, an anchor: neither is a cell of the notebook.
            return {"state": "cell", "cell": error.exec_count, "ename": error.ename, "evalue": error.evalue}
        except CellTimeoutError:
            return {"state": "timeout"}
        except DeadKernelError:
            return {"state": "kernel"}
        except RuntimeError as error:
            if re.search(r"[Kk]ernel (died|didn't respond)", str(error)):
                return {"state": "kernel"}
            raise
    return {"state": "ok"}


def _die_with(parent: int) -> None:
    """Leave when the runner is gone, even killed: a kernel that nobody waits for would go on for hours."""
    while os.getppid() == parent:
        time.sleep(1)
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    work = json.loads(Path(sys.argv[1]).read_text())
    Path(work["result"]).write_text(json.dumps(execute(work)))
