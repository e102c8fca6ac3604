"""Several processes that train one transformer or dictionary together, on one machine or on many (torch.distributed).

Data parallel: each process takes some contexts of every batch through the transformer, or harvests some of the contexts and
takes their rows of every batch through the dictionary; gradients and counts are summed, and all make the same step. What each of
them does it asks an object of `Processes`, whose default is the only process there is: nothing that uses it has two ways to go.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# One process makes the text while the others wait; torchrun itself notices when one of them dies.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together; methods that exchange anything must be called by all of them."""

    rank: int = 0
    count: int = 1
    on_this_machine: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes: the same bits in each of them."""
        if self.count > 1:
            for exchange in [dist.all_reduce(t, async_op=True) for t in tensors]:
                exchange.wait()

    def same(self, *tensors: Tensor) -> None:
        """Replace each tensor by the first process's."""
        if self.count > 1:
            for exchange in [dist.broadcast(t, 0, async_op=True) for t in tensors]:
                exchange.wait()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, the only one that calls it; small, since it is pickled on its way."""
        made = [make() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(made, 0)
        return made[0]

    def tensors_from_first(self, make: Callable[[], tuple[dict[str, Tensor], T]]) -> tuple[dict[str, Tensor], T]:
        """The same for named tensors of any size, and something small."""
        made = make() if self.first else None
        shapes, small = self.from_first(lambda: ({name: (t.shape, t.dtype) for name, t in made[0].items()}, made[1]))
        tensors = made[0] if made else {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        self.same(*tensors.values())
        return tensors, small


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone if it was started in another way."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()
