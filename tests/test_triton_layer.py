"""A whole attention layer on the backend ``triton``: choice of keys, tail and attention, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICE

from sparsifiner import Connectivity, SparsifinerConfig, Tiling
from sparsifiner.attention import AttentionInputs, LayerRecord, attend, build_predictor

TILING = Tiling((8, 8), (4, 4), 1)  # whole tiles: in border tiles several groups of queries start alike
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "screened": {"screen_from": 0, "keep_rate": 0.1},
    "sum, no tail, class token competes": {"reduction": "sum", "tail": None, "keep_prefix": False},
}


def layer(config: SparsifinerConfig, qkv: Tensor, backend: str, **changes: Any) -> tuple[Tensor, Connectivity]:
    """Attention of one layer on packed ``[B, N, 3, H, D]``, and the keys it chose."""
    predictor = build_predictor(
        config, num_heads=1, head_dim=16, grid=TILING.grid, num_prefix_tokens=TILING.num_prefix_tokens
    ).to(qkv.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    seen: list[LayerRecord] = []
    inputs = AttentionInputs(q, k, v, TILING, 0.25, backend=backend, **changes)
    out = attend(inputs, predictor, config, observe=seen.append)
    assert seen[0].connectivity is not None
    return out, seen[0].connectivity


@pytest.fixture
def qkv() -> Tensor:
    return torch.randn(2, TILING.num_tokens, 3, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_chooses_and_attends_as_the_references_do(name: str, qkv: Tensor) -> None:
    config = SparsifinerConfig.from_dict({"keep_rate": 0.2, "mode": "sparse", **SETTINGS[name]})
    with torch.no_grad():
        (got, chosen), (want, expected) = layer(config, qkv, "triton"), layer(config, qkv, "reference")
    # Keys whose scores are nearly equal are taken for each other; tiles that chose the same attend alike.
    same = (chosen.indices == expected.indices).all(-1)
    assert same.double().mean() > 0.8
    tokens = TILING.tokens(qkv.device).long()
    rows = torch.stack([x[:, :, tokens.flatten()].unflatten(2, tokens.shape) for x in (got, want)])[:, same]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-5)


def test_a_layer_compiles_as_one_graph_and_images_do_not_depend_on_their_neighbours(qkv: Tensor) -> None:
    config = SparsifinerConfig(keep_rate=0.2, mode="sparse")
    predictor = build_predictor(
        config, num_heads=1, head_dim=16, grid=TILING.grid, num_prefix_tokens=TILING.num_prefix_tokens
    ).to(DEVICE)

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return attend(AttentionInputs(q, k, v, TILING, 0.25, backend="triton"), predictor, config)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(qkv)[:1], run(qkv[:1]))
