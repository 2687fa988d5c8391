"""Files and numbers that somebody has edited, and models of unusual images: one line each, never a traceback."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import fuzz_files
import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file

import sparsifiner
from sparsifiner import SparsifinerConfig, SparsifinerError, calibrate, from_pretrained, save_pretrained, sparsify
from sparsifiner.calibration.state import State
from sparsifiner.cli import main
from sparsifiner.evaluation import Sweep
from sparsifiner.models import load_model
from sparsifiner.predictors import RandomConfig
from sparsifiner.reduction import linformer
from sparsifiner.saving import CONFIG_NAME
from sparsifiner.training.recipe import DataConfig
from sparsifiner.training.recipe_file import from_dict
from sparsifiner.training.student import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "vit_tiny_patch16_224"
DEEP = "[" * 100_000
BURIED = json.loads("[" * 70 + "]" * 70)
FILES = [name for name in fuzz_files.READERS if name.endswith((".json", ".yaml"))]


def refused(read, *arguments: object) -> str:
    with pytest.raises((SparsifinerError, OSError)) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sample(tmp_path):
    """A sound file of a kind in a folder of its own, and what reads it."""
    import shutil

    def make(name: str):
        source = fuzz_files.samples() / name
        if "/" in name:
            shutil.copytree(source.parent, tmp_path / source.parent.name)
        else:
            shutil.copy(source, tmp_path / name)
        return tmp_path / name, fuzz_files.READERS[name]

    return make


@pytest.mark.parametrize("name", list(fuzz_files.READERS))
def test_what_the_fuzzer_starts_from_is_read(name, sample):
    if name == "nested.json" or not name.endswith(" "):
        path, read = sample(name)
        read(path)


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_settings_is_read_strictly(name, sample):
    path, read = sample(name)
    sound = path.read_text()
    for text in (DEEP, "{}"[:1] + '"a":' * 3000, json.dumps({"a": BURIED}), "\ufeff[", "null", "7", '"text"', ""):
        path.write_text(text)
        refused(read, path)
    path.write_bytes(b"\xff\xfe\x00")
    refused(read, path)
    path.unlink()
    path.mkdir()
    refused(read, path)
    path.rmdir()
    if sound.startswith("{"):
        first = next(iter(json.loads(sound)))
        path.write_text('{"' + first + '": null, ' + sound.lstrip()[1:])
        assert f"'{first}' is given twice" in refused(read, path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data", [], "data in .* must be named settings"),
        ("data", {"mean": "a"}, "data.mean in .* must be a list of numbers, got 'a'"),
        ("data", {"mean": 0.5}, "data.mean in .* must be a list of numbers, got 0.5"),
        ("data", {"mean": [0.5]}, None),
        ("data", {"std": [0, 0, 0]}, "data.std in .* must be a list of numbers above 0"),
        ("data", {"crop_pct": "1"}, "data.crop_pct in .* must be a number above 0"),
        ("data", {"interpolation": "best"}, "data.interpolation in .* must be one of"),
        ("dtype", 32, "dtype in .* must be one of float32"),
        ("dtype", "int8", "dtype in .* must be one of float32"),
        ("config", [1], "config in .* must be named settings or null"),
        ("config", {"keep_rate": "0.1"}, "keep_rate must lie in"),
        ("config", {"predictor": {"name": ["pooled"]}}, r"predictor \['pooled'\] is unknown"),
        ("config", {"predictor": 3}, "predictor 3 is unknown"),
        ("config", {"tail": {"block": [2, 2], "refine": 10**400}}, "tail refine must be a whole number"),
        ("config", {"seed": 2**70}, "seed must fit 64 bits"),
        ("token_pruning", {"keep_rate": "x"}, "keep_rate must lie in"),
        ("baseline", {"name": "tome"}, "a baseline is saved as"),
        ("basis_grid", "8x8", "basis_grid in .* must be rows and columns"),
        ("basis_grid", [0, 8], "basis_grid in .* must be rows and columns"),
        ("format", True, "has format True"),
        ("model_args", None, "model_args in .* must be arguments by name"),
    ],
)
def test_a_description_is_checked_field_by_field(field, value, words, sample):
    path, read = sample(f"pooled/{CONFIG_NAME}")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    if words is None:
        assert from_pretrained(path.parent).pretrained_cfg["mean"] == (0.5,)
        return
    with pytest.raises(SparsifinerError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 10**12}, "hits hold 8 answers, not 1000000000000"),
        ({"count": -1}, "count must be a whole number"),
        ({"hits": "é"}, "no readable sweep"),
        ({"method": ["evit"]}, "is unknown"),
        ({"keep_rate": [0.1]}, "keep_rate must lie in"),
        ({"missing": [9]}, "missing must be a whole number"),
        ({"ms": "fast"}, "ms must be a number"),
        ({"fit": [1]}, "fit must be named values or null"),
        ({"colour": 1}, "no readable sweep"),
    ],
)
def test_rows_of_a_sweep_are_checked(changes, words, sample):
    path, read = sample("pareto.json")
    kept = json.loads(path.read_text())
    kept["rows"][0].update(changes)
    path.write_text(json.dumps(kept))
    assert words in refused(read, path)


@pytest.mark.parametrize("done", ["[]", '{"a": "x"}', '{"a": -1}', "[" * 100_000, "7"])
def test_the_state_of_a_calibration_is_checked(done, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "state", metadata={"done": done, "identity": "me"})
    assert "not the state of a calibration" in refused(State, tmp_path / "state", "me")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: {b: 1, b: 2}", "- {x: 1, 'x': 2}", "1: 2\n1: 3"])
def test_names_given_twice_in_yaml(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert "given twice" in refused(SparsifinerConfig.from_file, tmp_path / "a.yaml")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 10**400, 1.5, "3", True, None])
def test_every_seed_has_bounds(seed, tmp_path):
    model = sparsify(timm.create_model(NAME, num_classes=0, **TINY))
    data = DataConfig(path="x")
    for use in (
        lambda: from_dict({"phases": [{"name": "cls", "steps": 1}], "sparsity": None, "seed": seed}),
        lambda: Sweep(model="builtin", data=data, methods=("evit",), keep_rates=(0.5,), seed=seed),
        lambda: calibrate(model, torch.zeros(1, 3, 32, 32), seed=seed),
        *([] if seed == -1 else [lambda: RandomConfig(seed=seed)]),
    ):
        assert "seed must" in refused(use)


def test_the_largest_seed_is_taken(tmp_path):
    largest = 2**63 - 1
    model = sparsify(timm.create_model(NAME, num_classes=0, **TINY), SparsifinerConfig(predictor=RandomConfig(largest)))
    calibrate(model, torch.rand(1, 3, 32, 32), seed=largest)
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()
    from sparsifiner.training.randomness import seeded

    with seeded(largest, 0):
        assert torch.rand(1).isfinite()


@pytest.mark.parametrize("seed", ["9223372036854775808", "1" * 400, "1" * 5000, "1e3"])
def test_the_commands_seed_has_bounds(seed, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--images", str(tmp_path), "--output", str(tmp_path / "out"), "--seed", seed])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_model_args_that_are_overridden_are_told():
    with pytest.warns(UserWarning, match="model_args say num_classes=4; what is built is 3"):
        assert load_model(NAME, num_classes=3, pretrained=False, model_args={**TINY, "num_classes": 4}).num_classes == 3
    with pytest.warns(UserWarning, match="model_args say img_size=32; what is built is"):
        load_model(NAME, img_size=(64, 64), pretrained=False, model_args=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(NAME, img_size=(32, 32), num_classes=4, pretrained=False, model_args={**TINY, "num_classes": 4})


@pytest.fixture(params=[1, 2, 12], ids=lambda channels: f"{channels} channels")
def channels(request):
    return request.param


@pytest.fixture
def models(channels, tmp_path) -> dict[str, Path]:
    """Folders of a dense and a sparse model of so many channels."""
    dense = timm.create_model(NAME, num_classes=3, in_chans=channels, **TINY).eval()
    save_model(dense, tmp_path / "dense")
    save_pretrained(sparsify(dense, SparsifinerConfig(query_tile=(2, 2), tail=(2, 2))), tmp_path / "sparse")
    return {"dense": tmp_path / "dense", "sparse": tmp_path / "sparse"}


def test_models_of_other_channels_in_every_command(models, channels, folder_of_images, tmp_path, capsys):
    """Grey photographs serve a model of one channel; more channels than three no photograph has, which is said."""
    pictures = str(folder_of_images / "val" / "class0")
    quick = ["--repeats", "1", "--max-tokens", "256"]
    for kind, folder in models.items():
        for command in (
            ["report", "--model", folder, "--images", pictures, "--num-images", "1", "--no-memory", *quick],
            ["report", "--model", folder, "--num-images", "1", "--repeats", "0", "--no-memory"],
            ["validate", "--model", folder, "--data", folder_of_images, "--limit", "3", "--workers", "0",
             "--repeats", "0"],
            ["calibrate", "--model", folder, "--images", pictures, "--num-images", "1"],
        ):  # fmt: skip
            output = tmp_path / f"out-{command[0]}"
            with pytest.raises(SystemExit) as stop:
                main([*map(str, command), "--output", str(output)])
            said = capsys.readouterr().err.splitlines()
            if channels == 1:
                assert stop.value.code == 0, (kind, command, said)
            else:
                assert stop.value.code == 2, (kind, command, said)
                (line,) = (line for line in said if line.startswith("error: "))
                assert "channels" in line
                assert "Traceback" not in "".join(said)
            if output.is_dir():
                import shutil

                shutil.rmtree(output)
            output.unlink(missing_ok=True)


def test_the_benchmark_of_a_model_of_other_channels(models, channels, capsys):
    """It measures random images, of which there are some of any kind."""
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--model", str(models["dense"]), "--img-size", "32", "--tokens", "64", "--keep-rate", "0.5",
              "--repeats", "1", "--dtype", "float32", "--max-tokens", "256", "--json"])  # fmt: skip
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert json.loads(printed.out)["measured"][-1]["median_s"]["dense"] > 0


@pytest.mark.parametrize("given", [None, "vit", 3])
def test_what_is_no_model_is_told(given, tmp_path):
    calls = {
        "densify": lambda: sparsifiner.densify(given),
        "set_keep_rate": lambda: sparsifiner.set_keep_rate(given, 0.1),
        "sparse_layers": lambda: sparsifiner.sparse_layers(given),
        "record": lambda: sparsifiner.record(given).__enter__(),
        "save_pretrained": lambda: sparsifiner.save_pretrained(given, tmp_path / "saved"),
        "linformer": lambda: linformer(given, keep_rate=0.5),
        "export": lambda: sparsifiner.export(given, tmp_path / "model.pt2"),
    }
    for name, call in calls.items():
        with pytest.raises(sparsifiner.SparsifinerError, match="an nn.Module") as caught:
            call()
        assert "\n" not in str(caught.value), name
    assert not list(tmp_path.iterdir())
