"""A folder of text files as a corpus: `files:DIR`."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from sae_lib.documents import Document
from sae_lib.errors import StudyError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# Longer texts are cut into documents; their pieces share a source, and so a split.
MAX_DOCUMENT_CHARS = 20_000
# More than a token holds in most languages: a large folder is read up to this many times the tokens wanted.
CHARS_PER_TOKEN = 4


def _files(folder: Path) -> list[Path]:
    """All text files, sorted by name. Raises StudyError if there are none."""
    if not folder.is_dir():
        raise StudyError(f"there is no folder {folder}: name one with {', '.join(SUFFIXES)} files after files:")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise StudyError(f"the folder {folder} has no {', '.join(SUFFIXES)} files: put text there, one folder per domain")
    return found


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise StudyError(f"line {number} of {path} is not JSON: mend or remove it") from None
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"], f"{name}:{number}"


def _parquet(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise StudyError(f"{path} has no column named text: rename the one that holds the text")
            row = 0
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(text, str):
                        yield text, f"{name}:{row}"
    except pyarrow.ArrowInvalid:
        raise StudyError(f"{path} is not a parquet file: remove it or copy it again") from None


def _texts(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(text, source) of a file: itself, or its records. Raises UnicodeDecodeError where it is not text."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, name)
    elif path.suffix.lower() == ".jsonl":
        yield from _jsonl(path, name)
    else:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "binary")
        yield text, name


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_DOCUMENT_CHARS, cut after a line or a word where there is one."""
    while len(text) > MAX_DOCUMENT_CHARS:
        end = max(text.rfind("\n", MAX_DOCUMENT_CHARS // 2, MAX_DOCUMENT_CHARS),
                  text.rfind(" ", MAX_DOCUMENT_CHARS // 2, MAX_DOCUMENT_CHARS)) + 1 or MAX_DOCUMENT_CHARS
        yield text[:end]
        text = text[end:]
    yield text


def _domain_documents(domain: str, folder: Path, files: list[Path], unreadable: list[str]) -> Iterator[Document]:
    """Documents of one domain; names of files that are not text are put into `unreadable`."""
    for path in files:
        try:
            for text, source in _texts(path, path.relative_to(folder).as_posix()):
                yield from (Document(domain, piece, source) for piece in _cut(text) if piece.strip())
        except (UnicodeDecodeError, OSError):
            unreadable.append(path.name)


def folder_documents(folder: Path, target_tokens: int, seed: int) -> Iterator[Document]:
    """The documents of a folder: its top-level folders are the domains; files beside them have the folder's own name as domain.

    `.txt` and `.md` files are cut into documents of 20,000 characters that share the file as source; a line of `.jsonl` (field
    "text") and a row of `.parquet` (column "text") is a document of its own. Records without text are skipped, and so, with a
    warning, are files that are not UTF-8 text. Domains are read in equal parts as far as each has text, their files in an order
    that depends on seed and name, until the text is certainly enough for `target_tokens`.

    Raises StudyError if the folder is missing, has no files or no readable text, or if a .jsonl or .parquet file is broken.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(_files(folder), key=lambda path: hashlib.sha256(f"{seed}/{path.relative_to(folder)}".encode()).digest()):
        inner = path.relative_to(folder)
        files.setdefault(inner.parts[0] if len(inner.parts) > 1 else folder.resolve().name, []).append(path)
    unreadable: list[str] = []
    open_domains = {domain: _domain_documents(domain, folder, paths, unreadable) for domain, paths in sorted(files.items())}
    chars = dict.fromkeys(open_domains, 0)
    while open_domains and sum(chars.values()) < CHARS_PER_TOKEN * target_tokens:
        domain = min(open_domains, key=chars.__getitem__)
        document = next(open_domains[domain], None)
        if document is None:
            del open_domains[domain]
        else:
            chars[domain] += len(document.text)
            yield document
    if unreadable:
        warnings.warn(f"skipped {len(unreadable)} files of {folder} that are not UTF-8 text: {', '.join(sorted(unreadable)[:5])}")
    if not any(chars.values()):
        raise StudyError(f"none of the {sum(map(len, files.values()))} files in {folder} holds readable text "
                         f"({len(unreadable)} are not UTF-8): put text there, one folder per domain")


def folder_fingerprint(folder: Path) -> str:
    """Changes when the text of the folder does. Of a large file its size, its beginning and its end are looked at."""
    digest, edge = hashlib.sha256(), 2**20
    for path in _files(folder):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            file.seek(max(size - edge, 0))
            digest.update(file.read(edge))
    return digest.hexdigest()
