"""Exported files in their runtimes, for every predictor; refusals that leave nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsifiner
from sparsifiner import SparsifinerConfig, SparsifinerError, sparsify
from sparsifiner.cli import main
from sparsifiner.config import PooledConfig, TailConfig
from sparsifiner.exporters import load_exported, onnx, openvino, registry
from sparsifiner.exporters.program import exact_copy

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other exporters

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(4, 4), tail=TailConfig((2, 2)))
SETTINGS = {
    "pooled": SPARSE,
    "lowrank": SPARSE.replace(predictor="lowrank", tail=TailConfig((2, 2), refine=0, offset=True)),
    **{name: SPARSE.replace(predictor=name, tail=None) for name in ("oracle", "local", "strided", "random")},
    "screened": SPARSE.replace(predictor=PooledConfig(screen_from=16), tail=None),
    "budget": SPARSE.replace(predictor=PooledConfig(budget="layer"), tail=None),
    "paper": SparsifinerConfig.paper(),
    "threshold": SparsifinerConfig.paper(score_threshold=0.02),
}


@pytest.fixture
def model(tiny_vit: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """One sparse layer on 9x8 patches, which tiles and blocks do not divide, and a classifier."""

    def make(config: SparsifinerConfig | None = SPARSE) -> nn.Module:
        dense = tiny_vit(img_size=(36, 32), depth=1)
        return dense if config is None else sparsify(dense, config)

    return make


def check(run: registry.Run, model: nn.Module, images: Callable[..., Tensor]) -> None:
    """The file gives the model's numbers for batches of several sizes, and each image the same alone."""
    exact = exact_copy(model)
    x = images(3, 3, 36, 32)
    with torch.no_grad():
        want = exact(x)
    torch.testing.assert_close(run(x)[0], want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(x[:1])[0], want[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_onnx_files_give_the_models_numbers_in_onnx_runtime_and_openvino(settings, model, images, tmp_path) -> None:
    import onnx as package

    sparse = model(SETTINGS[settings])
    done = sparsifiner.export(sparse, tmp_path / "model.onnx")
    assert done.layers == (1, 1)
    assert done.relative_l2 < 1e-4
    check(load_exported(done.path), sparse, images)
    check(openvino.load(done.path), sparse, images)
    graph = package.load(done.path)
    package.checker.check_model(graph, full_check=True)
    assert [entry.domain for entry in graph.opset_import] == [""]  # standard operators only
    assert not graph.functions
    assert {"Gather", "MatMul", "Softmax"} <= {node.op_type for node in graph.graph.node}
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_openvino_files_give_the_models_numbers(model, images, tmp_path) -> None:
    sparse = model(SETTINGS["local"])
    check(load_exported(sparsifiner.export(sparse, tmp_path / "model.xml").path), sparse, images)
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}


def test_packages_of_aotinductor_run_the_kernels(model, images, tmp_path) -> None:
    sparse = model()
    done = sparsifiner.export(sparse, tmp_path / "model.pt2", batch_size=2)
    assert "import sparsifiner" in str(done)
    x = images(2, 3, 36, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(done.path)(x)[0], sparse(x), rtol=1e-3, atol=1e-4)


def test_the_size_is_the_models_own_or_the_one_asked_for(tiny_vit, images, tmp_path) -> None:
    sparse = sparsify(tiny_vit(depth=1, dynamic_img_size=True), SETTINGS["strided"])
    done = sparsifiner.export(sparse, tmp_path / "model.onnx", image_size=(32, 48), batch_size=1)
    assert done.image_size == (32, 48)
    x = images(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(done.path)(x)[0], exact_copy(sparse)(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(SparsifinerError, match="image size 33x33 is not a multiple|image size 33 is not a multiple"):
        sparsifiner.export(sparse, tmp_path / "other.onnx", image_size=33)


@pytest.mark.parametrize("settings", ["pooled", "auto", "threshold"])
def test_torch_export_takes_any_batch(settings, model, images) -> None:
    """The other predictors: above, and layer by layer in ``test_derivatives.py``."""
    sparse = model(SETTINGS.get(settings, SPARSE.replace(mode="auto")))
    sizes = {"x": {0: torch.export.Dim("batch", min=1, max=8)}}
    with torch.no_grad():
        exported = torch.export.export(sparse, (images(2, 3, 36, 32),), dynamic_shapes=sizes).module()
        for batch in (1, 5):
            x = images(batch, 3, 36, 32)
            torch.testing.assert_close(exported(x), sparse(x), rtol=1e-4, atol=1e-5)


def test_other_heights_and_widths_in_one_program_are_refused(tiny_vit, images) -> None:
    sparse = sparsify(tiny_vit(depth=1, dynamic_img_size=True), SPARSE)
    sizes = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    with pytest.raises(SparsifinerError, match="exported for one height and width"):
        torch.export.export(sparse, (images(2, 3, 32, 32),), dynamic_shapes=sizes)


def test_a_file_that_computes_something_else_is_not_kept(model, tmp_path, monkeypatch) -> None:
    def load(path: Path) -> registry.Run:
        run = onnx.load(path)
        return lambda x: [y * 1.05 for y in run(x)]

    wrong = registry.Exporter("onnx", "ONNX", (".onnx",), (), onnx.write, load)
    monkeypatch.setitem(registry.EXPORTERS, "onnx", wrong)
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(SparsifinerError, match=r"was not written: in ONNX the model's output is off by 5.0e-02"):
        sparsifiner.export(model(None), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


def test_bad_places_formats_and_missing_packages_are_one_line(model, tmp_path, monkeypatch) -> None:
    for path, to, said in (
        ("model.txt", None, "names no format; choose from .onnx"),
        ("model.txt", "onnx", "should end in .onnx"),
        ("model.onnx", "onxn", "format 'onxn' is unknown; did you mean 'onnx'"),
        ("missing/../file/model.onnx", None, "cannot be written"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(SparsifinerError, match=said):
            sparsifiner.export(model(None), tmp_path / path, to=to)
    with pytest.raises(SparsifinerError, match="there is no file"):
        load_exported(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SparsifinerError, match=r"ONNX needs onnxscript, .*: pip install 'sparsifiner\[export\]'"):
        sparsifiner.export(model(None), tmp_path / "model.onnx")


def test_the_command_writes_a_file_and_says_how_far_it_is(model, tmp_path, capsys) -> None:
    sparsifiner.save_pretrained(model(SETTINGS["strided"]), tmp_path / "saved")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "saved"), "--output", str(tmp_path / "out.onnx")])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "36x32 pixels, any batch, 1 of 1 attention layers sparse" in said
    assert "relative L2" in said
    for arguments, message in (
        ([], "name a format with --to"),
        (["--to", "onxn"], "format 'onxn' is unknown"),
        (["--to", "onnx", "--dense"], "sparse already"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", str(tmp_path / "saved"), *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
