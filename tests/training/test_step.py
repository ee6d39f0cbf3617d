from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raycluster.models import resnet18
from raycluster.models.heads import Heads
from raycluster.training.config import TrainingSettings
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step
from raycluster.types import UserError
from tests.training.partition import CASES, microbatches, network, run, run_alone, settings, worker


class Sum:
    """`all_reduce` among threads: the terms are added in the order of arrival."""

    def __init__(self, world: int) -> None:
        self.barrier, self.total = Barrier(world), None
        self.terms: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> None:
        self.terms.append(tensor.clone())
        if self.barrier.wait() == 0:
            self.total = torch.stack(self.terms).sum(0)
            self.terms = []
        self.barrier.wait()
        assert self.total is not None
        tensor.copy_(self.total)
        self.barrier.wait()


Deal = Callable[[list[Microbatch], int, int], list[Microbatch]]


def _in_turn(batches: list[Microbatch], rank: int, world: int) -> list[Microbatch]:
    return batches[rank::world]


def _runs(batches: list[Microbatch], rank: int, world: int) -> list[Microbatch]:
    return batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]


def _one_takes_all(batches: list[Microbatch], rank: int, world: int) -> list[Microbatch]:
    return batches[::-1] if rank == 0 else []


def _dealt(mode: str, world: int, deal: Deal, num_steps: int = 30) -> list[tuple[dict[str, Tensor], list[float]]]:
    """What each of `world` workers has in the end; they are threads with networks of their own."""
    all_reduce, chosen = Sum(world), settings(mode)
    outcomes: list[tuple[dict[str, Tensor], list[float]]] = []

    def work(rank: int) -> None:
        ours = network()
        step = Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen, all_reduce=all_reduce)
        outcomes.append(run(ours, step, lambda batches: deal(batches, rank, world), num_steps))

    threads = [Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.use_deterministic_algorithms(False)  # a setting of the whole process, which real workers do not share
    assert len(outcomes) == world
    return outcomes


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(((one[key] - other[key]).abs().max() / one[key].abs().max().clamp(min=1)).item() for key in one)


@pytest.mark.parametrize(("world", "deal"), [(2, _in_turn), (3, _in_turn), (3, _runs), (4, _runs), (2, _one_takes_all)])
def test_exact_mode_is_bitwise_identical_for_any_split_of_microbatches(world: int, deal: Deal) -> None:
    expected, losses = run_alone("exact")
    assert losses[-1] < 0.9 * losses[0]
    for weights, seen in _dealt("exact", world, deal):
        assert seen == losses
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fast_mode_agrees_with_exact_mode(world: int) -> None:
    expected, losses = run_alone("exact")
    for weights, seen in _dealt("fast", world, _runs):
        assert seen == pytest.approx(losses, abs=1e-5)
        assert _largest_difference(expected, weights) < 1e-5


def test_fast_mode_in_pieces_agrees() -> None:
    expected, _ = run_alone("fast")
    assert _largest_difference(expected, run_alone("fast", forward_rows=16)[0]) < 1e-5


def test_exact_bf16_is_bitwise_reproducible() -> None:
    expected, _ = run_alone("exact", precision="bf16")
    again, _ = run_alone("exact", precision="bf16")
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_one_step_is_textbook_sgd() -> None:
    ours, chosen = network(), settings("exact", weight_decay=0, momentum=0)
    reference = network()
    step = Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen)
    result = step(microbatches(0), epoch=0)
    losses, weights = [], []
    for microbatch in microbatches(0):
        for module in reference.modules():
            if hasattr(module, "seeds"):
                module.seeds = [microbatch.seed]
        (logits,) = reference(microbatch.images.permute(0, 3, 1, 2))
        for scores, labels in zip(logits, microbatch.labels, strict=True):
            good = labels >= 0
            picked = scores.log_softmax(1)[good, labels[good]]
            losses.append(-(picked * microbatch.weights[good]).sum() / 2)
        weights.append(microbatch.weights[microbatch.labels[0] >= 0].sum())
    loss = torch.stack(losses).sum()
    (loss / 48).backward()
    assert result.loss == pytest.approx((loss / sum(weights)).item(), rel=1e-5)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad, atol=1e-6, rtol=1e-5)


def test_running_statistics_are_the_mean_over_microbatches() -> None:
    ours, chosen = network(), settings("fast")
    Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen)(microbatches(0), epoch=0)
    first = network().backbone
    maps = [
        torch.nn.functional.conv2d(
            first.input_layer(batch.images.permute(0, 3, 1, 2)), first.body.conv1[0].weight, padding=1
        ).transpose(0, 1).flatten(1)
        for batch in microbatches(0)
    ]  # fmt: skip
    norm = ours.backbone.body.conv1[1]
    torch.testing.assert_close(
        norm.running_mean, 0.1 * torch.stack([m.mean(1) for m in maps]).mean(0), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack([m.var(1) for m in maps]).mean(0))


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_without_label_and_microbatches_without_any_change_nothing(mode: str) -> None:
    ours, chosen = network(), settings(mode, weight_decay=0)
    before = {key: value.clone() for key, value in ours.named_parameters()}
    empty = [batch._replace(labels=torch.full_like(batch.labels, -1)) for batch in microbatches(0)]
    result = Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen)(empty, epoch=0)
    assert (result.loss, result.weight) == (0, 0)
    assert all(torch.equal(before[key], value) for key, value in ours.named_parameters())


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_divergence_is_told_and_nothing_is_changed(mode: str) -> None:
    ours, chosen = network(), settings(mode)
    with torch.no_grad():
        ours.heads.linear[0].weight[0, 0] = float("nan")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(UserError, match=r"Lower training\.lr"):
        Step(ours, Optimisers(ours.backbone, ours.heads, chosen), chosen)(microbatches(0), epoch=0)
    assert all(
        torch.equal(before[key], value) for key, value in ours.state_dict().items() if key != "heads.linear.0.weight"
    )


class _Operations(TorchDispatchMode):
    """Counts operations that compute: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(found.alias_info and not found.alias_info.is_write for found in func._schema.returns)
        self.count += not is_view and "empty" not in str(func) and "view" not in str(func)
        return func(*args, **(kwargs or {}))


def test_small_microbatches_need_few_operations_however_many_share_a_pass() -> None:
    counts = []
    for groups in (2, 8):
        chosen = TrainingSettings(global_batch=8 * groups, microbatch=8, threads=1)
        backbone = resnet18.Model().build(0)
        heads = Heads(backbone.num_features, (10,), 0)
        step = Step(Network(backbone, heads), Optimisers(backbone, heads, chosen), chosen)
        images, labels = torch.zeros(8, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.int64)
        batch = [Microbatch(images, labels, torch.ones(8), seed) for seed in range(groups)]
        step(batch, epoch=0)
        with _Operations() as operations:
            step(batch, epoch=0)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 600


def test_the_process_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    run_alone("exact")
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_resuming_from_saved_state_is_bitwise_identical() -> None:
    expected, _ = run_alone("exact", head_momentum=0.9)
    chosen, ours = settings("exact", head_momentum=0.9), network()
    optimisers = Optimisers(ours.backbone, ours.heads, chosen)
    step = Step(ours, optimisers, chosen)
    for index in range(11):
        step(microbatches(index), epoch=index / 10)
    again = network()
    again.load_state_dict(ours.state_dict())
    restored = Optimisers(again.backbone, again.heads, chosen)
    restored.load_state_dict(optimisers.state_dict())
    step = Step(again, restored, chosen)
    for index in range(11, 30):
        step(microbatches(index), epoch=index / 10)
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_new_heads_take_a_new_step() -> None:
    ours, chosen = network(), settings("exact")
    optimisers = Optimisers(ours.backbone, ours.heads, chosen)
    Step(ours, optimisers, chosen)(microbatches(0), epoch=0)
    ours.heads = Heads(32, (7, 5), 9)
    optimisers.new_heads(ours.heads)
    before = ours.heads.linear[1].weight.detach().clone()
    Step(ours, optimisers, chosen)(microbatches(1), epoch=0.1)
    assert not torch.equal(before, ours.heads.linear[1].weight)


@pytest.mark.slow
def test_processes_end_bitwise_identical(tmp_path: Path) -> None:
    """The same across processes, with real collectives; and gradients averaged by the framework agree."""
    expected = {name: run_alone(mode, objective, **fields) for name, (mode, objective, fields) in CASES.items()}
    for world in (2, 3):
        torch.multiprocessing.spawn(worker, (world, str(tmp_path), world == 2), nprocs=world)
        for rank in range(world):
            for name, (weights, losses) in torch.load(tmp_path / f"{world}-{rank}.pt").items():
                if name.startswith("exact"):
                    assert losses == expected[name][1]
                    assert all(torch.equal(weights[key], value) for key, value in expected[name][0].items())
                assert _largest_difference(expected[name][0], weights) < 1e-5
