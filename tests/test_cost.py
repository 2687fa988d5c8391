"""Where sparse attention does not pay, a sparse layer runs dense; the rule knows shapes only."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsifiner
from sparsifiner import SparsifinerConfig, Tiling, record
from sparsifiner.attention import AttentionInputs, build_predictor
from sparsifiner.attention.cost import costs_of, predicted_share, sparse_pays
from sparsifiner.config import FLAT_NAMES
from sparsifiner.convert import always_sparse
from sparsifiner.measure.flops import count_flops
from sparsifiner.ops import cpu


def share(config: SparsifinerConfig, side: int, dtype: torch.dtype = torch.float32) -> float:
    tiling = Tiling((side, side), config.query_tile, 1)
    predictor = build_predictor(config, num_heads=6, head_dim=64, grid=tiling.grid, num_prefix_tokens=1)
    costs = costs_of(dtype, cpu.level())
    return predicted_share(config, costs, 6, 64, tiling, predictor.score_macs(6, 64, tiling))


@given(side=st.integers(8, 120), keep_rate=st.sampled_from([0.02, 0.1, 0.5]))
def test_more_tokens_and_fewer_keys_favour_sparse(side: int, keep_rate: float) -> None:
    config = SparsifinerConfig(keep_rate=keep_rate)
    assert share(config, side + 4) < share(config, side)
    assert share(config.replace(keep_rate=keep_rate * 2), side) > share(config, side)


def test_the_anchors_that_were_measured() -> None:
    """``benchmarks/cost.py``: 224 px does not pay, 512 px at keep 0.1 does, the paper's tiles never do."""
    for dtype in (torch.float32, torch.bfloat16):
        assert share(SparsifinerConfig(keep_rate=0.1), 14, dtype=dtype) > 1
        assert share(SparsifinerConfig(keep_rate=0.1), 32, dtype=dtype) < 0.8
    assert share(SparsifinerConfig.paper(keep_rate=0.25), 64) > 1


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "speed-amx.json"


def test_a_cpu_with_amx_is_told_what_was_measured_on_one(monkeypatch) -> None:
    """There dense attention in bfloat16 is so fast that sparse pays later; float32 is as on any AVX-512."""
    ratios = []
    for case in json.loads(RESULTS.read_text()).values():
        for entry in case["measured"]:
            found = entry["settings"]
            known = {*FLAT_NAMES, *(field.name for field in dataclasses.fields(SparsifinerConfig))}
            settings = {name: value for name, value in found["config"].items() if name in known}
            config = SparsifinerConfig.from_dict(settings)
            tiling = Tiling(tuple(found["grid"]), config.query_tile, found["num_tokens"] - 4096)
            predictor = build_predictor(
                config, num_heads=6, head_dim=64, grid=tiling.grid, num_prefix_tokens=tiling.num_prefix_tokens
            )
            monkeypatch.setattr(cpu, "level", lambda: "amx")
            dtype = getattr(torch, found["dtype"])
            costs = costs_of(dtype, cpu.level())
            predicted = predicted_share(config, costs, 6, 64, tiling, predictor.score_macs(6, 64, tiling))
            ratios.append(predicted * entry["speedup"]["layer"])
    assert len(ratios) == 4
    assert all(0.75 < ratio < 1.33 for ratio in ratios), ratios
    config = SparsifinerConfig(keep_rate=0.1)
    on_amx = share(config, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu, "level", lambda: "avx512bf16")
    assert on_amx > 1 > share(config, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")])
def test_without_kernels_sparse_never_pays(dtype: torch.dtype, device: str) -> None:
    q = torch.empty(1, 6, 129**2 - 128 * 2, 64, dtype=dtype, device=device)
    inputs = AttentionInputs(q, q, q, Tiling((127, 129), (4, 4), 2), 0.125)
    assert not sparse_pays(SparsifinerConfig(keep_rate=0.02), inputs, score_macs=0)


@pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")
def test_a_layer_runs_dense_where_sparse_does_not_pay(tiny_vit, images) -> None:
    model, x = tiny_vit(img_size=32, dynamic_img_size=True).eval(), images(1, 3, 32, 32)
    wide = images(1, 3, 256, 256)
    sparse = sparsifiner.sparsify(model, keep_rate=0.05)
    with torch.no_grad():
        with record(sparse) as seen:
            assert torch.equal(sparse(x), model(x))
        assert all(item.connectivity is None for item in seen.values())
        with record(sparse) as seen:
            assert not torch.equal(sparse(wide), model(wide))
        assert all(item.connectivity is not None for item in seen.values())


def test_the_threshold_can_be_set(tiny_vit, images) -> None:
    model, x = tiny_vit().eval(), images(1, 3, 32, 32)  # 65 tokens
    with torch.no_grad():
        want = model(x)
        for dense_below, dense in ((0, False), (65, False), (66, True)):
            config = SparsifinerConfig.from_dict({"keep_rate": 0.2, "dense_below": dense_below})
            assert torch.equal(sparsifiner.sparsify(model, config)(x), want) == dense


def test_training_and_the_oracle_stay_sparse(tiny_vit, images) -> None:
    x = images(1, 3, 32, 32)
    training = sparsifiner.sparsify(tiny_vit(), keep_rate=0.2).train()
    oracle = sparsifiner.sparsify(tiny_vit().eval(), SparsifinerConfig(predictor="oracle", keep_rate=0.2))
    for model in (training, oracle):
        with torch.no_grad(), record(model) as seen:
            model(x)
        assert all(item.connectivity is not None for item in seen.values())


@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "oracle", "local"])
def test_the_estimated_work_of_a_predictor_is_what_it_does(predictor: str, tiny_vit, images) -> None:
    """Averaging and regrouping queries are left out of the estimate: the kernels' cost per element covers them."""
    config = SparsifinerConfig.from_dict({"predictor": predictor, "query_refine": 0, "n_down": 8, "mode": "sparse"})
    sparse, x = sparsifiner.sparsify(tiny_vit().eval(), config), images(1, 3, 32, 32)
    attention = sparse.blocks[0].attn
    counted = count_flops(sparse, x).layers[0].predictor
    estimate = attention.predictor.score_macs(attention.num_heads, attention.head_width(), attention.tiling(65))
    assert estimate == pytest.approx(sum(counted.values()), rel=0.4, abs=0)


def test_settings_changed_inside_always_sparse_leave_it_sparse(tiny_vit, images) -> None:
    sparse, x = sparsifiner.sparsify(tiny_vit().eval(), keep_rate=0.2), images(1, 3, 32, 32)
    with torch.no_grad(), always_sparse(sparse):
        sparsifiner.set_keep_rate(sparse, 0.4)
        with record(sparse) as seen:
            sparse(x)
        assert all(item.connectivity is not None for item in seen.values())
    with torch.no_grad(), record(sparse) as seen:
        sparse(x)
    assert all(item.connectivity is None for item in seen.values())
