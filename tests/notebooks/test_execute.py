"""Every notebook from its first cell to its last, in the smoke profile, as a user runs them."""

import json
import os
import subprocess
import sys

import pytest

from sae_lib.study import figures, notebooks, paths


@pytest.mark.notebook
def test_all_notebooks_in_smoke(tmp_path):
    places = {"SAE_DATA": str(tmp_path / "data"), "SAE_FIGURES": str(tmp_path / "figures")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAE_")} | places
    command = [sys.executable, "-m", "sae_lib.study", "run", "--profile", "smoke", "--no-export"]

    def run() -> tuple[str, dict[str, str]]:
        done = subprocess.run(command, env=environment, cwd=paths.project(), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        return done.stdout, json.loads((tmp_path / "data" / "runs" / "smoke" / "manifest.json").read_text())["states"]

    sources = notebooks.sources()
    _, states = run()
    assert states == {source.stem: "ran" for source in sources}

    declared = [notebooks.declared_outputs(notebooks.convert(source)) for source in sources]
    index = figures.read_index(tmp_path / "figures")
    assert set(index) == {name for outputs in declared for name in outputs.figures}
    for name, entry in index.items():
        assert entry["claim"] and entry["alt"] and entry["n_traces"] > 0
        assert (tmp_path / "figures" / f"{name}.html").stat().st_size > 1000
    results = json.loads((tmp_path / "figures" / "results.json").read_text())
    assert results["profile"] == "smoke"
    assert {name for outputs in declared for name in outputs.rows} <= {row["id"] for row in results["rows"]}

    said, states = run()
    assert set(states.values()) == {"cached"}, said
