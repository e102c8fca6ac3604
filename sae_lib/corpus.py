"""Text in: documents with a domain each, from the environment, from a folder, or from the Hugging Face hub.

A corpus is named `environment`, `files:DIR` or `hf:NAME[:config][:split]`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sae_lib import corpus_environment, corpus_folder
from sae_lib.documents import Document
from sae_lib.errors import StudyError

__all__ = ["RECIPE", "SPECIAL_CONTEXTS", "CorpusConfig", "Document", "budgets", "documents", "fingerprint"]

RECIPE = corpus_environment.RECIPE
# The rare contexts, each 0.1 to 0.4 % of tokens. Rarity makes superposition: a neuron is not worth a context met this seldom.
SPECIAL_CONTEXTS = tuple(part.domain for part in RECIPE if part.special)


@dataclass(frozen=True)
class CorpusConfig:
    """`source`: `environment`, `files:DIR` or `hf:NAME[:config][:split]`. `target_tokens`: about how much text to take."""

    source: str = "environment"
    target_tokens: int = 46_000_000
    seed: int = 0


def _split_source(source: str) -> tuple[str, str]:
    """Kind and name of a source. Raises StudyError if it is of no known kind."""
    kind, _, name = source.partition(":")
    if kind not in ("environment", "files", "hf") or (kind == "environment") == bool(name):
        raise StudyError(f"there is no corpus {source!r}: write environment, files:DIR or hf:NAME[:config][:split]")
    return kind, name


def documents(config: CorpusConfig, cache: Path | None = None) -> Iterator[Document]:
    """The corpus's documents, in an order that depends on the configuration and the text only.

    `cache`: where `hf:` keeps what it streamed. Raises StudyError if there is no such text, at the first document.
    """
    kind, name = _split_source(config.source)
    if kind == "files":
        return corpus_folder.folder_documents(Path(name), config.target_tokens, config.seed)
    if kind == "hf":
        from sae_lib import corpus_hub  # `datasets` takes a second to import, and is seldom needed

        return corpus_hub.hub_documents(name, config.target_tokens, cache or Path.home() / ".cache" / "sae_lib")
    return corpus_environment.environment_documents(config.target_tokens, config.seed)


def budgets(config: CorpusConfig) -> dict[str, int]:
    """The most tokens that each domain may have; empty where the corpus is taken as it is."""
    return corpus_environment.budgets(config.target_tokens) if config.source == "environment" else {}


def fingerprint(config: CorpusConfig) -> str:
    """What the text depends on, as hexadecimal digits; of a hub dataset only its name is known without a network."""
    kind, name = _split_source(config.source)
    content = {"environment": corpus_environment.environment_fingerprint,
               "files": lambda: corpus_folder.folder_fingerprint(Path(name)),
               "hf": lambda: name}[kind]()
    return hashlib.sha256(f"{kind}/{config.target_tokens}/{config.seed}/{content}".encode()).hexdigest()
