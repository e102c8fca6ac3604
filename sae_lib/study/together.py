"""The main dictionary, and the transformer under it, trained by several processes: `torchrun ... -m sae_lib.study dictionary`.

The first process goes through the study as a notebook does. Whenever that comes to a training it calls the others, which until
then wait, to train with it; what they need they find in the study's folder, which all must see.
"""

from pathlib import Path

import pandas as pd

from sae_lib.distributed import Processes, joined
from sae_lib.errors import StudyError
from sae_lib.recipe import TrainConfig
from sae_lib.sae import SAE, SAEConfig
from sae_lib.study.pipeline import Study
from sae_lib.transformer import Transformer


class _FirstStudy(Study):
    """A study whose trainings are all processes' work."""

    def pretrain(self, which: str, checkpoint: Path | None = None) -> tuple[Transformer, pd.DataFrame]:
        self.processes.from_first(lambda: ("pretrain", which))
        return super().pretrain(which, checkpoint)

    def train(self, on: str, config: SAEConfig, train: TrainConfig, checkpoint: Path | None = None) -> tuple[SAE, pd.DataFrame]:
        self.processes.from_first(lambda: ("train", on, config, train))
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
            name, *arguments = work
            getattr(study, name)(*arguments)


def _called(processes: Processes) -> tuple | None:
    """What to train with the others, or None if there is no more."""
    try:
        return processes.from_first(lambda: None)
    except RuntimeError as error:
        raise StudyError("The first of the processes has ended before its work was done; it says why.") from error
