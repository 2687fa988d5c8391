"""Transformer blocks that hold fewer tokens after their attention than before: what pruning and merging share."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from functools import partial
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..attention.layer import refuse_mask
from ..attention.module_state import LEAF, move_state, why_not_movable
from ..errors import SparsifinerError

_NO_VIT = {
    "Beit": "its biases of relative positions belong to the full patch grid",
    "Eva": "its rotary embedding belongs to the full patch grid",
    "NaFlexVit": "a mask hides the padding of its images, which have patches of different number",
    "SwinTransformer": "its windows need the full patch grid",
    "SwinTransformerV2": "its windows need the full patch grid",
    "VisionTransformerRelPos": "its biases of relative positions belong to the full patch grid",
}


class ReducingBlock(nn.Module):
    """timm's ``Block`` with a step between attention and MLP that removes or merges tokens.

    Norms, LayerScale and stochastic depth are the block's own and keep their names in the state dict.

    Args:
        block: the block to take over. It must not be used afterwards: its weights are shared.
    """

    attn: nn.Module

    def __init__(self, block: Block) -> None:
        super().__init__()
        move_state(block, self)
        vars(self)["__module__"] = LEAF
        self.train(block.training)

    def to_block(self) -> Block:
        """timm's block with the same parts; this one must not be used afterwards."""
        block = Block.__new__(Block)
        nn.Module.__init__(block)
        move_state(self, block, skip=self.own_attributes())
        return block.train(self.training)

    @abstractmethod
    def own_attributes(self) -> tuple[str, ...]:
        """Names of the attributes that timm's block does not have."""

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention layer's output ``[B, N, C]``, and what :meth:`reduce` decides by."""
        return self.attn(x)

    @abstractmethod
    def reduce(self, x: Tensor, seen: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to fewer tokens ``[B, n, C]``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` to ``[B, n, C]``."""
        refuse_mask(attn_mask, is_causal)
        part: Any = self
        attended, seen = self.attend(part.norm1(x))
        x = self.reduce(x + part.drop_path1(part.ls1(attended)), seen)
        return x + part.drop_path2(part.ls2(part.mlp(part.norm2(x))))


def check_reducible(model: nn.Module, layers: list[int], attention: tuple[type[nn.Module], ...], what: str) -> None:
    """Refuse models whose tokens cannot become fewer.

    Args:
        model: the model.
        layers: numbers of the blocks that shall remove tokens.
        attention: classes of attention that can serve there.
        what: what is asked for, for the message: "prune tokens of".

    Raises:
        ValueError: one line with the class and the reason.
    """

    def refuse(reason: str) -> SparsifinerError:
        return SparsifinerError(f"cannot {what} {type(model).__name__}: {reason}")

    if not isinstance(model, VisionTransformer):
        reason = _NO_VIT.get(type(model).__name__, "it is no timm VisionTransformer")
        raise refuse(f"{reason}; ViT, DeiT, DINOv2, CLIP and LV-ViT models work")
    blocks: Any = model.blocks
    if any(isinstance(block, ReducingBlock) for block in blocks):
        raise refuse("tokens are removed or merged in it already; start from the model as it was")
    if not isinstance(model.patch_drop, nn.Identity):
        raise refuse("it drops patches at random in training; build it with patch_drop_rate=0")
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise refuse("its attention pooling has position embeddings of the full patch grid")
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise refuse(f"there is no block {layer}; they are numbered 0 to {len(blocks) - 1}")
        block = blocks[layer]
        if sum(other is block for other in blocks) > 1:
            raise refuse(f"block {layer} stands at several places of the model; give each a copy of its own")
        if type(block) is not Block:
            raise refuse(f"block {layer} is a {type(block).__name__}; only timm's Block can be taken apart")
        unmovable = why_not_movable(block) or why_not_movable(block.attn)
        if unmovable is not None:
            raise refuse(f"block {layer}: {unmovable}")
        if type(block.attn) not in attention:
            expected = " or ".join(known.__name__ for known in attention)
            raise refuse(f"block {layer} has {type(block.attn).__name__}, expected {expected}")


def reduces_tokens(model: nn.Module) -> bool:
    """True for a model that prunes or merges tokens."""
    return any(isinstance(module, ReducingBlock) for module in model.modules())


def refuse_maps(model: nn.Module) -> None:
    """Make ``forward_intermediates`` of a model that prunes or merges tokens refuse maps of the blocks that do, and of
    those after them: timm would reshape fewer tokens to the patch grid, and fail, or even succeed."""
    if reduces_tokens(model):
        vars(model)["forward_intermediates"] = partial(_forward_intermediates, model)
    else:
        vars(model).pop("forward_intermediates", None)


def _forward_intermediates(model: Any, *args: Any, **settings: Any) -> Any:
    forward = partial(type(model).forward_intermediates, model)
    asked = inspect.signature(forward).bind(*args, **settings)
    asked.apply_defaults()
    indices, depth = asked.arguments["indices"], len(model.blocks)
    last = depth - 1 if indices is None or isinstance(indices, int) else max(number % depth for number in indices)
    if asked.arguments["output_fmt"] == "NCHW" and reduces_tokens(model.blocks[: last + 1]):
        raise SparsifinerError(
            f"{type(model).__name__} prunes or merges tokens, so block {last} has no map of all patches; use "
            f'output_fmt="NLC" (reshape=False), and kept_patches(model) for the places of pruned tokens'
        )
    return forward(*args, **settings)


def refuse_reduced(model: nn.Module, what: str) -> None:
    """Refuse a model that ends with fewer tokens than patches, where ``what`` needs every patch in its place.

    Raises:
        ValueError: one line that names ``what``.
    """
    if reduces_tokens(model):
        raise SparsifinerError(
            f"{what} compare patch by patch, but {type(model).__name__} prunes or merges tokens; "
            f"use the model without that (unprune_tokens undoes pruning)"
        )
