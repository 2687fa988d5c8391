"""Multiply-adds of a dense or sparse Vision Transformer, per layer and term, as the paper counts and in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention.adapters import Refusal, find_adapter
from ..attention.adapters.scored import ScoredAttention, SparseScoredAttention
from ..attention.attend import LayerRecord
from ..attention.layer import SparseAttention
from ..errors import SparsifinerError
from ..ops.group_patches import grouping_macs
from ..predictors import LayerShape
from ..recording import record

PAPER_NOTE = (
    "The published sparse figures equal the attention over the kept keys (class row dense) plus a constant of "
    "73.4 M MACs for DeiT-S, 6.12 M per layer. The projections q' and k' (4.83 M) and W_down^T k' (1.21 M) are 98.7 % "
    "of it, so mhsa_macs counts these three and leaves out the coefficient product q' k_down^T (1.20 M) and the "
    "score product coef basis^T (7.41 M as executed here, 1.85 M over the 8 kept coefficients only). What remains, "
    "0.08 M per layer (0.14 M in LV-ViT-S), would be a score product over a basis with about 4 % (7 %) non-zeros. "
    "mhsa_full_macs counts every product as executed. Where tokens are pruned, attention keeps its budget of "
    "keep_rate times the tokens of the whole image, which reproduces the published 113.3 M (token 0.7, attention 0.25) "
    "within 0.5 % and 86.6 M (token 0.5) within 2.1 %; the class token's scores for pruning (0.05 M per pruning layer) "
    "are a row of the attention map already counted, so mhsa_macs leaves out that they are computed once more."
)

_LINEAR_OPS = ("mm", "addmm", "linear", "convolution")


@dataclass(frozen=True)
class LayerFlops:
    """MACs (multiply-adds) of one Transformer layer, per image.

    Args:
        name: path of the attention layer in the model.
        sparse: whether its attention is sparse.
        num_tokens: tokens it saw.
        density: query-key pairs computed over all pairs, pooled tail tokens not included; 1 where dense.
        projections: qkv and output projection (and whatever else multiplies tokens by weights in attention).
        attention: ``q k^T`` and weights times ``v`` over the kept keys, dense query rows of prefix tokens included.
        tail: the same over the pooled tail tokens, and the additions that pool keys and values, one MAC each.
        token_scores: the class token's row of ``q k^T`` once more, where it chooses the tokens to keep.
        predictor: MACs per step of the predictor, as executed; empty where there is no predictor.
        predictor_in_paper: the part of them that the published figures count (see :data:`PAPER_NOTE`).
        mlp: everything else in the block: the MLP, and the matching of tokens where they are merged.
    """

    name: str
    sparse: bool
    num_tokens: int
    density: float
    projections: int
    attention: int
    tail: int
    token_scores: int
    predictor: dict[str, int]
    predictor_in_paper: int
    mlp: int

    @property
    def predictor_macs(self) -> int:
        """All of the predictor, as executed."""
        return sum(self.predictor.values())

    @property
    def mhsa_macs(self) -> int:
        """The paper's accounting: attention and tail, and the predictor as the published figures count it."""
        return self.attention + self.tail + self.predictor_in_paper

    @property
    def mhsa_full_macs(self) -> int:
        """Attention, tail, token scores and all of the predictor; projections excluded, as in the paper."""
        return self.attention + self.tail + self.token_scores + self.predictor_macs

    @property
    def total_macs(self) -> int:
        return self.projections + self.mhsa_full_macs + self.mlp


@dataclass(frozen=True)
class FlopReport:
    """MACs of one forward pass per image; one MAC is one multiply and one add, two FLOPs.

    ``mhsa_macs`` is what Wei et al. print as "MHSA MFLOPs": ``q k^T`` and weights times ``v`` plus the predictor,
    projections excluded; ``2 N^2 D L`` for a dense model. It leaves out two products of the predictor that the
    published figures cannot contain (``note`` says which); ``mhsa_full_macs``, ``predictor_macs`` and
    ``total_macs`` leave out nothing. Additions, softmax, norms and activations count nothing, but for the
    pooling that only a sparse model does.

    Args:
        layers: one entry per Transformer layer, in order.
        patch_embed: MACs of the patch embedding.
        other: MACs outside the blocks and the patch embedding: head, attention pooling.
        note: which terms the paper's accounting and the full count differ in; empty for a dense model.
    """

    layers: list[LayerFlops] = field(default_factory=list)
    patch_embed: int = 0
    other: int = 0
    note: str = ""

    def _sum(self, term: str) -> int:
        return sum(getattr(layer, term) for layer in self.layers)

    @property
    def projection_macs(self) -> int:
        return self._sum("projections")

    @property
    def attention_macs(self) -> int:
        """Attention over the kept keys, without tail and predictor."""
        return self._sum("attention")

    @property
    def tail_macs(self) -> int:
        return self._sum("tail")

    @property
    def predictor_macs(self) -> int:
        """All predictors, every product as executed."""
        return self._sum("predictor_macs")

    @property
    def mlp_macs(self) -> int:
        return self._sum("mlp")

    @property
    def mhsa_macs(self) -> int:
        """The paper's "MHSA" figure."""
        return self._sum("mhsa_macs")

    @property
    def mhsa_full_macs(self) -> int:
        """As :attr:`mhsa_macs` with every product of the predictor."""
        return self._sum("mhsa_full_macs")

    @property
    def total_macs(self) -> int:
        """The whole model."""
        return self._sum("total_macs") + self.patch_embed + self.other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the sums, and every layer with its terms."""
        sums = ("projection", "attention", "tail", "predictor", "mlp", "mhsa", "mhsa_full", "total")
        return {
            "unit": "MACs per image",
            **{f"{name}_macs": getattr(self, f"{name}_macs") for name in sums},
            "patch_embed_macs": self.patch_embed,
            "other_macs": self.other,
            "note": self.note,
            "layers": [asdict(layer) for layer in self.layers],
        }


def count_flops(model: nn.Module, x: Tensor) -> FlopReport:
    """Count the multiply-adds of ``model(x)``, dense or sparse, by running it once.

    PyTorch's counter attributes matrix products to modules; attention of sparse layers is counted from the
    connectivity they really used. Reproduces the published dense figures exactly (DeiT-S 357.7 M, LV-ViT-S
    476.9 M) and the sparse ones of Wei et al., table 1, within 1.5 % (:data:`PAPER_NOTE`).

    Args:
        model: a timm Vision Transformer, its sparse version, or any module that contains one.
        x: images ``[B, 3, height, width]``; counts are per image, the mean over the batch.

    Raises:
        ValueError: if the model has no attention layer that is known, or ``x`` no image.
    """
    if not x.shape[0]:
        raise SparsifinerError(f"count_flops needs at least one image, got a batch of shape {list(x.shape)}")
    names = _attention_layers(model)
    if not names:
        raise SparsifinerError(f"{type(model).__name__} has no attention layer to count; expected a Vision Transformer")
    is_sparse = any(isinstance(model.get_submodule(name), SparseAttention) for name in names)
    tokens: dict[str, tuple[int, int]] = {}
    with _evaluating(model), torch.no_grad(), _watch_tokens(model, names, tokens):
        watch: AbstractContextManager[dict[str, LayerRecord]] = record(model) if is_sparse else nullcontext({})
        with watch as seen, FlopCounterMode(display=False) as counter:
            model(x.detach())
    counts = _Counts(counter, model, batch=x.shape[0])
    blocks = {name: name.rpartition(".")[0] for name in names}
    layers = [
        _layer(name, model.get_submodule(name), counts, blocks[name], seen.get(name), *tokens[name])
        for name in names
        if name in tokens
    ]
    embeds = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "patch_embed"]
    patch_embed = sum(counts.total(name) for name in embeds)
    inside = sum(layer.projections + layer.mlp for layer in layers) + sum(
        counts.attention(layer.name) + counts.total(f"{layer.name}.predictor") for layer in layers
    )
    other = counts.total("") - inside - patch_embed
    in_part = any(layer.predictor_in_paper != layer.predictor_macs for layer in layers)
    return FlopReport(layers, patch_embed, other, PAPER_NOTE if in_part else "")


class _Counts:
    """MACs per image of every module, from PyTorch's counter."""

    def __init__(self, counter: FlopCounterMode, model: nn.Module, batch: int) -> None:
        root = type(model).__name__
        self.batch = batch
        self.by_name: dict[str, dict[str, int]] = {}
        for name, ops in counter.get_flop_counts().items():
            path = "" if name == "Global" else name.removeprefix(root).removeprefix(".")
            if name == "Global" or path:
                self.by_name[path] = {str(op).rpartition(".")[2]: count // 2 for op, count in ops.items()}

    def total(self, name: str) -> int:
        return sum(self.by_name.get(name, {}).values()) // self.batch

    def linear(self, name: str) -> int:
        """Products of tokens with weights below ``name``, its predictor's excluded."""
        return self._where(name, lambda op: op in _LINEAR_OPS)

    def attention(self, name: str) -> int:
        """All other products below ``name``, its predictor's excluded: the attention itself."""
        return self._where(name, lambda op: op not in _LINEAR_OPS)

    def _where(self, name: str, wanted: Any) -> int:
        own, predictor = self.by_name.get(name, {}), self.by_name.get(f"{name}.predictor", {})
        return sum(count - predictor.get(op, 0) for op, count in own.items() if wanted(op)) // self.batch


def _layer(
    name: str, attention: nn.Module, counts: _Counts, block: str, seen: LayerRecord | None, batch: int, num_tokens: int
) -> LayerFlops:
    mlp = counts.total(block) - counts.total(name) if block else 0
    scores = 0
    if isinstance(attention, (ScoredAttention, SparseScoredAttention)):
        scores = attention.num_heads * attention.head_dim * num_tokens
    dense = counts.attention(name) - scores
    layer = LayerFlops(name, False, num_tokens, 1.0, counts.linear(name), dense, 0, scores, {}, 0, mlp)
    if not isinstance(attention, SparseAttention) or seen is None or seen.connectivity is None:
        return layer
    connectivity, config = seen.connectivity, attention.config
    tiling, heads, width = connectivity.tiling, attention.num_heads, attention.head_width()
    density = connectivity.density()
    tail = 0
    if config.tail is not None:
        blocks = tiling.regions(config.tail.block)
        tail = 2 * heads * width * (tiling.num_patches * blocks.num_tiles + tiling.num_patches)
        if not attention.takes_bias:
            tail += heads * grouping_macs(blocks, width, config.tail.refine)
    shape = LayerShape(heads, width, tiling.image_grid, tiling.num_prefix_tokens)
    predictor, in_paper = attention.predictor.mac_terms(
        lambda part: counts.total(f"{name}.predictor.{part}".rstrip(".")), shape, tiling, config.tail is not None
    )
    return LayerFlops(
        name=name,
        sparse=True,
        num_tokens=num_tokens,
        density=density,
        projections=layer.projections,
        attention=round(density * num_tokens**2) * 2 * heads * width,
        tail=tail,
        token_scores=scores,
        predictor=predictor,
        predictor_in_paper=in_paper,
        mlp=mlp,
    )


def _attention_layers(model: nn.Module) -> list[str]:
    """Paths of the attention layers, outermost first, cheap pooling at the end of a model left out."""
    names: list[str] = []
    for name, module in model.named_modules():
        found = find_adapter(module)
        known = isinstance(module, SparseAttention) or (
            found is not None and not (isinstance(found, Refusal) and not found.costly)
        )
        if known and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


@contextmanager
def _watch_tokens(model: nn.Module, names: list[str], tokens: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Note the batch and the number of tokens each layer sees."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens[name] = (inputs[0].shape[0], inputs[0].shape[1:-1].numel())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for a while; modules and parameters get their own settings back.

    PyTorch's module tracker trips over a parameter that is a module's input (attention pooling) unless it needs
    no gradient.
    """
    modes = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
