"""What the study runs on: whether the active environment satisfies the project, and what a manifest records of it.

Imports nothing but the standard library at the top, because run_all.sh asks it before anything is installed.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from sae_lib.study import paths

# The packages whose versions can change a number or a figure.
PACKAGES = ("torch", "transformer-lens", "tokenizers", "safetensors", "numpy", "pandas", "numba", "plotly", "papermill")


def unmet(project: Path, extras: tuple[str, ...] = ()) -> list[str]:
    """The requirements of `project`'s pyproject.toml (with `extras`) that the active environment does not meet."""
    with open(project / "pyproject.toml", "rb") as file:
        table = tomllib.load(file)["project"]
    wanted = list(table["dependencies"])
    for extra in extras:
        wanted += table["optional-dependencies"][extra]
    try:
        from packaging.requirements import Requirement
    except ImportError:  # every environment with the study's packages has it
        return wanted
    return [text for text in wanted if not _met(Requirement(text))]


def _met(requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | float]:
    """The machine, as far as it explains a run's time and memory."""
    import psutil

    return {
        "platform": platform.platform(terse=True),
        "processor": platform.machine(),
        "cpus": cpus(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def machine_check() -> list[tuple[str, str, str]]:
    """What the study needs of a machine, what this one has, and what to do where that is too little."""
    import psutil
    import torch

    from sae_lib.precision import best_device, low_precision
    from sae_lib.study.export import find_browser

    def check(name: str, found: str, fine: bool, advice: str) -> tuple[str, str, str]:
        return name, found, "ok" if fine else advice

    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(paths.data().parent).free / 2**30
    factors = low_precision(best_device())
    return [
        check("Python", platform.python_version(), sys.version_info >= (3, 11), "use Python 3.11 or newer"),
        check("cores", str(cpus()), cpus() >= 2, "training will take twice as long"),
        check("memory", f"{memory:.1f} GiB", memory >= 7, "close other programs or use the smoke profile"),
        check("free disk", f"{disk:.1f} GiB", disk >= 2, "free 2 GiB"),
        check("low-precision products", str(factors).removeprefix("torch."), factors != torch.float32,
              "this processor has none: training will take longer"),
        check("GPU", "yes" if torch.cuda.is_available() else "no", True, ""),
        check("browser for PNG files", str(find_browser() or "none"), True, ""),
    ]


def git(project: Path) -> dict | None:
    """The commit that is checked out and whether tracked files differ from it; None outside a git checkout."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(project), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return {"sha": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def lock_hash(project: Path) -> str | None:
    """Hash of requirements.lock, or None if there is none."""
    lock = project / "requirements.lock"
    return paths.sha256(lock) if lock.exists() else None
