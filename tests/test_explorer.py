"""The explorer's numbers and pictures, without its page."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from PIL import Image

import sparsifiner
from sparsifiner import SparsifinerConfig, SparsifinerError
from sparsifiner._utils.photos import bundled_photos
from sparsifiner.convert import always_sparse
from sparsifiner.explorer.figures import cost_note, cost_rows
from sparsifiner.explorer.html import render_figures, render_viewer
from sparsifiner.explorer.look import Explorer
from sparsifiner.explorer.panels import query_view
from sparsifiner.explorer.query import kept_mass, query_attention
from sparsifiner.ops import sparse_attention
from sparsifiner.recording import record
from sparsifiner.report.maps import attention_maps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo() -> Image.Image:
    return bundled_photos(1).photos[0].image


@pytest.fixture
def pair(tiny_vit):
    """A model on 8x8 patches with a class token, and its sparse version, which by itself would run dense."""
    dense = tiny_vit()
    return dense, sparsifiner.sparsify(dense, SparsifinerConfig(keep_rate=0.3, attention_dtype="float32"))


@pytest.fixture
def explorer(pair):
    made = Explorer(*pair)
    yield made
    made.close()


def test_weights_of_a_query_are_those_the_operator_uses(pair, explorer, photo):
    """Weights times values, tail included, are the layer's own output for that query."""
    look = explorer.look(photo, "photo")
    _, sparse = pair
    with torch.inference_mode(), always_sparse(sparse), record(sparse, tensors=True) as seen:
        sparse(look.dense.x)
    for number, did in enumerate(seen.values()):
        own = look.layers[number]
        expected = sparse_attention(did.q, did.k, did.v, own.connectivity, tail=own.tail, scale=own.scale)[0]
        for row, column in ((0, 0), (3, 5), (7, 7)):
            found = query_attention(look, number, (row, column))
            got = (found.sparse[..., None] * did.v[0]).sum(1) + (found.pooled[..., None] * own.tail.v[0]).sum(1)
            torch.testing.assert_close(got, expected[:, 1 + 8 * row + column], rtol=1e-4, atol=1e-5)
            assert not (found.sparse[~found.kept] > 0).any()
            torch.testing.assert_close(found.sparse.sum(-1) + found.tail_share, torch.ones(3))


def test_kept_keys_and_dense_attention_are_those_of_the_report(pair, explorer, photo):
    look = explorer.look(photo, "photo")
    with always_sparse(pair[1]):
        maps = attention_maps(*pair, look.dense.x, queries=[(2, 6)], layers=[0, 1])
    for number, expected in enumerate(maps.layers):
        found = query_attention(look, number, (2, 6))
        torch.testing.assert_close(found.kept[:, 1:].float().mean(0).view(8, 8), expected.kept[0])
        torch.testing.assert_close(found.dense[:, 1:].mean(0).view(8, 8), expected.attention[0])
        assert found.mass.mean() == pytest.approx(expected.mass[0].item())
        torch.testing.assert_close(kept_mass(look, (2, 6))[number], found.mass)
        assert found.tile == expected.tiles[0] == (0, 4, 4, 4)


def test_a_patch_without_a_tail_and_with_every_key_has_dense_weights(tiny_vit, photo):
    dense = tiny_vit()
    sparse = sparsifiner.sparsify(dense, SparsifinerConfig(keep_rate=1.0, tail=None, mode="sparse"))
    explorer = Explorer(dense, sparse)
    look = explorer.look(photo, "photo")
    found = query_attention(look, 1, (4, 4))
    assert found.kept.all()
    assert found.pooled.shape == (3, 0)
    torch.testing.assert_close(found.sparse, found.dense, rtol=1e-4, atol=1e-6)
    assert look.difference.max() < 1e-4
    assert look.dense_by_itself == 0
    assert "no tail" in query_view(look, (4, 4), 1).panels[2].caption
    explorer.close()


def test_the_difference_is_that_of_the_features(pair, explorer, photo):
    look = explorer.look(photo, "photo", 0.1)
    dense, sparse = pair
    sparsifiner.set_keep_rate(sparse, 0.1)
    with torch.inference_mode(), always_sparse(sparse):
        a, b = dense.forward_features(look.dense.x)[0, 1:], sparse.forward_features(look.dense.x)[0, 1:]
    torch.testing.assert_close(look.difference.flatten(), (a - b).norm(dim=-1) / a.norm(dim=-1), rtol=1e-3, atol=1e-5)
    assert look.fidelity.patch_l2 == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-3)


def test_looks_at_different_rates_do_not_disturb_each_other(explorer, photo):
    """Eight callers at once get what each gets alone."""
    rates = [0.05, 0.2, 0.5, 0.9] * 2
    alone = {rate: explorer.look(photo, "photo", rate) for rate in set(rates)}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rate: explorer.look(photo, "photo", rate), rates))
    for rate, look in zip(rates, together, strict=True):
        assert look.keep_rate == rate
        torch.testing.assert_close(look.difference, alone[rate].difference, rtol=0, atol=0)
    assert len({look.layers[0].connectivity.num_keys for look in together}) == 4


def test_a_second_look_at_an_image_uses_its_dense_half_again(explorer, photo):
    first = explorer.look(photo, "photo")
    assert explorer.look(photo, "photo", 0.5, first).dense is first.dense
    assert explorer.look(photo.copy(), "other", 0.5, first).dense is not first.dense


def test_costs_are_counted_and_measured(pair, explorer, photo):
    look = explorer.look(photo, "photo", 0.1)
    *_, before, last = explorer.measure(look, rounds=2)
    assert len(before.timings.dense) == 1
    assert len(last.timings.dense) == len(last.timings.sparse) == 2
    assert min(last.timings.dense) > 0
    sparsifiner.set_keep_rate(pair[1], 0.1)
    with always_sparse(pair[1]):
        expected = [sparsifiner.count_flops(model, look.dense.x) for model in pair]
    assert [last.dense, last.sparse] == expected
    rows = cost_rows(last)
    assert rows[1].dense == f"{expected[0].total_macs / 1e9:.2f}"
    assert rows[2].gain == f"{expected[0].mhsa_full_macs / expected[1].mhsa_full_macs:.2f}x"
    assert look.dense_by_itself == 2
    assert "2 of 2 layers dense" in cost_note(look, last, 2)
    assert "measuring, 1 of 2" in cost_note(look, before, 2)


def test_pictures_show_patches_where_they_are(explorer, photo):
    """Patches that no head keeps are dark, and those that all keep are the photograph's own."""
    look = explorer.look(photo, "photo")
    view = query_view(look, (3, 5), 0)
    assert [panel.key for panel in view.panels] == ["photo", "kept", "tail", "dense", "difference"]
    assert {panel.image.size for panel in view.panels} == {(32, 32)}
    kept = query_attention(look, 0, (3, 5)).kept[:, 1:].float().mean(0).view(8, 8)
    shown, original = numpy.asarray(view.panels[1].image).astype(int), numpy.asarray(look.image).astype(int)
    for row in range(8):
        for column in range(8):
            place = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
            if kept[row, column] == 1:
                assert abs(shown[place] - original[place]).max() <= 1
            elif kept[row, column] == 0:
                assert (shown[place] == [15, 18, 23]).all()
    assert {0.0} < set(kept.flatten().tolist())
    one, other = (query_view(look, (3, 5), 0, head) for head in (0, 1))
    assert one.panels[1].image.tobytes() != other.panels[1].image.tobytes()


def test_patches_layers_and_heads_outside_are_moved_inside(explorer, photo):
    look = explorer.look(photo, "photo")
    view = query_view(look, (99, -1), 99, 99)
    assert (view.patch, view.layer, view.head) == ((7, 0), 1, None)


def test_names_are_escaped(explorer, photo):
    look = explorer.look(photo, "<img src=x onerror=alert(1)>.jpg")
    cost = next(explorer.measure(look))
    assert "<img src=x" not in render_figures(look, cost, 3)
    html = render_viewer(look, (1, 2), 0, None)
    assert html.count("<figure") == 6
    assert html.count("data-layer=") == 6


def test_a_model_with_rates_of_its_own_keeps_them_until_asked(tiny_vit, photo):
    dense = tiny_vit()
    explorer = Explorer(dense, sparsifiner.sparsify(dense, keep_rate=[0.1, 0.5]))
    assert explorer.keep_rate == pytest.approx(0.3)
    look = explorer.look(photo, "photo", 0.7)
    assert look.layers[0].connectivity.num_keys == look.layers[1].connectivity.num_keys
    look = explorer.look(photo, "photo")
    assert look.layers[0].connectivity.num_keys < look.layers[1].connectivity.num_keys
    explorer.close()


def test_models_that_show_nothing_are_refused(tiny_vit):
    dense = tiny_vit()
    with pytest.raises(SparsifinerError, match="attends densely by its settings"):
        Explorer(dense, sparsifiner.sparsify(dense, SparsifinerConfig(mode="dense")))
    pruned = sparsifiner.prune_tokens(sparsifiner.sparsify(dense), keep_rate=0.5, layers=(1,))
    with pytest.raises(SparsifinerError, match="prunes or merges"):
        Explorer(dense, pruned)
