"""Image sources, batches and their randomness."""

from __future__ import annotations

import json
import random
import shutil
import struct
import tracemalloc
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsifiner.training import sources
from sparsifiner.training.data import (
    Samples,
    TrainBatches,
    collate,
    train_loader,
    train_transform,
    validation_loader,
    validation_transform,
)
from sparsifiner.training.randomness import seeded
from sparsifiner.training.recipe import AugmentConfig
from sparsifiner.training.sources import Renumbered, TorchvisionSource, open_source

NORMALISATION = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def read(source, number):
    return numpy.asarray(source.image(number))


def test_a_folder_per_class(folder_of_images):
    source = open_source("folder", str(folder_of_images), "train", train=True)
    assert (len(source), source.classes) == (24, ["class0", "class1", "class2"])
    assert [source.label(n) for n in (0, 8, 23)] == [0, 1, 2]
    assert source.name(9) == "class1/1.png"
    assert read(source, 20).mean((0, 1)).argmax() == 2
    few = open_source("folder", str(folder_of_images), "train", train=True, limit=6)
    assert [few.label(n) for n in range(len(few))] == [0, 0, 1, 1, 2, 2]


def test_images_without_labels(folder_of_images):
    source = open_source("images", str(folder_of_images), "", train=True)
    assert (len(source), source.classes, source.label(3)) == (48, None, -1)


def write_cifar(folder, monkeypatch):
    """The package's files with ten images each instead of ten thousand."""
    generator = numpy.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 32, 32, 3), dtype="uint8")
    for number in range(6):
        name = f"data_batch_{number + 1}.png" if number < 5 else "test_batch.png"
        Image.fromarray(pixels[number * 10 : number * 10 + 10].reshape(10, 1024, 3)).save(folder / name)
    labels = generator.integers(0, 10, 60).tolist()
    (folder / "train_lables.json").write_text(json.dumps(labels[:50]))
    (folder / "test_lables.json").write_text(json.dumps(labels[50:]))
    return pixels, labels


def test_cifar10_as_png_strips(tmp_path, monkeypatch):
    pixels, labels = write_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the real strips are over the bound
    train = open_source("cifar10-png", str(tmp_path), "train", train=True)
    test = open_source("cifar10-png", str(tmp_path), "val", train=False)
    assert (len(train), len(test)) == (50, 10)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert train.classes[3] == "cat"
    assert (read(train, 37) == pixels[37]).all()
    assert (read(test, 4) == pixels[54]).all()
    assert [train.label(n) for n in range(50)] + [test.label(n) for n in range(10)] == labels
    (tmp_path / "data_batch_3.png").unlink()
    with pytest.raises(ValueError, match="data_batch_3.png is missing"):
        open_source("cifar10-png", str(tmp_path), "train", train=True)


def test_a_torchvision_set_by_name(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 5), ("t10k", 3)):
        pictures = bytes(range(256)) * (count * 784 // 256 + 1)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, count, 28, 28) + pictures[: count * 784]
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + bytes(range(count)))
    train = open_source("torch/mnist", str(tmp_path), "train", train=True)
    val = open_source("torch/mnist", str(tmp_path), "val", train=False)
    assert (len(train), len(val), len(train.classes)) == (5, 3, 10)
    assert [train.label(n) for n in range(5)] == [0, 1, 2, 3, 4]
    assert train.image(1).mode == "RGB"
    assert read(train, 0)[0, 5].tolist() == [5, 5, 5]


def test_a_hugging_face_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    colours = [Image.new("RGB", (8, 8), (number * 40, 0, 0)) for number in range(4)]
    made = datasets.Dataset.from_dict({"picture": colours, "kind": [0, 1, 1, 0]}, features=features)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "set")
    source = open_source("hf", str(tmp_path / "set"), "train", train=True)
    assert (len(source), source.classes, [source.label(n) for n in range(4)]) == (4, ["a", "b"], [0, 1, 1, 0])
    assert read(source, 2)[0, 0].tolist() == [80, 0, 0]
    with pytest.raises(ValueError, match="cannot be opened"):
        open_source("hf", str(tmp_path / "none"), "train", train=True)


def test_validation_labels_go_by_the_names_of_the_training_classes(folder_of_images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder_of_images, root)
    shutil.rmtree(root / "val" / "class1")
    classes = open_source("folder", str(root), "train", train=True).classes

    def val(limit=None):
        return open_source("folder", str(root), "val", train=False, limit=limit, classes=classes)

    assert val().classes == classes
    assert [val().label(number) for number in range(16)] == [0] * 8 + [2] * 8
    assert [val(4).label(number) for number in range(4)] == [0, 0, 2, 2]
    assert val().name(9) == "class2/1.png"
    assert read(val(), 9)[..., 2].mean() > 127
    (root / "val" / "class2").rename(root / "val" / "klass2")
    for name in "abc":
        (root / "val" / name).mkdir()
    with pytest.raises(ValueError, match="training does not have: a, b, c and 1 more; .* among the 3 ") as refused:
        val()
    assert "\n" not in str(refused.value)


def test_named_classes_of_a_data_set_are_renumbered_too():
    source = TorchvisionSource(SimpleNamespace(targets=[0, 1, -1]), ["dog", "cat"])
    assert [Renumbered(source, ["cat", "cow", "dog"]).label(number) for number in range(3)] == [2, 0, -1]
    with pytest.raises(ValueError, match="does not have: dog;"):
        Renumbered(source, ["cat", "cow"])
    with pytest.raises(ValueError, match="two training classes have the same name"):
        Renumbered(source, ["cat", "dog", "cat"])


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text" / "class").mkdir(parents=True)
    (tmp_path / "text" / "class" / "a.txt").write_text("x")
    for source, path, words in [
        ("folder", None, "data.path is not set"),
        ("folder", tmp_path / "nowhere", "does not exist"),
        ("folder", tmp_path / "empty", "no folder per class"),
        ("folder", tmp_path / "text", "holds no image"),
        ("images", tmp_path / "text", "holds no image"),
        ("cifar10-png", tmp_path, "unpacked npm package"),
        ("torch/cifar10", tmp_path, "data.download=true"),
        ("torch/nonesuch", tmp_path, "torchvision's nonesuch cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=words) as refused:
            open_source(source, None if path is None else str(path), "", train=True)
        assert "\n" not in str(refused.value)


@given(
    length=st.integers(8, 60),
    batch=st.integers(1, 4),
    world=st.integers(1, 2),
    start=st.integers(0, 5),
)
def test_batches_cover_each_epoch_once_and_go_on_from_anywhere(length, batch, world, start):
    per_epoch = length // (batch * world)
    total = per_epoch * 2 + 1

    def places(rank, first=0):
        return list(TrainBatches(length, batch, per_epoch, total, start=first, seed=(3,), rank=rank, world=world))

    ranks = [places(rank) for rank in range(world)]
    first_epoch = [place for rank in ranks for one in rank[:per_epoch] for place in one]
    assert len({number for _, number in first_epoch}) == len(first_epoch) == per_epoch * batch * world
    assert {epoch for epoch, _ in first_epoch} == {0}
    assert [number for _, number in ranks[0][0]] != list(range(length))[:batch] or batch < 4
    assert places(0, min(start, total)) == ranks[0][min(start, total) :]
    # The processes' parts put together are one process's larger batches.
    together = list(TrainBatches(length, batch * world, per_epoch, total, seed=(3,)))
    assert [[place for rank in ranks for place in rank[n]] for n in range(total)] == together


def samples(folder, *, replace=True, transform=None):
    source = open_source("folder", str(folder), "train", train=True)
    transform = transform or train_transform(AugmentConfig(), (32, 32), NORMALISATION)
    return Samples(source, transform, 5, replace_broken=replace)


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder_of_images):
    data = samples(folder_of_images)
    first = data[(0, 3)][0]
    random.seed(9)
    torch.manual_seed(9)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    assert torch.equal(data[(0, 3)][0], first)
    assert not torch.equal(data[(1, 3)][0], first)
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    batches = TrainBatches(24, 4, 6, 6, seed=(0,))
    plain, parallel = (list(train_loader(data, batches, workers)) for workers in (0, 2))
    for a, b in zip(plain, parallel, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_a_broken_image_is_replaced_in_training_and_left_out_in_validation(folder_of_images, monkeypatch):
    plain = sources.FolderSource.image

    def image(self, number):
        if number in (4, 5, 23):
            raise OSError("broken\nfile")
        return plain(self, number)

    monkeypatch.setattr(sources.FolderSource, "image", image)
    transform = validation_transform((32, 32), NORMALISATION)
    data = samples(folder_of_images, transform=transform)
    got = data[(0, 4)]
    assert torch.equal(got[0], data[(0, 6)][0])
    assert got[3] == {"class0/4.png": "broken file", "class0/5.png": "broken file"}
    assert torch.equal(data[(0, 23)][0], data[(0, 0)][0])  # from the end it goes on at the start
    assert data[(0, 23)][1] == 0
    batches = list(validation_loader(samples(folder_of_images, replace=False, transform=transform), 5, 0))
    assert sum(len(batch.images) for batch in batches) == 21
    assert torch.cat([batch.numbers for batch in batches]).tolist() == [n for n in range(24) if n not in (4, 5, 23)]
    assert {name for batch in batches for name in batch.broken} == {"class0/4.png", "class0/5.png", "class2/7.png"}
    assert len(collate([(None, -1, 0, {"x": "y"})]).images) == 0


def test_the_cost_of_an_image_does_not_depend_on_how_many_there_are():
    class Large:
        def __len__(self):
            return 10**7

        def image(self, number):
            return Image.new("RGB", (2, 2))

        def label(self, number):
            return 0

    data = Samples(Large(), lambda image: torch.zeros(1), 5, replace_broken=True)
    tracemalloc.start()
    try:
        assert data[(0, 3)][2] == 3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10**6


def test_nothing_readable_is_an_error(folder_of_images, monkeypatch):
    monkeypatch.setattr(sources.FolderSource, "image", lambda self, number: 1 / 0)
    with pytest.raises(ValueError, match="none of the 24 images can be read"):
        samples(folder_of_images)[(0, 2)]


def test_validation_shares_the_images_among_processes(folder_of_images):
    transform = validation_transform((32, 32), NORMALISATION)
    data = samples(folder_of_images, replace=False, transform=transform)
    parts = [list(validation_loader(data, 5, 0, rank=rank, world=3)) for rank in range(3)]
    labels = sorted(int(label) for part in parts for batch in part for label in batch.labels)
    assert labels == [0] * 8 + [1] * 8 + [2] * 8


def test_seeded_numbers_follow_from_the_place():
    def draw(*place):
        with seeded(*place):
            return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    assert draw(1, 2) == draw(1, 2)
    assert len({value for place in ((1, 2), (1, 3), (2, 1), (12,)) for value in draw(*place)}) == 12


def test_a_transform_that_fails_is_not_blamed_on_the_image(folder_of_images):
    source = open_source("folder", str(folder_of_images), "train", train=True)

    def refuse(image):
        raise RuntimeError("no such size")

    for replace in (True, False):
        with pytest.raises(RuntimeError, match="no such size"):
            Samples(source, refuse, 5, replace_broken=replace)[(0, 3)]


def test_the_strongest_augmentation_can_be_applied(folder_of_images):
    """Posterizing to 0 bits, which timm's RandAugment draws now and then, must work with the Pillow installed."""
    source = open_source("folder", str(folder_of_images), "train", train=True)
    transform = train_transform(AugmentConfig(auto_augment="rand-m10-n8-inc1"), (32, 32), NORMALISATION)
    samples = Samples(source, transform, 5, replace_broken=True)
    assert all(samples[(epoch, 0)][0].shape == (3, 32, 32) for epoch in range(12))
