"""Folders of models and dictionaries from elsewhere: those that are there, and those of the hub, downloaded once."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from sae_lib.errors import StudyError
from sae_lib.study import paths

ROOT_FILES = ("*.json", "*.safetensors", "*.txt")
# The base of the hub's error is that of whichever HTTP client it uses; a name that cannot be one is a ValueError.
HUB_ERRORS = (OSError, ValueError, HfHubHTTPError.__bases__[0])


def fetch(repo: str, patterns: list[str], ignore: list[str], what: str) -> Path:
    """The folder below data/hub with some files of a repository of the Hugging Face hub, downloaded once.

    Raises StudyError if there is none, or no network.
    """
    folder = paths.data() / "hub" / "repositories" / repo.replace("/", "--")
    done = folder / f".{paths.digest([patterns, ignore])[:12]}.done"
    if not done.exists():
        try:
            snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignore, local_dir=folder)
        except HUB_ERRORS as error:
            raise StudyError(f"{what} is neither a folder nor could it be downloaded ({type(error).__name__}); check the name, "
                             "or run this once with a network.") from error
        paths.write_atomic(done, "")
    return folder


def _folder(name: str) -> Path | None:
    """The folder of this name, if it is there: seen from the working directory or from the study's own folder."""
    places = (Path(name).expanduser(), paths.root() / name)
    return next((place.resolve() for place in places if place.is_dir()), None)


def model_folder(name: str) -> Path:
    """The folder of a model in Hugging Face's layout: one that is there, or one of the hub."""
    if found := _folder(name):
        return found
    repo = name.removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith("."):
        raise StudyError(f"There is no folder {name}; give MODEL a folder with a model, or the name of one on the hub.")
    return fetch(repo, list(ROOT_FILES), ["*/*"], f"The model '{name}'")


def dictionary_folder(source: str) -> Path:
    """The folder of a dictionary: one that is there, or hf:OWNER/NAME/path/in/repository."""
    if not source.startswith("hf:"):
        if found := _folder(source):
            return found
        raise StudyError(f"There is no folder {source}; give DICTIONARY a folder with a dictionary, or hf:OWNER/NAME/path.")
    owner, _, rest = source.removeprefix("hf:").strip("/").partition("/")
    name, _, inside = rest.partition("/")
    if not name:
        raise StudyError(f"'{source}' names no repository; write hf:OWNER/NAME/path/in/repository.")
    # The folder itself, and beside it the configuration of the run.
    patterns = [f"{inside}/*", f"{Path(inside).parent}/config.json", "config.json"] if inside else ["*"]
    return fetch(f"{owner}/{name}", patterns, [f"{inside}/*/*" if inside else "*/*"], f"The dictionary '{source}'") / inside
