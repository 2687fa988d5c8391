"""A prepared model runs like the one it was made from, in another precision, compiled or not."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsifiner import SparsifinerConfig, from_pretrained, save_pretrained, sparsify
from sparsifiner.models import load_model
from sparsifiner.runtime import Runtime, prepare
from sparsifiner.runtime import ready as ready_module

CONFIG = SparsifinerConfig(keep_rate=0.3, mode="sparse")
torchao = pytest.mark.filterwarnings("ignore")


def error(got, want):  # type: ignore[no-untyped-def]
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    ("runtime", "least", "most"),
    [
        (Runtime(), 0.0, 0.0),
        (Runtime(activations="bfloat16"), 1e-4, 0.05),
        pytest.param(Runtime(linears="int8"), 1e-4, 0.1, marks=torchao),
        pytest.param(Runtime(activations="bfloat16", linears="int8"), 1e-4, 0.1, marks=torchao),
    ],
)
def test_precision_changes_the_result_by_its_own_rounding(tiny_vit, images, runtime, least, most) -> None:  # type: ignore[no-untyped-def]
    model, x = sparsify(tiny_vit(), CONFIG.replace(keep_rate=1.0)), images(2, 3, 32, 32)
    ready = prepare(model, runtime)
    with torch.no_grad():
        for method in ("forward", "forward_features"):
            want, got = getattr(model, method)(x), getattr(ready, method)(x)
            assert got.dtype == torch.float32
            assert got.shape == want.shape
            assert least <= error(got, want) <= most
    assert ready.num_prefix_tokens == model.num_prefix_tokens
    assert next(model.parameters()).dtype == torch.float32  # the source stays as it was


@torchao
def test_a_compiled_model_computes_what_the_eager_one_does(tiny_vit, images, one_thread) -> None:  # type: ignore[no-untyped-def]
    model, x = sparsify(tiny_vit(depth=1), CONFIG), images(1, 3, 32, 32)
    want = model(x).detach()
    ready = prepare(model, Runtime(compilation="ahead"))
    process = ready.start_compiling(x)
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        ready.start_compiling(x).result(timeout=0.01)
    ready.adopt(process.result(timeout=240), x)
    assert error(ready(x), want) < 1e-4
    with torch.inference_mode():
        assert error(ready(x), want) < 1e-4
    assert len(ready._compiled) == 1  # one shape, compiled once, for forward and whatever mode it is called in
    assert copy.deepcopy(ready)._compiled == {}


def test_a_model_that_cannot_be_exported_runs_uncompiled_and_says_why(images, caplog) -> None:  # type: ignore[no-untyped-def]
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    ready, x = prepare(Branching(), Runtime(compilation="ahead")), images(1, 3, 8, 8).abs()
    with pytest.raises(ValueError, match="Branching cannot be compiled: "):
        ready.compile_for(x)
    assert torch.equal(ready(x), x)
    assert "1x3x8x8 run uncompiled: Branching cannot be compiled: " in caplog.text
    with pytest.raises(ValueError, match="cannot be pickled"):
        ready.start_compiling(x)


def test_other_sizes_than_the_compiled_one(tiny_vit, images, caplog, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ready_module, "compile_ahead", lambda module, x, options: module)
    monkeypatch.setattr(ready_module, "MOST_SHAPES", 2)
    model = sparsify(tiny_vit(dynamic_img_size=True), CONFIG)
    ready = prepare(model, Runtime(compilation="ahead"))
    with torch.no_grad():
        for size in ((1, 3, 32, 32), (2, 3, 32, 48), (1, 3, 64, 32)):
            assert torch.equal(ready(images(*size)), model(images(*size)))
    assert "1x3x64x32 run uncompiled: it is compiled for 2 shapes already" in caplog.text


def test_saved_and_ready_again(tiny_vit, images, tmp_path) -> None:  # type: ignore[no-untyped-def]
    x = images(1, 3, 32, 32)
    for model in (sparsify(tiny_vit(), CONFIG), tiny_vit()):
        ready = prepare(model, Runtime(activations="bfloat16", threads=1))
        save_pretrained(ready, tmp_path)
        again = from_pretrained(tmp_path)
        assert again.runtime == ready.runtime
        with torch.no_grad():
            assert torch.equal(again(x), ready(x))
            assert torch.equal(from_pretrained(tmp_path, ready=False)(x), model(x))
            assert torch.equal(load_model(str(tmp_path))(x), model(x))
    path = tmp_path / "sparsifiner.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float8"'))
    with pytest.raises(ValueError, match="activations 'float8' is unknown"):
        from_pretrained(tmp_path)


def test_it_does_not_train_and_bad_settings_are_refused(tiny_vit) -> None:  # type: ignore[no-untyped-def]
    ready = prepare(tiny_vit(), Runtime())
    with pytest.raises(ValueError, match="cannot train"):
        ready.train()
    with pytest.raises(ValueError, match="linears 'int4' is unknown; did you mean 'int8'"):
        Runtime(linears="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="runtime setting 'linear' is unknown; did you mean 'linears'"):
        Runtime.from_dict({"linear": "int8"})
    with pytest.raises(ValueError, match="no linear layer to hold in int8"):
        prepare(torch.nn.Conv2d(3, 3, 1), Runtime(linears="int8"))


def test_threads_are_those_asked_for_while_it_runs_and_come_back(images, two_threads) -> None:  # type: ignore[no-untyped-def]
    seen = []

    class Threads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return x

    prepare(Threads(), Runtime(threads=1))(images(1, 3, 8, 8))
    assert seen == [1]
    assert torch.get_num_threads() == 2
