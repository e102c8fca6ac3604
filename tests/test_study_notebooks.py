"""Notebooks from source: the same every time, and the rules that are checked without running them."""

import json
import re

import nbformat
import pytest

from sae_lib.errors import StudyError
from sae_lib.study import notebooks

PARAMETERS = '# %% tags=["parameters"]\nPROFILE = "workshop"\nSEED = 0\nARTEFACTS = "auto"\nCORPUS = ""\n'
GOOD = f"""# %% [markdown]
# # 04 · Title
# ## First

{PARAMETERS}
# %%
fig = 1
study.show(fig, "04-one", claim="a", alt="b")
run.scorecard.row("04.one", claim="c")
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_ROOT", str(tmp_path))
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    return tmp_path


def write(study, text: str = GOOD, name: str = "04_title"):
    source = study / "notebooks" / "src" / f"{name}.py"
    source.write_text(text)
    return source


def test_build_is_deterministic_valid_and_clean(study):
    source = write(study)
    assert notebooks.build() == [notebooks.target(source)]
    first = notebooks.target(source).read_bytes()
    notebooks.target(source).unlink()
    notebooks.build()
    assert notebooks.target(source).read_bytes() == first
    notebook = nbformat.read(notebooks.target(source), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert len({cell.id for cell in notebook.cells}) == 3
    assert notebook.cells[1].metadata.tags == ["parameters"]


def test_check_tells_and_does_not_write(study):
    source = write(study)
    assert notebooks.build(check=True) == [notebooks.target(source)]
    assert not notebooks.target(source).exists()
    notebooks.build()
    assert notebooks.build(check=True) == []
    edited = json.loads(notebooks.target(source).read_text())
    edited["cells"][0]["source"] = ["# Other"]
    notebooks.target(source).write_text(notebooks.serialise(edited))
    assert notebooks.build(check=True) == [notebooks.target(source)]


def test_a_good_notebook_has_no_problems(study):
    assert notebooks.problems(write(study)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD.replace('SEED = 0\n', ""), "lacks SEED"),
        (GOOD.replace(PARAMETERS, ""), "0 cells tagged"),
        (GOOD + PARAMETERS, "2 cells tagged"),
        (GOOD.replace("SEED = 0", "SEED = PROFILE"), "plain value|only lines"),
        (GOOD + "# %%\n" + "x = 1\n" * 16, "16 lines"),
        (GOOD + "# %%\n1\n" * 45, "48 cells"),
        (GOOD + "# %%\n# %pip install x\n", "not Python"),
        (GOOD + "# %%\n# !ls\n", "not Python"),
        (GOOD + "# %%\nwidget = go.FigureWidget()\n", "FigureWidget"),
        (GOOD + '# %%\npath = "/home/me/x"\n', "absolute path"),
        (GOOD + '# %%\npath = "~/x"\n', "absolute path"),
        (GOOD.replace(', alt="b"', ""), "lacks a claim or alt"),
        (GOOD.replace("04-one", "05-one"), "number"),
        (GOOD.replace("# ## First", "# ### First"), "skips a level"),
        (GOOD.replace("# ## First", "# # First"), "2 headings"),
    ],
)
def test_each_rule(study, text, problem):
    (found,) = [item for item in notebooks.problems(write(study, text)) if re.search(problem, item)]
    assert found


def test_comments_and_blanks_are_no_code_and_code_fences_no_headings(study):
    text = GOOD + "# %%\n" + "# why\n\n" * 20 + "x = 1\n" + "# %% [markdown]\n# ```\n# #### not a heading\n# ```\n"
    assert notebooks.problems(write(study, text)) == []


def test_declared_outputs(study):
    text = GOOD + """
# %%
row = run.scorecard.row
row("04.two", claim="x"); row(id="04.three"); row(f"04.pearson.{name}.feature"); frame.row("other")
show(fig, "04-two", claim="a", alt="b"); show(fig, name)
"""
    outputs = notebooks.declared_outputs(notebooks.convert(write(study, text)))
    assert outputs.figures == ("04-one", "04-two")
    assert outputs.rows == ("04.one", "04.two", "04.three")


def test_parameters(study):
    assert notebooks.parameters(notebooks.convert(write(study)), "04") == \
        {"PROFILE": "workshop", "SEED": 0, "ARTEFACTS": "auto", "CORPUS": ""}
    with pytest.raises(StudyError, match="exactly one"):
        notebooks.parameters(notebooks.convert(write(study, "# %%\n1\n")), "04")


def test_who_reads_the_scorecard(study):
    assert not notebooks.reads_scorecard(notebooks.convert(write(study)))
    assert not notebooks.reads_scorecard(notebooks.convert(write(study, GOOD + "# %%\nrun.tokens.table()\n")))
    assert notebooks.reads_scorecard(notebooks.convert(write(study, GOOD + "# %%\nrun.scorecard.table()\n")))
