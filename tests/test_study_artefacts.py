"""The artefact store: what is loaded, what is made, what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from sae_lib.errors import StudyError
from sae_lib.study import paths
from sae_lib.study.artefacts import Store, canonical


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    rates: tuple[float, ...] = (0.1, 0.2)


class Maker:
    """Writes a file and counts how often it was asked to."""

    def __init__(self, text: str = "weights"):
        self.calls, self.text = 0, text

    def __call__(self, out: Path, checkpoint: Path) -> None:
        self.calls += 1
        (out / "part").mkdir()
        (out / "part" / "weights.txt").write_text(self.text)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path, lines) -> Store:
    return Store(tmp_path, log=lines.append)


def store_like(store: Store, mode: str) -> Store:
    return Store(store.root, mode, store.log)


def test_made_once_then_loaded_with_one_line_each(store, lines):
    make = Maker()
    again = store_like(store, "auto")
    first, second = store.stage("sae", Config(), make), again.stage("sae", Config(), make)
    again.stage("sae", Config(), make)
    assert make.calls == 1
    assert (first.source, second.source) == ("made", "cache")
    assert (second.path / "part" / "weights.txt").read_text() == "weights"
    assert [line.split()[0] for line in lines] == ["made", "loaded"]
    assert not (store.root / "checkpoints" / f"sae-{first.key}").exists()


def test_manifest_records_the_making(store):
    tokens = store.stage("tokens", {}, Maker(), fingerprint="abc")
    manifest = json.loads((store.stage("sae", Config(), Maker(), inputs=[tokens], version=3).path / "manifest.json").read_text())
    assert manifest["config"] == {"width": 8, "rates": [0.1, 0.2]}
    assert manifest["version"] == 3
    assert manifest["inputs"] == [{"name": "tokens", "key": tokens.key, "recipe_key": tokens.recipe_key}]
    assert set(manifest["files"]) == {"part/weights.txt"}
    assert manifest["seconds"] >= 0 and manifest["machine"]["cpus"] >= 1 and "torch" in manifest["versions"]


def test_key_depends_on_everything_that_changes_the_content(store):
    def key(config=Config(), **options) -> tuple[str, str]:
        artefact = store.stage("sae", config, Maker(), **options)
        return artefact.key, artefact.recipe_key

    plain = key()
    assert key(Config(width=9))[1] != plain[1]
    assert key(version=2)[1] != plain[1]
    other_text = key(fingerprint="other text")
    assert other_text[0] != plain[0] and other_text[1] == plain[1]
    tokens = [store.stage("tokens", {}, Maker(), fingerprint=text) for text in ("a", "b")]
    a, b = key(inputs=tokens[:1]), key(inputs=tokens[1:])
    assert a[0] != b[0] and a[1] == b[1] != plain[1]


def test_configs_have_one_spelling():
    assert canonical(Config()) == canonical({"rates": [0.1, 0.2], "width": 8})
    with pytest.raises(TypeError):
        canonical({"make": Maker()})


def promoted(store: Store, **options) -> None:
    store_like(store, "auto").stage("sae", Config(), Maker("reference"), **options)
    store.promote("sae")
    shutil.rmtree(store.root / "artefacts")


def test_reference_is_used_when_there_is_no_cache(store, lines):
    promoted(store)
    make = Maker()
    artefact = store.stage("sae", Config(), make)
    assert artefact.source == "reference" and make.calls == 0
    assert (artefact.path / "part" / "weights.txt").read_text() == "reference"
    assert "reference" in lines[-1] and "differ" not in lines[-1]


def test_reference_from_other_text_says_so_and_keeps_its_own_key(store, lines):
    promoted(store, fingerprint="their text")
    artefact = store.stage("sae", Config(), Maker(), fingerprint="our text")
    assert artefact.source == "reference" and artefact.key == artefact.manifest["key"]
    assert "another environment's text" in lines[-1]


def test_reference_of_other_sizes_is_not_taken(store):
    promoted(store)
    make = Maker()
    assert store.stage("sae", Config(width=16), make).source == "made"
    assert store.stage("sae", Config(), Maker(), reference=False).source == "made"


def test_reference_measured_on_another_dictionary_is_not_taken(store):
    """What belongs to the committed dictionary says nothing of one that was trained here by the same recipe."""
    auto = store_like(store, "auto")
    made = {text: auto.stage("sae", Config(), Maker(), fingerprint=text) for text in ("theirs", "ours")}
    auto.stage("scores", {}, Maker(), inputs=[made["theirs"]])
    for name, key in (("sae", made["theirs"].key), ("scores", None)):
        store.promote(name, key)
    shutil.rmtree(store.root / "artefacts" / "scores")
    assert store.stage("scores", {}, Maker(), inputs=[made["theirs"]]).source == "reference"
    assert store.stage("scores", {}, Maker(), inputs=[made["ours"]]).source == "made"


def test_train_never_takes_the_reference_but_its_own_cache(store):
    promoted(store)
    make, train = Maker("own"), store_like(store, "train")
    assert train.stage("sae", Config(), make).source == "made"
    assert train.stage("sae", Config(), make).source == "cache" and make.calls == 1


def test_load_never_makes(store):
    with pytest.raises(StudyError, match=r"`\./run_all\.sh`"):
        store_like(store, "load").stage("sae", Config(), Maker())
    store.stage("sae", Config(), Maker())
    assert store_like(store, "load").stage("sae", Config(), Maker()).source == "cache"


def test_promote_replaces_and_refuses_what_is_not_there(store):
    promoted(store)
    store_like(store, "train").stage("sae", Config(), Maker("newer"))
    folder = store.promote("sae")
    assert (folder / "part" / "weights.txt").read_text() == "newer"
    assert [path.name for path in store.reference.iterdir()] == ["sae"]
    with pytest.raises(StudyError, match="no artefact nothing"):
        store.promote("nothing")


def change_byte(path: Path) -> None:
    path.write_text("weighty")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: change_byte(folder / "part" / "weights.txt"), "weights.txt does not have the hash"),
        (lambda folder: os.truncate(folder / "part" / "weights.txt", 3), "weights.txt has 3 bytes instead of 7"),
        (lambda folder: (folder / "part" / "weights.txt").unlink(), "weights.txt is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"key": "a'), "manifest.json is missing or broken"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or broken"),
        (lambda folder: (folder / "weights.pt").write_bytes(b"\x80\x04N."), "weights.pt is a pickle"),
    ],
)
@pytest.mark.parametrize("where", ["cache", "reference"])
def test_damage_is_refused_by_name_and_never_remade(store, damage, named, where):
    artefact = store.stage("sae", Config(), Maker("weights"))
    if where == "reference":
        folder = store.promote("sae")
        shutil.rmtree(store.root / "artefacts")
    else:
        folder = artefact.path
    damage(folder)
    make = Maker()
    with pytest.raises(StudyError, match=named) as caught:
        store.stage("sae", Config(), make)
    assert make.calls == 0
    assert str(folder) in str(caught.value)
    assert ("run_all.sh --train" if where == "reference" else "delete the folder") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_stored(store):
    with pytest.raises(StudyError, match="pickle"):
        store.stage("sae", Config(), lambda out, checkpoint: (out / "weights.ckpt").write_text("x"))
    assert list((store.root / "artefacts" / "sae").iterdir()) == []


def test_a_failed_making_leaves_no_artefact(store):
    def fail(out: Path, checkpoint: Path) -> None:
        (out / "half").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.stage("sae", Config(), fail)
    assert list((store.root / "artefacts" / "sae").iterdir()) == []
    assert store.stage("sae", Config(), Maker()).source == "made"


def test_receipts_tell_the_runner(store, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_RECEIPTS", str(tmp_path / "receipts"))
    artefact = store.stage("sae", Config(), Maker())
    making, made = paths.receipts(tmp_path / "receipts")
    assert (making["event"], making["name"]) == ("making", "sae")
    assert (made["event"], made["key"], made["source"]) == ("artefact", artefact.key, "made")
