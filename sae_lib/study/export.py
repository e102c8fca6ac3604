"""PNGs of the figures, made in a process of their own that can be killed, and put into the executed notebooks.

A browser that cannot start makes the renderer wait for ever, so none is started inside a kernel or without a time limit.
"""

import asyncio
import base64
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from sae_lib.errors import StudyError
from sae_lib.study import paths
from sae_lib.study.processes import module, run_limited

SCALE = 1.5
# The programs themselves before the wrapper scripts of the same name: a signal to a wrapper does not reach the browser.
_BROWSERS = (
    "/usr/lib/chromium/chromium-headless-shell",
    "/usr/lib/chromium/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "microsoft-edge",
    "msedge",
    "brave-browser",
)


def find_browser() -> str | None:
    """A Chrome-like browser: $BROWSER_PATH and nothing else if it is set, else one from the usual places."""
    if wanted := os.environ.get("BROWSER_PATH"):
        return shutil.which(wanted)
    return next((found for name in _BROWSERS if (found := shutil.which(name))), None)


def export(folder: Path, timeout: float = 300.0, start_timeout: float = 15.0) -> str:
    """Render every figures/*.json whose PNG is missing or of other data; one line that says what was done or why not.

    Never raises for a missing, broken or hanging browser: the figures are complete without PNGs.
    """
    pending = outdated(folder)
    if not pending:
        return "PNG export: all up to date"
    why = _no_renderer(start_timeout)
    if why is None:
        status = run_limited(module("export", str(folder)), timeout)
        left = outdated(folder)
        if not left:
            return f"PNG export: {len(pending)} rendered"
        end = f"did not finish in {timeout:g} s and was stopped" if status is None else "failed"
        why = f"the browser {end}, with {len(left)} of {len(pending)} figures left; set BROWSER_PATH to another one"
    return f"PNG export skipped: {why}"


def outdated(folder: Path) -> list[str]:
    """Names of the figures here whose PNG is missing or was rendered from other data."""
    from sae_lib.study.figures import read_index

    return [
        name
        for name, entry in sorted(read_index(folder).items())
        if (folder / f"{name}.json").exists()
        and not (entry.get("png_of") == entry["sha256"] and (folder / f"{name}.png").exists())
    ]


def inject(notebook: Path, folder: Path) -> None:
    """Put each figure's PNG beside its plotly output in an executed notebook, for viewers that run no JavaScript."""
    from sae_lib.study.figures import MIMETYPE, read_index

    index = read_index(folder)
    content = json.loads(notebook.read_text(encoding="utf-8"))
    changed = False
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            shown = output.get("metadata", {}).get(MIMETYPE, {})
            name = shown.get("figure")
            entry, png = index.get(name, {}), folder / f"{name}.png"
            if name and png.exists() and entry.get("png_of") == shown.get("sha256"):
                image = base64.b64encode(png.read_bytes()).decode()
                changed |= output["data"].get("image/png") != image
                output["data"]["image/png"] = image
                output["metadata"]["image/png"] = {"alt": entry["alt"]}
    if changed:
        paths.write_atomic(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _no_renderer(start_timeout: float) -> str | None:
    """Why no PNG can be made here, or None if one can."""
    if importlib.util.find_spec("kaleido") is None:
        return "kaleido is not installed; install the project's `export` extra"
    browser = find_browser()
    if browser is None:
        wanted = os.environ.get("BROWSER_PATH")
        missing = f"BROWSER_PATH is {wanted}, which is no program" if wanted else "no Chrome or Chromium found"
        return f"{missing}; set BROWSER_PATH or install one"
    # On Windows asking for the version opens a window.
    if sys.platform != "win32" and run_limited([browser, "--version"], start_timeout) != 0:
        return f"{browser} does not start; set BROWSER_PATH to another browser"
    return None


async def _render(folder: Path) -> None:
    """Render what is outdated with one browser. MathJax off: it would be fetched from the network, a minute a figure."""
    import kaleido

    from sae_lib.study.figures import update_index

    async with kaleido.Kaleido(n=1, timeout=60, mathjax=False, path=find_browser()) as renderer:
        for name in outdated(folder):
            content = (folder / f"{name}.json").read_bytes()
            image = await renderer.calc_fig(json.loads(content), opts={"format": "png", "scale": SCALE})
            paths.write_atomic(folder / f"{name}.png", image)
            update_index(folder, {name: {"png_of": paths.sha256(folder / f"{name}.json")}})


if __name__ == "__main__":
    try:
        asyncio.run(_render(Path(sys.argv[1])))
    except StudyError as error:
        sys.exit(str(error))
