from __future__ import annotations

import torch
from torch.nn.functional import conv2d, pad

from raycluster.models.input_layers import Normalise, Sobel
from raycluster.models.smallnet import Model
from raycluster.types import IMAGE_MEAN, IMAGE_STD


def _gray(plane: torch.Tensor) -> torch.Tensor:
    return plane.expand(1, 3, *plane.shape)


def test_gradients_of_a_ramp() -> None:
    x, y = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="xy")
    response = Sobel().gradients(_gray(2 * x + 3 * y))
    assert response.shape == (1, 2, 7, 7)
    torch.testing.assert_close(response[0, 0, 1:-1, 1:-1], torch.full((5, 5), -16.0))
    torch.testing.assert_close(response[0, 1, 1:-1, 1:-1], torch.full((5, 5), -24.0))
    torch.testing.assert_close(response[0, :, 0, 0], torch.tensor([-9.0, -11.0]))


def test_constant_image_has_no_gradient_inside() -> None:
    assert Sobel().gradients(_gray(torch.full((6, 6), 3.0)))[:, :, 1:-1, 1:-1].abs().max() < 1e-5


def test_impulse_returns_the_kernels_flipped() -> None:
    impulse = torch.zeros(5, 5)
    impulse[2, 2] = 1
    response = Sobel().gradients(_gray(impulse))[0, :, 1:4, 1:4].flip(1, 2)
    horizontal = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    torch.testing.assert_close(response, torch.stack((horizontal, horizontal.T)))


def test_colour_is_averaged_plainly() -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        Sobel().gradients(images), Sobel().gradients(images.mean(1, keepdim=True).expand(2, 3, 8, 8))
    )


def test_sobel_and_first_convolution_are_one_convolution_in_the_interior() -> None:
    sobel, images = Sobel().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    weight = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    kernels = sobel.kernel[:, 0] * 3
    merged = torch.stack(
        [conv2d(pad(row, (2, 2, 2, 2))[None], kernels.flip(1, 2)[:, None], groups=2)[0].sum(0) / 3 for row in weight]
    )
    two_steps = conv2d(sobel.gradients(images), weight)
    one_step = conv2d(images, merged[:, None].expand(4, 3, 5, 5))
    torch.testing.assert_close(two_steps[:, :, 1:-1, 1:-1], one_step, atol=1e-12, rtol=0)


def test_bytes_and_floats_are_normalised_alike() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
    torch.testing.assert_close(Normalise()(images), expected)
    torch.testing.assert_close(Normalise()(images / 255), expected)


def test_autocast_does_not_reach_the_input_layer() -> None:
    backbone, images = Model(input="sobel", widths=(4, 8)).build(0), torch.randint(0, 256, (2, 3, 16, 16)).byte()
    seen: list[torch.Tensor] = []
    backbone.input_layer.register_forward_hook(lambda layer, args, output: seen.append(output))
    expected = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(features.float(), expected)  # the network itself is under autocast


def test_nothing_of_it_is_learned_or_saved() -> None:
    assert not list(Sobel().parameters())
    assert not Sobel().state_dict()
