"""What calibration fits a low-rank predictor by: the spectral start and the reconstruction loss."""

from __future__ import annotations

import pytest
import torch
from choosing import lowrank_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsifiner import SparsifinerConfig
from sparsifiner.attention import AttentionInputs, tail_groups
from sparsifiner.calibration import spectral
from sparsifiner.calibration.reconstruction import reconstruction_loss
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.predictors import LowRankConfig, LowRankPredictor

PAPER = SparsifinerConfig.paper(keep_rate=0.2, n_down=12)
TILES = SparsifinerConfig(
    keep_rate=0.1, query_tile=(2, 2), mode="sparse", predictor=LowRankConfig(n_down=12), tail=(2, 2)
)
SHARED = TILES.replace(predictor=LowRankConfig(n_down=12, share_basis=True))


def reconstructing(config: SparsifinerConfig) -> SparsifinerConfig:
    return config.replace(predictor=config.predictor.with_reconstruction(True))


def loss_of(
    predictor: LowRankPredictor, config: SparsifinerConfig, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling
) -> Tensor:
    """Over all tiles."""
    inputs = AttentionInputs(q, k, v, tiling, 0.25)
    return reconstruction_loss(predictor, inputs, tail_groups(config.tail, inputs), torch.arange(tiling.num_tiles))


@pytest.mark.parametrize("config", [PAPER, TILES, reconstructing(PAPER), SHARED])
def test_reconstruction_lowers_its_loss(config: SparsifinerConfig) -> None:
    tiling = Tiling((8, 8), config.query_tile, 1)
    q, k, v = torch.randn(3, 1, 2, 65, 16, generator=torch.Generator().manual_seed(0))
    predictor = lowrank_of(config, tiling, num_heads=2, head_dim=16).train()
    with torch.no_grad():  # a zeroed basis would have no gradient
        predictor.w_down.abs_().add_(0.05)
        if predictor.w_up is not None:
            predictor.w_up.abs_().add_(0.05)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(predictor, config, q, k, v, tiling)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_reconstruction_loss_is_the_papers() -> None:
    """Equation of section 3.4 over all patch queries, by hand: 0.01 times the squared distance to the attention."""
    config = reconstructing(PAPER)
    tiling = Tiling((4, 4), (1, 1), 1)
    predictor = lowrank_of(config, tiling, num_heads=2, head_dim=16).train()
    q, k, v = torch.randn(3, 1, 2, 17, 16, generator=torch.Generator().manual_seed(0))
    attention = (q @ k.mT * 0.25).softmax(-1)[:, :, 1:]
    want = 0.01 * (predictor.token_scores(q, k, tiling) - attention).square().sum() / 2
    got = loss_of(predictor, config, q, k, v, tiling)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_the_reconstruction_loss_merges_the_queries_of_a_tile_as_the_scores_do(reduction: str) -> None:
    config = TILES.replace(tail=None, predictor=LowRankConfig(n_down=12, reduction=reduction))
    tiling = Tiling((3, 4), (2, 2), 1)  # the tiles of the last row have two queries
    predictor = lowrank_of(config, tiling, num_heads=2, head_dim=16)
    q, k, v = torch.randn(3, 1, 2, 13, 16, generator=torch.Generator().manual_seed(0))
    coef = predictor.dense_coefficients(q, k, tiling)
    attention = (q @ k.mT * 0.25).softmax(-1)[:, :, 1:]
    want = torch.zeros(())
    for tile in ([0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11]):
        merge = (lambda x: x.amax(2)) if reduction == "max" else (lambda x: x.mean(2))
        score = merge(coef[:, :, tile]) @ predictor.basis(tiling)[1:].mT
        want = want + 0.01 * (score - merge(attention[:, :, tile])[..., 1:]).square().sum() / 2
    got = loss_of(predictor, config, q, k, v, tiling)
    torch.testing.assert_close(got, want)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_regions_are_exactly_as_many_as_asked_for(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows * columns))
    region, centres = spectral.regions((rows, columns), count)
    assert region.unique().tolist() == list(range(count))
    assert centres.shape == (count, 2)
    down, up = spectral.pooling_basis((rows, columns), 1, count)
    assert torch.isfinite(down).all()
    assert torch.isfinite(up).all()
    sums = down.sum(0)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_projections_of_full_width_keep_every_logit_and_narrow_ones_most() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 100, 16, generator=g) * torch.logspace(0, -2, 16)
    moments = torch.stack([q.mT @ q, k.mT @ k]).double()
    a, b = spectral.project_queries_and_keys(moments, 16)
    torch.testing.assert_close((q @ a.mT) @ (k @ b.mT).mT, q @ k.mT)
    errors = []
    for width in (2, 4, 8):
        a, b = spectral.project_queries_and_keys(moments, width)
        errors.append(((q @ a.mT) @ (k @ b.mT).mT - q @ k.mT).norm() / (q @ k.mT).norm())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
