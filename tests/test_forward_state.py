"""The patch grid of a pass belongs to that pass: copies, replaced embeddings, other sizes, threads, recomputation."""

from __future__ import annotations

import copy
import threading

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsifiner import SparsifinerConfig, densify, prune_tokens, record, sparsify
from sparsifiner.reduction import merge_tokens

CONFIG = SparsifinerConfig(keep_rate=0.2, query_tile=(2, 2), tail=(2, 2), mode="sparse")


@pytest.fixture
def dynamic(tiny_vit) -> nn.Module:
    """Takes 16x8, 8x16 and 32x4 patches alike: all are 128 tokens."""
    return tiny_vit(dynamic_img_size=True, img_size=32)


WIDE, TALL = (1, 3, 32, 64), (1, 3, 64, 32)


def grids(model: nn.Module, x: Tensor) -> set[tuple[int, int]]:
    with torch.no_grad(), record(model) as seen:
        model(x)
    return {did.connectivity.tiling.grid for did in seen.values()}


def test_a_block_that_is_copied_goes_on_with_its_model(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    sparse.blocks[1] = copy.deepcopy(sparse.blocks[1])
    assert grids(sparse, images(*WIDE)) == {(8, 16)}
    assert grids(sparse, images(*TALL)) == {(16, 8)}


def test_an_embedding_that_is_copied_goes_on(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    grids(sparse, images(*WIDE))
    sparse.patch_embed = copy.deepcopy(sparse.patch_embed)
    assert grids(sparse, images(*TALL)) == {(16, 8)}


def test_an_embedding_that_is_replaced_is_noticed(dynamic, images) -> None:
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, dynamic_img_size=True)
    sparse = sparsify(dynamic, CONFIG)
    grids(sparse, images(*WIDE))
    sparse.patch_embed = other.patch_embed
    with pytest.raises(ValueError, match="the patch embedding of VisionTransformer was replaced"), torch.no_grad():
        sparse(images(*TALL))


def test_whole_copies_are_independent(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        tokens = sparse._pos_embed(sparse.patch_embed(images(*WIDE)))
        twin(images(*TALL))
        with record(sparse) as seen:
            sparse.blocks(tokens)
    assert {did.connectivity.tiling.grid for did in seen.values()} == {(8, 16)}


def test_the_convolution_alone_tells_the_grid(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    grids(sparse, images(*WIDE))
    with torch.no_grad(), record(sparse) as seen:
        x = sparse.patch_embed.proj(images(*TALL)).permute(0, 2, 3, 1)
        sparse.blocks(sparse._pos_embed(x))
    assert {did.connectivity.tiling.grid for did in seen.values()} == {(16, 8)}


def test_two_embeddings_before_the_blocks_are_told_apart_or_refused(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    with torch.no_grad():
        first, second = (sparse._pos_embed(sparse.patch_embed(images(*size))) for size in (WIDE, (1, 3, 32, 32)))
        with record(sparse) as seen:
            sparse.blocks(first)  # another number of tokens than the second's
        assert {did.connectivity.tiling.grid for did in seen.values()} == {(8, 16)}
        with record(sparse) as seen:
            sparse.blocks(second)
        assert {did.connectivity.tiling.grid for did in seen.values()} == {(8, 8)}
        first, _ = (sparse._pos_embed(sparse.patch_embed(images(*size))) for size in (WIDE, TALL))
        with pytest.raises(ValueError, match="images of 8x16 and 16x8 patches were embedded before the blocks ran"):
            sparse.blocks(first)


def test_one_of_two_towers_that_share_an_embedding_can_be_densified(dynamic, images) -> None:
    first, second = dynamic, copy.deepcopy(dynamic)
    second.patch_embed = first.patch_embed
    sparsify(first, CONFIG, inplace=True)
    sparsify(second, CONFIG, inplace=True)
    densify(first, inplace=True)
    assert grids(second, images(*TALL)) == {(16, 8)}
    assert grids(second, images(*WIDE)) == {(8, 16)}


def test_threads_of_different_sizes_share_a_model(dynamic, images) -> None:
    sparse, inputs = sparsify(dynamic, CONFIG), [images(*WIDE), images(*TALL)]
    with torch.no_grad():
        want = [sparse(x) for x in inputs]
    barrier, failures = threading.Barrier(2), []

    def run(number: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(sparse(inputs[number]), want[number], rtol=1e-4, atol=1e-5):
                    failures.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


KINDS = {
    "two sizes": lambda model: sparsify(model, CONFIG),
    "pruned": lambda model: prune_tokens(model, layers=(0,)),
    "pruned and sparse": lambda model: sparsify(prune_tokens(model, layers=(0,)), CONFIG),
    "merged": lambda model: merge_tokens(model, 8),
}


def gradients(model: nn.Module, inputs: list[Tensor], use_reentrant: bool | None) -> list[Tensor]:
    """Of two forward passes before one backward pass, with or without recomputing each block."""
    model.zero_grad()
    total = torch.zeros(())
    for x in inputs:
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            tokens = block(tokens) if use_reentrant is None else checkpoint(block, tokens, use_reentrant=use_reentrant)
        total = total + model.norm(tokens).square().sum()
    total.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_recomputation_after_two_forward_passes_finds_each_its_own_state(make, dynamic, images) -> None:
    model = make(dynamic).train()
    inputs = [images(*WIDE), images(*TALL) * 0.7]
    for want, got in zip(gradients(model, inputs, None), gradients(model, inputs, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_reentrant_recomputation_is_right_or_refused(make, dynamic, images) -> None:
    model = make(dynamic).train()
    single = [images(*WIDE)]
    for want, got in zip(gradients(model, single, None), gradients(model, single, True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradients(model, [images(*WIDE), images(*TALL)], True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_that_is_checkpointed_alone(reentrant, dynamic, images) -> None:
    """As ``checkpoint_wrapper`` of PyTorch's distributed package does: the block does not run again, its part does."""
    model = sparsify(dynamic, CONFIG).train()
    attention = [block.attn for block in model.blocks]

    def forward(x: Tensor, wrapped: bool) -> Tensor:
        for block, layer in zip(model.blocks, attention, strict=True):
            block.attn = Checkpointed(layer, reentrant) if wrapped else layer
        return model.forward_features(x).square().sum()

    def backward(wrapped: bool, sizes: list[tuple[int, ...]]) -> list[Tensor]:
        model.zero_grad()
        total = torch.stack([forward(images(*size), wrapped) for size in sizes]).sum()
        total.backward()
        return [p.grad.clone() for layer in attention for p in layer.parameters() if p.grad is not None]

    for sizes in ([TALL], [TALL, TALL], [WIDE, TALL]):
        want = backward(False, sizes)
        if reentrant and len(set(sizes)) > 1:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                backward(True, sizes)
        else:
            torch.testing.assert_close(backward(True, sizes), want, rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor, **settings: object) -> Tensor:
        return checkpoint(lambda x: self.layer(x, **settings), x, use_reentrant=self.reentrant)


def test_parts_of_blocks_run_by_hand_after_two_embeddings_are_refused(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    block = sparse.blocks[0]
    with torch.no_grad():
        waiting = [sparse._pos_embed(sparse.patch_embed(images(*size))) for size in (WIDE, TALL)]
        with pytest.raises(ValueError, match="images of 8x16 and 16x8 patches were embedded before the blocks ran"):
            block.attn(block.norm1(waiting[0]))
        for size, grid in ((WIDE, (8, 16)), (TALL, (16, 8)), (TALL, (16, 8)), (WIDE, (8, 16))):
            sparse.forward_features(images(*size))
            tokens = sparse._pos_embed(sparse.patch_embed(images(*size)))
            with record(sparse) as seen:
                for block in sparse.blocks:
                    tokens = tokens + block.attn(block.norm1(tokens))
            assert {did.connectivity.tiling.grid for did in seen.values()} == {grid}


def test_interleaved_passes_are_told_apart_or_refused(dynamic, images) -> None:
    """A block's own output tells its pass; a copy of it may be of either image where both wait at the same block."""
    sparse, wide, tall = sparsify(dynamic, CONFIG), images(*WIDE), images(*TALL)
    first, second = sparse.blocks
    with torch.no_grad():
        want = [sparse.forward_features(x) for x in (wide, tall)]
        halfway = [first(sparse._pos_embed(sparse.patch_embed(x))) for x in (wide, tall)]
        for tokens, features in zip(halfway, want, strict=True):
            torch.testing.assert_close(sparse.norm(second(tokens)), features)
        halfway = [first(sparse._pos_embed(sparse.patch_embed(x))) for x in (wide, tall)]
        with pytest.raises(ValueError, match="images of 16x8 and 8x16 patches are both between two blocks"):
            second(halfway[0].clone())
        del halfway
        done = sparse.blocks(sparse._pos_embed(sparse.patch_embed(wide)))  # held, but through with its blocks
        tokens = first(sparse._pos_embed(sparse.patch_embed(tall))).clone()
        torch.testing.assert_close(sparse.norm(second(tokens)), want[1])
        assert done.shape == tokens.shape


def in_a_thread(work):
    """What ``work()`` returns or raises in a thread of its own."""
    found = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def blocks_of(model: nn.Module, tokens: Tensor) -> Tensor:
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens)


@torch.no_grad()
def test_tokens_that_another_thread_has_embedded(dynamic, images) -> None:
    """A pipeline: images of one shape are its own; of two shapes at once nobody can tell them apart, which is said."""
    sparse = sparsify(dynamic, CONFIG)
    wide, tall = images(*WIDE), images(*TALL)
    want = {x.shape: sparse.forward_features(x) for x in (wide, tall)}
    for x in (wide, tall, wide, wide, tall):
        tokens = sparse._pos_embed(sparse.patch_embed(x))
        torch.testing.assert_close(in_a_thread(lambda tokens=tokens: blocks_of(sparse, tokens)), want[x.shape])

    queue, results, started = [], [], threading.Event()

    def consume() -> None:  # one thread runs the blocks of all images, after passes of its own
        with torch.no_grad():
            sparse.forward_features(tall)
            started.wait(30)
            results.extend(blocks_of(sparse, tokens) for tokens in queue)

    consumer = threading.Thread(target=consume)
    consumer.start()
    queue += [sparse._pos_embed(sparse.patch_embed(wide)) for _ in range(3)]
    started.set()
    consumer.join()
    for result in results:
        torch.testing.assert_close(result, want[wide.shape])
    assert len(results) == 3

    waiting = [sparse._pos_embed(sparse.patch_embed(x)) for x in (wide, tall)]
    with pytest.raises(ValueError, match="images of 8x16 and 16x8 patches were embedded before the blocks ran"):
        in_a_thread(lambda: blocks_of(sparse, waiting[0]))


@torch.no_grad()
def test_what_another_thread_embeds_meanwhile_does_not_disturb_a_pass(dynamic, images) -> None:
    sparse = sparsify(dynamic, CONFIG)
    wide, tall = images(*WIDE), images(*TALL)
    want = sparse.forward_features(wide)
    tokens = sparse.blocks[0](sparse._pos_embed(sparse.patch_embed(wide)))
    in_a_thread(lambda: sparse.patch_embed(tall))
    changed = tokens + 0.0  # which no block has returned
    torch.testing.assert_close(sparse.norm(sparse.blocks[1](changed)), want)
    torch.testing.assert_close(sparse.forward_features(wide), want)
