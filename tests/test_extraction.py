"""Features of many images: what shards hold, bad images, and going on after a run that was stopped or killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import sparsifiner
from sparsifiner import SparsifinerConfig, SparsifinerError, sparsify
from sparsifiner._utils.photos import preprocess, read_photo
from sparsifiner.cli import main
from sparsifiner.extraction import ExtractConfig, extract
from sparsifiner.extraction.shards import read_shard
from sparsifiner.measure.fidelity import final_features


@pytest.fixture
def saved(tiny_vit, tmp_path) -> str:
    model = sparsify(tiny_vit(), SparsifinerConfig(keep_rate=0.2, mode="sparse"))
    sparsifiner.save_pretrained(model, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Seven pictures in two folders, and one file that is none."""
    generator = numpy.random.default_rng(0)
    for number in range(7):
        folder = tmp_path / "pictures" / ("a" if number < 4 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (40, 50, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "pictures" / "a" / "2b.png").write_text("no picture")
    return tmp_path / "pictures"


@pytest.mark.parametrize("form", ["safetensors", "parquet", "zarr"])
def test_shards_hold_the_models_features(form, saved, pictures, tmp_path) -> None:
    said: list[str] = []
    config = ExtractConfig(
        model=saved, features="both", format=form, stored="float32", shard_size=3, batch_size=2, workers=0
    )
    done = extract(pictures, tmp_path / "out", config, say=said.append)
    assert (done.images, done.new, done.skipped_shards) == (7, 7, 0)
    assert list(done.unreadable) == ["a/2b.png"]
    assert "8 of 8 images" in said[-1]
    assert "images/s" in said[-1]
    assert done.dense_seconds is not None
    assert "the dense model would have taken" in str(done)
    model, names = sparsifiner.from_pretrained(saved).eval(), []
    for shard in range(3):
        found, arrays = read_shard(tmp_path / "out", shard)
        names += found
        for place, name in enumerate(found):
            x = preprocess(model, (32, 32))(read_photo(pictures / name))[None]
            for kind, want in zip(("patch", "class"), final_features(model, x), strict=True):
                assert want is not None
                got = torch.from_numpy(arrays[kind][place].copy())
                torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-4)
    assert names == ["a/0.png", "a/1.png", "a/2.png", "a/3.png", "b/4.png", "b/5.png", "b/6.png"]


def test_a_second_run_does_what_is_left_and_nothing_else(saved, pictures, tmp_path) -> None:
    out, config = tmp_path / "out", ExtractConfig(model=saved, shard_size=3, workers=0)
    extract(pictures, out, config)
    untouched = (out / "features-000000.safetensors").stat().st_mtime_ns
    (out / "features-000001.json").unlink()  # as if it had been stopped in between
    done = extract(pictures, out, config)
    assert (done.images, done.new, done.skipped_shards) == (7, 2, 2)
    assert (out / "features-000000.safetensors").stat().st_mtime_ns == untouched
    assert extract(pictures, out, config).new == 0
    with pytest.raises(SparsifinerError, match="holds a job with shard_size=3, not 4"):
        extract(pictures, out, ExtractConfig(model=saved, shard_size=4, workers=0))
    (pictures / "a" / "0.png").unlink()
    with pytest.raises(SparsifinerError, match="holds a job with other images"):
        extract(pictures, out, config)


def test_a_killed_run_loses_no_shard_and_leaves_no_half_one(saved, pictures, tmp_path) -> None:
    out = tmp_path / "out"
    command = ["extract", str(pictures), str(out), "--model", saved, "--shard-size", "1", "--workers", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from sparsifiner.cli import main; main(sys.argv[1:])", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("features-*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.stem for file in out.glob("features-*.json")}
    assert before
    done = extract(pictures, out, ExtractConfig(model=saved, shard_size=1, workers=0))
    assert done.skipped_shards == len(before)
    assert (done.images, len(done.unreadable)) == (7, 1)
    for file in out.glob("features-*.safetensors"):
        assert read_shard(out, int(file.stem.split("-")[1]))[1]["patch"].shape == (1, 64, 48)


def test_several_model_processes_and_decoding_workers_write_the_same(saved, pictures, tmp_path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("# some\n" + "\n".join(f"pictures/{name}" for name in ("a/0.png", "b/5.png", "a/2b.png")) + "\n")
    alone = extract(listed, tmp_path / "one", ExtractConfig(model=saved, shard_size=1, workers=0))
    both = extract(listed, tmp_path / "two", ExtractConfig(model=saved, shard_size=1, workers=1, processes=2))
    assert (alone.images, both.images) == (2, 2)
    for shard in (0, 1):
        (names, want), (others, found) = (read_shard(tmp_path / folder, shard) for folder in ("one", "two"))
        assert names == others
        numpy.testing.assert_allclose(found["patch"], want["patch"], rtol=1e-2, atol=1e-2)


def test_the_command_and_its_refusals(saved, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["extract", str(pictures), str(out), "--tuned", saved, "--workers", "0"])
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert "1 images cannot be read:\na/2b.png: " in said.out
    assert "8 of 8 images" in said.err
    (tmp_path / "empty").mkdir()
    (out / "extraction.json").write_text(json.dumps({}))
    for arguments, message in (
        ([str(tmp_path / "none"), str(out)], "does not exist"),
        ([str(tmp_path / "empty"), str(tmp_path / "new")], "holds no image"),
        ([str(pictures), str(out), "--features", "all"], "features 'all' is unknown"),
        ([str(pictures), str(out), "--format", "csv"], "format 'csv' is unknown"),
        ([str(pictures), str(out), "--tuned", saved], "holds a job with model=None"),
        ([str(pictures), str(out), "--tuned", saved, "--dense"], "leave out --model and --dense"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["extract", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
