"""The runner, on tiny notebooks of its own in a folder of its own."""

import dataclasses
import json
import textwrap
from types import SimpleNamespace

import nbformat
import plotly.express as px
import pytest

from sae_lib.errors import StudyError
from sae_lib.study import __main__, export, figures, paths, plan, runner
from sae_lib.study.plan import Options, UsageError
from sae_lib.study.scorecard import Scorecard

HEAD = """
# %% [markdown]
# # Title
# %% tags=["parameters"]
PROFILE = "workshop"
SEED = 0
ARTEFACTS = "auto"
CORPUS = ""
"""
DRAW = """
# %%
import plotly.graph_objects as go
from sae_lib.study.figures import show
show(go.Figure(go.Bar(x=[1, 2], y=[SEED, 3])), "{0}-bars", claim="Three is more", alt="Two bars.")
# %%
from sae_lib.study.scorecard import Scorecard
Scorecard(profile=PROFILE, seed=SEED).row("{0}.bars", "Three", 3, "here", 3.0, 2.0, 4.0, 1, "reproduced", "")
"""


@dataclasses.dataclass(frozen=True)
class Corpus:
    source: str = "environment"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study with the notebooks that a test writes to it, and without the real profiles."""
    for name in ("SAE_FIGURES", "SAE_RECEIPTS", "SAE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAE_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    profiles = {name: SimpleNamespace(corpus=Corpus()) for name in ("smoke", "workshop")}
    monkeypatch.setattr(plan, "load_profiles", lambda: profiles)
    monkeypatch.setattr(plan, "corpus_fingerprint", lambda corpus: f"text of {corpus.source}")
    return tmp_path


def write(study, number: str, body: str = "", head: str = HEAD) -> None:
    (study / "notebooks" / "src" / f"{number}_title.py").write_text(head + textwrap.dedent(body))


def go(**options) -> tuple[int, str]:
    lines: list[str] = []
    status = runner.run(Options(**{"export": False} | options), lines.append)
    return status, "\n".join(lines)


def manifest(study, profile: str = "workshop") -> dict:
    return json.loads((study / "data" / "runs" / profile / "manifest.json").read_text())


def states(study, profile: str = "workshop") -> dict:
    return manifest(study, profile)["states"]


def test_runs_then_caches_then_reruns_what_changed(study):
    write(study, "02", DRAW.format("02"))
    write(study, "03", "# %%\nprint(SEED)")
    status, said = go()
    assert status == 0 and states(study) == {"02_title": "ran", "03_title": "ran"}
    assert "02_title: running (first run)" in said
    record = manifest(study)["notebooks"]["02_title"]
    assert record["figures"] == {"02-bars": paths.sha256(study / "figures" / "02-bars.json")}
    assert set(record["rows"]) == {"02.bars"} and record["peak_bytes"] > 10e6 and record["seconds"] > 0
    executed = nbformat.read(study / "data" / "runs" / "workshop" / "03_title.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "0\n"
    assert not (study / "data" / "runs" / "workshop" / ".work" / "02_title").exists()

    assert go()[0] == 0 and set(states(study).values()) == {"cached"}
    write(study, "03", "# %% [markdown]\n# Other words\n# %%\nprint(SEED)")
    assert "would run" not in go(dry_run=True)[1]
    (study / "figures" / "02-bars.html").unlink()
    write(study, "03", "# %%\nprint(SEED + 1)")
    said = go(dry_run=True)[1]
    assert "figure 02-bars is missing or changed" in said and "code changed" in said
    assert "code, corpus, parameters changed" in go(dry_run=True, corpus="files:x", seed=1, only=("3",))[1]
    assert go(dry_run=True, force=True)[1].count("--force") == 2


def test_what_a_notebook_keeps_apart_touches_nothing_of_the_study(study):
    head = HEAD + 'MODEL = ""\n# %%\nfrom pathlib import Path\nfolder = Path(MODEL) if MODEL else None\n'
    body = DRAW.format("02").replace('bars."', 'bars.", folder=folder')
    body = body.replace("Scorecard(", "Scorecard(folder and folder / 'results.json', ")
    write(study, "02", body, head)
    folder, mine = study / "figures", study / "mine"
    assert go()[0] == 0
    figures.update_index(folder, {"02-bars": {"png_of": figures.read_index(folder)["02-bars"]["sha256"]}})
    (folder / "02-bars.png").write_bytes(b"image")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    other = {"parameters": (("MODEL", str(mine)),), "seed": 5}
    status, said = go(**other)
    assert status == 0 and states(study) == {"02_title": "ran"} and "lie apart, in mine" in said
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(figures.read_index(mine)) == ["02-bars"] and len(Scorecard(mine / "results.json", seed=5).table()) == 1
    executed = study / "data" / "runs" / "workshop" / "02_title.ipynb"
    export.inject(executed, folder)
    assert "image/png" not in displayed(executed).data  # the study's image is not of this figure
    assert go(**other)[0] == 0 and states(study) == {"02_title": "cached"}
    (mine / "02-bars.json").unlink()
    assert "figure 02-bars is missing or changed" in go(dry_run=True, **other)[1]


def test_figures_of_a_notebook(study):
    """A smoke run keeps its figures apart; in the executed copy a figure has its text, and its PNG once there is one."""
    write(study, "02", DRAW.format("02"))
    assert go(profile="smoke")[0] == 0
    assert not (study / "figures").exists()
    runs = study / "data" / "runs" / "smoke"
    folder, executed = runs / "figures", runs / "02_title.ipynb"
    assert list(figures.read_index(folder)) == ["02-bars"]
    assert list(Scorecard(folder / "results.json", profile="smoke").table().id) == ["02.bars"]

    output = displayed(executed)
    assert output.data["text/plain"] == "Figure 02-bars: Three is more Two bars."
    assert output.data[figures.MIMETYPE]["config"]["showSendToCloud"] is False
    assert output.metadata[figures.MIMETYPE]["alt"] == "Two bars."

    (folder / "02-bars.png").write_bytes(b"image")
    export.inject(executed, folder)
    assert "image/png" not in displayed(executed).data  # nobody knows which data that image shows
    figures.update_index(folder, {"02-bars": {"png_of": figures.read_index(folder)["02-bars"]["sha256"]}})
    export.inject(executed, folder)
    nbformat.validate(nbformat.read(executed, as_version=4))
    output = displayed(executed)
    assert output.data["image/png"] == "aW1hZ2U=" and output.metadata["image/png"]["alt"] == "Two bars."
    assert figures.MIMETYPE in output.data


def displayed(executed):
    """The only figure in an executed notebook."""
    cells = nbformat.read(executed, as_version=4).cells
    (output,) = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs if out.output_type == "display_data"]
    return output


def test_failing_cell(study):
    write(study, "02", "# %%\n")
    write(study, "03", "# %%\nprint('before')\n# %%\n1 / 0")
    write(study, "04", "# %%\n")
    status, said = go()
    assert status == 1
    assert states(study) == {"02_title": "ran", "03_title": "failed", "04_title": "not run"}
    assert "Cell In [4] raised ZeroDivisionError: division by zero." in said
    folder = study / "data" / "runs" / "workshop"
    assert "data/runs/workshop/03_title.failed.ipynb" in said and (folder / "03_title.failed.ipynb").exists()
    assert not (folder / "03_title.ipynb").exists()
    assert "failed last time" in go(dry_run=True)[1]


def test_study_error_is_shown_as_its_sentence(study):
    write(study, "02", "# %%\nfrom sae_lib.errors import StudyError\nraise StudyError('The corpus is empty: add a file.')")
    status, said = go()
    assert status == 1 and "02_title: The corpus is empty: add a file." in said and "raised" not in said


def test_declared_output_that_was_not_made(study):
    # Files of an earlier run do not count.
    figures.show(px.bar(x=[1], y=[2]), "02-bars", claim="a", alt="b")
    Scorecard().row("02.bars", "Three", 3, "here", 3.0, 2.0, 4.0, 1, "reproduced", "")
    hidden = DRAW.format("02").replace("show(go", "None and show(go").replace("Scorecard(profile", "None and Scorecard(profile")
    write(study, "02", hidden)
    status, said = go()
    assert status == 1 and "did not make figure 02-bars, scorecard row 02.bars" in said


def test_readers_of_the_scorecard_rerun_when_other_rows_change(study, monkeypatch):
    row = lambda id, ours: Scorecard().row(id, "Three", 3, "here", ours, None, None, 1, "reproduced", "")
    produced = {"figures": {}, "rows": {}, "artefacts": {}}
    monkeypatch.setattr(runner.Run, "_execute", lambda self, job, meter: produced)
    for number in ("00", "14"):
        write(study, number, "# %%\nscorecard.table()")
    row("02.bars", 3.0)
    go()
    row("02.bars", 3.0)
    assert "would run" not in go(dry_run=True)[1]
    row("14.own", 1.0)
    assert "14_title  cached" in go(dry_run=True)[1]
    row("02.bars", 3.5)
    assert go(dry_run=True)[1].count("scorecard changed") == 2


def test_dry_run_runs_nothing(study):
    write(study, "02", DRAW.format("02"))
    status, said = go(dry_run=True)
    assert status == 0 and "would run" in said and "first run" in said
    assert not (study / "data").exists() and not (study / "figures").exists()


def test_selection(study):
    for number in ("00", "02", "03", "14"):
        write(study, number)
    names = lambda **options: [job.name[:2] for job in plan.jobs(Options(**options))]
    assert names() == ["02", "03", "14", "00"]  # the entrance tells what the others found
    assert names(only=("3", "02_title")) == ["02", "03"]
    assert names(first="02", last="3") == ["02", "03"]
    with pytest.raises(UsageError, match="--from the smaller"):
        names(first="03", last="02")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "smok"], "no profile 'smok' (did you mean 'smoke'?): choose one of smoke, workshop"),
        (["--only", "07"], "no notebook '07'"),
        (["--from", "title"], "no notebook 'title'"),
        (["-p", "SEDE=9"], "no parameter 'SEDE' (did you mean 'SEED'?): choose one of ARTEFACTS, CORPUS, PROFILE, SEED"),
        (["-p", "SEED"], "-p NAME=VALUE"),
        (["-p", "SEED=x"], "whole number"),
        (["-p", "ARTEFACTS=maybe"], "--train"),
    ],
)
def test_unknown_words_are_refused_in_one_sentence(study, capsys, arguments, said):
    write(study, "02")
    status = __main__.main(["run", *arguments])
    error = capsys.readouterr().err
    assert status != 0 and said in error and error.count("\n") == 1
    assert not (study / "data").exists()


def test_corpus_that_cannot_be_read(study, capsys, monkeypatch):
    write(study, "02")

    def refuse(corpus):
        raise StudyError(f"There is no folder {corpus.source}: give files:DIR.")

    monkeypatch.setattr(plan, "corpus_fingerprint", refuse)
    assert __main__.main(["run", "--corpus", "files:texts"]) == 2
    assert f"no folder files:{study / 'texts'}:" in capsys.readouterr().err


def test_parameters_reach_the_notebook(study):
    write(study, "02", "# %%\nprint(PROFILE, SEED, ARTEFACTS, CORPUS, WIDTH)", HEAD + "WIDTH = 3\n")
    assert __main__.main(["run", "--profile", "smoke", "-p", "WIDTH=5", "-p", "SEED=7", "--train", "--no-export"]) == 0
    executed = nbformat.read(study / "data" / "runs" / "smoke" / "02_title.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "smoke 7 train  5\n"


def test_little_disk(study, monkeypatch):
    write(study, "02")
    monkeypatch.setattr(runner, "FREE_DISK", 1 << 60)
    with pytest.raises(StudyError, match="GB are free"):
        go()


def test_notebook_that_differs_from_its_source_is_mentioned(study, monkeypatch):
    write(study, "02")
    monkeypatch.setattr(runner.Run, "_execute", lambda self, job, meter: {"figures": {}, "rows": {}, "artefacts": {}})
    assert "differs from the source" in go()[1]
    assert __main__.main(["build"]) == 0
    assert "differs" not in go()[1] and __main__.main(["build", "--check"]) == 0


def test_train_reruns_only_what_used_reference_artefacts(study):
    record = {"state": "ran", "parts": {}, "figures": {}, "rows": {}}
    used = lambda source: record | {"artefacts": {"sae": {"key": "a", "source": source}}}
    why = lambda record: plan.why({}, record, Options(train=True), study / "figures")
    assert why(used("cache")) is None
    assert "reference" in why(used("reference"))
