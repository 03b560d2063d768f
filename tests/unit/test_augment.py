"""The augmentation against torchvision's affine, its distribution, and each row's independence of its neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, RandomAffine
from torchvision.transforms import functional as tv

from cxr_dist.data.plan import draws
from cxr_dist.model.augment import IMAGENET, XRV, Normalization, affine_coefficients, to_grey, to_input, warp

STILL = np.array([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]], dtype=np.float32)
"""Draws of the identity: no rotation, shift, scale or shear, and no flip."""

UNIT = Normalization((1.0,), (0.0,))


def picture(size: int, seed: int = 0) -> torch.Tensor:
    """A smooth uint8 image [1, S, S] that fills the frame and is the same nowhere."""
    line = torch.linspace(0, 1, size)
    wave = torch.sin(7 * line[:, None] + 3 * line[None, :] ** 2 + seed) + torch.cos(
        11 * line[None, :] - 4 * line[:, None]
    )
    return (128 + 50 * wave).to(torch.uint8)[None]


def augmented(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    coefficients = torch.from_numpy(affine_coefficients(numbers, images.shape[-1]))
    return to_input(images, UNIT, coefficients_B6=coefficients)


unit = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=30, deadline=None)
@given(st.tuples(unit, unit, unit, unit, unit, unit), st.sampled_from([33, 64]))
def test_warp_is_torchvisions_affine_then_flip(numbers: tuple[float, ...], size: int) -> None:
    rotation, shift_x, shift_y, scale, shear, flip = numbers
    image = picture(size)
    expected = tv.affine(
        image[:, None].float(),
        angle=(2 * rotation - 1) * 5,
        translate=[(2 * shift_x - 1) * 0.02 * size, (2 * shift_y - 1) * 0.02 * size],  # type: ignore[list-item]
        scale=1 + (2 * scale - 1) * 0.05,
        shear=[(2 * shear - 1) * 5, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    if flip < 0.5:
        expected = tv.hflip(expected)
    found = augmented(image, np.array([numbers], dtype=np.float32))
    assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        # forward maps by hand, on the point (10, 20) from the centre, y down
        (
            0,
            1.0,
            (10 * np.cos(np.pi / 36) - 20 * np.sin(np.pi / 36), 10 * np.sin(np.pi / 36) + 20 * np.cos(np.pi / 36)),
        ),
        (1, 1.0, (12.0, 20.0)),
        (2, 0.0, (10.0, 18.0)),
        (3, 1.0, (10.5, 21.0)),
        (4, 1.0, (10 - 20 * np.tan(np.pi / 36), 20.0)),
        (5, 0.0, (-10.0, 20.0)),
    ],
)
def test_each_draw_moves_a_point_as_it_says(column: int, value: float, expected: tuple[float, float]) -> None:
    numbers = STILL.copy()
    numbers[0, column] = value
    [(a, b, c, d, e, f)] = affine_coefficients(numbers, 100).tolist()
    x, y = expected
    assert (a * x + b * y + c, d * x + e * y + f) == pytest.approx((10, 20), abs=1e-4)


@pytest.mark.parametrize("size", [32, 224])
def test_middle_draws_are_the_identity(size: int) -> None:
    assert affine_coefficients(STILL, size).tolist() == [[1, 0, 0, 0, 1, 0]]
    image = picture(size)
    assert (augmented(image, STILL)[:, 0] - image).abs().max() < 1e-5 * 255


def test_levels_are_the_images_own_without_coefficients() -> None:
    image = picture(32)
    for dtype in (torch.float32, torch.float64):
        found = to_grey(image, dtype)
        assert (found.shape, found.dtype) == ((1, 1, 32, 32), dtype)
        assert torch.equal(found[:, 0], image.to(dtype))


def test_a_flip_mirrors_left_and_right_only() -> None:
    flipped = STILL.copy()
    flipped[0, 5] = 0.0
    image = picture(32)
    assert (augmented(image, flipped)[:, 0] - image.flip(-1)).abs().max() < 1e-5 * 255


def test_outside_is_black() -> None:
    shifted = STILL.copy()
    shifted[0, 1] = 1.0
    white = torch.full((1, 100, 100), 255, dtype=torch.uint8)
    found = augmented(white, shifted)[0, 0]
    # two pixels of a hundred to the right
    assert found[:, :2].abs().max() < 0.01
    assert (found[:, 2:] - 255).abs().max() < 0.01


def test_parameters_of_many_views_are_uniform_within_their_bounds() -> None:
    size, num = 224, 20_000
    numbers = np.stack([np.frombuffer(draws(0, f"{i}.png", 1 + i % 3), "<f4") for i in range(num)])
    coefficients = affine_coefficients(numbers, size).astype(np.float64)
    mirror = np.where(numbers[:, 5] < 0.5, -1.0, 1.0)
    inverse = np.stack(
        [coefficients[:, 0] * mirror, coefficients[:, 1], coefficients[:, 3] * mirror, coefficients[:, 4]], 1
    )
    forward = np.linalg.inv(inverse.reshape(num, 2, 2))
    shift = -np.einsum("nij,nj->ni", forward, coefficients[:, [2, 5]])
    angle = np.arctan2(forward[:, 1, 0], forward[:, 0, 0])
    scale = np.hypot(forward[:, 0, 0], forward[:, 1, 0])
    lean = (np.cos(angle) * forward[:, 0, 1] + np.sin(angle) * forward[:, 1, 1]) / -scale
    found = {
        "rotation": (np.degrees(angle), 0.0, 5.0),
        "shift x": (shift[:, 0], 0.0, 0.02 * size),
        "shift y": (shift[:, 1], 0.0, 0.02 * size),
        "scale": (scale, 1.0, 0.05),
        "shear": (np.degrees(np.arctan(lean)), 0.0, 5.0),
    }
    for name, (values, middle, reach) in found.items():
        part = (values - middle) / reach
        assert np.abs(part).max() <= 1 + 1e-3, name
        assert np.abs(part).max() > 0.99, name
        # uniform on -1 to 1: mean 0, variance 1/3, both within five standard errors
        assert abs(part.mean()) < 5 * np.sqrt(1 / 3 / num), name
        assert abs(part.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / num), name
    assert abs((mirror < 0).mean() - 0.5) < 5 * np.sqrt(0.25 / num)
    together = np.corrcoef(np.stack([values for values, _, _ in found.values()] + [mirror]))
    assert np.abs(together - np.eye(6)).max() < 0.04


def test_matrices_have_the_moments_and_bounds_of_torchvisions_own() -> None:
    size, num = 224, 20_000
    numbers = np.stack([np.frombuffer(draws(0, f"{i}.png", 1 + i % 3), "<f4") for i in range(num)])
    ours = affine_coefficients(numbers, size).astype(np.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.empty((num, 6))
        for row in range(num):
            angle, shift, scale, shear = RandomAffine.get_params(
                (-5, 5), (0.02, 0.02), (0.95, 1.05), (-5, 5), [size, size]
            )  # type: ignore[arg-type]
            theirs[row] = tv._get_inverse_affine_matrix([0.0, 0.0], angle, list(shift), scale, list(shear))
        theirs[:, [0, 3]] *= np.where(torch.rand(num).numpy() < 0.5, -1.0, 1.0)[:, None]
    # theirs shifts by whole pixels: a twelfth more variance, up to half a pixel more or less reach
    rounding = np.array([0, 0, 1, 0, 0, 1])
    std = np.sqrt(theirs.var(0) - rounding / 12)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * np.sqrt(2 / num) * std).all()
    np.testing.assert_allclose(ours.std(0), std, rtol=0.03)
    np.testing.assert_allclose(np.corrcoef(ours.T), np.corrcoef(theirs.T), atol=0.05)
    for extreme in (np.min, np.max):
        apart = np.abs(extreme(ours, 0) - extreme(theirs, 0))
        assert (apart < np.where(rounding, 0.6, 0.005)).all(), apart


def test_a_rows_result_does_not_depend_on_its_neighbours() -> None:
    torch.set_num_threads(1)
    images = torch.cat([picture(48, seed) for seed in range(7)])
    numbers = np.stack([np.frombuffer(draws(3, f"{i}.png", 1), "<f4") for i in range(7)])
    together = augmented(images, numbers)
    for row in range(7):
        assert torch.equal(augmented(images[row : row + 1], numbers[row : row + 1])[0], together[row])
    order = [6, 2, 4]
    assert torch.equal(augmented(images[order], numbers[order]), together[order])


def test_imagenet_normalisation_by_hand() -> None:
    images = torch.tensor([[[0, 255], [51, 128]]], dtype=torch.uint8)
    found = to_input(images, IMAGENET)
    assert found.shape == (1, 3, 2, 2)
    assert found[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)
    assert found[0, :, 0, 1].tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-5)
    assert found[0, 1, 1, 0].item() == pytest.approx((0.2 - 0.456) / 0.224, rel=1e-5)


def test_xrv_normalisation_by_hand() -> None:
    images = torch.tensor([[[0, 255], [51, 128]]], dtype=torch.uint8)
    found = to_input(images, XRV, dtype=torch.float64)
    assert found.shape == (1, 1, 2, 2)
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx([-1024, 1024, -1024 + 2048 / 5, -1024 + 2048 * 128 / 255])


def test_warp_keeps_double_precision() -> None:
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    assert warp(image, torch.from_numpy(affine_coefficients(STILL, 8))).dtype == torch.float64
