"""The arithmetic of the benchmark, who is measured when, and what it says when there are no peers. Nothing is timed."""

import subprocess
from pathlib import Path

import pytest
from benchmarks import peers
from benchmarks.arithmetic import (
    l1_at_scale,
    mean_norm_scale,
    order,
    product_operations,
    rate,
    ratio,
    row,
    unit_norm_scale,
)
from benchmarks.dictionaries import begin
from benchmarks.exchange import answer, fill
from benchmarks.interchange import interchange
from benchmarks.measure import QUICK, Arm, Benchmark, alternate
from benchmarks.protocol import FOLDER, WorkerError
from benchmarks.report import BEGIN, END, into_readme, short_table, table

from sae_lib.errors import StudyError
from sae_lib.sae import SAE, SAEConfig, TopKSAE


def test_a_rate_is_the_median_over_rounds_of_each_rounds_mean_step():
    # Rounds of two steps: 3, 6 and 1 seconds for 2 * 12 activations are 8, 4 and 24 a second.
    found = rate(12, [[1.0, 2.0], [3.0, 3.0], [0.5, 0.5]])
    assert found == (8.0, 4.0, 24.0, 3)
    with pytest.raises(ValueError, match="no round"):
        rate(12, [])


def test_a_ratio_compares_within_rounds_and_only_then_takes_the_median():
    # The machine was half as fast for both in the second round, which does not touch the ratio: 4, 4 and 3.
    project, peer = [[1.0], [2.0], [1.0, 1.0]], [[4.0], [8.0], [3.0, 3.0]]
    assert ratio(project, peer) == (4.0, 3.0, 4.0, 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        ratio(project, peer[:2])


def test_everyone_is_measured_once_a_round_and_each_begins_in_turn():
    assert [order(["project", "a", "b"], i) for i in range(4)] == [
        ["project", "a", "b"], ["a", "b", "project"], ["b", "project", "a"], ["project", "a", "b"]]


def test_the_warm_up_round_is_not_counted():
    calls: list[str] = []

    def arm(name: str) -> Arm:
        def run() -> list[float]:
            calls.append(name)
            return [float(len(calls))]
        return Arm(name, run)

    found = alternate([arm("project"), arm("peer")], rounds=2)
    assert calls == ["project", "peer"] + ["project", "peer"] + ["peer", "project"]
    assert found == {"project": [[3.0], [6.0]], "peer": [[4.0], [5.0]]}


def test_the_l1_coefficient_in_each_librarys_unit():
    # Activations (3, 4) and (0, 10), norms 5 and 10: mean norm 7.5, mean squared norm 62.5.
    mine, theirs = mean_norm_scale(2, 7.5), unit_norm_scale(62.5)
    assert mine == pytest.approx(2 ** 0.5 / 7.5) and theirs == pytest.approx(1 / 62.5 ** 0.5)
    # 3 at the project's scale is 3 * (0.126491 / 0.188562) = 2.0125 at dictionary_learning's.
    assert l1_at_scale(3.0, mine, theirs) == pytest.approx(2.01246, rel=1e-5)


def test_the_converted_coefficient_orders_solutions_as_before():
    # One activation x = 6 and two solutions: x_hat = 5 with f = 5 and x_hat = 4 with f = 4, at scales 1 and 1/2. With coefficient
    # 2 they cost 1 + 10 = 11 and 4 + 8 = 12; at half the scale each must cost a quarter.
    new = l1_at_scale(2.0, 1.0, 0.5)
    assert (0.5 ** 2 + new * 2.5, 1.0 ** 2 + new * 2.0) == (11 / 4, 12 / 4)


def test_five_products():
    assert product_operations(batch=2, d_in=3, d_sae=5) == 5 * 2 * 30


def test_a_row_and_its_line_of_the_table():
    found = row("sae_step.relu.8x.vs_peer", 30_000.4, 6_000, 5.00006, "activations/s", 4.5, 5.5, "note")
    assert found == {"id": "sae_step.relu.8x.vs_peer", "project": 30_000, "peer": 6_000, "ratio": 5.0, "unit": "activations/s",
                     "low": 4.5, "high": 5.5, "note": "note"}
    alone = row("harvest.tokens_per_second", 4e5, None, None, "tokens/s")
    lines = table([found, alone]).splitlines()
    assert lines[2] == "| sae_step.relu.8x.vs_peer | 30,000 | 6,000 | 5 (4.5 to 5.5) | activations/s | note |"
    assert lines[3] == "| harvest.tokens_per_second | 400,000 | - | - | tokens/s |  |"


ROWS = [row("sae_step.relu.8x.vs_saelens_fp32", 30_000, 6_000, 5.0, "activations/s", 4.5, 5.5),
        row("harvest.tokens_per_second", 4e5, None, None, "tokens/s", 3.9e5, 4.1e5),
        row("sae_step.relu.8x.dense.vs_saelens_fp32", 20_000, 6_000, 3.3, "activations/s", 3, 4)]


def test_the_readmes_table_has_the_rows_that_there_are_in_words():
    assert short_table(ROWS).splitlines()[2:] == [
        "| dictionary step, 512 to 4,096 | 30,000 activations/s | SAELens, float32 | 6,000 activations/s | 5.00 (4.5 to 5.5) |",
        "| harvest, 64 of 256 positions kept | 400,000 tokens/s |  |  |  |"]


def test_the_readmes_table_is_replaced_and_nothing_else(tmp_path):
    result = {"machine": {"processor": "P", "threads": 2, "ram_gb": 8, "bfloat16": "AMX"}, "date": "2026-01-02", "quick": False,
              "processor_time": False, "versions": {"torch": "2", "peers": {}}, "data": {}, "rows": ROWS}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        into_readme(result, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| what |") and text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text and text.count("2026-01-02") == 1 and "bfloat16 by AMX" in text
    readme.write_text("no place")
    with pytest.raises(StudyError, match="no place for the table"):
        into_readme(result, readme)


def test_the_projects_readme_has_a_place_for_the_table():
    text = (FOLDER.parent.parent / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


class FakeWorker:
    """Answers `loss` with what its training is to have."""

    def __init__(self, losses: dict[str, float]):
        self.losses, self.asked = losses, []

    def ask(self, operation: str, name: str = "", **_: object) -> dict:
        self.asked.append((operation, name))
        if self.losses[name] is None:
            raise WorkerError("it cannot.")
        return {"loss": self.losses[name]}


def test_only_those_who_compute_the_same_loss_are_compared(tmp_path):
    worker, said = FakeWorker({"project": 200.0, "near": 201.0, "far": 210.0, "broken": None}), []
    b = Benchmark(QUICK, tmp_path, start=None, peers=True, say=said.append, workers={"any": worker})
    remaining = begin(b, "id", {name: ("any", {}) for name in worker.losses})
    assert list(remaining) == ["project", "near"] and ("drop", "far") in worker.asked
    assert said == ["id: far is left out, for its loss is 210 where project's is 200.", "id: broken is left out, for it cannot."]
    assert [(entry["name"], entry["relative"]) for entry in b.losses] == [("project", 1.0), ("near", 1.005), ("far", 1.05)]


def test_the_share_of_bare_products_counts_operations(tmp_path):
    # Bare products take 2 s for 5 * 2 * 1024 * 512 * 4096 operations; the arm needs half as many and takes 4 s.
    b = Benchmark(QUICK, tmp_path, start=None, peers=False, say=lambda _: None, data={"d_in": 512})
    bare = product_operations(1024, 512, 4096)
    b.record("id", {"project": [[4.0]], "own_matmuls": [[2.0]]}, 100, "tokens/s", 4096, bare / 2)
    project, products = b.measurements
    assert project["median"] == 25 and project["share_of_products"] == 0.25
    assert products["gflop_per_second"] == pytest.approx(bare / 2 / 1e9)


def test_one_sentence_when_the_peers_cannot_be_installed(tmp_path, monkeypatch):
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peers.subprocess, "run", fail)
    python, why = peers.environment(tmp_path / "venv", tmp_path / "install.log", lambda _: None)
    assert python is None
    assert "could not be installed" in why and why.count(". ") == 0 and why.endswith(".") and "install.log" in why


def test_an_environment_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    made: list[list[str]] = []

    def make(command: list[str], **_: object) -> None:
        made.append(command)
        (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "venv" / "bin" / "python").touch()

    monkeypatch.setattr(peers.subprocess, "run", make)
    monkeypatch.setattr(peers.os, "name", "posix")
    for _ in range(2):
        python, why = peers.environment(tmp_path / "venv", tmp_path / "install.log", lambda _: None)
        assert python == str(tmp_path / "venv" / "bin" / "python") and not why
    assert len(made) == 4  # environment, torch, peers, and the one whose requirements contradict


class Reader:
    """A peer that reads our files as we do, adds `error` to each feature, and writes one of its own."""

    def __init__(self, error):
        self.error = error

    def ask(self, operation, folder):
        path = Path(folder)
        if operation == "write":
            path /= "mine"
            fill(TopKSAE(SAEConfig(24, 96), 8)).requires_grad_(False).save(path)
        sae = SAE.load(path)
        answer(path, lambda x: sae.encode(x) + self.error, lambda f: sae.decode(f - self.error))
        return {"names": ["mine"]}

    def close(self):
        """Nothing is open."""


@pytest.mark.parametrize("error, differ", [(0.0, 0), (1e-3, 8)])
def test_what_another_library_reads_otherwise_is_noted(tmp_path, error, differ):
    reader, said = Reader(error), []
    b = Benchmark(QUICK, tmp_path, start=lambda _: reader, peers=True, say=said.append, workers={"saelens": reader})
    interchange(b)
    ids = [row["id"] for row in b.rows]
    kinds, others = ("standard", "topk", "jumprelu", "gated", "batchtopk"), ("saelens", "dictionary_learning", "sparsify")
    assert ids == [*(f"interchange.project.{kind}.read_by_saelens" for kind in kinds),
                   *(f"interchange.{peer}.mine.read_by_project" for peer in others)]
    assert all(row["project"] == pytest.approx(error, abs=1e-6) for row in b.rows)
    assert len(b.notes) == differ and all("differs by 0.001" in note for note in b.notes)
