"""Shapes in signatures are checked at run time, in tests only."""

from jaxtyping import install_import_hook

install_import_hook("sae_lib", "beartype.beartype")
