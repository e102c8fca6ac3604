"""Every notebook keeps the rules of the house and is generated from its source."""

import pytest

from sae_lib.study import notebooks

SOURCES = notebooks.sources()


def test_numbers_are_unique():
    numbers = [source.stem[:2] for source in SOURCES]
    assert SOURCES and len(numbers) == len(set(numbers))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_rules(source):
    assert notebooks.problems(source) == []


def test_notebooks_are_their_sources_and_nothing_else():
    assert notebooks.build(check=True) == []
    generated = {path.stem for path in (SOURCES[0].parents[1]).glob("*.ipynb")}
    assert generated == {source.stem for source in SOURCES}


def test_no_two_notebooks_make_the_same_output():
    names = [name for source in SOURCES for outputs in [notebooks.declared_outputs(notebooks.convert(source))]
             for name in (*outputs.figures, *outputs.rows)]
    assert len(names) == len(set(names))
