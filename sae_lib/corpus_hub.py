"""A dataset of the Hugging Face hub as a corpus: `hf:NAME[:config][:split]`, streamed once to disk, resumable."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import IterableDataset
from datasets.exceptions import FileNotFoundDatasetsError
from huggingface_hub.errors import HfHubHTTPError

from sae_lib.documents import Document
from sae_lib.errors import StudyError

SPLIT_NAMES = ("train", "validation", "valid", "test")
DOMAIN_FIELDS = (("domain",), ("meta", "pile_set_name"), ("source",))
# Examples between two savings of the place in the stream.
BLOCK = 1000
# Pauses before each new attempt when the network fails; the count begins again with every block that arrives.
RETRY_SECONDS = (1, 5, 20, 60)
CHARS_PER_TOKEN = 4

# The base of the hub's error is that of whichever HTTP client the hub library uses, whose errors reach us as they are.
_NETWORK_ERRORS = (OSError, HfHubHTTPError.__bases__[0])


def _parse(name: str) -> tuple[str, str | None, str]:
    """Dataset, config and split of NAME[:config][:split]; a single part after the name is a split if it is called like one."""
    dataset, *rest = name.split(":")
    if not dataset or len(rest) > 2:
        raise StudyError(f"hf:{name} does not name a dataset: write hf:NAME[:config][:split]")
    if len(rest) == 1:
        return (dataset, None, rest[0]) if rest[0] in SPLIT_NAMES else (dataset, rest[0], "train")
    return dataset, rest[0] if rest else None, rest[1] if rest else "train"


def _load(name: str) -> IterableDataset:
    dataset, config, split = _parse(name)
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=True)
    except FileNotFoundDatasetsError:
        raise StudyError(f"there is no dataset {dataset} that can be read without a login: check its name on the hub") from None
    except ValueError as error:
        raise StudyError(f"hf:{name} cannot be opened ({str(error).splitlines()[0]}): check its config and split") from None


def _text_field(example: dict[str, Any], name: str) -> str:
    """The column "text", or the only one that holds strings."""
    strings = [field for field, value in example.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise StudyError(f"hf:{name} has no column named text and {len(strings)} others of strings ({', '.join(strings)}): "
                         "use a dataset with one text column")
    return strings[0]


def _domain(example: dict[str, Any], default: str) -> str:
    for path in DOMAIN_FIELDS:
        value: Any = example
        for field in path:
            value = value.get(field) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value
    return default


class _Download:
    """The part of a stream that is on disk: `documents.jsonl`; in `cursor.json`, how far it is valid and where the stream stands.

    The cursor is written after the text and replaces the old one at once: text beyond it, from a run that was killed, is cut off.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.text, self.place = folder / "documents.jsonl", folder / "cursor.json"
        self.cursor: dict[str, Any] = {"bytes": 0, "chars": 0, "examples": 0, "finished": False, "stream": None}
        if self.place.exists():
            self.cursor = json.loads(self.place.read_text())
        self.text.touch()
        os.truncate(self.text, self.cursor["bytes"])

    def append(self, records: list[tuple[str, str]], examples: int, stream: dict, finished: bool) -> None:
        with self.text.open("ab") as file:
            for domain, text in records:
                file.write(json.dumps([domain, text]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self.cursor = {"bytes": size, "chars": self.cursor["chars"] + sum(len(text) for _, text in records),
                       "examples": self.cursor["examples"] + examples, "finished": finished, "stream": stream}
        new = self.place.with_suffix(".new")
        new.write_text(json.dumps(self.cursor))
        os.replace(new, self.place)

    def documents(self, start: int) -> Iterator[tuple[str, str]]:
        """(domain, text) from byte `start` on."""
        with self.text.open("rb") as file:
            file.seek(start)
            for line in file:
                domain, text = json.loads(line)
                yield domain, text


def _blocks(name: str, download: _Download) -> Iterator[None]:
    """Appends the rest of the stream block by block, with new attempts when the network fails."""
    stream, dataset, pauses = None, None, iter(RETRY_SECONDS)
    while not download.cursor["finished"]:
        try:
            if stream is None:
                dataset = _load(name)
                if download.cursor["stream"]:
                    dataset.load_state_dict(download.cursor["stream"])
                stream = iter(dataset)
            examples = list(islice(stream, BLOCK))
        except _NETWORK_ERRORS as error:
            stream, pause = None, next(pauses, None)
            if pause is None:
                raise StudyError(f"hf:{name} stopped after {download.cursor['examples']} examples ({type(error).__name__}): run "
                                 "again with a network, it goes on from there, or use the corpus environment") from None
            time.sleep(pause)
            continue
        pauses = iter(RETRY_SECONDS)
        field = _text_field(examples[0], name) if examples else ""
        records = [(_domain(example, _parse(name)[0]), example[field]) for example in examples]
        download.append([record for record in records if record[1] and record[1].strip()], len(examples), dataset.state_dict(),
                        finished=len(examples) < BLOCK)
        yield


def hub_documents(name: str, target_tokens: int, cache: Path) -> Iterator[Document]:
    """Documents of NAME[:config][:split], in the order of the stream, until the text is certainly enough for `target_tokens`.

    What arrives is kept below `cache`, so that a second reading needs no network and an interrupted one goes on. The domain is
    the field "domain", "meta.pile_set_name" or "source", else the dataset's name.

    Raises StudyError if there is no such dataset, no text column, no text, or, after several attempts, no network.
    """
    download = _Download(cache / hashlib.sha256(name.encode()).hexdigest()[:16])
    blocks = _blocks(name, download)
    left, read, number = CHARS_PER_TOKEN * target_tokens, 0, 0
    while True:
        for domain, text in download.documents(read):
            number += 1
            yield Document(domain, text, str(number))
            left -= len(text)
            if left <= 0:
                return
        read = download.cursor["bytes"]
        try:
            next(blocks)
        except StopIteration:
            break
    if number == 0:
        raise StudyError(f"hf:{name} holds no text: use another split or dataset")
