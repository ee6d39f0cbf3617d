"""Images per CPU second of the augmentation of exemplar learning, step by step, and of finding seeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raycluster.data.colour import ChangeHSV
from raycluster.data.patches import Patch
from raycluster.data.seed_boxes import SeedBox
from raycluster.data.transforms import View, apply
from raycluster.seeding import generator, reseeded_generator

_PATCH = Patch(scale=(0.7, 1.4), translation=0.2, rotation=20)
_HSV = ChangeHSV(power=(0.25, 4), factor=(0.7, 1.4), offset=0.1, hue=0.1)


def run(side: int = 96, size: int = 32, images: int = 500, repeats: int = 5) -> str:
    """A table: views of `size` pixels of decoded images of side x side, all steps in turns, median of the repeats."""
    pixels = _images(side, 50)
    box = np.array([0.2, 0.3, 0.2 + size / side, 0.3 + size / side], np.float32)
    views = {
        "random crop, flip, colour jitter": View(
            size=size, crop_scale=(0.3, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4
        ),
        "patch": View(size=size, patch=_PATCH, flip=0.5),
        "patch, colour components": View(size=size, patch=_PATCH, flip=0.5, colour_components=(0.5, 2)),
        "patch, HSV": View(size=size, patch=_PATCH, flip=0.5, hsv=_HSV),
        "patch, colour components, HSV": View(size=size, patch=_PATCH, flip=0.5, colour_components=(0.5, 2), hsv=_HSV),
    }
    cases: dict[str, Callable[[int], object]] = {name: _augment(view, pixels, box) for name, view in views.items()}
    cases["box of a seed"] = lambda index: SeedBox(size).render(
        pixels[index % len(pixels)], None, generator(0, "fixed crop", index), None
    )
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.process_time()
            for index in range(images):
                case(index)
            seconds[name].append(time.process_time() - began)
    rows = [f"| {name} | {images / median(seconds[name]):.0f} |" for name in cases]
    return "\n".join([f"| view of {size} pixels, image of {side} | images / CPU s |", "|---|---:|", *rows])


def _augment(view: View, pixels: list[NDArray[np.uint8]], box: NDArray[np.float32]) -> Callable[[int], object]:
    place = None if view.patch is None else box
    return lambda index: apply(
        pixels[index % len(pixels)], view, reseeded_generator(0, "augment", 0, index, 0), box=place
    )


def _images(side: int, count: int) -> list[NDArray[np.uint8]]:
    """Smooth noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse]
