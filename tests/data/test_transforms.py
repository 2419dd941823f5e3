"""From an image to the square: geometry as the libraries that trained the weights have it, and edges that stay background."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from src.data.transforms import train_transform
from src.engine.images.resizing import eval_transform
from src.engine.runs import seeding
from src.engine.weights.backbone_names import pretrained_preprocessing
from src.engine.weights.preprocessing import Preprocessing

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUARE = Preprocessing(32, 0.875, "bilinear", *IMAGENET)


def image(height: int, width: int) -> torch.Tensor:
    """Smooth, with noise: uint8 (3, H, W)."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 3 + y / 5)]
    noisy = np.stack(planes) + random.normal(0, 8, (3, height, width))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [(40, 60), (90, 33), (31, 31), (20, 150)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("ratio", [0.875, 1.0, 0.9])
def test_usual_images_get_what_torchvision_gives(shape, interpolation, ratio):
    preprocessing = Preprocessing(32, ratio, interpolation, *IMAGENET)
    size = round(32 / ratio)
    steps = [v2.Resize(size, v2.InterpolationMode(interpolation), antialias=True), v2.CenterCrop(32)]
    assert torch.equal(eval_transform(preprocessing)(image(*shape)), v2.Compose(steps)(image(*shape)))


@pytest.mark.parametrize("shape", [(4, 301), (4, 300), (300, 5), (301, 5), (40, 401), (999, 60)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_strip_gives_the_same_pixels_as_if_it_were_enlarged_whole(shape, interpolation):
    steps = [v2.Resize(37, v2.InterpolationMode(interpolation), antialias=True), v2.CenterCrop(32)]
    whole = v2.Compose(steps)(image(*shape)).int()
    cut = eval_transform(replace(SQUARE, interpolation=interpolation))(image(*shape)).int()
    assert (whole - cut).abs().max() <= 12  # the scale differs by less than a pixel over the middle
    assert (whole - cut).abs().float().mean() < 2


@pytest.mark.parametrize("augment", ["none", "light", "standard", "strong"])
@pytest.mark.parametrize("shape", [(2, 60_000), (60_000, 2), (1, 100_000)])
def test_a_long_strip_needs_little_memory(augment, shape, monkeypatch):
    """A strip of 0.1 megapixels became 2,000."""
    sizes = []
    resize = torch.nn.functional.interpolate

    def recording(image, size, **settings):
        sizes.append(size[0] * size[1])
        return resize(image, size, **settings)

    monkeypatch.setattr("torchvision.transforms.v2.functional._geometry.interpolate", recording)
    transform = train_transform(Preprocessing(224, 0.875, "bilinear", *IMAGENET), augment)
    assert transform(torch.zeros(3, *shape, dtype=torch.uint8)).shape == (3, 224, 224)
    assert sizes
    assert max(sizes) < 10 * 256 * 256


# --- timm ------------------------------------------------------------------------------------------------------------


@needs_timm
@pytest.mark.parametrize("shape", [(120, 80), (60, 200), (97, 97)])
@pytest.mark.parametrize(
    ("name", "mode", "interpolation"),
    [
        ("timm/volo_d4_448.sail_in1k", "center", "bicubic"),
        ("timm/coat_lite_medium_384", "squash", "bicubic"),
        ("", "border", "bicubic"),
        ("timm/resnet18.a1_in1k", "center", "bicubic"),
    ],
)
def test_crop_modes_and_sizes_are_those_of_timm(shape, name, mode, interpolation):
    from timm.data import create_transform

    own = pretrained_preprocessing(name) if name else Preprocessing(64, 0.95, "bicubic", *IMAGENET, "border", "floor")
    assert (own.crop_mode, own.interpolation, own.rounding) == (mode, interpolation, "floor")
    ours = replace(own, image_size=61)
    theirs = create_transform(
        (3, 61, 61),
        is_training=False,
        interpolation=ours.interpolation,
        mean=ours.mean,
        std=ours.std,
        crop_pct=ours.crop_ratio,
        crop_mode=ours.crop_mode,
        normalize=False,
    )
    pixels = image(*shape)
    expected = theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy())).int()
    assert (eval_transform(ours)(pixels).int() - expected).abs().max() <= 2


@needs_timm
def test_a_backbone_for_oblong_images_is_refused(monkeypatch):
    import timm

    from src.engine.runs.errors import UserError

    found = timm.data.resolve_data_config
    monkeypatch.setattr(
        timm.data, "resolve_data_config", lambda *a, **k: found(*a, **k) | {"input_size": (3, 1024, 768)}
    )
    with pytest.raises(UserError, match="1024 x 768 pixels, which are no squares"):
        pretrained_preprocessing("timm/resnet18.a1_in1k")


def test_the_preprocessing_of_an_older_model_folder_rounds_and_cuts_the_centre():
    values = SQUARE.to_dict()
    del values["crop_mode"], values["rounding"]
    assert Preprocessing.from_dict(values) == SQUARE
    assert Preprocessing(224, 0.9, "bicubic", *IMAGENET).resize_size == 249
    assert Preprocessing(224, 0.9, "bicubic", *IMAGENET, rounding="floor").resize_size == 248


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["light", "strong"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (30, 60, 90)])
def test_what_is_uncovered_has_the_colour_of_the_edge(augment, background):
    """A page stays white to its corners, and a digit's black stays black."""
    mean = [level / 255 for level in background]  # a patch that is erased gets the mean
    preprocessing = Preprocessing(32, 1.0, "bilinear", tuple(mean), IMAGENET[1])
    page = torch.tensor(background, dtype=torch.uint8).view(3, 1, 1).repeat(1, 32, 32)
    transform = train_transform(preprocessing, augment)
    different = 0
    for index in range(60):
        with seeding.image_randomness(0, 0, index):
            different += int((transform(page).int() - page.int()).abs().max() > 2)
    # TrivialAugment also changes colours: of 14 operations, 7 or so
    assert different <= (0 if augment == "light" else 45)


def test_a_turned_page_has_no_dark_corner():
    page = torch.full((3, 64, 64), 250, dtype=torch.uint8)
    page[:, 20:40, 20:40] = 10
    transform = train_transform(Preprocessing(64, 1.0, "bilinear", *IMAGENET), "light")
    for index in range(30):
        with seeding.image_randomness(0, 0, index):
            turned = transform(page)
        corners = torch.stack([turned[:, y, x] for y in (0, -1) for x in (0, -1)])
        assert corners.min() >= 248


def test_strong_erases_to_the_mean_and_interpolates_bilinearly(monkeypatch):
    made = []
    trivial = v2.TrivialAugmentWide
    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda **settings: made.append(settings) or trivial(**settings))
    monkeypatch.setattr(v2, "ColorJitter", None)
    transform = train_transform(SQUARE, "strong")
    erased = [step for step in transform.transforms if isinstance(step, v2.RandomErasing)]
    assert [step.value for step in erased] == [[124, 116, 104]]
    transform(image(40, 40))
    assert made == [{"interpolation": v2.InterpolationMode.BILINEAR, "fill": made[0]["fill"]}]
    assert len(made[0]["fill"]) == 3


@pytest.mark.parametrize("augment", ["none", "light", "standard", "strong"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_the_order_of_the_bytes_in_memory_changes_nothing(augment, interpolation):
    """Files come as rows of RGB pixels, which are resized more quickly than three planes."""
    transform = train_transform(replace(SQUARE, interpolation=interpolation), augment)
    for number, shape in enumerate([(40, 60), (90, 33), (7, 300), (20, 20), (250, 333)] * 3):
        planes = image(*shape)
        rows = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        with seeding.image_randomness(0, 0, number):
            expected = transform(planes)
        with seeding.image_randomness(0, 0, number):
            assert torch.equal(transform(rows), expected)
