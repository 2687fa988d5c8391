"""Random surgery on a model: conversions, copies, replaced parts, hooks, sizes; compared after each step."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import timm
import torch
from torch import nn

from sparsifiner import (
    SparsifinerConfig,
    conversion,
    densify,
    prune_tokens,
    record,
    set_keep_rate,
    sparsify,
    unprune_tokens,
)
from sparsifiner.convert import is_sparse
from sparsifiner.reduction.pruning import is_pruned

SIZES = ((32, 32), (32, 64), (64, 32), (16, 48))
RATES = (0.1, 0.4, 1.0)


def dense_model(seed: int) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=4,
        dynamic_img_size=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


class Surgery:
    """A model under random operations, with the settings that a fresh conversion needs to equal it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.dense = dense_model(seed)
        self.model: Any = copy.deepcopy(self.dense)
        self.rate: float | None = None
        self.pruned_first = False
        self.log: list[str] = []

    def step(self) -> None:
        """One operation that is possible now, then the comparison."""
        names = [name for name in dir(self) if name.startswith("do_")]
        name = self.random.choice(names)
        self.log.append(name)
        getattr(self, name)()
        self.compare()

    def config(self) -> SparsifinerConfig:
        return SparsifinerConfig(keep_rate=self.rate or 0.1, query_tile=(2, 2), tail=(2, 2), mode="sparse")

    def fresh(self) -> nn.Module:
        """The same state, reached in one go."""
        model = copy.deepcopy(self.dense)
        if is_pruned(self.model):
            model = prune_tokens(model, layers=(1,))
        return model if self.rate is None else sparsify(model, self.config())

    def compare(self) -> None:
        size = self.random.choice(SIZES)
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        x = torch.randn(2, 3, *size, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(self.model(x), self.fresh()(x), rtol=1e-4, atol=1e-4)
            if self.rate is not None:
                with record(self.model) as seen:
                    self.model(x)
                grids = {did.connectivity.tiling.image_grid for did in seen.values() if did.connectivity is not None}
                assert grids == {(size[0] // 4, size[1] // 4)}, grids
                assert len(seen) == 3

    def do_sparsify(self) -> None:
        if not is_sparse(self.model):
            self.rate = self.random.choice(RATES)
            self.model = sparsify(self.model, self.config(), inplace=self.random.random() < 0.5)
            assert len(conversion(self.model).swapped) == 3

    def do_densify(self) -> None:
        if is_sparse(self.model):
            self.rate = None
            self.model = densify(self.model, inplace=self.random.random() < 0.5)
            if not is_pruned(self.model):
                assert not self.model.patch_embed._forward_hooks
                assert not any(block._forward_pre_hooks for block in self.model.blocks)

    def do_prune(self) -> None:
        if not is_pruned(self.model):
            self.model = prune_tokens(self.model, layers=(1,), inplace=self.random.random() < 0.5)

    def do_unprune(self) -> None:
        if is_pruned(self.model):
            self.model = unprune_tokens(self.model, inplace=self.random.random() < 0.5)

    def do_set_keep_rate(self) -> None:
        if is_sparse(self.model):
            self.rate = self.random.choice(RATES)
            set_keep_rate(self.model, self.rate)

    def do_copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def do_pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    def do_copy_a_block(self) -> None:
        number = self.random.randrange(3)
        self.model.blocks[number] = copy.deepcopy(self.model.blocks[number])

    def do_copy_the_embedding(self) -> None:
        self.model.patch_embed = copy.deepcopy(self.model.patch_embed)

    def do_load_own_state(self) -> None:
        self.model.load_state_dict(self.model.state_dict())

    def do_modes(self) -> None:
        self.model.train()
        self.model.eval()

    def do_hooks(self) -> None:
        attention, calls = self.model.blocks[0].attn, []
        handle = attention.register_forward_hook(lambda *args: calls.append(1))
        with torch.no_grad():
            self.model(torch.zeros(1, 3, 32, 32))
        handle.remove()
        assert calls == [1]

    def do_blocks_by_hand(self) -> None:
        with torch.no_grad():
            x = torch.ones(1, 3, *self.random.choice(SIZES))
            tokens = self.model._pos_embed(self.model.patch_embed(x))
            for block in self.model.blocks:
                tokens = block(tokens)
            torch.testing.assert_close(self.model.norm(tokens), self.model.forward_features(x))


def run(seed: int, steps: int = 12) -> None:
    """``steps`` operations on a model drawn from ``seed``.

    Raises:
        AssertionError: with the operations so far, if the model differs from a fresh conversion.
    """
    surgery = Surgery(seed)
    for _ in range(steps):
        try:
            surgery.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}, after {', '.join(surgery.log)}: {error}") from error
