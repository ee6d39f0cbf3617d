from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from raycluster.data.dataset import ImageDataset
from raycluster.data.epoch_plan import shard_chunks
from raycluster.data.loader import load_chunk
from raycluster.data.transforms import View
from raycluster.features.extraction import FeatureSpec, extract
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.smallnet import Model
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.state import open_run
from raycluster.types import Block
from tests.training.partition import network

VIEW = View(size=16, crop_scale=(0.4, 1.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Config]) -> ImageDataset:
    return open_run(tiny(tmp_path_factory.mktemp("run")), LocalWorkers()).dataset


def features(dataset: ImageDataset, feature_spec: FeatureSpec) -> np.ndarray:
    """Of the first shard."""
    workers, backbone = LocalWorkers(), Model(widths=(4, 8)).build(0)
    list(extract(backbone, dataset, workers, feature_spec=feature_spec, version="v", shards=[0]))
    (block,) = workers.features("v").collect(_same)
    assert block.samples.tolist() == list(range(*dataset.manifest.shards[0]))
    return block.values.astype(np.float32)


def _same(block: Block) -> Block:
    return block


def test_visits_are_averaged_and_every_epoch_has_its_own(dataset: ImageDataset) -> None:
    many = FeatureSpec(VIEW, "conv2", "activations", visits=3, epoch=-2)
    (chunk, *_) = shard_chunks(dataset.manifest.shards, -2, 3)
    blocks = load_chunk(chunk, dataset.uri, VIEW, seed=dataset.seed, settings=dataset.settings)
    images = np.concatenate([block.images for block in blocks]).reshape(-1, 3, 16, 16, 3)
    with torch.no_grad():
        seen = [
            Model(widths=(4, 8)).build(0).eval()(torch.from_numpy(images[:, visit]).permute(0, 3, 1, 2), "conv2")
            for visit in range(3)
        ]
    expected = torch.stack([one.flatten(1).relu() for one in seen]).mean(0)
    assert np.allclose(features(dataset, many), expected, atol=2e-3)
    assert not np.allclose(features(dataset, replace(many, epoch=-3)), expected, atol=2e-2)


def test_activations_are_the_map_after_its_relu(dataset: ImageDataset) -> None:
    view = View(size=16)
    flat = features(dataset, FeatureSpec(view, "conv2", "flat"))
    assert flat.min() < 0
    assert np.array_equal(features(dataset, FeatureSpec(view, "conv2", "activations")), np.maximum(flat, 0))


def test_training_mode_normalises_each_part_by_itself_and_leaves_no_trace() -> None:
    images = np.random.default_rng(0).integers(0, 256, (19, 16, 16, 3), np.uint8)
    backbone, cpu = Model(widths=(4, 8)).build(0).eval(), torch.device("cpu")
    norms = [module for module in backbone.modules() if isinstance(module, GhostBatchNorm)]
    for norm in norms:
        norm.microbatch = 5  # as a step of training leaves it
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = FeatureSpec(VIEW, "conv2", microbatch=8).describe(backbone, images, cpu)
    assert not backbone.training and all(norm.microbatch == 5 and norm.statistics is None for norm in norms)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    backbone.train()
    for norm in norms:
        norm.microbatch = None
    with torch.no_grad():
        parts = [torch.from_numpy(part).permute(0, 3, 1, 2) for part in np.array_split(images, 3)]  # of at most 8
        expected = torch.cat([backbone(part, "conv2").flatten(1) for part in parts])
    assert np.array_equal(found, expected.half().numpy())
    assert not np.allclose(found, FeatureSpec(VIEW, "conv2").describe(backbone.eval(), images, cpu), atol=0.1)


def test_dropout_in_training_mode_follows_from_the_seed() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    backbone, cpu, spec = network().backbone.eval(), torch.device("cpu"), FeatureSpec(VIEW, "fc", microbatch=4)
    one, same, other = (spec.describe(backbone, images, cpu, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_are_described_in_evaluation_mode(rows: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), np.uint8)
    backbone, cpu = Model(widths=(4, 8)).build(0).eval(), torch.device("cpu")
    found, expected = (FeatureSpec(VIEW, microbatch=size).describe(backbone, images, cpu) for size in (4, None))
    assert np.array_equal(found, expected)
