"""Long sequences: blocks of keys are scored first, single keys in the best blocks only."""

from __future__ import annotations

import pytest
import torch
from choosing import Chooser, chooser
from native_levels import LEVELS, ROUNDING_LEVELS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner import SparsifinerConfig, Tiling, sparsify
from sparsifiner._utils.photos import bundled_photos, preprocess
from sparsifiner.measure.fidelity import measure_fidelity
from sparsifiner.models import load_model
from sparsifiner.ops import cpu
from sparsifiner.predictors import PooledConfig
from sparsifiner.predictors.screening import num_screened_blocks


def build(tiling: Tiling, **changes: object) -> Chooser:
    config = SparsifinerConfig.from_dict({"keep_rate": 0.1, "query_tile": tiling.tile, "screen_from": 0, **changes})
    return chooser(config, tiling, num_heads=2, head_dim=32)


def smooth_qkv(tiling: Tiling, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose neighbours resemble each other, as those of images do."""
    g = torch.Generator().manual_seed(0)
    rows, columns = tiling.grid
    coarse = torch.randn(3 * batch * 2, 32, -(-rows // 4), -(-columns // 4), generator=g)
    patches = torch.nn.functional.interpolate(coarse, size=tiling.grid, mode="bilinear") * 2
    patches = (patches + 0.4 * torch.randn(patches.shape, generator=g)).flatten(2).mT
    prefix = torch.randn(3 * batch * 2, tiling.num_prefix_tokens, 32, generator=g)
    q, k, v = torch.cat([prefix, patches], dim=1).unflatten(0, (3, batch, 2))
    return q, k, v


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"reduction": "sum"}, {"tail": None}, {"keep_rate": 0.04}])
@pytest.mark.parametrize(("grid", "tile"), [((24, 24), (4, 4)), ((19, 23), (4, 8)), ((13, 11), (1, 1))])
def test_native_kernels_choose_what_torch_chooses(level, dtype, changes, grid, tile) -> None:
    tiling = Tiling(grid, tile, 1)
    predictor = build(tiling, **changes)
    assert predictor.num_screened_blocks(tiling) is not None
    q, k, v = (x.to(dtype) for x in smooth_qkv(tiling))
    with cpu.force_level(level):
        native = predictor(q, k, v, tiling, 32**-0.5)
    stepwise = predictor.by_torch(q.float(), k.float(), v.float(), tiling, 32**-0.5)
    assert native.indices.shape == stepwise.indices.shape
    assert (native.indices.diff(dim=-1) > 0).all()
    same = (native.to_mask() == stepwise.to_mask()).double().mean()
    # Rounded scores take keys for each other whose scores are nearly equal.
    rounded = dtype == torch.bfloat16 or level in ROUNDING_LEVELS
    assert same >= (0.985 if rounded else 0.9999)


def test_nothing_is_screened_where_it_is_not_meant_to_be() -> None:
    tiling = Tiling((24, 24), (4, 4), 1)
    assert build(tiling).num_screened_blocks(tiling) == num_screened_blocks(tiling, 58) == 44
    assert build(tiling, screen_from=577).num_screened_blocks(tiling) is None
    assert build(tiling, screen_from=576).num_screened_blocks(tiling) == 44
    assert build(tiling, screen_from=None).num_screened_blocks(tiling) is None
    assert build(tiling, keep_rate=0.2).num_screened_blocks(tiling) is None
    assert build(tiling, keep_prefix=False).num_screened_blocks(tiling) is None  # the class token is in no block
    assert SparsifinerConfig().predictor.screen_from == 8192
    thin = Tiling((1, 500), (1, 4), 0)
    assert num_screened_blocks(thin, 10) is None


def test_an_attention_bias_is_part_of_every_score() -> None:
    """The mean of a block says nothing of its keys' biases, so every key is scored."""
    tiling = Tiling((12, 12), (4, 4), 0)
    q, k, v = smooth_qkv(tiling)
    bias = torch.zeros(1, 1, 144, 144)
    bias[..., 100] = 50.0
    chosen = build(tiling)(q, k, v, tiling, 32**-0.5, bias)
    assert torch.equal(chosen.to_mask(), build(tiling, screen_from=None)(q, k, v, tiling, 32**-0.5, bias).to_mask())
    assert (chosen.indices == 100).any(-1).all()


@pytest.mark.parametrize("level", [*LEVELS, None])
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_extreme_keys(level, reduction) -> None:
    """One key whose logit is 10,000 among three that oppose it: more than its block's mean and spread foretell."""
    tiling = Tiling((24, 24), (4, 4), 1)
    predictor, (q, k, v) = build(tiling, reduction=reduction), smooth_qkv(tiling, batch=1)
    q = q.abs() + 0.1
    k[:, :, 1:] *= 0.01
    k[:, :, 100] = 1e4
    k[:, :, [101, 124, 125]] = -1e4
    if level is None:
        chosen = predictor.by_torch(q, k, v, tiling, 32**-0.5)
    else:
        with cpu.force_level(level):
            chosen = predictor(q, k, v, tiling, 32**-0.5)
    assert chosen.indices.shape[-1] == 1 + predictor.num_keep(tiling)
    assert (chosen.indices.diff(dim=-1) > 0).all()
    assert ((chosen.indices >= 0) & (chosen.indices < tiling.num_tokens)).all()
    assert (chosen.indices == 100).any(-1).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_blocks_that_stick_out_hold_no_keys_even_where_no_key_has_a_probability(level, reduction) -> None:
    """Sharp attention leaves most keys a probability of exactly 0, as a place outside the grid has."""
    tiling = Tiling((25, 25), (4, 4), 1)
    predictor, (q, k, v) = build(tiling, reduction=reduction), smooth_qkv(tiling, batch=1)
    with cpu.force_level(level):
        chosen = predictor(20 * q, 20 * k, v, tiling, 32**-0.5)
    assert (chosen.indices.diff(dim=-1) > 0).all()
    assert ((chosen.indices >= 0) & (chosen.indices < tiling.num_tokens)).all()


@pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
def test_flops_count_means_and_the_keys_that_were_scored() -> None:
    tiling = Tiling((24, 24), (4, 4), 1)
    predictor, (q, k, v) = build(tiling, query_refine=0), smooth_qkv(tiling, batch=1)
    with FlopCounterMode(display=False) as counted:
        predictor(q, k, v, tiling, 32**-0.5)
    scored = counted.get_flop_counts()["Global"][torch.ops.sparsifiner.screened_keys]
    assert scored == 2 * predictor.score_macs(2, 32, tiling) == 2 * 2 * 32 * 36 * 4 * (144 + 4 * 44)


@pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
def test_library_contract_and_refusals() -> None:
    pooled, k, weight = torch.randn(1, 2, 3, 4, 32), torch.randn(1, 2, 101, 32), torch.rand(1, 2, 100)
    op = torch.ops.sparsifiner.screened_keys
    arguments = (pooled, k, weight, 10, 10, 2, 2, 1, 9, 20, 0.2, False, "native")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    for changed, message in (
        ({8: 26}, "26 of 25 blocks"),
        ({8: 4}, "may hold fewer than 20 keys"),
        ({5: 4}, "a block must have 4 places"),
        ({3: 11}, "must be the patches of the grid"),
        ({9: 0}, "cannot select 0 of 100 keys"),
    ):
        broken = [changed.get(i, x) for i, x in enumerate(arguments)]
        with pytest.raises(ValueError, match=message):
            op(*broken)
    broken = op(pooled, k * float("nan"), *arguments[2:])  # any keys will do, every output is NaN
    assert ((broken >= 0) & (broken < 101)).all()
    assert (broken.diff(dim=-1) > 0).all()


def test_features_stay_as_close_to_the_dense_ones_as_with_every_key_scored() -> None:
    model = load_model("builtin", img_size=(504, 504))
    photos = bundled_photos(2).photos
    images = torch.stack([preprocess(model, (504, 504))(photo.image) for photo in photos])
    errors = {}
    for screen_from in (None, 0):
        sparse = sparsify(
            model, SparsifinerConfig(keep_rate=0.1, mode="sparse", predictor=PooledConfig(screen_from=screen_from))
        )
        measured = measure_fidelity(model, sparse, images, [photo.name for photo in photos])
        errors[screen_from] = measured.mean("patch_l2")
    assert errors[None] is not None
    assert errors[0] is not None
    assert errors[0] != errors[None]
    assert errors[0] <= 1.1 * errors[None]
