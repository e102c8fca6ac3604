"""The peers' own environment: they want other versions than the project (transformer-lens below 4), so they get their own."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .protocol import FOLDER

WITH_DEPENDENCIES, WITHOUT = FOLDER / "peers.txt", FOLDER / "peers_no_deps.txt"


def environment(folder: Path, log: Path, say: Callable[[str], object]) -> tuple[str | None, str]:
    """Path of the python that has the peers, made if it is not there; or None, and the sentence that says why.

    It gets the project's version of torch, so that both are measured on the same matrix products.
    """
    torch = importlib.metadata.version("torch").split("+")[0]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / ".complete"
    wanted = hashlib.sha256(WITH_DEPENDENCIES.read_bytes() + WITHOUT.read_bytes() + torch.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return str(python), ""
    say(f"Making {folder} with the peers; about 2 GB are downloaded once.")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    commands = [[sys.executable, "-m", "venv", "--clear", str(folder)],
                [*pip, f"torch=={torch}"],
                [*pip, f"torch=={torch}", "-r", str(WITH_DEPENDENCIES)],
                [*pip, "--no-deps", "-r", str(WITHOUT)]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log, "w") as out:
            for command in commands:
                subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, (f"The peers could not be installed (see {log}), so the project's own rows are measured alone; connect to "
                      "the network and run this again.")
    stamp.write_text(wanted)
    return str(python), ""


def versions(python: str) -> dict[str, str]:
    """Versions of the peers and of what they stand on, as that environment has them."""
    code = ("import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in "
            "('sae-lens', 'dictionary-learning', 'eai-sparsify', 'transformer-lens', 'torch')}))")
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
