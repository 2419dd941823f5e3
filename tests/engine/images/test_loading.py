"""Batches are a function of (seed, epoch, batch): not of workers, ranks, or where training was interrupted."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from src.config import Data
from src.data.sources import load_images
from src.data.transforms import train_transform
from src.engine.images.image_loader import LoaderSettings
from src.engine.images.loading import eval_loader, num_workers, train_loader
from src.engine.images.resizing import eval_transform
from src.engine.images.sampler import PADDING, EpochSampler, PartSampler, Share
from src.engine.runs import seeding
from src.engine.runs.epochs import batches_per_epoch
from src.engine.weights.preprocessing import Preprocessing
from src.tasks.multiclass import Multiclass

SQUARE = Preprocessing(24, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def images(tmp_path):
    return load_images(Data(source="synthetic", num_images=45), Multiclass(), 0, cache_dir=tmp_path)


def hashes(labelled, augment, workers, epochs=(0, 1), start=(0, 0)):
    """SHA-256 of every batch of the epochs."""
    batches = EpochSampler(labelled.splits["train"], 8, seed=5, start=start)
    loader = train_loader(labelled, train_transform(SQUARE, augment), batches, LoaderSettings(8, workers), 24)
    found = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        found += [
            hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest() for images, labels in loader
        ]
    return found


@pytest.mark.parametrize("augment", ["light", "standard", "strong"])
def test_batches_do_not_depend_on_the_number_of_workers(images, augment):
    reference = hashes(images, augment, workers=0)
    assert len(set(reference)) == len(reference), "two batches are the same"
    torch.manual_seed(99)  # what the global generators were must not matter either
    for workers in (1, 2):
        assert hashes(images, augment, workers) == reference


def test_what_augmentation_draws_leaves_the_trainings_numbers_alone(images):
    """Without loader processes it draws in the process that trains."""
    seeding.seed_everything(0)
    before = torch.rand(1), np.random.rand(), random.random()
    seeding.seed_everything(0)
    hashes(images, "strong", workers=0)
    assert (torch.rand(1), np.random.rand(), random.random()) == before


def test_an_epoch_goes_on_where_it_was_interrupted(images):
    whole = hashes(images, "standard", 0, epochs=(0, 1, 2))
    per_epoch = len(whole) // 3
    rest = hashes(images, "standard", 0, epochs=(1, 2), start=(1, 2))
    assert rest == whole[per_epoch + 2 :]


def test_two_processes_see_the_images_of_one():
    indices = list(range(100, 137))
    one = list(EpochSampler(indices, 8, 1))
    ranks = [list(EpochSampler(indices, 8, 1, Share(rank, 2))) for rank in range(2)]
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    assert sorted(index for batch in one for _, index in batch) == indices


@pytest.mark.parametrize(
    ("images_", "batch", "sizes"), [(17, 8, [8, 9]), (18, 8, [8, 8, 2]), (16, 8, [8, 8]), (1, 8, [1]), (3, 8, [3])]
)
def test_no_batch_of_a_single_image(images_, batch, sizes):
    """BatchNorm cannot normalise one image; nothing is left out for it."""
    sampler = EpochSampler(range(images_), batch, seed=0)
    assert [len(keys) for keys in sampler] == sizes
    assert len(sampler) == batches_per_epoch(images_, batch) == len(sizes)


LABELS = torch.tensor([0] * 30 + [1] * 5 + [3] * 2)


def test_a_balanced_epoch_has_as_many_images_of_each_class_and_can_be_interrupted():
    indices = list(range(100, 137))
    sampler = EpochSampler(indices, 8, 1, labels=LABELS)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        keys = [key for batch in epochs[-1] for key in batch]
        assert len(keys) == 37
        counts = LABELS[[index - 100 for _, index in keys]].bincount()
        assert sorted(counts.tolist()) == [0, 12, 12, 13]
        assert len(set(keys)) == len(keys), "an image that is drawn again is augmented in another way"
        rare = [sum(index == 100 + place for _, index in keys) for place in (35, 36)]
        assert max(rare) - min(rare) <= 1
    assert epochs[0] != epochs[1]
    rest = EpochSampler(indices, 8, 1, start=(1, 2), labels=LABELS)
    assert list(rest) == epochs[1][2:]
    ranks = [list(EpochSampler(indices, 8, 1, Share(rank, 2), (1, 0), LABELS)) for rank in range(2)]
    for batch, parts in zip(epochs[1], zip(*ranks, strict=True), strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
    assert rest.whole_batch(1, 2) == [index for _, index in epochs[1][2]]


def test_a_process_always_has_two_images_to_compute():
    """Of 7 images in batches of 5 the last has 2: four processes have one, one, none and none of their own in it."""
    samplers = [EpochSampler(range(7), 5, 0, Share(rank, 4)) for rank in range(4)]
    last = [list(sampler)[-1] for sampler in samplers]
    assert [len(batch) for batch in last] == [2, 2, 2, 2]
    whole = samplers[0].whole_batch(0, 1)
    assert [sampler.share.of(whole) for sampler in samplers] == [[whole[0]], [whole[1]], [], []]
    assert [{index for _, index in batch} for batch in last] == [{whole[0]}, {whole[1]}, {whole[0]}, {whole[0]}]


def test_a_process_without_a_image_to_measure_has_one_that_does_not_count(images):
    samplers = [PartSampler(2, 6, Share(rank, 4)) for rank in range(4)]
    assert [list(sampler) for sampler in samplers] == [[[0]], [[1]], [[PADDING]], [[PADDING]]]
    assert list(PartSampler(0, 6, Share(1, 2))) == []
    few = replace(images, splits=images.splits | {"val": images.splits["val"][:2]})
    loader = eval_loader(few, "val", SQUARE, LoaderSettings(6), Share(3, 4))
    assert [labels.tolist() for _, labels in loader] == [[PADDING]]


def test_a_gpu_that_the_run_leaves_alone_is_not_set_up_to_pin_memory(images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = eval_loader(images, "val", SQUARE, LoaderSettings(32))
    loader.begin(60.0)
    assert not loader.loader.pin_memory
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # or torch would pin here
    loader.begin(60.0)
    assert loader.loader.pin_memory


@pytest.mark.parametrize(("world", "length", "batch"), [(1, 10, 4), (2, 10, 4), (3, 7, 4), (4, 9, 8)])
def test_several_processes_measure_every_image_once(world, length, batch):
    """DistributedSampler would give some of them twice, and they would count twice."""
    samplers = [PartSampler(length, batch, Share(rank, world)) for rank in range(world)]
    places = [place for sampler in samplers for part in sampler for place in part]
    assert sorted(places) == list(range(length))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]
    assert max(len(part) for sampler in samplers for part in sampler) <= -(-batch // world)


def test_images_for_a_process_that_needs_the_labels_alone(images):
    def fail(index: int) -> torch.Tensor:
        raise AssertionError(f"image {index} was read")

    black = replace(images, read=fail, in_memory=False).without_pixels()
    assert num_workers(None, black) == num_workers(8, black) == 0
    for batch, labels in eval_loader(black, "val", SQUARE, LoaderSettings(4)):
        assert batch.shape[1:] == (3, SQUARE.image_size, SQUARE.image_size)
        assert not batch.any()
        assert len(labels) == len(batch)
    assert black.digest() == images.digest()


@pytest.mark.parametrize(("total", "processes", "each"), [(8, 1, 8), (8, 4, 2), (3, 2, 2), (0, 4, 0)])
def test_loader_processes_are_divided_among_the_processes_of_a_machine(images, total, processes, each):
    assert num_workers(total, images, processes) == each


def test_eval_batches_come_in_the_order_of_the_list(images):
    loader = eval_loader(images, "val", SQUARE, LoaderSettings(4))
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [images.labels[index] for index in images.splits["val"]]


def test_making_an_iterator_leaves_the_global_generator_alone(images):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for _ in eval_loader(images, "val", SQUARE, LoaderSettings(32)):
        pass
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("augment", ["none", "light", "standard", "strong"])
@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 90, 24), (3, 5, 5)])
def test_every_image_becomes_the_square(augment, shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    for transform in (train_transform(SQUARE, augment), eval_transform(SQUARE)):
        square = transform(image)
        assert square.shape == (3, 24, 24)
        assert square.dtype == torch.uint8


def test_light_does_not_mirror():
    """A mirrored digit is no digit."""
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :, :8] = 255
    augmented = [train_transform(SQUARE, "light")(image).float().mean((0, 1)) for _ in range(30)]
    assert all(columns[:6].mean() > columns[-6:].mean() for columns in augmented)
    mirrored = [train_transform(SQUARE, "standard")(image).float().mean((0, 1)) for _ in range(30)]
    assert any(columns[:6].mean() < columns[-6:].mean() for columns in mirrored)


def test_the_digits_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    images = load_images(Data(source="digits"), Multiclass(), 0, cache_dir=tmp_path)
    assert len(images.names) == 1797
    assert images.read(0).shape == (3, 8, 8)
    assert images.read(17)[0].tolist() == (load_digits().images[17] * 255 / 16).round().astype(int).tolist()
    assert {split: len(members) for split, members in images.splits.items()} == {
        "train": 1259,
        "val": 269,
        "test": 269,
    }
