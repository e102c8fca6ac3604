"""Plumbing of the study, nothing of the papers: profiles, artefacts, runner, figures, notebook build.

A notebook starts with `from sae_lib import study`; what that offers is imported on first use, so that the runner stays quick.
"""

import importlib

_HOMES = {
    "begin": "pipeline",
    "machine_check": "environment",
    "show": "figures",
    "style": "figures",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_lib.study' has no attribute {name!r}")
    importlib.import_module("sae_lib.study.figures")  # sets the template that plotly.express draws with
    return getattr(importlib.import_module(f"sae_lib.study.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
