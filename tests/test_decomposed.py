"""Biases of rows and columns folded into queries and keys, and SAM's encoders that have them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import lively
from homes import first_tensor, pixels
from repositories import MapAttention, MapViT
from torch import nn

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.attention.decomposed import fold_bias, folded_width
from sparsifiner.errors import SparsifinerError
from sparsifiner.functional import scaled_dot_product_attention

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))


def problem(dtype=torch.float64, grid=(6, 10), prefix=3, width=16):
    """q, k, v, a bias of rows and one of columns, and the N x N bias that they mean."""
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + grid[0] * grid[1]
    qkv = torch.randn(3, 2, 2, tokens, width, generator=generator, dtype=torch.float64)
    rows, columns = (torch.randn(2, 2, tokens, side, generator=generator, dtype=torch.float64) * 2 for side in grid)
    bias = F.pad((rows[..., :, None] + columns[..., None, :]).flatten(-2), (prefix, 0))
    return [x.to(dtype) for x in (*qkv.unbind(0), rows, columns)], bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folding_is_exact(dtype):
    tensors, bias = problem(dtype)
    q, k, v, rows, columns = tensors
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=bias, scale=0.3)
    q, k, v = fold_bias(q, k, v, rows, columns, 0.3, 3)
    assert q.shape == k.shape == v.shape == (2, 2, 63, folded_width(16, (6, 10)))
    got = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)[..., :16]
    # Rounding the tables, which are divided by the scale and stored in dtype, is all that is lost.
    assert (got - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


def test_the_function_takes_two_tables_and_differentiates_them():
    (q, k, v, rows, columns), bias = problem()
    arguments = dict(grid=(6, 10), num_prefix_tokens=3, scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    exact = SPARSE.replace(keep_rate=1.0, tail=None)
    for config in (exact, SparsifinerConfig()):
        got = scaled_dot_product_attention(q, k, v, attn_bias=(rows, columns), config=config, **arguments)
        assert got.shape == want.shape
        assert (got - want).abs().max() < 1e-12
    # At a low keep rate it is what the N x N bias gives for the same keys.
    sparse, seen = scaled_dot_product_attention(
        q, k, v, attn_bias=(rows, columns), config=SPARSE.replace(tail=None), return_connectivity=True, **arguments
    )
    again = sparsifiner.sparse_attention(q, k, v, seen, attn_bias=bias, scale=0.3, backend="reference")
    assert (sparse - again).abs().max() < 1e-12
    rows.requires_grad_(), columns.requires_grad_()
    scaled_dot_product_attention(q, k, v, attn_bias=(rows, columns), config=SPARSE, **arguments).sum().backward()
    assert rows.grad.abs().max() > 0
    assert columns.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("biases", "more", "message"),
    [
        (lambda r, c: (c, r), {}, r"that of rows must have shape \[2, 2, 63, 6\], got \[2, 2, 63, 10\]"),
        (lambda r, c: (r, c.long()), {}, "that of columns .* torch.int64"),
        (lambda r, c: (r, c), dict(grid=(2, 3, 10), num_prefix_tokens=3), "patches of one frame"),
    ],
)
def test_wrong_tables_are_one_line(biases, more, message):
    (q, k, v, rows, columns), _ = problem()
    arguments = dict(grid=(6, 10), num_prefix_tokens=3) | more
    with pytest.raises(SparsifinerError, match=message):
        scaled_dot_product_attention(q, k, v, attn_bias=biases(rows, columns), **arguments)


def samvit() -> nn.Module:
    return timm.create_model(
        "samvit_base_patch16", img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2,
        global_attn_indexes=(0, 2), window_size=4,
    )  # fmt: skip


def sam(attention: str = "sdpa", whole: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_dim=48, image_size=64, patch_size=8,
        window_size=4, global_attn_indexes=[0, 2], output_channels=16, num_pos_feats=8,
    )  # fmt: skip
    if not whole:
        return transformers.SamVisionModel._from_config(vision, attn_implementation=attention)
    config = transformers.SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16, attention_downsample_rate=1),
    )  # fmt: skip
    return transformers.SamModel._from_config(config, attn_implementation=attention)


POINTS = dict(input_points=torch.tensor([[[[5.0, 6.0]]]] * 2))
MODELS = {
    "timm samvit": (samvit, lambda model, x: model.forward_features(x)),
    "segment-anything": (MapViT, lambda model, x: model(x)),
    "transformers SAM, sdpa": (sam, lambda model, x: first_tensor(model(x))),
    "transformers SAM, eager": (lambda: sam("eager"), lambda model, x: first_tensor(model(x))),
    "transformers SAM with prompts": (lambda: sam(whole=True), lambda model, x: model(x, **POINTS).pred_masks),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_encoders_are_equal_at_keep_rate_1_and_dense_again(name):
    build, run = MODELS[name]
    model, x = lively(build()), pixels(2, 3, 64, 64)
    with torch.no_grad():
        dense = run(model, x)
        sparse = sparsifiner.sparsify(model, SPARSE)
        assert list(sparse.state_dict()) == list(model.state_dict())
        assert len(sparsifiner.conversion(sparse).swapped) == 2
        windows = [item for item in sparsifiner.conversion(sparse).stayed if "windows" in item.reason]
        assert len(windows) == 1
        with sparsifiner.record(sparse) as seen:
            pruned = run(sparse, x)
        assert all(record.attn_bias is None for record in seen.values())
        assert (pruned - dense).norm() > 1e-4 * dense.norm()
        sparsifiner.set_keep_rate(sparse, 1.0)
        assert (run(sparse, x) - dense).norm() < 1e-5 * dense.norm()
        assert torch.equal(run(sparsifiner.densify(copy.deepcopy(sparse)), x), dense)


@pytest.mark.parametrize("name", ["timm samvit", "segment-anything"])
def test_other_sizes_resize_the_tables(name):
    build, run = MODELS[name]
    model, x = lively(build()), pixels(1, 3, 48, 80)
    sparse = sparsifiner.sparsify(model, SPARSE.replace(keep_rate=1.0))
    with torch.no_grad():
        assert (run(sparse, x) - run(model, x)).norm() < 1e-5 * run(model, x).norm()


@pytest.mark.filterwarnings("ignore")
def test_transformers_reloads_sam_sparse(tmp_path):
    import transformers

    sparse, x = sparsifiner.sparsify(lively(sam()), SPARSE), pixels(2, 3, 64, 64)
    sparse.save_pretrained(tmp_path / "sparse")
    lively(sam()).save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        want = first_tensor(sparse(x))
        for load in (transformers.SamVisionModel.from_pretrained, sparsifiner.from_pretrained):
            assert torch.equal(first_tensor(load(tmp_path / "sparse")(x)), want)
    asked = transformers.AutoModel.from_pretrained(tmp_path / "dense", attn_implementation="sparsifiner")
    assert len(sparsifiner.sparse_layers(asked)) == 2


def test_a_training_step():
    sparse = sparsifiner.sparsify(lively(MapViT()), SPARSE).train()
    sparse(pixels(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


class ShiftedAttention(MapAttention):
    """Counts distances from the other side, which a table of zeros would hide."""

    def distances(self, side):
        return super().distances(side).flip(0)


def test_tables_of_zeros_hide_no_difference():
    model = MapViT(attention=ShiftedAttention)
    assert not any(p.any() for name, p in model.named_parameters() if "rel_pos" in name)
    with pytest.raises(SparsifinerError, match="on random tokens its output is not"):
        sparsifiner.sparsify(model, SPARSE)


def test_learned_predictors_are_refused_in_one_line():
    with pytest.raises(SparsifinerError, match="'lowrank' has weights for heads of one width"):
        sparsifiner.sparsify(MapViT(), SPARSE.replace(predictor="lowrank"))
