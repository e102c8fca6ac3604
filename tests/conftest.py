"""Shapes in signatures are checked at run time, in tests only; and what several files of tests need."""

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("sae_lib", "beartype.beartype")


@pytest.fixture(scope="module")
def one_thread():
    """For steps so small that they would spend their time waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
