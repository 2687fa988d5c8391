"""The sparse attention layer: projections of a dense layer around the pure attention function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import SparsifinerConfig
from ..errors import SparsifinerError
from ..geometry.patch_grid import PatchGrid, follow_grid
from ..geometry.tiling import Tiling
from ..ops.inputs import AttentionInputs
from ..predictors import Predictor
from .attend import LayerRecord, attend
from .build import build_predictor
from .module_state import LEAF, move_state, weight_like
from .policy import Policy

Observer = Callable[["SparseAttention", LayerRecord], None]
"""Called with a layer and what it does, tensors included, before it attends."""


class SparseAttention(nn.Module):
    """An attention layer that has taken over the weights of a dense one.

    Parameters keep their names, so state dicts of the dense model fit; the predictor's own weights are
    under ``predictor.``. Subclasses, one per dense class, say how q, k, v come about (:meth:`project`) and what follows
    (:meth:`merge`).

    Args:
        dense: the attention layer to take over. It must not be used afterwards: its weights are shared.
        config: settings of this layer (one ``keep_rate``).
        grid: the patch grid of the model the layer sits in.
    """

    dense_class: ClassVar[type[nn.Module]]
    takes_bias: ClassVar[bool] = False
    """:meth:`project` may return a bias."""
    child: ClassVar[str | None] = None
    """Name under which the layer is put inside the dense one, which stays; None where it takes its place."""
    tells_grid: ClassVar[str] = "a patch_embed and num_prefix_tokens"
    """What a module above the layer needs for the patch grid to be known."""
    num_heads: int
    scale: float
    proj: Any

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """The reason why ``dense``, an instance of ``dense_class``, cannot be converted, or None if it can."""
        dropout = getattr(dense, "attn_drop", None)
        if isinstance(dropout, nn.Dropout) and dropout.p > 0:
            return f"it drops attention weights (attn_drop={dropout.p}), which a sparse layer cannot; build it with 0"
        return None

    @classmethod
    def find_owner(cls, model: nn.Module, name: str) -> Any:
        """Path of the module that embeds the patches of the dense layer at ``name``, None if there is none, or a
        ``Refusal`` that says why the layer stays dense where it stands."""
        while name:
            name = name.rpartition(".")[0]
            module = model.get_submodule(name)
            embed = getattr(module, "patch_embed", None)
            if hasattr(module, "num_prefix_tokens") and getattr(embed, "grid_size", None) is not None:
                return name
        return None

    @classmethod
    def follow_grid(cls, owner: Any, dense: nn.Module) -> PatchGrid:
        """The patch grid of ``owner``; not attached yet where there was none."""
        return follow_grid(owner)

    def __init__(self, dense: nn.Module, config: SparsifinerConfig, grid: PatchGrid) -> None:
        nn.Module.__init__(self)  # not the dense class's own, which would make new weights
        move_state(dense, self)
        vars(self)["__module__"] = LEAF
        self.grid = grid
        self.config = config
        self.override: Policy | None = None
        self.observer: Observer | None = None
        self.reset_predictor(grid.shape)
        self.train(dense.training)

    def reset_predictor(self, grid: tuple[int, int]) -> None:
        """A new predictor for ``config``; a learned basis is made for the patch grid ``grid``."""
        like = weight_like(self)
        self.predictor: Predictor = build_predictor(
            self.config,
            num_heads=self.num_heads,
            head_dim=self.head_width(),
            grid=grid,
            num_prefix_tokens=self.grid.num_prefix_tokens,
        ).to(device=like.device, dtype=like.dtype)
        for name, parameter in self.predictor.named_parameters():
            # The choice of keys has no gradient; only the reconstruction phase, which asks for them, gives it one.
            parameter.requires_grad_(name == "tail_offset")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles made while somebody watches are not watched."""
        return {**vars(self), "observer": None}

    def to_dense(self) -> nn.Module:
        """The dense layer back, with the weights of this one; this one must not be used afterwards."""
        dense = self.dense_class.__new__(self.dense_class)
        nn.Module.__init__(dense)
        move_state(self, dense, skip=("grid", "config", "override", "observer", "predictor"))
        return dense.train(self.training)

    def configure(self, config: SparsifinerConfig) -> None:
        """Change settings that need no new weights, such as the keep rate."""
        assert isinstance(config.keep_rate, float)
        self.config = config
        self.predictor.settings = config.predictor
        self.predictor.keep_rate, self.predictor.keep_prefix = config.keep_rate, config.keep_prefix

    @property
    def policy(self) -> Policy:
        """Decides whether the layer runs dense: ``override`` where one is set, else what ``config`` asks for."""
        return Policy.of(self.config) if self.override is None else self.override

    def head_width(self) -> int:
        """Width of a head, ``D``."""
        own = getattr(self, "head_dim", None)
        return own if isinstance(own, int) else int(self.proj.in_features) // self.num_heads

    def project(self, x: Tensor, **context: Any) -> Any:
        """q, k, v ``[B, H, N, D]``, and an additive bias ``[1 or B, 1 or H, N, N]`` or None where there is one."""
        raise NotImplementedError

    def merge(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output ``[B, N, C]`` from its input and the attended values ``[B, N, H * D]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **context: Any) -> Tensor:
        """The dense layer's contract: ``[B, N, C]`` to ``[B, N, C]``."""
        out = self.attend(*self.project(x, *args, **context))
        return self.merge(x, out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Attention of queries, keys and values ``[B, H, N, D]`` of the present input: ``[B, H, N, D]``."""
        layout = self.grid.layout(q.shape[2])
        layout = None if layout is None or layout.is_sorted or layout.num_tokens != q.shape[2] else layout
        if layout is not None:
            q, k, v = (layout.sort(x, 2) for x in (q, k, v))
            if attn_bias is not None:
                attn_bias = layout.sort(layout.sort(attn_bias, 2), 3)
        observe = None if self.observer is None else partial(self.observer, self)
        out = attend(
            self.inputs(q, k, v, attn_bias), self.predictor, self.config,
            policy=self.override, training=self.training, observe=observe,
        )  # fmt: skip
        return out if layout is None else layout.unsort(out, 2)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> AttentionInputs:
        """Inputs of attention; q and k get the dtype of v, since autocast leaves norms and rotations in float32."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        return AttentionInputs(q, k, v, self.tiling(q.shape[2]), self.scale, attn_bias, self.config.backend)

    def tiling(self, num_tokens: int) -> Tiling:
        """The query tiles of the present input, checked against the length of its sequence."""
        tile = self.policy.query_tile(self.grid.shape, self.config, training=self.training)
        tiling = self.grid.tiling(tile, num_tokens)
        if tiling.num_tokens != num_tokens:
            raise SparsifinerError(
                f"attention got {num_tokens} tokens, but the image has a {tiling.grid[0]}x{tiling.grid[1]} patch grid "
                f"and {tiling.num_prefix_tokens} prefix tokens; patch dropout and token merging are not supported, and "
                f"where the model has other prefix tokens, pass num_prefix_tokens to sparsify"
            )
        return tiling

    def extra_repr(self) -> str:
        settings = self.config
        return f"keep_rate={settings.keep_rate}, query_tile={settings.query_tile}, tail={settings.tail}"


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Attention masks come with packed or padded sequences, which have no single patch grid."""
    if attn_mask is not None or is_causal:
        raise SparsifinerError("sparse attention takes no attn_mask and is not causal; use densify() for masked inputs")
