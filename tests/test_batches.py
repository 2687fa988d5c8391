"""An image's answer does not depend on the other images of its batch."""

from __future__ import annotations

import pytest
import torch

from sparsifiner import SparsifinerConfig, record, sparsify
from sparsifiner.methods import METHODS, convert_with


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_batch_gives_what_its_images_give_alone(method, tiny_vit, images) -> None:
    torch.manual_seed(0)
    model = convert_with(method, tiny_vit(img_size=48, depth=4).eval(), 0.3).eval()
    x = images(4, 3, 48, 48)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [20, 24, 28])
def test_the_choice_of_dense_does_not_see_the_batch(side, tiny_vit, images) -> None:
    """Sizes around which sparse attention begins to pay on CPUs."""
    sparse = sparsify(tiny_vit(img_size=side * 4, embed_dim=128, num_heads=2).eval(), keep_rate=0.1)
    chosen = []
    for batch in (1, 2, 7, 32):
        with torch.no_grad(), record(sparse) as seen:
            sparse(images(batch, 3, side * 4, side * 4))
        chosen.append([did.connectivity is None for did in seen.values()])
    assert all(choice == chosen[0] for choice in chosen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "config",
    [
        SparsifinerConfig(keep_rate=0.2, mode="sparse"),
        SparsifinerConfig(keep_rate=0.2, mode="sparse", tail=None),
        SparsifinerConfig(keep_rate=0.2, mode="sparse", predictor="lowrank"),
        SparsifinerConfig(keep_rate=0.2, mode="sparse", predictor="oracle"),
        SparsifinerConfig.paper(keep_rate=0.2),
    ],
    ids=["pooled", "no tail", "lowrank", "oracle", "paper"],
)
def test_a_broken_image_breaks_no_other(config, value, tiny_vit, images) -> None:
    sparse, x = sparsify(tiny_vit().eval(), config), images(3, 3, 32, 32)
    with torch.no_grad():
        want = sparse(x)
        x[1, :, 5, 5] = value
        got = sparse(x)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-6)
    assert got[1].isnan().all()
