"""The front doors: what the environment must have is said in one place."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from sae_lib.study import environment

REPOSITORY = Path(__file__).parents[1]


def test_conda_names_no_package_of_its_own():
    content = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert content["channels"] == ["conda-forge", "nodefaults"]
    names = [item for item in content["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in content["dependencies"] if isinstance(item, dict)]
    assert names == ["python>=3.11", "pip"]
    assert pip == ["-r requirements.lock", "-e ."]


def test_same_python_everywhere():
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert project["requires-python"] == ">=3.11"
    assert "(3, 11)" in (REPOSITORY / "run_all.sh").read_text()


def test_unmet_names_what_is_missing_or_too_old(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy>=2", "numpy>=999", "no-such-package", "x; python_version < \'3\'"]\n'
        '[project.optional-dependencies]\ndev = ["pytest>=999"]\n'
    )
    assert environment.unmet(tmp_path) == ["numpy>=999", "no-such-package"]
    assert environment.unmet(tmp_path, ("dev",)) == ["numpy>=999", "no-such-package", "pytest>=999"]


def test_this_environment_satisfies_the_project():
    assert environment.unmet(REPOSITORY, ("dev",)) == []


def test_asking_is_quick_because_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformer_lens', 'papermill', 'plotly', 'pandas', 'jupytext'}"
    code = f"import sys, sae_lib.study.__main__ as m; m.main(['doctor', '--quiet']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "set()\n"


def test_help_and_ci_lead_to_the_same_script():
    done = subprocess.run(["bash", str(REPOSITORY / "run_all.sh"), "--help"], capture_output=True, text=True, cwd="/", check=True)
    assert "--profile" in done.stdout and "--test" in done.stdout
    assert "run_all.sh\" --test" in (REPOSITORY / ".ci" / "run").read_text()


def test_the_machine_check_says_what_to_do():
    rows = environment.machine_check()
    assert {"Python", "cores", "memory", "free disk"} <= {name for name, _, _ in rows}
    assert dict((name, verdict) for name, _, verdict in rows)["Python"] == "ok"
