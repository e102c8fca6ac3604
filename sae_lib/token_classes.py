"""Readable classes of tokens: script, case, digits, spaces, punctuation, ... What the pattern explainer has words for."""

import string
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Int

SCRIPT_NAMES = {"Cjk": "Chinese", "Latin": "accented Latin"}
MARKS = {"opening brackets": "([{<", "closing brackets": ")]}>", "quotation marks": "\"'`",
         "full stops, commas and colons": ".,:;!?", "operators": "=+-*/%<>&|^~", "underscores": "_"}


@cache
def _script(character: str) -> str:
    """The script of a letter or vowel sign beyond ASCII, from its Unicode name; "" for anything else."""
    if character.isascii() or unicodedata.category(character)[0] not in "LM":
        return ""
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0].capitalize()
    return SCRIPT_NAMES.get(name, name)


def _text(token: bytes) -> tuple[str, bool]:
    """The token's characters, and whether it has a piece of one. A first piece is completed to a character that begins so,
    which as a rule is of the same script: tokens of byte-level vocabularies often end inside a character."""
    text = token.decode("utf-8", errors="ignore")
    for length in range(1, min(4, len(token) + 1)):
        for filling in (b"\x90", b"\x90\x90"):  # 0x90 is where most alphabets have a letter
            try:
                character = (token[-length:] + filling).decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(character) == 1:
                return text + character, True
    return text, text.encode() != token


def quoted(token: bytes) -> str:
    """The token in quotation marks, spaces and line breaks visible; in bytes if it holds a piece of a character."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)


def classes_of(token: bytes) -> set[str]:
    """Names of the classes that a token belongs to."""
    text, broken = _text(token)
    body = text.strip()
    scripts = {script for script in map(_script, body) if script}
    found = {f"{script} letters" for script in scripts}
    checks = {
        "pieces of a character": broken,
        "letters beyond Latin": bool(scripts - {"accented Latin"}),
        "spaces or line breaks": bool(text) and not body,
        "line breaks": "\n" in text,
        "indentation": not body and "  " in text,
        "tokens with a space in front": text.startswith(" ") and bool(body),
        "tokens without a space in front": bool(body) and not text[0].isspace(),
        "digits": body.isdigit(),
        "letters": body.isalpha() and body.isascii(),
        "lower-case letters": body.isalpha() and body.islower() and body.isascii(),
        "capitals": body.isalpha() and body.isupper() and body.isascii(),
        "capitalised words": len(body) > 1 and body.isascii() and body.isalpha() and body[0].isupper() and body[1:].islower(),
        "one letter": len(body) == 1 and body.isalpha() and body.isascii(),
        "hexadecimal digits": bool(body) and set(body) <= set(string.digits + "abcdef"),
        "the letters A, C, G, T": bool(body) and (set(body) <= set("ACGT") or set(body) <= set("acgt")),
        "mixed letters and digits": _mixed(body),
        "punctuation": bool(body) and all(c in string.punctuation for c in body),
    }
    found |= {name for name, holds in checks.items() if holds}
    if "punctuation" in found:
        found |= {name for name, marks in MARKS.items() if body[0] in marks}
    return found


def _mixed(body: str) -> bool:
    """Runs like those of base64: of lower case, capitals and digits at least two, and no ordinary capitalised word."""
    if not body or not all(c.isascii() and (c.isalnum() or c in "+/=") for c in body):
        return False
    kinds = any(map(str.islower, body)) + any(map(str.isupper, body)) + any(map(str.isdigit, body))
    return kinds > 1 and not (body[0].isupper() and body[1:].islower())


class Classes:
    """The classes of a vocabulary's tokens, and their spelling forms (the same word whatever its case and spaces)."""

    def __init__(self, vocabulary: Sequence[bytes]):
        self.vocabulary = vocabulary
        of_token = [classes_of(token) for token in vocabulary]
        self.names = sorted(set().union(*of_token))
        column = {name: i for i, name in enumerate(self.names)}
        self.member: Bool[np.ndarray, "classes d_vocab"] = np.zeros((len(self.names), len(vocabulary)), dtype=bool)
        for token, names in enumerate(of_token):
            self.member[[column[name] for name in names], token] = True
        keys = [token.strip().lower() or token for token in vocabulary]
        self.form: Int[np.ndarray, " d_vocab"] = np.unique(np.array(keys, dtype=object), return_inverse=True)[1]
        self.form_size = np.bincount(self.form)
        self.spelling: dict[int, bytes] = {}  # the shortest of each form
        for form, token in zip(self.form.tolist(), vocabulary, strict=True):
            if form not in self.spelling or len(token) < len(self.spelling[form]):
                self.spelling[form] = token

    def show(self, token: int) -> str:
        """A token as it can stand in a sentence."""
        return quoted(self.vocabulary[token])
