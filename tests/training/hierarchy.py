"""Steps with a head per super-class that can be dealt to any number of workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, distributed

from raycluster.models.heads import HierarchicalHeads
from raycluster.models.smallnet import Model
from raycluster.seeding import seed_for
from raycluster.training.hierarchical import HierarchicalCrossEntropy
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step, no_reduce
from tests.training.partition import settings

PARENTS = np.repeat(np.arange(3), (4, 1, 2))
NUM_STEPS = 6


def network() -> Network:
    sizes = (12, *np.repeat(np.bincount(PARENTS), 4).tolist())
    return Network(Model(widths=(8, 16)).build(1), HierarchicalHeads(16, sizes, 2))


def microbatches(step: int) -> list[Microbatch]:
    """Six of eight rows; the first has rows of one super-cluster only, one row takes no part."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for stream in range(6):
        clusters = torch.randint(0, len(PARENTS) if stream else 4, (8,), generator=generator)
        clusters[stream] = -1
        labels = torch.stack((clusters, torch.from_numpy(PARENTS)[clusters].where(clusters >= 0, -1)))
        images = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=generator)
        batches.append(Microbatch(images, labels, torch.ones(8), seed_for(0, "microbatch", step, stream)))
    return batches


def train(mode: str, rank: int = 0, world: int = 1, wrapped: bool = False) -> dict[str, Tensor]:
    """The weights after some steps on this worker's share of the microbatches."""
    ours, chosen = network(), settings(mode)
    optimisers = Optimisers(ours.backbone, ours.heads, chosen)
    module: torch.nn.Module = ours
    if wrapped:
        module = torch.nn.parallel.DistributedDataParallel(ours, broadcast_buffers=False)
    objective = HierarchicalCrossEntropy(PARENTS, rotations=True)
    reduce = no_reduce if world == 1 else distributed.all_reduce
    step = Step(module, optimisers, chosen, all_reduce=reduce, objective=objective)
    for index in range(NUM_STEPS):
        step(microbatches(index)[rank::world], epoch=index / 10)
    return {key: value.clone() for key, value in ours.state_dict().items()}


def worker(rank: int, world: int, folder: str) -> None:
    """One process of `world`: trains in every mode and saves what it got."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    wrapped = train("fast", rank, world, wrapped=True)
    torch.save({"exact": train("exact", rank, world), "wrapped": wrapped}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
