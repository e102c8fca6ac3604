"""The main dictionary trained by several processes: `torchrun ... -m sae_lib.study dictionary`.

The first process goes through the study as a notebook does. Whenever that comes to the training of a dictionary it calls the
others, which until then wait, to train it with it; what they need they find in the study's folder, which all must see.
"""

from pathlib import Path

import pandas as pd

from sae_lib.distributed import Processes, joined
from sae_lib.errors import StudyError
from sae_lib.recipe import TrainConfig
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study.pipeline import Study


class _FirstStudy(Study):
    """A study whose dictionaries are trained by all processes."""

    def train(self, on: str, config: SAEConfig, train: TrainConfig, checkpoint: Path | None = None) -> tuple[SAE, pd.DataFrame]:
        self.processes.from_first(lambda: (on, config, train))
        return super().train(on, config, train, checkpoint)


def dictionary(profile: str, seed: int, corpus: str, on: str = "A") -> None:
    """Make the main dictionary on a transformer's activations, if it is not there, as the artefact that notebooks load."""
    with joined() as processes:
        if processes.first:
            study = _FirstStudy(profile, seed, corpus=corpus, processes=processes)
            study.dictionary(on)
            processes.from_first(lambda: None)
            return
        study = Study(profile, seed, "load", corpus, processes)
        study.store.log = lambda _: None  # the first says it
        while work := _called(processes):
            study.train(*work)


def _called(processes: Processes) -> tuple | None:
    """What to train with the others, or None if there is no more."""
    try:
        return processes.from_first(lambda: None)
    except RuntimeError as error:
        raise StudyError("The first of the processes has ended before its work was done; it says why.") from error
