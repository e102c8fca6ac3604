"""The artefact store: every slow product is made once, kept under the hash of what made it, and checked when it is loaded."""

import dataclasses
import enum
import errno
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sae_lib.errors import StudyError
from sae_lib.study import environment, paths

MANIFEST = "manifest.json"
# Loading a pickle runs whatever code it holds.
PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
_verified: set[tuple[str, int, int]] = set()


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A finished folder. `key` names its content's making to the byte, `recipe_key` leaves out what the text was made of."""

    name: str
    key: str
    recipe_key: str
    path: Path
    manifest: dict
    source: Literal["cache", "reference", "made"]

    def __str__(self) -> str:
        return f"{self.name}@{self.key[:6]}"


class Store:
    """Artefacts under `root` (artefacts/, checkpoints/, locks/) and the committed ones in data/reference.

    mode: "auto" loads what exists and makes the rest; "load" never makes; "train" never takes a committed one.
    """

    def __init__(
        self,
        root: Path | None = None,
        mode: Literal["auto", "load", "train"] = "auto",
        log: Callable[[str], object] = print,
        command: str = "./run_all.sh",
    ):
        self.root = root or paths.data()
        self.reference = (root or paths.root() / "data") / "reference"
        self.mode, self.log, self.command = mode, log, command
        self._told: set[str] = set()  # each artefact is announced once, however often it is asked for

    def stage(
        self,
        name: str,
        config: Any,
        make: Callable[[Path, Path], object] | None,
        *,
        inputs: Sequence[Artefact] = (),
        version: int = 1,
        fingerprint: str = "",
        reference: bool = True,
    ) -> Artefact | None:
        """The artefact `name` made from `config` and `inputs`: loaded if it exists, else made by `make(out, checkpoint)`.

        config: dataclass or dict; version: raise it when the code behind `make` changes its result; fingerprint: what else
        the content depends on (the text of this environment); reference: whether a committed one will do.
        `make` fills the folder `out`; what it puts in `checkpoint` survives an interruption and is gone after success. Without
        a `make` an artefact that does not exist is None.
        Raises StudyError if the artefact is damaged, the disk is full, or mode is "load" and there is none.
        """
        recipe_key = _key(name, canonical(config), version, [artefact.recipe_key for artefact in inputs])
        key = _key(recipe_key, fingerprint, [artefact.key for artefact in inputs])
        find = lambda: self._find(name, key, recipe_key, inputs if reference and self.mode != "train" else None)
        found = find()
        if found is None and make is None:
            return None
        if found is None:
            label = f"{name}@{key[:6]}"
            if self.mode == "load":
                raise StudyError(f"There is no {label} yet, and ARTEFACTS is \"load\": make it with `{self.command}`, or set "
                                 "ARTEFACTS = \"auto\".")
            lock = self.root / "locks" / f"{name}-{key}"
            with paths.lock(lock, lambda: self.log(f"waiting for another process that is making {label}")):
                recipe = {
                    "name": name,
                    "key": key,
                    "recipe_key": recipe_key,
                    "config": canonical(config),
                    "version": version,
                    "fingerprint": fingerprint,
                    "inputs": [{"name": a.name, "key": a.key, "recipe_key": a.recipe_key} for a in inputs],
                }
                found = find() or self._make(recipe, make)
        line = describe(found)
        if found.source == "reference" and found.key != key:
            line += "; it was made from another environment's text, so numbers may differ slightly"
        if found.key not in self._told:
            self._told.add(found.key)
            self.log(line)
            paths.receipt("artefact", name=name, key=found.key, source=found.source, line=line)
        return found

    def promote(self, name: str, key: str | None = None) -> Path:
        """Copy an artefact (the newest, or the one with `key`) to data/reference, to be committed; returns the new folder."""
        folders = [folder for folder in (self.root / "artefacts" / name).glob(key or "[!.]*") if (folder / MANIFEST).exists()]
        if not folders:
            raise StudyError(f"There is no artefact {name}{f'@{key}' if key else ''} to promote: make it with `{self.command}`.")
        source = max(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime)
        verify(source, self.command)
        target = self.reference / name
        fresh, old = target.with_name(f".{name}.new"), target.with_name(f".{name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            shutil.copytree(source, fresh)
            if target.exists():
                os.replace(target, old)
            os.replace(fresh, target)
        except (OSError, shutil.Error) as error:
            if paths.is_disk_full(error, self.reference):
                raise paths.disk_full(f"copying {name} to {self.reference}") from error
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _find(self, name: str, key: str, recipe_key: str, inputs: Sequence[Artefact] | None) -> Artefact | None:
        """The artefact in the cache, or the committed one made from these inputs (None: no committed one is wanted)."""
        folder = self.root / "artefacts" / name / key
        if folder.exists():
            manifest = verify(folder, self.command)
            if manifest["key"] != key:
                raise _damaged(folder / MANIFEST, "is of another artefact", folder, self.command)
            return Artefact(name, key, recipe_key, folder, manifest, "cache")
        folder = self.reference / name
        if inputs is not None and folder.exists():
            # The hashes are checked only once the recipe fits: a reference for other sizes is no business of this run.
            manifest = paths.read_json(folder / MANIFEST)
            if manifest is None or manifest.get("recipe_key") == recipe_key and self._made_from(manifest, inputs):
                manifest = verify(folder, self.command)
                return Artefact(name, manifest["key"], recipe_key, folder, manifest, "reference")
        return None

    def _made_from(self, manifest: dict, inputs: Sequence[Artefact]) -> bool:
        """Whether a committed artefact is of the inputs at hand: what was measured on the committed dictionary says nothing of
        one trained here. Inputs that are never committed, such as tokens, may be of another environment's text.
        """
        keys = {recorded["name"]: recorded["key"] for recorded in manifest.get("inputs", [])}
        return all(keys.get(artefact.name) == artefact.key for artefact in inputs if (self.reference / artefact.name).exists())

    def _make(self, recipe: dict, make: Callable[[Path, Path], object]) -> Artefact:
        name, key = recipe["name"], recipe["key"]
        folder = self.root / "artefacts" / name / key
        out = folder.with_name(f".making-{key}")
        checkpoint = self.root / "checkpoints" / f"{name}-{key}"
        shutil.rmtree(out, ignore_errors=True)  # of a process that was killed; the lock is ours
        resumed = checkpoint.exists() and any(checkpoint.iterdir())
        started = time.monotonic()
        paths.receipt("making", name=name, key=key, resumed=resumed)
        try:
            out.mkdir(parents=True)
            checkpoint.mkdir(parents=True, exist_ok=True)
            make(out, checkpoint)
            files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
            _refuse_pickles(out, self.command)
            manifest = recipe | {
                "files": {file: {"sha256": paths.sha256(path), "bytes": path.stat().st_size} for file, path in files.items()},
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - started, 1),
                "resumed": resumed,
                "machine": {"cpus": environment.cpus(), "platform": platform.platform(terse=True)},
                "versions": environment.versions(),
            }
            paths.write_json(out / MANIFEST, manifest)
            for path in files.values():
                _sync(path)
            os.replace(out, folder)
            _sync(folder.parent)
        except BaseException as error:
            shutil.rmtree(out, ignore_errors=True)
            if paths.is_disk_full(error, self.root) and not isinstance(error, StudyError):
                raise paths.disk_full(f"making {name}") from error
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        return Artefact(name, key, recipe["recipe_key"], folder, manifest, "made")


def verify(folder: Path, command: str = "./run_all.sh") -> dict:
    """The manifest of an artefact's folder, after every file's size and hash have been compared with it.

    Raises StudyError naming the first file that is missing, cut short, changed or a pickle, and how to remake the artefact.
    """
    manifest = paths.read_json(folder / MANIFEST)
    if manifest is None or not isinstance(manifest.get("files"), dict) or not {"key", "recipe_key"} <= manifest.keys():
        raise _damaged(folder / MANIFEST, "is missing or broken", folder, command)
    _refuse_pickles(folder, command)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "is missing", folder, command)
        stat = path.stat()
        if stat.st_size != expected["bytes"]:
            raise _damaged(path, f"has {stat.st_size} bytes instead of {expected['bytes']}", folder, command)
        seen = (f"{path}:{expected['sha256']}", stat.st_size, stat.st_mtime_ns)
        if seen not in _verified and paths.sha256(path) != expected["sha256"]:
            raise _damaged(path, "does not have the hash it was stored with", folder, command)
        _verified.add(seen)
    return manifest


def describe(artefact: Artefact) -> str:
    """One line: what was loaded or made, when, and how long it took on what."""
    manifest = artefact.manifest
    took = duration(manifest["seconds"])
    if artefact.source == "made":
        return f"made {artefact} in {took}" + (", going on from a checkpoint" if manifest["resumed"] else "")
    kind = "reference, made" if artefact.source == "reference" else "made"
    return f"loaded {artefact} ({kind} {manifest['made'][:10]}, {took} on {manifest['machine']['cpus']} cores)"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def canonical(value: Any) -> Any:
    """`value` as plain JSON with one spelling, so that equal configs have equal keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, enum.Enum):
        return canonical(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path) or type(value).__module__ == "torch":  # torch.dtype and torch.device
        return str(value)
    raise TypeError(f"A config may hold numbers, strings, lists, dicts and dataclasses, not {type(value).__name__}")


def _key(*parts: object) -> str:
    return paths.digest(list(parts))[:12]


def _refuse_pickles(folder: Path, command: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise _damaged(path, "is a pickle, which can run code when it is opened, and is refused", folder, command)


def _damaged(path: Path, what: str, folder: Path, command: str) -> StudyError:
    if folder.parent.name == "reference":
        remedy = f"restore it with `git checkout -- {folder}`, or make your own with `{command} --train`"
    else:
        remedy = f"delete the folder {folder} and run `{command}` to make it again"
    return StudyError(f"The file {path} {what}: {remedy}.")


def _sync(path: Path) -> None:
    """Make sure that a power cut cannot leave a finished name over unfinished bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):  # file systems that cannot
            raise
    finally:
        os.close(handle)
