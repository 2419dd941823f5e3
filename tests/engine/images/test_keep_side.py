"""Large images are halved while they are decoded (ReadOptions.keep_side): what the network sees of them stays the same."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from src.config import Data
from src.data.sources import load_images
from src.engine.images.checking import check_images
from src.engine.images.image_bank import ImageBank
from src.engine.images.labelled_images import Listing
from src.engine.images.reading import decode_image, read_image
from src.engine.images.resizing import eval_transform, with_side_to_keep
from src.engine.weights.preprocessing import Preprocessing, ReadOptions
from src.tasks.multiclass import Multiclass
from tests.conftest import SMALL, check_error

SQUARE = Preprocessing(64, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
HALVED = ReadOptions(keep_side=128)


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth, with grain and a black corner at the top left."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    large = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    large += random.integers(-12, 13, large.shape, dtype=np.int16)
    large[: size[1] // 4, : size[0] // 4] = 0
    return Image.fromarray(large.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "shrink"),
    [((255, 400), 1), ((256, 300), 2), ((511, 900), 2), ((512, 512), 4), ((3000, 2000), 8), ((9000, 9000), 8)],
)
def test_an_image_is_halved_while_its_shorter_side_keeps_what_is_asked(size, shrink):
    assert HALVED.shrink_of(*size) == HALVED.shrink_of(*size[::-1]) == shrink
    assert ReadOptions().shrink_of(*size) == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("size", [(523, 611), (1200, 777)])
def test_what_the_network_sees_is_the_same_to_a_level_or_two(tmp_path, form, size):
    extra = {"save_all": True, "append_images": [photo(size, 1)]} if form == "MPO" else {}
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo(size), form, quality=92, **extra))
    whole, halved = read_image(path, ReadOptions()), read_image(path, HALVED)
    shrink = HALVED.shrink_of(*size)
    assert whole.shape[1:] == size[::-1]
    assert halved.shape[1:] == tuple(-(-side // shrink) for side in size[::-1])
    seen = [eval_transform(SQUARE)(image).int() for image in (whole, halved)]
    difference = (seen[0] - seen[1]).abs().float()
    assert difference.mean() < 2.5  # of the grain, which is averaged in another way
    assert difference.quantile(0.99) <= 12  # beside the corner's edges


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_it_stays_upright_and_its_whole_size_is_known(orientation, corner):
    exif = Image.Exif()
    exif[274] = orientation
    decoded = decode_image(encoded(photo((600, 400)), "JPEG", exif=exif.tobytes()), "x", HALVED)
    turned = orientation > 4
    assert decoded.size == ((400, 600) if turned else (600, 400))
    assert decoded.image.size == ((200, 300) if turned else (300, 200))
    pixels = np.asarray(decoded.image).astype(int)
    assert pixels[corner].sum() < 60
    assert pixels[corner[0] - 1 if corner[0] == 0 else 0, corner[1]].sum() > 60 or pixels.mean() > 60


def test_only_as_many_pixels_are_decoded(monkeypatch):
    """Not decoded and made smaller afterwards."""
    data, loaded = encoded(photo((1200, 800)), "JPEG"), []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: (loaded.append(self.size), load(self))[1])
    decode_image(data, "x", HALVED)
    assert max(loaded) == (300, 200)


def test_the_check_knows_the_whole_size_and_finds_what_is_truncated(tmp_path):
    data = encoded(photo((600, 400)), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    listing = Listing(tmp_path, ["a.jpg", "b.jpg"], ["a", "a"])
    checked = check_images(listing, HALVED, None, 1)
    assert (checked["a.jpg"].width, checked["a.jpg"].height) == (600, 400)
    assert checked["b.jpg"].error == "the file ends too early (truncated)"


def test_the_bank_keeps_what_is_read_for_each_side_apart(tmp_path):
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo((600, 400), number), "JPEG"))
    data = Data(source="image_folder", root=str(tmp_path / "photos"))
    places = {"cache_dir": tmp_path / "runs" / ".checked", "bad_list": tmp_path / "bad.txt"}
    for side, shape in ((128, (3, 200, 300)), (0, (3, 400, 600)), (128, (3, 200, 300))):
        images = load_images(replace(data, keep_side=side), Multiclass(), 0, **places)
        options = ReadOptions(keep_side=side)
        bank = ImageBank(tmp_path / "runs" / ".images", tmp_path / "photos", options, 100)
        assert len(bank.places) == 12
        for index, name in enumerate(images.names):
            assert images.read(index).shape == shape
            assert (images.read(index) == read_image(tmp_path / "photos" / name, options)).all()


def test_an_own_augmentation_gets_whole_images():
    assert with_side_to_keep(Data(source="digits"), SQUARE).keep_side == 128
    assert with_side_to_keep(Data(source="digits", augment="src.my_transforms.build"), SQUARE).keep_side == 0
    assert with_side_to_keep(Data(source="digits", keep_side=7), SQUARE).keep_side == 7


def test_a_run_and_its_evaluation_read_alike(tmp_path, command):
    """Also with data.keep_side=null: model.json has the number."""
    for number in range(16):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo((300, 200), number), "JPEG"))
    words = ("data=image_folder", "data.root=photos", "data.image_size=32", "data.num_images=null", "name=halved")
    assert command("train", *SMALL, *words).code == 0
    card = json.loads((tmp_path / "runs/halved/model/model.json").read_text())
    resized = round(card["preprocessing"]["image_size"] / card["preprocessing"]["crop_ratio"])
    assert card["keep_side"] == 2 * resized
    assert ReadOptions(keep_side=card["keep_side"]).shrink_of(300, 200) == 2
    assert command("evaluate", "run=runs/halved").code == 0
    result, measured = (
        json.loads((tmp_path / "runs/halved" / name).read_text())["metrics"]
        for name in ("result.json", "evaluation_test.json")
    )
    assert measured["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)
    refused = command("evaluate", "run=runs/halved", "data.keep_side=0")
    check_error(
        refused, 64, "data.keep_side=0 has no effect here", "images are read as large as the model was trained on"
    )
