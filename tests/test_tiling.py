"""Index tensors that are kept between calls are real, whatever mode made the first call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sparsifiner import SparsifinerConfig, prune_tokens, sparsify
from sparsifiner.geometry.subset import z_order
from sparsifiner.geometry.tiling import Tiling

CPU = torch.device("cpu")


def make_plain(vit: nn.Module) -> nn.Module:
    return sparsify(vit, SparsifinerConfig(keep_rate=0.2, query_tile=(3, 2), mode="sparse", tail=(3, 3)))


def make_pruned(vit: nn.Module) -> nn.Module:
    return make_plain(prune_tokens(vit, keep_rate=0.7, layers=(1,)))


@pytest.mark.parametrize("make", [make_plain, make_pruned])
def test_a_forward_pass_of_fake_tensors_leaves_none_behind(
    make: Callable[[nn.Module], nn.Module], tiny_vit: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    model, x = make(tiny_vit(img_size=44)), images(1, 3, 44, 44)  # a grid that no other test has
    with torch.no_grad():
        for _ in range(2):  # nothing is kept at first, then real tensors are
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert isinstance(model(mode.from_tensor(x)), FakeTensor)
            assert type(model(x)) is Tensor


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), tile=st.tuples(st.integers(1, 4), st.integers(1, 5)))
def test_places_lead_from_patches_to_their_tiles(rows: int, columns: int, tile: tuple[int, int]) -> None:
    tiling = Tiling((rows, columns), (min(rows, tile[0]), min(columns, tile[1])), 2)
    found = tiling.tokens(CPU).flatten()[tiling.slots(CPU)]
    assert torch.equal(found, torch.arange(2, tiling.num_tokens, dtype=torch.int32))


def test_index_tensors_are_on_the_device_asked_for() -> None:
    tiling = Tiling((7, 9), (4, 4), 1)
    with torch.device("meta"):
        place, tokens = z_order((7, 9), CPU), tiling.tokens(CPU)
    assert place.device == tokens.device == CPU
    assert len(place.unique()) == 63
    assert z_order((7, 9), CPU).device == CPU
