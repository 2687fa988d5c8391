"""Images in, pictures out."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy
import pytest
import timm
import torch
from conftest import lively
from PIL import Image

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner._utils.photos import as_rgb, bundled_photos, crop, load_photos, preprocess
from sparsifiner.geometry.patch_grid import check_size
from sparsifiner.report.maps import attention_maps
from sparsifiner.report.pictures import draw_maps
from sparsifiner.training.sources import FolderSource, HuggingFaceSource, TorchvisionSource


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "c.webp", "d.TIF"):
        Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / name)
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "e.jpg")
    (tmp_path / "e.jpg").write_bytes((tmp_path / "e.jpg").read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_unreadable_pictures_are_named_and_skipped(folder):
    loaded = load_photos(folder)
    assert [photo.name for photo in loaded.photos] == ["b.png", "c.webp", "d.TIF"]
    assert list(loaded.skipped) == ["a.jpg", "e.jpg"]
    assert loaded.skipped["a.jpg"] == "not an image"
    assert "\n" not in "".join(loaded.skipped.values())


def test_a_limit_counts_readable_pictures(folder):
    assert [photo.name for photo in load_photos(folder, 2).photos] == ["b.png", "c.webp"]


def test_folders_in_the_folder_take_turns(tmp_path):
    for name in ("cat/b.png", "cat/a.png", "dog/c.png", ".hidden/d.png", "e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [photo.name for photo in load_photos(tmp_path).photos] == ["cat/a.png", "dog/c.png", "e.png", "cat/b.png"]
    assert [photo.name for photo in load_photos(tmp_path, 2).photos] == ["cat/a.png", "dog/c.png"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        load_photos(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_photos(tmp_path / "missing")
    (tmp_path / "only.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="only.jpg"):
        load_photos(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_photos(tmp_path / "only.jpg")


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path, suffix):
    grey = numpy.arange(0, 65536, 64, dtype="uint16").reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    opened = Image.open(tmp_path / f"a.{suffix}")
    assert opened.mode in ("I;16", "I")
    dataset = SimpleNamespace(select_columns=lambda names: [{"image": opened}])
    images = [
        FolderSource(tmp_path, labelled=False).image(0),
        TorchvisionSource([(opened, 0)], ["a"]).image(0),
        HuggingFaceSource(dataset, "image", None).image(0),
        *([] if suffix == "ppm" else [load_photos(tmp_path).photos[0].image]),
    ]
    for image in images:
        assert image.mode == "RGB"
        assert abs(numpy.asarray(image)[..., 0] - grey / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (numpy.ones((4, 4), "float32"), "it holds floating-point numbers; save it with 8 or 16 bits"),
        (numpy.full((4, 4), 65536, "int32"), "it holds whole numbers beyond 16 bits; save it with 8 or 16 bits"),
        (numpy.full((4, 4), -1, "int32"), "it holds whole numbers beyond 16 bits; save it with 8 or 16 bits"),
    ],
)
def test_numbers_without_a_known_white_are_unreadable(tmp_path, pixels, reason):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert load_photos(tmp_path).skipped == {"a.tif": reason}
    with pytest.raises(ValueError, match=reason):
        FolderSource(tmp_path, labelled=False).image(0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_read_as_pillow_converts_them(mode):
    image = Image.effect_noise((8, 8), 90).convert("RGB").convert(mode)
    assert as_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_four_photographs_are_bundled():
    assert [photo.name for photo in bundled_photos().photos] == [
        "astronaut.jpg",
        "chelsea.jpg",
        "coffee.jpg",
        "rocket.jpg",
    ]


def test_preprocessing_uses_the_models_own_mean_and_size():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0)  # mean and std 0.5
    x = preprocess(model, (32, 64))(Image.new("RGB", (100, 100), (255, 0, 0)))
    assert x.shape == (3, 32, 64)
    assert torch.allclose(x[:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))


def test_cropping_keeps_the_centre():
    image = Image.new("RGB", (300, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    assert numpy.array(crop(image, (50, 50))).min() > 200


def test_sizes_that_do_not_divide_are_refused_with_near_ones():
    check_size((28, 42), (14, 14))
    with pytest.raises(ValueError, match="500 is not a multiple of the model's 14x14 patches; use 490 or 504"):
        check_size((500, 500), (14, 14))
    with pytest.raises(ValueError, match="28x50 .* use 28x42 or 28x56"):
        check_size((28, 50), (14, 14))
    with pytest.raises(ValueError, match="0 is not a multiple of the model's 14x14 patches; use 14$"):
        check_size((0, 0), (14, 14))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, num_classes=0).eval()
    return dense, sparsifiner.sparsify(dense, SparsifinerConfig(mode="sparse", keep_rate=0.25, query_tile=(4, 4)))


def test_maps_are_the_dense_attention_and_the_kept_keys(models):
    dense, sparse = models
    x = torch.randn(1, 3, 96, 96)
    maps = attention_maps(dense, sparse, x, queries=[(1, 2), (5, 5)])
    assert [layer.number for layer in maps.layers] == [1, 2, 3]
    assert maps.grid == (6, 6)

    grabbed = {}
    attention = dense.blocks[0].attn
    handle = attention.qkv.register_forward_hook(lambda module, inputs, output: grabbed.update(qkv=output))
    with torch.no_grad(), sparsifiner.record(sparse) as seen:
        dense(x), sparse(x)
    handle.remove()
    q, k, _ = grabbed["qkv"].unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)[:, 0]
    weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
    mask = seen["blocks.0.attn"].connectivity.to_mask()[0].float()
    first = maps.layers[0]
    for number, (row, column) in enumerate(maps.queries):
        token = 1 + row * 6 + column
        torch.testing.assert_close(first.attention[number].flatten(), weights[:, token, 1:].mean(0))
        torch.testing.assert_close(first.kept[number].flatten(), mask[:, token, 1:].mean(0))
        torch.testing.assert_close(first.mass[number], (weights * mask)[:, token].sum(-1).mean())
    assert first.tiles == [(0, 0, 4, 4), (4, 4, 2, 2)]
    assert all(layer.observer is None for layer in sparsifiner.sparse_layers(sparse).values())


def test_maps_of_a_model_with_relative_positions_show_them():
    dense = lively(timm.create_model("beit_base_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=1))
    sparse = sparsifiner.sparsify(dense, SparsifinerConfig(mode="sparse", keep_rate=0.25, query_tile=(2, 2)))
    seen = {}
    dense.blocks[0].attn.fused_attn = False
    dense.blocks[0].attn.attn_drop.register_forward_hook(lambda module, inputs, out: seen.update(attention=out))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        dense(x)
    attention = attention_maps(dense, sparse, x, queries=[(1, 2)]).layers[0].attention
    torch.testing.assert_close(attention[0].flatten(), seen["attention"][0, :, 1 + 4 + 2, 1:].mean(0))


def test_maps_show_layers_that_chose_keys(models):
    dense, sparse = models
    mixed = copy.deepcopy(sparse)
    first = mixed.blocks[0].attn
    first.configure(first.config.replace(mode="auto", dense_below=10**6))
    x = torch.randn(1, 3, 96, 96)
    assert [layer.number for layer in attention_maps(dense, mixed, x).layers] == [2, 3]
    assert [layer.number for layer in attention_maps(dense, mixed, x, layers=[2]).layers] == [3]
    for block in mixed.blocks:
        block.attn.configure(first.config)
    for layers in (None, [0]):
        with pytest.raises(ValueError, match="attention ran dense"):
            attention_maps(dense, mixed, x, layers=layers)


def test_maps_refuse_what_they_cannot_show(models):
    with pytest.raises(ValueError, match="one image"):
        attention_maps(*models, torch.zeros(2, 3, 96, 96))
    with pytest.raises(ValueError, match="outside the 6x6"):
        attention_maps(*models, torch.zeros(1, 3, 96, 96), queries=[(6, 0)])


def test_a_picture_has_a_row_per_query(models):
    pictures = []
    for queries in ([(1, 1)], [(1, 1), (4, 4)]):
        maps = attention_maps(*models, torch.randn(1, 3, 96, 96), queries=queries, layers=[0])
        pictures.append(Image.open(io.BytesIO(draw_maps(Image.new("RGB", (96, 96)), maps, title="x", dpi=50))))
    assert pictures[0].width == pictures[1].width
    assert pictures[1].height - pictures[0].height > 100
