import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import unicodedata
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from packaging.requirements import Requirement

from sae_lib import corpus_environment, corpus_hub, corpus_phrases
from sae_lib.corpus import RECIPE, SPECIAL_CONTEXTS, CorpusConfig, budgets, documents, fingerprint
from sae_lib.corpus_environment import DISTRIBUTIONS
from sae_lib.documents import Document, Duplicates, is_generated, is_minified, normalise
from sae_lib.errors import StudyError
from sae_lib.tokens import TokenConfig, TokenData, tokenise, train_tokenizer

ROOT = Path(__file__).parents[1]
TINY = CorpusConfig(target_tokens=100_000)


def folder(path):
    return CorpusConfig(f"files:{path}", target_tokens=1_000_000)


def digest(found):
    return hashlib.sha256("\0".join("\1".join(document) for document in found).encode()).hexdigest()


# --- what a document is ------------------------------------------------------------------------------------------------

def test_minified_and_generated_texts_are_recognised():
    code = "def f(x):\n    return x\n" * 50
    assert not is_minified(code) and not is_generated(code)
    assert is_minified(code + "a=1;" * 300)
    assert is_minified("\n".join(["x" * 300] * 10))
    assert is_generated("# This file is AUTO-GENERATED\n" + code) and is_generated("// do not edit\n" + code)
    assert not is_generated(code * 10 + "# do not edit")


def test_duplicates_and_near_duplicates_are_recognised():
    lines = [f"    value_{i} = compute_the_thing({i}, {i * 7})" for i in range(200)]
    text, copy = "\n".join(lines), "\n".join(["# a changed head"] + lines[:180])
    other = "\n".join(line.replace("value", "other") for line in lines)
    duplicates = Duplicates()
    assert [duplicates.seen(t) for t in (text, text, copy, other)] == [False, True, True, False]


def test_normalise():
    assert normalise("\ufeff\n\na \r\nb\t\n\n\n") == "a\nb\n"


# --- the environment ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    return list(documents(TINY))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small environment corpus, as tokens."""
    path, config, tokens = tmp_path_factory.mktemp("tokens"), CorpusConfig(target_tokens=500_000), TokenConfig(1024, 64)
    found = list(documents(config))
    tokenise(found, train_tokenizer(found, tokens), tokens, path, budgets(config))
    return TokenData.open(path)


def test_special_contexts_are_many_and_rare(built):
    table = built.table().set_index("domain")
    assert len(SPECIAL_CONTEXTS) >= 20 and set(SPECIAL_CONTEXTS) < set(table.index)
    assert table.share[list(SPECIAL_CONTEXTS)].between(0.001, 0.004).all()
    assert 0.97 * 500_000 < table.tokens.sum() <= 500_000
    assert table[["train", "validation", "test"]].min().min() > 0


def test_budgets_add_up_to_the_target():
    assert sum(budgets(CorpusConfig()).values()) == pytest.approx(46_000_000, abs=50)
    assert budgets(CorpusConfig("files:x")) == {}


def test_same_environment_same_text_in_any_process(tiny):
    code = """
import hashlib
from sae_lib.corpus import CorpusConfig, documents
print(hashlib.sha256("\\0".join("\\1".join(d) for d in documents(CorpusConfig(target_tokens=100_000))).encode()).hexdigest())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(tiny)


def test_another_seed_is_another_text(tiny):
    assert digest(islice(documents(CorpusConfig(target_tokens=100_000, seed=1)), 50)) != digest(tiny[:50])


def test_code_and_docstrings_are_of_different_files(tiny):
    of = {name: {document.source for document in tiny if document.domain == name} for name in ("python", "docstrings")}
    assert of["python"] and of["docstrings"] and not of["python"] & of["docstrings"]


def test_only_named_distributions_and_the_standard_library_are_read(tiny):
    owned = {str(file) for name in DISTRIBUTIONS for file in importlib.metadata.distribution(name).files}
    for source in {document.source for document in tiny}:
        # Scripts of a source map are named by the map and their own path.
        file = re.split(r"(?<=\.map)/|(?<=\.(?:js|ss))/$|(?<=\.css)/$", source)[0].rstrip("/")
        assert file in owned or file.startswith(("python/", "cldr/", "generated/dna/")), source


def test_named_distributions_are_always_installed():
    """Each is reached from the project's dependencies, whatever the platform."""
    todo = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    reached, platforms = {}, [{"sys_platform": s, "platform_system": p, "os_name": "posix", "platform_machine": m}
                              for s, p, m in (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"))]
    while todo:
        requirement = todo.pop()
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        if name in reached and reached[name] >= requirement.extras:
            continue
        reached[name] = reached.get(name, set()) | requirement.extras
        for line in importlib.metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(all(inner.marker.evaluate({"extra": extra, **p}) for p in platforms)
                                           for extra in requirement.extras | {""}):
                todo.append(inner)
    assert set(DISTRIBUTIONS) <= set(reached)


def test_a_missing_distribution_is_named(monkeypatch):
    monkeypatch.setattr(corpus_environment, "DISTRIBUTIONS", ["no-such-package"])
    corpus_environment._files.cache_clear()
    try:
        with pytest.raises(StudyError, match="no-such-package, which is not installed"):
            fingerprint(TINY)
    finally:
        corpus_environment._files.cache_clear()


def test_docstrings_and_formulas_are_cut_out_of_code(tmp_path):
    (tmp_path / "a.py").write_text('''def f():
    """First line.

    .. math::

        x^2 + y^2

    Last line.
    """
    query = """
    not a docstring"""
    return query
''')
    files = [corpus_environment.File("a.py", str(tmp_path / "a.py"), "")]
    part = RECIPE[0]
    [docstring] = corpus_environment._docstrings(part, files, 0)
    assert docstring == ("First line.\n\n.. math::\n\n    x^2 + y^2\n\nLast line.", "a.py")
    assert list(corpus_environment._latex(part, files, 0)) == [("x^2 + y^2", "a.py")]


def test_scripts_come_from_source_maps_and_minified_ones_not_at_all(tmp_path):
    (tmp_path / "a.js.map").write_text(json.dumps({"sources": ["x.ts", "y.ts"], "sourcesContent": ["let x = 1;\n", "y;" * 900]}))
    (tmp_path / "b.js").write_text("z;" * 900)
    files = [corpus_environment.File(name, str(tmp_path / name), "") for name in ("a.js.map", "b.js")]
    assert list(corpus_environment._source_maps(RECIPE[0], files, 0)) == [("let x = 1;\n", "a.js.map/x.ts")]


@pytest.mark.parametrize(("locale", "script"), [
    ("ar", "ARABIC"), ("he", "HEBREW"), ("ru", "CYRILLIC"), ("th", "THAI"), ("ko", "HANGUL"), ("am", "ETHIOPIC"), ("fr", "LATIN"),
    ("ja", ("KATAKANA", "HIRAGANA", "CJK"))])
def test_phrases_are_in_the_script_of_their_language(locale, script):
    text = "".join(corpus_phrases.locale_document(locale, np.random.default_rng(i)) for i in range(30))
    letters = [unicodedata.name(character, "") for character in text if character.isalpha()]
    assert np.mean([name.startswith(script) for name in letters]) > 0.98
    assert len(set(text.splitlines())) > 0.75 * len(text.splitlines())


def test_binary_data_and_genes():
    rng, data = np.random.default_rng(0), bytes(range(256)) * 20
    alphabets = {corpus_phrases.base64_document: r"[A-Za-z0-9+/=\n]+", corpus_phrases.hex_document: r"[0-9a-f \n]+"}
    for encode, alphabet in alphabets.items():
        texts = list(corpus_phrases.encoded_documents(data, rng, encode))
        assert len(texts) == 4 and all(re.fullmatch(alphabet, text) for text in texts)
    gene = corpus_phrases.dna_document(rng).upper().replace("\n", "")
    codons = [gene[i:i + 3] for i in range(0, len(gene), 3)]
    assert set(gene) == set("ACGT") and len(gene) % 3 == 0 and codons[0] == "ATG"
    assert [codon in ("TAA", "TAG", "TGA") for codon in codons] == [False] * (len(codons) - 1) + [True]


def test_shares_are_fractions():
    assert sum(part.share for part in RECIPE) == pytest.approx(1, abs=0.05)
    assert len({part.domain for part in RECIPE}) == len(RECIPE)


# --- a folder ----------------------------------------------------------------------------------------------------------

def test_every_kind_of_file_and_its_domain(tmp_path):
    for name in ("a", "b/deep"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "x.txt").write_text("plain")
    (tmp_path / "a" / "y.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"other": 1}\n{"text": "two"}\n')
    (tmp_path / "b" / "deep" / "z.md").write_text("\ufeffmarked", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", None, "q"]}), tmp_path / "b" / "w.parquet")
    (tmp_path / "beside.txt").write_text("beside")
    (tmp_path / "notes.pdf").write_bytes(b"\0")
    assert sorted(documents(folder(tmp_path))) == sorted([
        Document("a", "plain", "a/x.txt"), Document("a", "one", "a/y.jsonl:1"), Document("a", "two", "a/y.jsonl:5"),
        Document("b", "marked", "b/deep/z.md"), Document("b", "p", "b/w.parquet:1"), Document("b", "q", "b/w.parquet:3"),
        Document(tmp_path.name, "beside", "beside.txt")])


def test_long_files_are_cut_without_loss_and_keep_their_source(tmp_path):
    text = " ".join(f"word{i}" for i in range(10_000)) + "x" * 50_000
    (tmp_path / "book.txt").write_text(text)
    found = list(documents(folder(tmp_path)))
    assert "".join(document.text for document in found) == text
    assert len(found) >= 6 and max(len(document.text) for document in found) <= 20_000
    assert {document.source for document in found} == {"book.txt"}


def test_a_large_folder_is_read_as_far_as_needed_and_every_domain_of_it(tmp_path):
    for name, n in (("large", 20), ("small", 1)):
        (tmp_path / name).mkdir()
        for i in range(n):
            (tmp_path / name / f"{i}.txt").write_text("some words " * 100)
    found = list(documents(CorpusConfig(f"files:{tmp_path}", target_tokens=1000)))
    assert sorted(document.domain for document in found) == ["large"] * 3 + ["small"]


def test_the_fingerprint_follows_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = fingerprint(folder(tmp_path))
    assert fingerprint(folder(tmp_path)) == first
    (tmp_path / "a.txt").write_text("two")
    assert len({first, fingerprint(folder(tmp_path)), fingerprint(TINY), fingerprint(CorpusConfig("hf:a"))}) == 4


def test_binary_files_are_skipped_with_a_warning(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\0\1")
    (tmp_path / "null.txt").write_bytes(b"a\0b")
    (tmp_path / "good.txt").write_text("good")
    with pytest.warns(UserWarning, match="skipped 2 files"):
        assert [document.text for document in documents(folder(tmp_path))] == ["good"]


@pytest.mark.parametrize(("files", "message"), [
    ({}, "has no .txt"),
    ({"a.pdf": b"%PDF"}, "has no .txt"),
    ({"a.txt": b"  \n"}, "none of the 1 files"),
    ({"a.jsonl": b'{"text": "x"}\n{"text": "y\n'}, "line 2 of .*a.jsonl is not JSON"),
    ({"a.parquet": b"no"}, "a.parquet is not a parquet file"),
])
def test_faulty_folders(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=message):
        list(documents(folder(tmp_path)))


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_folder_of_binary_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\0")
    with pytest.raises(StudyError, match=r"none of the 1 files .*\(1 are not UTF-8\)"):
        list(documents(folder(tmp_path)))


def test_parquet_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["p"]}), tmp_path / "w.parquet")
    with pytest.raises(StudyError, match="no column named text"):
        list(documents(folder(tmp_path)))


@pytest.mark.parametrize("source", ["nothing", "files", "environment:x", "hf", "http://x"])
def test_unknown_corpora(source):
    if source == "files":
        source = "files:/no/such/folder"
    with pytest.raises(StudyError, match="there is no (corpus|folder)|does not name a dataset"):
        next(iter(documents(CorpusConfig(source))))


def test_shared_corpora(tmp_path):
    path = Path(os.environ.get("SAE_LIB_CORPORA", ROOT.parent / "shared" / "corpora"))
    if not path.is_dir():
        pytest.skip("no folder of corpora")
    found = list(documents(CorpusConfig(f"files:{path}", target_tokens=200_000)))
    assert {"arabic", "dna", "english", "hebrew"} <= {document.domain for document in found}
    config = TokenConfig(1024, 64)
    tokenise(found, train_tokenizer(found, config), config, tmp_path)
    table = TokenData.open(tmp_path).table().set_index("domain")
    assert (table.loc[["arabic", "dna", "english", "hebrew"], ["validation", "test"]] > 0).all().all()


# --- the hub (local files: no test needs a network) --------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset of 25 examples in a folder, and small blocks."""
    (tmp_path / "data").mkdir()
    records = [{"text": f"text number {i}", "meta": {"pile_set_name": "AB"[i % 2]}} for i in range(25)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(corpus_hub, "BLOCK", 4)
    monkeypatch.setattr(corpus_hub, "RETRY_SECONDS", (0, 0))
    return CorpusConfig(f"hf:{tmp_path / 'data'}", target_tokens=1000)


def expected(n=25):
    return [Document("AB"[i % 2], f"text number {i}", str(i + 1)) for i in range(n)]


def test_a_stream_is_read_and_then_kept(hub, tmp_path, monkeypatch):
    assert list(documents(hub, tmp_path / "cache")) == expected()
    monkeypatch.setattr(corpus_hub, "_load", None)  # from now on there is nothing to stream from
    assert list(documents(hub, tmp_path / "cache")) == expected()


def test_no_more_is_streamed_than_needed(hub, tmp_path):
    found = list(documents(CorpusConfig(hub.source, target_tokens=10), tmp_path / "cache"))
    assert found == expected(len(found)) and 3 <= len(found) <= 4


def test_an_interrupted_stream_goes_on_where_it_was(hub, tmp_path):
    """Ended after 10 documents, and killed while the next were written."""
    assert list(islice(documents(hub, tmp_path / "cache"), 10)) == expected(10)
    [text] = (tmp_path / "cache").glob("*/documents.jsonl")
    with text.open("ab") as file:
        file.write(b'["A", "half a docu')
    assert list(documents(hub, tmp_path / "cache")) == expected()


def test_network_failures_are_retried_and_at_last_reported(hub, tmp_path, monkeypatch):
    load, calls = corpus_hub._load, []

    class Flaky:
        """A stream that breaks after 6 examples each time."""

        def __init__(self, name):
            self.dataset = load(name)
            self.load_state_dict, self.state_dict = self.dataset.load_state_dict, self.dataset.state_dict
            calls.append(name)

        def __iter__(self):
            for i, example in enumerate(self.dataset):
                if i == 6:
                    raise ConnectionError
                yield example

    monkeypatch.setattr(corpus_hub, "_load", Flaky)
    assert list(documents(hub, tmp_path / "cache")) == expected()
    assert len(calls) > 3

    def offline(_name):
        raise ConnectionError
    monkeypatch.setattr(corpus_hub, "_load", offline)
    with pytest.raises(StudyError, match="stopped after 0 examples .* with a network"):
        list(documents(hub, tmp_path / "other"))


def test_the_text_column(hub, tmp_path):
    path = tmp_path / "data" / "train.jsonl"
    path.write_text('{"story": "once", "n": 1}\n')
    assert list(documents(hub, tmp_path / "one"))[0].text == "once"
    path.write_text('{"story": "once", "title": "x"}\n')
    with pytest.raises(StudyError, match="no column named text and 2 others"):
        list(documents(hub, tmp_path / "two"))


@pytest.mark.parametrize(("name", "parsed"), [
    ("a/b", ("a/b", None, "train")), ("a/b:en", ("a/b", "en", "train")), ("a/b:test", ("a/b", None, "test")),
    ("a/b:en:validation", ("a/b", "en", "validation"))])
def test_names_of_datasets(name, parsed):
    assert corpus_hub._parse(name) == parsed


def test_a_split_that_does_not_exist(hub, tmp_path):
    with pytest.raises(StudyError, match="cannot be opened"):
        list(documents(CorpusConfig(hub.source + ":test"), tmp_path / "cache"))
