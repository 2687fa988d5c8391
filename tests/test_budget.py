"""Tiles and heads of a layer that share its keys: ``PooledConfig(budget="layer")``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsifiner import SparsifinerConfig, SparsifinerError, Tiling, record, sparsify
from sparsifiner.attention.attend import attend, tail_groups
from sparsifiner.attention.build import build_predictor
from sparsifiner.ops import cpu
from sparsifiner.ops.inputs import AttentionInputs
from sparsifiner.predictors import PooledConfig

BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(cpu.why_missing() is not None, reason="none"))]


def _inputs(backend: str = "auto", batch: int = 2) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 3, 1 + 16 * 12, 32, generator=generator)
    q[:, 0] *= 30  # of this head few keys have all of the probability
    return AttentionInputs(q, k, v, Tiling((16, 12), (4, 4), 1), 32**-0.5, backend=backend)


def _config(**changes: object) -> SparsifinerConfig:
    return SparsifinerConfig(keep_rate=0.1, mode="sparse", predictor=PooledConfig(budget="layer")).replace(**changes)


def _counts(inputs: AttentionInputs, config: SparsifinerConfig) -> Tensor:
    """Patches that each tile keeps, ``[B, H, T]``."""
    predictor = build_predictor(config, num_heads=3, head_dim=32, grid=inputs.tiling.grid, num_prefix_tokens=1)
    found = predictor(inputs, tail_groups(config.tail, inputs))
    assert found.bias is not None
    return (found.bias == 0).sum(-1) - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_is_the_keep_rate_and_sharp_heads_need_less(backend: str) -> None:
    counts, share = _counts(_inputs(backend), _config()), math.ceil(0.1 * 16 * 12)
    assert (counts.sum((1, 2)) == share * 3 * 12).all()
    assert counts.min() >= share // 4
    assert counts.max() <= 2 * share
    assert counts[:, 0].float().mean() < 0.5 * counts[:, 1:].float().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_alone_gets_what_it_gets_in_a_batch(backend: str) -> None:
    inputs = _inputs(backend)
    alone = inputs.replace(q=inputs.q[1:], k=inputs.k[1:], v=inputs.v[1:])
    assert torch.equal(_counts(inputs, _config())[1:], _counts(alone, _config()))


def test_every_key_is_dense_attention_and_a_budget_of_tiles_is_the_default() -> None:
    inputs = _inputs()
    config = _config(keep_rate=1.0)
    predictor = build_predictor(config, num_heads=3, head_dim=32, grid=inputs.tiling.grid, num_prefix_tokens=1)
    with torch.no_grad():
        got = attend(inputs, predictor, config)
    want = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert PooledConfig() == PooledConfig(budget="tile")
    with pytest.raises(SparsifinerError, match="budget 'image' is unknown"):
        PooledConfig(budget="image")  # type: ignore[arg-type]


def test_a_model_keeps_its_rate_and_its_settings_come_back(tiny_vit, images) -> None:  # type: ignore[no-untyped-def]
    config = _config(keep_rate=0.25)
    assert SparsifinerConfig.from_dict(config.to_dict()) == config
    shared, equal = sparsify(tiny_vit(), config), sparsify(tiny_vit(), config.replace(predictor=PooledConfig()))
    x = images(2, 3, 32, 32)
    densities = []
    for model in (shared, equal):
        with torch.no_grad(), record(model) as seen:
            model(x)
        densities.append([item.connectivity.density() for item in seen.values() if item.connectivity is not None])
    assert densities[0] == pytest.approx(densities[1])
    shared.train()(x).square().sum().backward()
