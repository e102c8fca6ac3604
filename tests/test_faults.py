"""Faults from outside: killed processes, full disks, missing or hanging programs. One sentence each, and no halves are left."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import plotly.express as px
import psutil
import pytest

from sae_lib.errors import StudyError
from sae_lib.study import export, figures, paths
from sae_lib.study.artefacts import Store

REPOSITORY = Path(__file__).parents[1]

# A training of ten steps that goes on from its checkpoint; argv: root, and the step at which it waits to be killed.
TRAINING = """
import sys, time
from pathlib import Path
from sae_lib.study.artefacts import Store
root, wait_at = Path(sys.argv[1]), int(sys.argv[2])
def make(out, checkpoint):
    (out / "half").write_text("half")
    done = checkpoint / "steps"
    first = int(done.read_text()) if done.exists() else 0
    print("from", first, flush=True)
    for step in range(first, 10):
        if step == wait_at:
            print("waiting", flush=True)
            time.sleep(float(sys.argv[3]))
        done.write_text(str(step + 1))
    (out / "half").unlink()
    (out / "steps").write_text(done.read_text())
print(Store(root).stage("training", {}, make).source)
"""


def _heed_interrupts() -> None:
    """A shell starts its background jobs deaf to Ctrl-C, and what they start inherits that; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **{"preexec_fn": _heed_interrupts} | options)


def until(process: subprocess.Popen, word: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line:
            return lines
    raise AssertionError(f"{word} did not come: {lines}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path, how):
    process = python(TRAINING, tmp_path, 7, 60)
    until(process, "waiting")
    process.send_signal(how)
    process.communicate()
    assert process.returncode != 0
    # At worst a hidden folder is left, which nothing loads.
    assert not [path for path in (tmp_path / "artefacts" / "training").iterdir() if not path.name.startswith(".")]
    said, _ = python(TRAINING, tmp_path, -1, 0).communicate()
    assert said.splitlines()[0] == "from 7" and "going on from a checkpoint" in said and said.endswith("made\n")
    (folder,) = (tmp_path / "artefacts" / "training").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "steps"]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_two_processes_make_it_once(tmp_path):
    first = python(TRAINING, tmp_path, 7, 3)
    until(first, "waiting")
    second = python(TRAINING, tmp_path, -1, 0)
    until(second, "waiting for another process")
    assert second.communicate()[0].endswith("cache\n")
    assert first.communicate()[0].endswith("made\n")


def raising(error: Exception):
    def make(out: Path, checkpoint: Path) -> None:
        (checkpoint / "step").write_text("7")
        raise error

    return make


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device")])
def test_disk_full_while_making(tmp_path, error):
    with pytest.raises(StudyError, match=r"^The disk is full .*free some space") as caught:
        Store(tmp_path).stage("sae", {}, raising(error))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "artefacts" / "sae").iterdir()) == []
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/step")
    assert checkpoint.read_text() == "7"


def test_real_limit_while_making(tmp_path):
    """The system itself refuses the write, as it does on a full disk."""
    code = """
    import sys
    from pathlib import Path
    from sae_lib.errors import StudyError
    from sae_lib.study.artefacts import Store
    try:
        Store(Path(sys.argv[1])).stage("sae", {}, lambda out, checkpoint: (out / "big").write_bytes(bytes(1 << 20)))
    except StudyError as error:
        print(error)
    """
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    said, _ = python(code, tmp_path, preexec_fn=limit).communicate()
    assert said.startswith("The disk is full") and said.count("\n") == 1
    assert list((tmp_path / "artefacts" / "sae").iterdir()) == []


def test_disk_full_while_writing_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_FIGURES", str(tmp_path))
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    figures.show(px.bar(x=[1], y=[2]), "02-bars", claim="a", alt="b")
    before = (tmp_path / "02-bars.json").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths.os, "fsync", full)
    with pytest.raises(StudyError, match="disk is full"):
        figures.show(px.bar(x=[1], y=[3]), "02-bars", claim="a", alt="b")
    assert (tmp_path / "02-bars.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- the runner --------------------------------------------------------------------------------------------------------------

RUN = """
import dataclasses, sys
from types import SimpleNamespace
from sae_lib.study import __main__, plan
Corpus = dataclasses.make_dataclass("Corpus", [("source", str, "environment")], frozen=True)
plan.load_profiles = lambda: {"workshop": SimpleNamespace(corpus=Corpus())}
plan.corpus_fingerprint = lambda corpus: "text"
sys.exit(__main__.main(["run", "--no-export", *sys.argv[1:]]))
"""
HEAD = '# %% tags=["parameters"]\nPROFILE = "workshop"\nSEED = 0\nARTEFACTS = "auto"\nCORPUS = ""\n# %%\n'


@pytest.fixture
def study(tmp_path):
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    return tmp_path


def run(study: Path, *arguments: str) -> subprocess.Popen:
    cleared = {"SAE_ROOT": str(study), "SAE_DATA": "", "SAE_FIGURES": "", "SAE_RECEIPTS": ""}
    return python(RUN, *arguments, env=cleared, cwd=study)


def test_kernel_killed(study):
    (study / "notebooks" / "src" / "02_title.py").write_text(HEAD + "import os\nos.kill(os.getpid(), 9)")
    process = run(study)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "02_title: The kernel died (probably out of memory: peak 0." in said and "try --profile smoke" in said
    assert not (study / "data" / "runs" / "workshop" / "02_title.ipynb").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_runner_stopped_takes_its_kernel_along(study, how):
    source = study / "notebooks" / "src" / "02_title.py"
    body = "import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(WAIT)\n"
    source.write_text(HEAD + body.replace("WAIT", "60"))
    process = run(study)
    deadline = time.monotonic() + 60
    while not (study / "pid").exists() or not (study / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    kernel = psutil.Process(int((study / "pid").read_text()))
    process.send_signal(how)
    said, _ = process.communicate(timeout=60)
    kernel.wait(10)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Interrupted; run the same command again" in said and "Traceback" not in said
        source.write_text(HEAD + body.replace("WAIT", "0"))
        assert "02_title: running (first run)" in run(study).communicate(timeout=60)[0]


# --- PNG export --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    for name in ("02-bars", "02-more"):
        figures.show(px.bar(x=["one", "two"], y=[2, 3]), name, claim="Three is more", alt="Two bars.")
    return tmp_path / "figures"


def program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def alive(pid: Path) -> bool:
    """Whether the process whose number is in a file still runs; one that init has not yet buried does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid.read_text())).status() != psutil.STATUS_ZOMBIE
    return False


def test_no_browser(drawn, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(drawn / "nothing"))
    assert "which is no program; set BROWSER_PATH or install one" in export.export(drawn)
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setattr(export, "_BROWSERS", ())
    assert export.export(drawn) == "PNG export skipped: no Chrome or Chromium found; set BROWSER_PATH or install one"


def test_browser_that_dies_at_its_start(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", program(tmp_path / "browser", "exit 1"))
    assert "does not start" in export.export(drawn)


def test_browser_that_hangs_at_its_start(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", program(tmp_path / "browser", f"echo $$ > {tmp_path}/pid\nsleep 61"))
    assert "does not start" in export.export(drawn, start_timeout=1.0)
    assert not alive(tmp_path / "pid")
    assert not [process for process in psutil.Process().children(recursive=True) if "sleep" in process.name()]


def test_browser_that_hangs_at_its_work_is_killed(drawn, tmp_path, monkeypatch):
    body = f'case "$1" in --version) exit 0;; esac\necho $$ > {tmp_path}/pid\nexec sleep 61'
    monkeypatch.setenv("BROWSER_PATH", program(tmp_path / "browser", body))
    assert "stopped, with 2 of 2 figures left" in export.export(drawn, timeout=8.0)
    assert not alive(tmp_path / "pid")


@pytest.mark.skipif(export.find_browser() is None, reason="needs Chrome or Chromium")
def test_browser_that_works(drawn):
    pytest.importorskip("kaleido")
    assert export.export(drawn) == "PNG export: 2 rendered"
    image = (drawn / "02-bars.png").read_bytes()
    assert image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") == 1350
    assert export.export(drawn) == "PNG export: all up to date"
    figures.show(px.bar(x=["one"], y=[5]), "02-bars", claim="Five", alt="A bar.")
    assert export.outdated(drawn) == ["02-bars"]


# --- run_all.sh --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """The files that run_all.sh looks at, in a folder of their own."""
    folder = tmp_path / "a checkout"
    (folder / "sae_lib" / "study").mkdir(parents=True)
    for name in ("run_all.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def shell(checkout: Path, search: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {"PATH": f"{search}:/usr/bin:/bin", "HOME": str(checkout)} | environment
    command = ["bash", str(checkout / "run_all.sh"), *arguments]
    return subprocess.run(command, env=variables, cwd=search, text=True, capture_output=True, timeout=60)


def fake_python(folder: Path, body: str) -> Path:
    folder.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        program(folder / name, body)
    return folder


def test_python_too_old(checkout, tmp_path):
    done = shell(checkout, fake_python(tmp_path / "bin", "exit 1"))
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.11 or newer is needed and none was found") and done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_no_network_leaves_no_environment_that_looks_whole(checkout, tmp_path):
    (checkout / "requirements.lock").write_text("numpy==2.0.0\n")
    bare = fake_python(tmp_path / "bin", f'exec {sys.executable} -S "$@"')
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    done = shell(checkout, bare, **unreachable)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("The packages could not be downloaded: connect to the network")
    assert (checkout / ".venv" / "bin" / "python").exists() and not (checkout / ".venv" / ".complete").exists()
    assert "Making" in shell(checkout, bare, **unreachable).stderr  # the half-made one is not used


# A python whose `venv` makes an environment with a pip that only notes its calls; argv of the format: notes, real python.
NOTING = """
if [ "$2" = venv ]; then
  echo made >> {notes}; mkdir -p "$4/bin"
  cat > "$4/bin/python" <<'END'
#!/bin/sh
if [ "$2" = pip ]; then echo "$@" >> {notes}; else exec {python} "$@"; fi
END
  chmod +x "$4/bin/python"
else exec {python} -S "$@"; fi
"""


def test_whole_environment_is_used_again_until_the_lock_changes(checkout, tmp_path):
    package, notes = checkout / "sae_lib" / "study", tmp_path / "notes"
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\nsys.exit('asked for ' + ' '.join(sys.argv[1:]))\n")
    (checkout / "requirements.lock").write_text("")
    search = fake_python(tmp_path / "bin", NOTING.format(notes=notes, python=sys.executable))
    for _ in range(2):
        done = shell(checkout, search, "--seed", "3")
        assert done.stderr.endswith("asked for run --seed 3\n") and done.returncode == 1
    made, locked, editable = notes.read_text().splitlines()
    assert made == "made" and locked.endswith("requirements.lock") and "--no-deps -e" in editable
    (checkout / "requirements.lock").write_text("# new\n")
    assert "Making" in shell(checkout, search).stderr
