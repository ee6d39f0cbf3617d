"""A training run of a few steps that can be dealt to any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from raycluster.models.backbone import Backbone, FlattenTo, conv_bn, initialise
from raycluster.models.dropout import SeededDropout
from raycluster.models.heads import Heads
from raycluster.seeding import seed_for
from raycluster.training.config import TrainingSettings
from raycluster.training.objective import Objective
from raycluster.training.optimiser import Optimisers
from raycluster.training.partial_softmax import PartialSoftmax
from raycluster.training.step import Microbatch, Network, Step, StepResult, no_reduce

NUM_STEPS = 30
CLUSTERS = (7, 5)


def settings(mode: str, **fields: Any) -> TrainingSettings:
    return TrainingSettings(mode=mode, global_batch=48, microbatch=8, lr=0.1, threads=1, **fields)


def network() -> Network:
    body = {
        "conv1": torch.nn.Sequential(*conv_bn(3, 8, 3)),
        "conv2": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.MaxPool2d(2), *conv_bn(8, 16, 3)),
        "fc": torch.nn.Sequential(
            torch.nn.ReLU(), torch.nn.MaxPool2d(2), FlattenTo(4), SeededDropout(0, 0.2), torch.nn.Linear(256, 32)
        ),
    }
    backbone = initialise(Backbone(body, tuple(body), num_features=32, input="rgb"), 1)
    return Network(backbone, Heads(32, CLUSTERS, 2))


def microbatches(step: int) -> list[Microbatch]:
    """The same for everybody, some rows without a label or with a weight."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for stream in range(6):
        labels = torch.stack([torch.randint(0, size, (8,), generator=generator) for size in CLUSTERS])
        labels[:, stream % 3] = -1
        images = torch.randint(0, 60, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
        images += (labels[0].clamp(min=0) * 30).to(torch.uint8)[:, None, None, None]
        weights = torch.rand(8, generator=generator) + 0.5
        batches.append(Microbatch(images, labels, weights, seed_for(0, "microbatch", step, stream)))
    return batches


def run(
    network: torch.nn.Module,
    step: Step,
    share: Callable[[list[Microbatch]], list[Microbatch]],
    num_steps: int = NUM_STEPS,
) -> tuple[dict[str, Tensor], list[float]]:
    """Final weights and running statistics, and the loss of each step."""
    results: list[StepResult] = [step(share(microbatches(index)), epoch=index / 10) for index in range(num_steps)]
    plain = getattr(network, "module", network)
    return {key: value.clone() for key, value in plain.state_dict().items()}, [result.loss for result in results]


def run_alone(mode: str, objective: Objective | None = None, **fields: Any) -> tuple[dict[str, Tensor], list[float]]:
    ours, chosen = network(), settings(mode, **fields)
    step = Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen, objective=objective)
    return run(ours, step, lambda batches: batches)


def worker(rank: int, world: int, folder: str, wrapped: bool) -> None:
    """One process of `world`: trains in each case and saves what it got."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    outcomes = {}
    for name, (mode, objective, fields) in CASES.items():
        ours, chosen = network(), settings(mode, **fields)
        optimisers = Optimisers(ours.backbone, ours.heads, chosen)
        module: torch.nn.Module = ours
        if name.startswith("wrapped"):
            if not wrapped:
                continue
            module = torch.nn.parallel.DistributedDataParallel(ours, broadcast_buffers=False)
        all_reduce = no_reduce if world == 1 else distributed.all_reduce
        step = Step(module, optimisers, chosen, all_reduce=all_reduce, objective=objective)
        outcomes[name] = run(module, step, lambda batches: batches[rank::world] if world < 6 else batches[rank:])
    torch.save(outcomes, f"{folder}/{world}-{rank}.pt")
    distributed.destroy_process_group()


PARTIAL = PartialSoftmax(4, CLUSTERS)
CASES: dict[str, tuple[str, Objective | None, dict[str, Any]]] = {
    "exact": ("exact", None, {}),
    "exact, partial softmax": ("exact", PARTIAL, {}),
    "fast": ("fast", None, {}),
    "wrapped": ("fast", None, {"forward_rows": 16}),
    "wrapped, partial softmax": ("fast", PARTIAL, {"forward_rows": 16}),
}
