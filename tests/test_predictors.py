"""What each predictor keeps, and that instance-dependent ones find what attention needs."""

from __future__ import annotations

import weakref

import pytest
import torch
from choosing import Chooser, chooser
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner import SparsifinerConfig, Tiling
from sparsifiner.attention import AttentionInputs, build_predictor
from sparsifiner.geometry.counting import num_kept
from sparsifiner.ops.tail import group_keys
from sparsifiner.predictors import LowRankPredictor, base

NAMES = ["pooled", "lowrank", "oracle", "local", "strided", "random"]


def tensors(tiling: Tiling, heads: int = 2, width: int = 16, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, heads, tiling.num_tokens, width, generator=g) * 2


def build(name: str, tiling: Tiling, heads: int = 2, **changes: object):
    config = SparsifinerConfig.from_dict({"predictor": name, "query_tile": tiling.tile, "tail": (2, 2), **changes})
    return chooser(config, tiling, num_heads=heads, head_dim=16)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    prefix=st.integers(0, 2),
    keep_rate=st.floats(0.01, 1.0),
    keep_prefix=st.booleans(),
)
def test_keeps_exactly_the_budget_without_duplicates(name, grid, tile, prefix, keep_rate, keep_prefix) -> None:
    tiling = Tiling(grid, tile, prefix)
    q, k, v = tensors(tiling)
    connectivity = build(name, tiling, keep_rate=keep_rate, keep_prefix=keep_prefix, reduce_n_factor=2)(
        q, k, v, tiling, 0.25
    )
    always = prefix if keep_prefix else 0
    want = always + num_kept(keep_rate, tiling.num_tokens - always)
    assert connectivity.indices.shape == (2, 2, tiling.num_tiles, want)
    assert connectivity.indices.dtype == torch.int32
    assert (connectivity.to_mask()[:, :, prefix:].sum(-1) == want).all()
    assert connectivity.indices[..., :always].tolist() == [[[list(range(always))] * tiling.num_tiles] * 2] * 2


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling((9, 7), (4, 2), 1)
    q, k, v = tensors(tiling)
    predictor = build(name, tiling, keep_rate=0.3)
    whole = predictor(q, k, v, tiling, 0.25).to_mask()
    monkeypatch.setattr(base, "CHUNK_BYTES", 1)
    assert torch.equal(predictor(q, k, v, tiling, 0.25).to_mask(), whole)


def test_oracle_keeps_the_most_attention_any_choice_could() -> None:
    tiling = Tiling((6, 6), (3, 3), 1)
    q, k, v = tensors(tiling)
    attention = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)

    def kept_mass(name: str) -> float:
        mask = build(name, tiling, keep_rate=0.2)(q, k, v, tiling, 0.25).to_mask()
        return (attention * mask)[:, :, 1:].sum(-1).mean().item()

    masses = {name: kept_mass(name) for name in NAMES}
    assert max(masses, key=masses.__getitem__) == "oracle"
    assert masses["pooled"] > max(masses["local"], masses["strided"], masses["random"]) + 0.05


def test_pooled_with_single_queries_is_the_oracle() -> None:
    tiling = Tiling((5, 6), (1, 1), 1)
    # Steps of 1/32, the largest of each row 127/32: some CPU levels round to bfloat16 or bytes before they score.
    q, k, v = (x.mul(32).round().clamp(-127, 127) / 32 for x in tensors(tiling))
    q[..., 0] = k[..., 0] = 127 / 32
    pooled = build("pooled", tiling, keep_rate=0.3, tail=None)(q, k, v, tiling, 0.25)
    assert torch.equal(pooled.to_mask(), build("oracle", tiling, keep_rate=0.3)(q, k, v, tiling, 0.25).to_mask())


def test_pooled_spends_the_budget_where_the_tail_would_be_wrong() -> None:
    """Of equally attended keys those are kept whose value the pooled one misrepresents."""
    tiling = Tiling((4, 4), (4, 4), 0)
    q, k, v = torch.zeros(3, 1, 1, 16, 8)
    v[..., 3, 0] = 1.0
    v[..., 9, 1] = 2.0
    kept = build("pooled", tiling, keep_rate=2 / 16, tail=(4, 4))(q, k, v, tiling, 1.0)
    assert sorted(kept.indices.flatten().tolist()) == [3, 9]


def test_pooled_groups_gather_like_queries() -> None:
    """Two kinds of queries in a checkerboard: sub-block means blur them, two Lloyd steps part them."""
    tiling = Tiling((4, 4), (4, 4), 0)
    kind = (torch.arange(16) // 4 + torch.arange(16) % 4) % 2
    q = torch.zeros(1, 1, 16, 8)
    q[0, 0, :, 0] = torch.where(kind == 0, 5.0, -5.0) + 0.1 * torch.randn(
        16, generator=torch.Generator().manual_seed(0)
    )
    blurred = build("pooled", tiling, query_refine=0).groups(q, tiling) @ q
    parted = build("pooled", tiling, query_refine=2).groups(q, tiling) @ q
    assert blurred[..., 0].abs().max() < 1
    assert sorted(parted[0, 0, 0, :, 0].round().unique().tolist())[0] == -5.0
    assert parted[..., 0].max().round() == 5.0
    weights = build("pooled", tiling).groups(q, tiling)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("name", ["pooled", "oracle"])
def test_attention_biases_steer_the_choice(name: str) -> None:
    tiling = Tiling((4, 4), (2, 2), 1)
    q, k, v = tensors(tiling)
    bias = torch.zeros(1, 1, 17, 17)
    bias[..., 5] = 100.0
    mask = build(name, tiling, keep_rate=0.05)(q, k, v, tiling, 0.25, bias).to_mask()
    assert mask[..., 5].all()


def test_fixed_patterns_ignore_the_image_and_random_has_a_seed() -> None:
    tiling = Tiling((8, 8), (4, 4), 1)
    for name in ("local", "strided", "random"):
        masks = [build(name, tiling)(*tensors(tiling, seed=seed), tiling, 0.25).to_mask() for seed in (0, 1)]
        assert torch.equal(*masks)
    seeds = [build("random", tiling, seed=seed)(*tensors(tiling), tiling, 0.25).to_mask() for seed in (0, 1)]
    assert not torch.equal(*seeds)
    heads = seeds[0]
    assert not torch.equal(heads[:, 0], heads[:, 1])


def test_random_is_uniform() -> None:
    tiling = Tiling((16, 16), (1, 1), 0)
    kept = build("random", tiling, keep_rate=0.25)(*tensors(tiling), tiling, 0.25).to_mask()[0]
    per_key = kept.float().mean((0, 1))
    # 512 draws per key: standard deviation 0.019.
    assert (per_key - 0.25).abs().max() < 5 * 0.019


def test_local_keeps_the_neighbourhood() -> None:
    tiling = Tiling((9, 9), (3, 3), 0)
    mask = build("local", tiling, keep_rate=9 / 81)(*tensors(tiling), tiling, 0.25).to_mask()[0, 0]
    tiles = tiling.tile_of_patch(torch.device("cpu"))
    assert torch.equal(mask, tiles[:, None] == tiles[None, :])


def test_strided_keeps_even_steps() -> None:
    tiling = Tiling((4, 8), (4, 4), 0)
    mask = build("strided", tiling, keep_rate=0.25)(*tensors(tiling), tiling, 0.25).to_mask()[0, 0]
    for row in mask:
        assert row.nonzero().flatten().diff().tolist() == [4] * 7


def lowrank(tiling: Tiling, **changes: object) -> Chooser:
    torch.manual_seed(0)
    predictor = build("lowrank", tiling, **changes)
    torch.nn.init.normal_(predictor.w_down)
    if predictor.w_up is not None:
        torch.nn.init.normal_(predictor.w_up)
    predictor.eval()
    return predictor


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("tail", [None, (2, 2)])
def test_lowrank_tiles_merge_their_queries_and_weigh_by_what_a_tail_gets_wrong(
    tail: tuple[int, int] | None, reduction: str
) -> None:
    tiling = Tiling((6, 5), (2, 3), 1)
    q, k, v = tensors(tiling)
    predictor = lowrank(tiling, keep_rate=0.2, tail=tail, reduction=reduction)
    with torch.no_grad():
        coef = predictor.coefficients(q, k, tiling)
        tokens = tiling.tokens(q.device).long()  # [T, S]
        rows = coef[:, :, tokens.clamp(min=1) - 1] * (tokens >= 0)[..., None]
        merged = rows.amax(3) if reduction == "max" else rows.sum(3)
        per_tile = (merged @ predictor.basis(tiling).mT)[..., 1:]
    if tail is not None:
        groups = group_keys(k, v, tiling.regions(tail), predictor.config.tail.refine)
        stand_in = groups.of_patches(groups.v)
        per_tile = per_tile * (v[:, :, 1:] - stand_in).norm(dim=-1)[:, :, None]
    want = per_tile.topk(predictor(q, k, v, tiling, 0.25).num_keys - 1, dim=-1).indices + 1
    got = predictor(q, k, v, tiling, 0.25).indices[..., 1:]
    assert torch.equal(got.sort(-1).values.long(), want.sort(-1).values)


def test_lowrank_basis_follows_the_grid() -> None:
    """A basis that is a smooth function of the position stays that function on another grid."""
    small, large = Tiling((8, 8), (4, 4), 1), Tiling((12, 20), (4, 4), 1)
    predictor = lowrank(small)
    y, x = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 8), indexing="ij")
    with torch.no_grad():
        predictor.w_up[1:] = (y + 2 * x).flatten()[:, None]
        resized = predictor.resampled(predictor.w_up, large, total=False)
        total = predictor.resampled(predictor.w_down, large, total=True)
    assert resized.shape == (241, predictor.w_up.shape[1])
    image = resized[1:, 0].view(12, 20)
    assert image[0, 0].item() == pytest.approx(0.0, abs=0.1)
    assert image[-1, -1].item() == pytest.approx(3.0, abs=0.1)
    assert (image.diff(dim=0) > 0).all()
    assert (image.diff(dim=1) > 0).all()
    assert torch.equal(resized[0], predictor.w_up[0])
    torch.testing.assert_close(total[1:].sum(0), predictor.w_down[1:].sum(0), rtol=0.1, atol=1.0)
    assert predictor.resampled(predictor.w_up, small, total=True) is predictor.w_up
    q, k, v = tensors(large)
    assert predictor(q, k, v, large, 0.25).indices.shape[2] == large.num_tiles


def test_lowrank_threshold_keeps_what_scores_above_it() -> None:
    tiling = Tiling((5, 5), (1, 1), 1)
    q, k, v = tensors(tiling)
    predictor = lowrank(tiling, score_threshold=0.8, keep_prefix=False, coef_topk=None, coef_threshold=0.1)
    with torch.no_grad():
        want = predictor.token_scores(q, k, tiling) > 0.8
        connectivity = predictor(q, k, v, tiling, 0.25)
    assert torch.equal(connectivity.to_mask()[:, :, 1:], want)
    assert connectivity.num_keys == want.sum(-1).max()


def test_a_threshold_holds_the_scores_of_one_chunk_at_a_time() -> None:
    tiling = Tiling((6, 6), (1, 1), 1)
    q, k, _ = tensors(tiling)
    predictor = lowrank(tiling, score_threshold=0.8, keep_prefix=False, coef_topk=None)
    with torch.no_grad():
        score, _ = predictor.tile_scores(AttentionInputs(q, k, q, tiling, 0.25), None)
        whole = predictor.select(score, [(0, 36)], tiling)
        held: list[weakref.ref[torch.Tensor]] = []

        def watched(start: int, stop: int) -> torch.Tensor:
            assert sum(part() is not None for part in held) <= 1
            part = score(start, stop)
            held.append(weakref.ref(part))
            return part

        chunked = predictor.select(watched, [(start, start + 4) for start in range(0, 36, 4)], tiling)
    assert torch.equal(chunked.to_mask(), whole.to_mask())


def test_lowrank_reconstruction_uses_the_signed_basis_and_all_coefficients() -> None:
    tiling = Tiling((4, 4), (1, 1), 1)
    q, k, _ = tensors(tiling)
    predictor = lowrank(tiling, attn_recon=True, coef_topk=2, n_down=8)
    assert (predictor.coefficients(q, k, tiling) > 0).sum(-1).eq(2).all()
    assert (predictor.basis(tiling) >= 0).all()
    predictor.train()
    assert (predictor.coefficients(q, k, tiling) > 0).all()
    assert (predictor.basis(tiling) < 0).any()
    loss = predictor.token_scores(q, k, tiling).square().sum()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in predictor.parameters())


def test_lowrank_settings() -> None:
    tiling = Tiling((14, 14), (1, 1), 1)
    paper = build_predictor(SparsifinerConfig.paper(), num_heads=6, head_dim=64, grid=(14, 14), num_prefix_tokens=1)
    assert isinstance(paper, LowRankPredictor)
    assert paper.w_down.shape == paper.w_up.shape == (197, 32)
    assert paper.q_proj.weight.shape == (32, 64)
    assert paper.scale == pytest.approx(6**-0.5)
    assert lowrank(tiling, share_basis=True).w_up is None
    assert lowrank(tiling, reduce_c_factor=2).scale == pytest.approx(8**-0.5)
    assert lowrank(tiling, scale=0.3).scale == 0.3
    with pytest.raises(ValueError, match="0 basis rows of width 16 for 10 tokens"):
        lowrank(Tiling((3, 3), (1, 1), 1), reduce_n_factor=11)


def test_a_predictor_serves_one_layer() -> None:
    with pytest.raises(ValueError, match="give it config.for_layer"):
        build("oracle", Tiling((4, 4), (2, 2)), keep_rate=(0.1, 0.2))
