"""Where things lie, and how they are written: whole or not at all, by one process at a time, leaving a receipt."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sae_lib.errors import StudyError

try:
    import fcntl
except ImportError:  # Windows: notebooks run, but two processes are not kept apart.
    fcntl = None


def project() -> Path:
    """The checkout that this library was imported from."""
    return Path(__file__).resolve().parents[2]


def root() -> Path:
    """The study's folder, which holds notebooks/, figures/ and data/."""
    return Path(os.environ.get("SAE_ROOT") or project()).resolve()


def data() -> Path:
    """Artefacts, checkpoints and runs; git-ignored but for data/reference."""
    return Path(os.environ.get("SAE_DATA") or root() / "data").resolve()


def figures() -> Path:
    """Figures and the scorecard."""
    return Path(os.environ.get("SAE_FIGURES") or root() / "figures").resolve()


def runs(profile: str) -> Path:
    """Executed notebooks, logs and the manifest of a profile's last run."""
    return data() / "runs" / profile


def figures_of(profile: str) -> Path:
    """The workshop's figures are the committed ones; no other profile may overwrite them."""
    if os.environ.get("SAE_FIGURES") or profile == "workshop":
        return figures()
    return runs(profile) / "figures"


def use_profile(profile: str) -> None:
    """Send this process's figures and scorecard rows where the profile's belong; for notebooks opened by hand."""
    os.environ["SAE_FIGURES"] = str(figures_of(profile))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """Hash of a JSON-able value that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step; on a full disk the old file stays and a StudyError says so."""
    content = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if is_disk_full(error, path.parent):
            raise disk_full(f"writing {path.name}") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict | None:
    """The object in `path`, or None if there is no such file or it is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def kept(path: Path, make: Callable[[], dict]) -> dict:
    """What `make` gives, made once: in a checkpoint folder it survives an interruption."""
    if (found := read_json(path)) is None:
        write_json(path, make())
    return found or read_json(path)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error` comes from a full disk, quota or file-size limit; numpy and safetensors lose the errno on the way."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return True
    while not folder.exists():
        folder = folder.parent
    return isinstance(error, OSError) and shutil.disk_usage(folder).free < 16 << 20


def disk_full(doing: str) -> StudyError:
    return StudyError(f"The disk is full (while {doing}): free some space and run again; nothing half-written was kept.")


@contextlib.contextmanager
def lock(path: Path, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold `path` as a lock between processes; `on_wait` is called once if another process holds it.

    The system drops the lock when its holder dies, however it dies, so no lock is ever stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait:
                    on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def receipt(event: str, **details: object) -> None:
    """Tell the runner, if there is one, what a notebook just made: its proof that an output is of this run."""
    if path := os.environ.get("SAE_RECEIPTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **details}) + "\n")


def receipts(path: Path) -> list[dict]:
    """Every whole receipt in `path`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
