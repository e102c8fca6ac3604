"""Checkpoints of interrupted trainings: tensors and plain values in one file, written whole or not at all."""

import errno
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lib.errors import StudyError


def save_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict) -> None:
    """Write tensors and JSON-able values to `path`, replacing it in one step.

    Raises StudyError when the disk is full; the previous checkpoint is kept.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"values": json.dumps(values)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        # safetensors reports the system's error in words, without an errno.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise StudyError(f"The disk is full, so {path} was not updated; free some space and run again to go on "
                             "from the last checkpoint.") from error
        raise


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and values last saved at `path`, or None if there are none.

    Raises StudyError if the file is not a whole checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"The checkpoint {path} is damaged; delete it to start this training anew.") from error
