"""Real text that every installation of this project holds: the standard library, and the packages of the lock.

RECIPE below says which domains there are, what share of the tokens each may have, and where its text is from. Only the
distributions named here are read, through the file lists in their metadata, so that whatever else is installed changes nothing.
"""

import fnmatch
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sae_lib import corpus_phrases
from sae_lib.documents import MIN_CHARS, Document, Duplicates, is_generated, is_minified, normalise
from sae_lib.errors import StudyError
from sae_lib.seeds import numpy_generator

# In the closure of the project's own dependencies on every platform and Python.
DISTRIBUTIONS = [
    "accelerate", "anyio", "arrow", "attrs", "babel", "beautifulsoup4", "bleach", "click", "datasets", "debugpy", "dill",
    "einops", "fsspec", "googleapis-common-protos", "huggingface-hub", "ipykernel", "ipython", "ipywidgets", "jaxtyping",
    "jedi", "jinja2", "jsonschema", "jupyter-client", "jupyter-core", "jupyter-lsp", "jupyter-server", "jupyterlab",
    "jupyterlab-server", "jupytext", "lark", "llvmlite", "markdown-it-py", "mistune", "mpmath", "multiprocess", "narwhals",
    "nbclient", "nbconvert", "nbformat", "networkx", "numba", "numpy", "packaging", "pandas", "papermill", "parso",
    "platformdirs", "plotly", "prompt-toolkit", "protobuf", "psutil", "pyarrow", "pydantic", "pygments", "python-dateutil",
    "pyyaml", "pyzmq", "regex", "requests", "rich", "safetensors", "sentencepiece", "setuptools", "soupsieve", "sympy",
    "tokenizers", "torch", "tornado", "tqdm", "traitlets", "transformer-lens", "transformers", "typer", "urllib3", "wandb",
    "wcwidth", "widgetsnbextension",
]

# What an installer adds for its own use differs between two installations of one lock.
INSTALLER_MADE = (".pyc", ".dist-info/INSTALLER", ".dist-info/REQUESTED", ".dist-info/direct_url.json")
# No one file gives more than this; longer ones are cut.
MAX_FILE_CHARS = 60_000
# Text is collected a little beyond the budget, since the number of characters a token holds is only known afterwards.
MARGIN = 1.12
# However small the corpus, so that every domain can be in every split.
MIN_DOCUMENTS = 12


class File(NamedTuple):
    """One installed file: `name` is its path below site-packages or the standard library, the same on every machine.

    `content` tells one version of it from another: the hash in the distribution's list, or the size.
    """

    name: str
    path: str
    content: str

    def read(self) -> str:
        """Its text, or "" where it is not UTF-8 or was removed after the installation."""
        try:
            with (gzip.open if self.path.endswith(".gz") else open)(self.path, "rt", encoding="utf-8", newline=None) as file:
                return file.read()
        except (UnicodeDecodeError, FileNotFoundError):
            return ""


class Part(NamedTuple):
    """One domain of the recipe.

    `share`: fraction of the corpus's tokens, an upper bound. `chars_per_token`: at most, with a vocabulary of 4,096. `read`:
    given the domain's files, yields (text, source). `special`: whether it is one of the rare contexts that the study looks for.
    """

    domain: str
    share: float
    chars_per_token: float
    files: str
    read: Callable[["Part", list[File], int], Iterator[tuple[str, str]]]
    special: bool = False


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _whole(_part: Part, files: list[File], _seed: int) -> Iterator[tuple[str, str]]:
    """Each file is a document."""
    for file in files:
        yield file.read(), file.name


def _pieces(_part: Part, files: list[File], _seed: int, n_chars: int = 1500) -> Iterator[tuple[str, str]]:
    """Documents of about `n_chars` characters, cut between lines: for domains that few files make up."""
    for file in files:
        piece, size = [], 0
        for line in file.read().splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= n_chars:
                yield "".join(piece), file.name
                piece, size = [], 0
        yield "".join(piece), file.name


_TRIPLE_QUOTED = re.compile(r'(^[ \t]*[rR]?)?"""(.*?)"""', re.MULTILINE | re.DOTALL)


def _dedent(text: str) -> str:
    """Without the indentation that the lines after the first share."""
    first, *rest = text.strip().split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return "\n".join([first, *(line[margin:] for line in rest)])


def _docstrings(_part: Part, files: list[File], _seed: int) -> Iterator[tuple[str, str]]:
    """The docstrings of a Python file, without the code: triple-quoted strings that begin a line."""
    for file in files:
        text = file.read()
        if not is_generated(text):
            strings = (match[2] for match in _TRIPLE_QUOTED.finditer(text) if match[1] is not None)
            yield "\n\n".join(_dedent(string) for string in strings if string.strip()), file.name


_MATH = re.compile(r"^([ \t]*)\.\. math::(.*\n(?:\1[ \t]+\S.*\n|[ \t]*\n)*)", re.MULTILINE)


def _latex(_part: Part, files: list[File], _seed: int) -> Iterator[tuple[str, str]]:
    """The displayed formulas of a file's docstrings."""
    for file in files:
        formulas = (_dedent(body) for _, body in _MATH.findall(file.read()))
        yield "\n\n".join(formula for formula in formulas if formula), file.name


def _source_maps(_part: Part, files: list[File], _seed: int) -> Iterator[tuple[str, str]]:
    """Scripts and style sheets as they were written, from the source maps of the compiled ones; and those never compiled."""
    for file in files:
        if file.path.endswith(".map"):
            sources = json.loads(file.read())
            scripts = zip(sources["sources"], sources.get("sourcesContent", ()), strict=False)
        else:
            scripts = [("", file.read())]
        for name, text in scripts:
            if text and not is_minified(text):
                yield text, f"{file.name}/{name}"


def _locale(part: Part, _files: list[File], seed: int) -> Iterator[tuple[str, str]]:
    """Documents of CLDR phrases, without end; `part.files` is the locale."""
    for i in range(100_000):
        rng = numpy_generator(seed, f"corpus/{part.domain}", i)
        yield corpus_phrases.locale_document(part.files, rng), f"cldr/{part.files}/{i}"


def _dna(part: Part, _files: list[File], seed: int) -> Iterator[tuple[str, str]]:
    """Generated genes, without end: the only text here that nobody wrote and no file holds."""
    for i in range(100_000):
        yield corpus_phrases.dna_document(numpy_generator(seed, f"corpus/{part.domain}", i)), f"generated/dna/{i}"


def _encoded(part: Part, files: list[File], seed: int) -> Iterator[tuple[str, str]]:
    """Pieces of fonts, pictures and compressed files as text. A few a file, so that there are many sources."""
    encode = {"base64": corpus_phrases.base64_document, "hex": corpus_phrases.hex_document}[part.domain]
    for file in files:
        # No file is in both.
        if _order(0, file.name)[0] % 2 == (part.domain == "hex"):
            rng = numpy_generator(seed, f"corpus/{part.domain}/{file.name}")
            for text in corpus_phrases.encoded_documents(Path(file.path).read_bytes(), rng, encode):
                yield text, file.name


_BINARY = "*.woff2 *.woff *.png *.gz *.bz2 *.jpg *.eot *.ttf -*.csv.gz"
_PYTHON, _TESTS = "*.py -*/tests/* -*/testing/*", "*/tests/*.py */testing/*.py"
_LOCALES = {
    "arabic": "ar", "hebrew": "he", "russian": "ru", "greek": "el", "armenian": "hy", "georgian": "ka",
    "amharic": "am", "hindi": "hi", "bengali": "bn", "tamil": "ta", "telugu": "te", "thai": "th", "khmer": "km",
    "chinese": "zh", "japanese": "ja", "korean": "ko", "french": "fr", "german": "de", "spanish": "es", "turkish": "tr",
    "vietnamese": "vi", "finnish": "fi", "polish": "pl", "welsh": "cy",
}

RECIPE = (
    #    domain          share  chars/token  files (patterns of names; "-": not these)                              read by
    Part("python",       0.430, 3.3, _PYTHON, _whole),
    Part("python_tests", 0.150, 2.7, _TESTS, _whole),
    Part("docstrings",   0.085, 3.0, _PYTHON, _docstrings),
    Part("c",            0.140, 2.8, "*.h *.hpp *.cuh *.c *.cpp *.cc", _whole),
    Part("type_stubs",   0.060, 2.7, "*.pyi", _whole),
    Part("licences",     0.003, 2.5, "*LICEN[CS]E* *COPYING* *NOTICE* *AUTHORS*", _whole),
    Part("markdown",     0.010, 2.6, "*.md *.rst *.dist-info/METADATA", _whole),
    Part("javascript",   0.012, 3.0, "*.js *.js.map", _source_maps),
    Part("cython",       0.010, 3.4, "*.pyx *.pxd *.pxi", _whole),
    Part("json",         0.008, 2.8, "*.json *.ipynb", _whole),
    #    special contexts
    *(Part(domain, 0.0022, 1.9, locale, _locale, special=True) for domain, locale in _LOCALES.items()),
    Part("base64",       0.0025, 1.1, _BINARY, _encoded, special=True),
    Part("hex",          0.0013, 1.1, _BINARY, _encoded, special=True),
    Part("dna",          0.0013, 2.2, "", _dna, special=True),
    Part("latex",        0.0012, 1.8, _PYTHON, _latex, special=True),
    Part("svg",          0.0022, 1.1, "*.svg", _pieces, special=True),
    Part("csv",          0.0022, 1.1, "plotly/*.csv.gz", _pieces, special=True),
    Part("yaml",         0.0022, 3.0, "*.yaml *.yml", _pieces, special=True),
    Part("protobuf",     0.0022, 3.0, "*.proto", _whole, special=True),
    Part("cmake",        0.0022, 2.5, "*.cmake *CMakeLists.txt", _pieces, special=True),
    Part("css",          0.0015, 2.4, "*.css *.css.map", _source_maps, special=True),
    Part("yarn_lock",    0.0022, 1.6, "*.lock", _pieces, special=True),
)


def budgets(target_tokens: int) -> dict[str, int]:
    """Most tokens of each domain; together they are the target."""
    total = sum(part.share for part in RECIPE)
    return {part.domain: round(part.share / total * target_tokens) for part in RECIPE}


@functools.cache
def _files() -> list[File]:
    """Files of the named distributions and of the standard library, in the order of their names."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise StudyError(f"the corpus reads the package {name}, which is not installed: install the project again, "
                             "pip install -r requirements.lock") from None
        root = str(distribution.locate_file(""))
        found += [File(name, os.path.join(root, name), file.hash.value if file.hash else "")
                  for file in distribution.files or ()
                  if not (name := str(file)).endswith(INSTALLER_MADE) and not name.startswith("..")]
    library = Path(sysconfig.get_path("stdlib"))
    # Builds of Python differ in which tests they leave out; site-packages may lie inside.
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in library.rglob("*.py"):
        inner = path.relative_to(library)
        if not skipped & set(inner.parts) and not inner.parts[0].startswith(("config-", "_sysconfigdata")):
            found.append(File(f"python/{inner.as_posix()}", str(path), str(path.stat().st_size)))
    return sorted(found)


def _matching(patterns: str) -> Callable[[str], bool]:
    """Whether a name fits one of the patterns and none of those with a minus sign."""
    wanted, unwanted = (re.compile("|".join(fnmatch.translate(pattern.removeprefix("-")) for pattern in patterns.split()
                                            if pattern.startswith("-") == minus) or r"(?!)") for minus in (False, True))
    return lambda name: wanted.match(name) is not None and unwanted.match(name) is None


def _of_part(part: Part, name: str) -> bool:
    """Code and docstrings are never of the same file: two in five Python files give docstrings, the others code."""
    if part.domain in ("python", "docstrings"):
        return (_order(0, name)[1] % 5 < 2) == (part.domain == "docstrings")
    return True


def environment_documents(target_tokens: int, seed: int) -> Iterator[Document]:
    """Documents of every domain of the recipe, a little more than the budgets; the same for the same environment and seed.

    Left out are duplicates and near-duplicates, minified and generated files, and texts too short to tell their domain by. Files
    are taken in an order that depends on seed and name only, until a domain has enough, so that little text is collected quickly.
    """
    limits, duplicates = budgets(target_tokens), Duplicates()
    # Special contexts first: where a text would fit two domains the rare one needs it more.
    for part in sorted(RECIPE, key=lambda part: not part.special):
        fits = _matching(part.files)
        files = sorted((file for file in _files() if fits(file.name) and _of_part(part, file.name)),
                       key=lambda file: _order(seed, file.name))
        need = limits[part.domain] * part.chars_per_token * MARGIN
        # Many sources even of a small domain, so that every split can have some.
        longest = int(max(2000, min(MAX_FILE_CHARS, need / 20)))
        count = 0
        for text, source in part.read(part, files, seed):
            if len(text) < MIN_CHARS or not part.special and (is_generated(text) or is_minified(text)):
                continue
            text = normalise(text[:longest])
            if duplicates.seen(text):
                continue
            yield Document(part.domain, text, source)
            need -= len(text)
            count += 1
            if need <= 0 and count >= MIN_DOCUMENTS:
                break


def environment_fingerprint() -> str:
    """Changes when the text of the environment does; hexadecimal."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for file in _files():
        digest.update(f"{file.name}\0{file.content}\0".encode())
    return digest.hexdigest()
