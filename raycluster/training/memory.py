"""Whether heads fit the memory of the device that trains them: their weights, gradients, and what optimisers keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from raycluster.training.config import TrainingSettings
from raycluster.types import UserError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_head_memory(
    sizes: Sequence[int], num_features: int, settings: TrainingSettings, device: torch.device
) -> None:
    """Raise UserError if heads of so many classes need more memory than the device has in all.

    Every class has num_features weights and a bias, in float32, and as many gradients; with momentum one more copy, and
    in exact mode the gradients once more as 64-bit integers.
    """
    parts = {"weights": 4, "gradients": 4}
    parts |= {"momentum": 4} if settings.head_momentum else {}
    parts |= {"exact sums": 8} if settings.mode == "exact" else {}
    needed, available = sum(sizes) * (num_features + 1) * sum(parts.values()), memory_of(device)
    if needed > available:
        copies = " + ".join(f"{size} bytes of {name}" for name, size in parts.items())
        raise UserError(
            f"the heads have {sum(sizes):,} classes of {num_features:,} features: {sum(sizes):,} x "
            f"{num_features + 1:,} x ({copies}) = {needed / 1e9:.1f} GB, but {device.type} has {available / 1e9:.1f} "
            "GB; set fewer clusters, choose a model with fewer features, or train on a larger device"
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory: of the GPU, or of this machine as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, int(limit)) if limit.isdecimal() else total
