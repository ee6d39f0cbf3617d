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
from raycluster.models.smallnet import Model
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.state import Config, open_run
from raycluster.types import Block

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
