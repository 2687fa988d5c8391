"""Symbolic tracing and feature extractors see attention as one module, which finds its grid at run time."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from sparsifiner import SparsifinerConfig, prune_tokens, sparsify
from sparsifiner.methods import convert_with
from sparsifiner.reduction import linformer, merge_tokens

CONFIG = SparsifinerConfig(keep_rate=0.2, mode="sparse")


@pytest.mark.parametrize("pruned", [False, True])
def test_torchvisions_feature_extractor_works_as_with_a_dense_model(pruned, tiny_vit, images) -> None:
    model, x = tiny_vit().eval(), images(2, 3, 32, 32)
    sparse = sparsify(prune_tokens(model, layers=(0,)) if pruned else model, CONFIG)
    extract = create_feature_extractor(sparse, ["blocks.1", "norm"])
    with torch.no_grad():
        found = extract(x)
        torch.testing.assert_close(found["norm"], sparse.forward_features(x))
    assert set(found) == {"blocks.1", "norm"}


@pytest.mark.parametrize(
    "convert", [lambda model: linformer(model, keep_rate=0.5), lambda model: merge_tokens(model, 4)]
)
def test_feature_extractors_work_with_the_other_methods(convert, tiny_vit, images) -> None:
    model, x = convert(tiny_vit().eval()), images(2, 3, 32, 32)
    with torch.no_grad():
        found = create_feature_extractor(model, ["norm"])(x)
        torch.testing.assert_close(found["norm"], model.forward_features(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_follows_its_own_images(tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit().eval(), CONFIG), images(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(sparse, x)
        torch.testing.assert_close(traced(x * 0.5), sparse(x * 0.5))
        exported = torch.export.export(sparse, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=1, max=8)}})
        for batch in (1, 5):
            y = images(batch, 3, 32, 32)
            torch.testing.assert_close(exported.module()(y), sparse(y), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["pruned", "pruned and sparse", "merged"])
def test_a_traced_model_whose_tokens_leave_follows_its_own_images(kind, tiny_vit, images) -> None:
    model, x = tiny_vit().eval(), images(2, 3, 32, 32)
    model = merge_tokens(model, 8) if kind == "merged" else prune_tokens(model, layers=(0,), fuse=True)
    model = sparsify(model, CONFIG) if kind == "pruned and sparse" else model
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        for other in (x.flip(-1), images(5, 3, 32, 32)):
            torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["paper-evit", "sparsifiner-evit", "evit", "tome", "linformer"])
def test_methods_are_traced_and_exported_for_any_batch(method, tiny_vit, images) -> None:
    model, x = convert_with(method, tiny_vit().eval(), 0.4), images(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        for number in (1, 5):
            other = images(number, 3, 32, 32)
            for program in (traced, exported):
                torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-4)
