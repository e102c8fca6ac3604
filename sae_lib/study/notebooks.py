"""Notebooks from their source: notebooks/src/NN_name.py (py:percent) is edited, notebooks/NN_name.ipynb is generated.

Also what can be told about a notebook without running it: its rules, its parameters, the outputs it declares.
"""

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from sae_lib.errors import StudyError
from sae_lib.study import paths

PARAMETERS = ("PROFILE", "SEED", "ARTEFACTS", "CORPUS")
MAX_CELLS, MAX_LINES = 45, 15
_KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class Outputs(NamedTuple):
    """What a notebook says it makes: names of figures, ids of scorecard rows (those written as plain strings)."""

    figures: tuple[str, ...]
    rows: tuple[str, ...]


def sources() -> list[Path]:
    """Every notebooks/src/NN_name.py, in order."""
    return sorted((paths.root() / "notebooks" / "src").glob("[0-9][0-9]_*.py"))


def target(source: Path) -> Path:
    """The generated notebook of a source."""
    return source.parents[1] / f"{source.stem}.ipynb"


def convert(source: Path) -> dict:
    """The notebook of a source: no outputs, and cell ids that stay the same from one build to the next."""
    import jupytext

    cells = []
    for number, cell in enumerate(jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells):
        identity = hashlib.sha1(f"{source.stem}/{number}".encode()).hexdigest()[:8]  # jupytext's own ids are random
        tags = cell.metadata.get("tags", [])
        fresh = {"cell_type": cell.cell_type, "id": identity, "metadata": {"tags": list(tags)} if tags else {}}
        fresh["source"] = cell.source.splitlines(keepends=True)
        if cell.cell_type == "code":
            fresh |= {"execution_count": None, "outputs": []}
        cells.append(fresh)
    metadata = {"kernelspec": _KERNEL, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def serialise(notebook: dict) -> str:
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def build(check: bool = False) -> list[Path]:
    """Write every notebook whose source says something else, or with `check` only tell which; returns those."""
    stale = []
    for source in sources():
        text = serialise(convert(source))
        if not target(source).exists() or target(source).read_text(encoding="utf-8") != text:
            stale.append(target(source))
            if not check:
                paths.write_atomic(target(source), text)
    return stale


def code_cells(notebook: dict) -> list[tuple[int, dict, str]]:
    """(position, cell, source) of every code cell."""
    return [(i, cell, "".join(cell["source"])) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]


def parameters(notebook: dict, name: str) -> dict[str, object]:
    """The parameters of a notebook with their defaults, from its cell tagged `parameters`.

    Raises StudyError unless there is exactly one such cell and it holds nothing but `NAME = plain value`.
    """
    tagged = [text for _, cell, text in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise StudyError(f"Notebook {name} has {len(tagged)} cells tagged `parameters`; give it exactly one.")
    found = {}
    for statement in ast.parse(tagged[0]).body:
        try:
            (variable,) = statement.targets
            found[variable.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError):
            raise StudyError(f"The parameters cell of notebook {name} may hold only lines like NAME = 1, "
                             f"not `{ast.unparse(statement)}`.") from None
    return found


def declared_outputs(notebook: dict) -> Outputs:
    """The figures and scorecard rows that a notebook's code names in `show(fig, "NN-name", ...)` and `row("NN.id", ...)`."""
    figures, rows = [], []
    for name, call in _calls(notebook):
        if name == "show" and len(call.args) > 1 and _text(call.args[1]):
            figures.append(_text(call.args[1]))
        if name == "row" and (text := _text(_argument(call, 0, "id"))) and re.match(r"\d\d\.", text):
            rows.append(text)
    return Outputs(tuple(dict.fromkeys(figures)), tuple(dict.fromkeys(rows)))


def reads_scorecard(notebook: dict) -> bool:
    """Whether a notebook shows the rows of others, so that it is out of date when they change."""
    return any(name == "table" and "scorecard" in ast.unparse(call.func).lower() for name, call in _calls(notebook))


def problems(source: Path) -> list[str]:
    """Every rule of the house that a notebook breaks, one sentence each."""
    notebook = convert(source)
    found = [f"{len(notebook['cells'])} cells; {MAX_CELLS} are the most"] if len(notebook["cells"]) > MAX_CELLS else []
    try:
        missing = [name for name in PARAMETERS if name not in parameters(notebook, source.stem)]
        found += [f"the parameters cell lacks {', '.join(missing)}"] if missing else []
    except StudyError as error:
        found.append(str(error))
    for i, _, text in code_cells(notebook):
        lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        if len(lines) > MAX_LINES:
            found.append(f"cell {i} has {len(lines)} lines of code; {MAX_LINES} are the most")
        if re.search(r"^\s*[!%]", text, re.MULTILINE):
            found.append(f"cell {i} uses `!` or `%`, which is not Python")
            continue
        if "FigureWidget" in text:
            found.append(f"cell {i} uses FigureWidget, which stores all of plotly in the notebook")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"(/|~/|[A-Za-z]:\\)\w", node.value):
                found.append(f"cell {i} has the absolute path {node.value!r}")
    for name, call in _calls(notebook):
        if name == "show" and not {"claim", "alt"} <= {keyword.arg for keyword in call.keywords}:
            found.append(f"`{ast.unparse(call)[:60]}` lacks a claim or alt text")
    for name in declared_outputs(notebook).figures:
        if name[:2] != source.stem[:2]:
            found.append(f"figure {name} does not carry this notebook's number")
    return found + _heading_problems(notebook)


def _heading_problems(notebook: dict) -> list[str]:
    level, found, titles = 0, [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = re.sub(r"^```.*?^```", "", "".join(cell["source"]), flags=re.MULTILINE | re.DOTALL)
        for marks, title in re.findall(r"^(#{1,6}) +(.+)$", text, re.MULTILINE):
            titles += len(marks) == 1
            if len(marks) > level + 1:
                found.append(f"the heading '{title}' skips a level")
            level = len(marks)
    return found + ([] if titles == 1 else [f"{titles} headings of the first level; one is the title"])


def _calls(notebook: dict) -> list[tuple[str, ast.Call]]:
    """(last part of the called name, call) of every call in a notebook's code."""
    calls = []
    for _, _, text in code_cells(notebook):
        try:
            tree = ast.parse(text)
        except SyntaxError:  # `problems` says what is wrong with the cell; running it says it too
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                calls.append((getattr(node.func, "attr", None) or getattr(node.func, "id", ""), node))
    return calls


def _argument(call: ast.Call, position: int, keyword: str) -> ast.expr | None:
    if len(call.args) > position:
        return call.args[position]
    return next((item.value for item in call.keywords if item.arg == keyword), None)


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
