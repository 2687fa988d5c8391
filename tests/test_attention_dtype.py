"""Attention may compute in another precision than the model, forth and back inside the layer."""

from __future__ import annotations

import pytest
import torch
from native_levels import LEVELS
from torch import Tensor

from sparsifiner import SparsifinerConfig, sparse_layers, sparsify
from sparsifiner.attention.attend import attend, precision_of, products_of
from sparsifiner.attention.build import build_predictor
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.ops import cpu
from sparsifiner.ops.inputs import AttentionInputs


def _inputs(dtype: torch.dtype, *, width: int = 16) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 65, width, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionInputs(q, k, v, Tiling((8, 8), (4, 4), 1), width**-0.5)


def _run(inputs: AttentionInputs, config: SparsifinerConfig) -> Tensor:
    predictor = build_predictor(
        config, num_heads=3, head_dim=inputs.q.shape[-1], grid=inputs.tiling.grid, num_prefix_tokens=1
    )
    with torch.no_grad():
        return attend(inputs, predictor, config)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_another_precision_is_that_of_converted_inputs_and_the_result_comes_back(mode: str, backend: str) -> None:
    inputs = _inputs(torch.float32).replace(backend=backend)
    config = SparsifinerConfig(keep_rate=0.3, mode=mode, backend=backend)
    got = _run(inputs, config.replace(attention_dtype="bfloat16"))
    assert got.dtype == torch.float32
    assert torch.equal(got, _run(inputs.to(torch.bfloat16), config).float())
    # Where every key is kept, rounding cannot change the choice: what is left are relative errors of 2^-9 of q, k, v,
    # the logits' share of which grows with their size, a few units here.
    every_key = config.replace(keep_rate=1.0, attention_dtype="bfloat16")
    exact = _run(_inputs(torch.float64).replace(backend="reference"), every_key.replace(attention_dtype="model"))
    error = (_run(inputs, every_key) - exact).norm() / exact.norm()
    assert 2**-11 < error < 2**-6


def test_the_default_is_the_precision_of_the_model() -> None:
    config = SparsifinerConfig()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert precision_of(config, _inputs(dtype)) == dtype
        assert precision_of(config.replace(attention_dtype="float32"), _inputs(dtype)) == torch.float32


def test_auto_is_bfloat16_where_the_kernels_have_its_products() -> None:
    config = SparsifinerConfig(attention_dtype="auto")
    for level in cpu.levels():
        with cpu.force_level(level):
            expected = torch.bfloat16 if level in ("avx512bf16", "amx") else torch.float32
            assert precision_of(config, _inputs(torch.float32)) == expected
            assert precision_of(config, _inputs(torch.float64)) == torch.float64
            biased = _inputs(torch.float32).replace(attn_bias=torch.zeros(1, 1, 65, 65))
            assert precision_of(config, biased) == torch.float32


def test_auto_multiplies_bytes_where_the_kernels_have_only_those() -> None:
    config = SparsifinerConfig(attention_dtype="auto")
    biased = _inputs(torch.float32).replace(attn_bias=torch.zeros(1, 1, 65, 65))
    for level in cpu.levels():
        with cpu.force_level(level):
            for inputs in (_inputs(torch.float32), _inputs(torch.float64), _inputs(torch.bfloat16), biased):
                meet = inputs.to(precision_of(config, inputs))
                expected = level == "avx512vnni" and inputs.q.dtype == torch.float32 and inputs.attn_bias is None
                assert products_of(config, meet) == ("int8" if expected else "same")
                for setting in ("model", "float32", "bfloat16"):
                    assert products_of(config.replace(attention_dtype=setting), inputs) == "same"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_changes_a_layer_by_less_than_a_percent_or_not_at_all(level: str, dtype: torch.dtype) -> None:
    """It is attention in float32, to the bit, where the kernels gain nothing by bytes."""
    inputs = _inputs(dtype, width=64)
    config = SparsifinerConfig(keep_rate=0.3, mode="sparse", attention_dtype="int8")
    with cpu.force_level(level):
        got, want = _run(inputs, config), _run(inputs, config.replace(attention_dtype="float32"))
        error = (got - want).norm() / want.norm()
        assert got.dtype == dtype
        assert (0 < error < 0.01) if "int8" in cpu.precisions() else error == 0


def test_a_bias_is_converted_along() -> None:
    inputs = _inputs(torch.float32)
    bias = torch.randn(1, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    config = SparsifinerConfig(keep_rate=0.3, mode="sparse", attention_dtype="bfloat16")
    got = _run(inputs.replace(attn_bias=bias), config)
    exact = _run(inputs.replace(attn_bias=bias), config.replace(attention_dtype="model"))
    assert (got - exact).norm() / exact.norm() < 3e-2


def test_a_float32_model_attends_in_bfloat16_and_learns(tiny_vit, images) -> None:  # type: ignore[no-untyped-def]
    model, x = tiny_vit(), images(2, 3, 32, 32)
    config = SparsifinerConfig(keep_rate=0.3, mode="sparse")
    exact = sparsify(model, config)
    half = sparsify(model, config.replace(attention_dtype="bfloat16"))
    with torch.no_grad():
        want, got = exact(x), half(x)
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.05
    half.train()(x).square().sum().backward()
    assert all(layer.qkv.weight.grad.isfinite().all() for layer in sparse_layers(half).values())


@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "oracle", "local", "strided", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_predictor_takes_another_precision(predictor: str, dtype: torch.dtype, tiny_vit, images) -> None:  # type: ignore[no-untyped-def]
    """A learned one has weights of the model's precision."""
    for precision in ("float32", "bfloat16", "auto"):
        config = SparsifinerConfig(predictor=predictor, mode="sparse", query_tile=(2, 2), attention_dtype=precision)
        model = sparsify(tiny_vit(), config).to(dtype)
        assert model(images(2, 3, 32, 32).to(dtype)).dtype == dtype
