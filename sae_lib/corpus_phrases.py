"""Documents of the rare contexts that are not files: phrases of CLDR locales, binary data as text, and DNA.

Babel carries the Unicode consortium's locale data: the names of territories, languages, scripts, currencies, months and units,
and the patterns that join them, as speakers of each language wrote them. Lines are put together as a program that speaks the
language would: lists, dates, sums of money, spans of time; which phrases, is drawn at random.
"""

import base64
import datetime
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from babel import Locale, dates, lists, numbers, units

# Short, so that even the little text held out of a rare context holds many documents.
DOCUMENT_CHARS = (220, 480)
Random = np.random.Generator


def _some(rng: Random, values: Sequence, low: int, high: int) -> list:
    return [values[i] for i in rng.choice(len(values), min(len(values), int(rng.integers(low, high + 1))), replace=False)]


def _one(rng: Random, values: Sequence):
    return values[int(rng.integers(len(values)))]


def _day(rng: Random) -> datetime.date:
    return datetime.date(1900, 1, 1) + datetime.timedelta(int(rng.integers(0, 54_000)))


class _Phrases:
    """The words of one locale, sorted so that draws repeat."""

    def __init__(self, identifier: str):
        self.locale = locale = Locale.parse(identifier)
        named = lambda table: sorted({name for key, name in table.items() if not key.isdigit() and isinstance(name, str)})
        self.territories, self.languages = named(locale.territories), named(locale.languages)
        self.scripts = named(locale.scripts)
        self.currencies = sorted(code for code in locale.currencies if len(code) == 3)
        self.currency_names = named(locale.currencies)
        self.cities = sorted({zone["city"] for zone in locale.time_zones.values() if isinstance(zone.get("city"), str)})
        self.zones = sorted({name for zone in locale.meta_zones.values() for name in zone.get("long", {}).values()})
        self.units = sorted(unit for unit in locale._data["unit_patterns"] if "-per-" not in unit and self._has_words(unit))

    def _has_words(self, unit: str) -> bool:
        """Whether the locale itself names the unit: Babel falls back to the English identifier."""
        return not any(unit in units.format_unit(n, unit, "long", locale=self.locale) for n in (1, 2, 3, 5, 11, 20, 99))

    def listed(self, rng: Random, names: Sequence[str], low: int = 2, high: int = 6) -> str:
        return lists.format_list(_some(rng, names, low, high), locale=self.locale)

    def place(self, rng: Random) -> str:
        return _one(rng, (lambda: self.listed(rng, self.territories),
                          lambda: f"{_one(rng, self.territories)}: {self.listed(rng, self.languages, 2, 4)}",
                          lambda: self.listed(rng, self.cities, 3, 7)))()

    def language(self, rng: Random) -> str:
        return _one(rng, (lambda: self.listed(rng, self.languages),
                          lambda: f"{_one(rng, self.languages)} ({_one(rng, self.territories)})",
                          lambda: f"{_one(rng, self.languages)} ({_one(rng, self.scripts)}, {_one(rng, self.territories)})"))()

    def money(self, rng: Random) -> str:
        def amount() -> str:
            value = int(rng.integers(1, 100))
            return numbers.format_currency(value, _one(rng, self.currencies), locale=self.locale, format_type="name",
                                           currency_digits=False, format="#,##0")
        return _one(rng, (lambda: lists.format_list([amount() for _ in range(3)], locale=self.locale),
                          lambda: self.listed(rng, self.currency_names, 2, 5),
                          lambda: f"{_one(rng, self.territories)}: {amount()}"))()

    def measure(self, rng: Random) -> str:
        def quantity() -> str:
            return units.format_unit(int(rng.integers(1, 100)), _one(rng, self.units), "long", locale=self.locale)
        return lists.format_list([quantity() for _ in range(int(rng.integers(2, 6)))], locale=self.locale)

    def calendar(self, rng: Random) -> str:
        def span() -> str:
            seconds = int(rng.integers(1, 60)) * int(_one(rng, (1, 60, 3600, 86400, 604_800, 2_629_800, 31_557_600)))
            return dates.format_timedelta(datetime.timedelta(seconds=int(rng.choice((-1, 1))) * seconds), add_direction=True,
                                          threshold=1, locale=self.locale)
        # Not the "stand-alone" forms: Babel resolves their aliases to whichever locale was loaded first.
        months = lambda: list(self.locale.months["format"]["wide"].values())
        skeletons = ("EEEE", "MMMM", "EEEE, MMMM", "d MMMM", "QQQQ")
        days = lambda: list(self.locale.days["format"]["wide"].values())
        return _one(rng, (lambda: dates.format_date(_day(rng), "full", locale=self.locale),
                          lambda: dates.format_date(_day(rng), _one(rng, skeletons), locale=self.locale),
                          lambda: lists.format_list([span() for _ in range(3)], locale=self.locale),
                          lambda: self.listed(rng, months(), 2, 5), lambda: self.listed(rng, days(), 2, 4),
                          lambda: self.listed(rng, self.zones, 2, 3)))()

    def document(self, rng: Random) -> str:
        """Lines of two topics, so that documents differ in more than the draw of words."""
        topics = _some(rng, (self.place, self.language, self.money, self.measure, self.calendar), 2, 2)
        length, lines = int(rng.integers(*DOCUMENT_CHARS)), []
        while sum(map(len, lines)) < length:
            lines.append(_one(rng, topics)(rng))
        return "\n".join(lines) + "\n"


@functools.cache
def _phrases(identifier: str) -> _Phrases:
    return _Phrases(identifier)


def locale_document(identifier: str, rng: Random) -> str:
    """A document of about 220-480 characters in the language of a CLDR locale."""
    return _phrases(identifier).document(rng)


def _lines(text: str, width: int) -> str:
    return "\n".join(text[i:i + width] for i in range(0, len(text), width)) + "\n"


def base64_document(data: bytes, rng: Random) -> str:
    """Base64 of `data`, with the line lengths of MIME, of PEM, or unbroken."""
    return _lines(base64.b64encode(data).decode(), int(_one(rng, (76, 64, 10_000))))


def hex_document(data: bytes, rng: Random) -> str:
    """`data` in hexadecimal digits: unbroken lines as of digests, or pairs as in a dump."""
    if rng.random() < 0.5:
        return _lines(data.hex(), int(_one(rng, (32, 40, 64))))
    return "\n".join(data[i:i + 16].hex(" ") for i in range(0, len(data), 16)) + "\n"


def encoded_documents(data: bytes, rng: Random, encode: Callable[[bytes, Random], str]) -> Iterator[str]:
    """Up to four pieces of a binary file as text; not its head, where formats keep names and zeros."""
    start = 512
    for _ in range(4):
        end = start + int(rng.integers(170, 400))
        if end > len(data):
            break
        yield encode(data[start:end], rng)
        start = end


# Human codon usage per thousand codons (Kazusa database), in the order T, C, A, G of each position; stops come at the end only.
_CODONS = [a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG"]
_STOPS = ("TAA", "TAG", "TGA")
_USAGE = """17.6 20.3 7.7 12.9 15.2 17.7 12.2 4.4 12.2 15.3 0 0 10.6 12.6 0 13.2 13.2 19.6 7.2 39.6 17.5 19.8 16.9 6.9 10.9 15.1
12.3 34.2 4.5 10.4 6.2 11.4 16.0 20.8 7.5 22.0 13.1 18.9 15.1 6.1 17.0 19.1 24.4 31.9 12.1 19.5 12.2 12.0 11.0 14.5 7.1 28.1
18.4 27.7 15.8 7.4 21.8 25.1 29.0 39.6 10.8 22.2 16.5 16.5"""


def dna_document(rng: Random) -> str:
    """A generated gene of 70-170 codons, drawn by human codon usage, in lines of 60 or 70 letters as in FASTA files."""
    usage = np.array(_USAGE.split(), dtype=float)
    body = rng.choice(_CODONS, int(rng.integers(70, 170)), p=usage / usage.sum())
    gene = "ATG" + "".join(body) + _one(rng, _STOPS)
    return _lines(gene if rng.random() < 0.7 else gene.lower(), int(_one(rng, (60, 70))))
