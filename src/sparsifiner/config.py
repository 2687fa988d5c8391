"""How a model is sparsified: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from ._utils.checks import choose, flag, number
from ._utils.messages import one_line, shown
from ._utils.reading import parse_json, read_text
from ._utils.yaml12 import load_yaml
from .errors import SparsifinerError

PredictorName = Literal["pooled", "lowrank", "oracle", "local", "strided", "random"]
PREDICTORS: tuple[str, ...] = get_args(PredictorName)
Reduction = Literal["max", "sum"]


@dataclass(frozen=True)
class SparsifinerConfig:
    """Connectivity, operator and predictor settings of a sparse model.

    ``SparsifinerConfig()`` is the training-free default (pooled predictor, 4x4 query tiles, pooled
    tail); :meth:`paper` is the method of Wei et al., CVPR 2023, to the letter.

    Args:
        keep_rate: share of the keys each query tile keeps, in (0, 1]; one for all layers or one per
            converted layer, in a list, an array or a tensor. ``ceil(keep_rate * candidates)`` keys are kept.
        predictor: what estimates the connectivity. ``pooled`` is training-free, ``lowrank`` is the
            paper's learned one, ``oracle`` looks at the dense attention (an upper bound, not a
            speed-up), ``local``, ``strided`` and ``random`` are fixed-pattern baselines.
        query_tile: rows and columns of the patch rectangle whose queries share one list of keys.
            ``(1, 1)`` is the paper's per-token connectivity.
        tail: rows and columns of the patch blocks that the tail's groups start as, whose mean key and value stand in
            for the keys that were not kept; None drops those keys as the paper does.
        tail_refine: how often the patches of these blocks are regrouped by their values (Lloyd steps), each joining the
            nearest mean of its own and the neighbouring blocks; 0 pools the blocks as they are. It takes no effect
            with an attention bias.
        tail_offset: whether each head adds an offset of its own to the tail's logits, zero until ``calibrate`` or
            training fits it. A block's mean key draws less attention than its keys together (Jensen's
            inequality), how much less depends on the head.
        keep_prefix: whether prefix tokens (class, registers) are kept as keys by every tile, on top
            of the budget. The paper lets the class token compete as an ordinary candidate.
        query_pool: ``pooled`` only: rows and columns of the sub-blocks whose queries are averaged before
            scoring; a side that does not divide the tile's is taken as 1.
        query_refine: ``pooled`` only: Lloyd steps that regroup a tile's queries around those averages.
        reduction: ``pooled`` and ``lowrank``: how the groups or queries of a tile are merged into one score per key.
        screen_from: ``pooled`` only: from this many candidate keys on, blocks of 2x2 keys are scored first by their
            mean, and single keys only in the best of them, about twice as many as are kept and a tenth of all.
            None: every key is scored. It takes no effect with keep rates from 0.2 on or an attention bias.
        reduce_n_factor: ``lowrank`` only: ``n_down = num_tokens // reduce_n_factor``.
        n_down: ``lowrank`` only: number of basis rows, instead of ``reduce_n_factor``.
        reduce_c_factor: ``lowrank`` only: head width divided by the predictor's width.
        scale: ``lowrank`` only: factor on the predictor's logits; ``"head_dim"`` is
            ``(head_dim / reduce_c_factor) ** -0.5``, ``"num_heads"`` the authors' ``num_heads ** -0.5``.
        coef_topk: ``lowrank`` only: coefficients kept per row, or all with None. The paper keeps 8, which leaves most
            keys of a tile without a score; nothing computes less for it.
        coef_threshold: ``lowrank`` only: coefficients at or below it become zero, or None.
        basis_threshold: ``lowrank`` only: entries of ``|W_up|`` at or below it become zero; 0.02 in the paper.
        score_threshold: ``lowrank`` only: keep every key that scores above it, instead of the top
            ``keep_rate``.
        share_basis: ``lowrank`` only: one matrix serves as ``W_down`` and ``W_up``.
        attn_recon: ``lowrank`` only: the paper's attention-reconstruction phase. In training mode
            attention runs dense and scores use the signed basis and all coefficients.
        seed: ``random`` only: seed of the pattern.
        dense_below: in evaluation mode, inputs of fewer tokens run attention dense, with the same weights. None:
            wherever sparse attention is expected to be slower than dense (see ``sparsifiner benchmark``), which on
            a GPU it always is; 0: never, for experiments about accuracy. Training and the ``oracle`` are always
            sparse with None, but for the oracle on a patch grid that is smaller than a tile or a block of the tail.

    Raises:
        ValueError: if a setting is out of range; the message says what was expected.
    """

    keep_rate: float | tuple[float, ...] = 0.1
    predictor: PredictorName = "pooled"
    query_tile: tuple[int, int] = (4, 4)
    tail: tuple[int, int] | None = (4, 4)
    tail_refine: int = 2
    tail_offset: bool = False
    keep_prefix: bool = True
    query_pool: tuple[int, int] = (2, 2)
    query_refine: int = 2
    reduction: Reduction = "max"
    screen_from: int | None = 8192
    reduce_n_factor: int = 6
    n_down: int | None = None
    reduce_c_factor: int = 1
    scale: float | Literal["head_dim", "num_heads"] = "head_dim"
    coef_topk: int | None = None
    coef_threshold: float | None = None
    basis_threshold: float = 0.0
    score_threshold: float | None = None
    share_basis: bool = False
    attn_recon: bool = False
    seed: int = 0
    dense_below: int | None = None

    def __post_init__(self) -> None:
        rates: Any = _plain(self.keep_rate)
        if isinstance(rates, Sequence) and not isinstance(rates, str):
            object.__setattr__(self, "keep_rate", tuple(check_keep_rate(rate) for rate in rates))
            if not rates:
                raise SparsifinerError("keep_rate is an empty list; give one rate, or one per layer")
        else:
            object.__setattr__(self, "keep_rate", check_keep_rate(rates))
        choose("predictor", self.predictor, PREDICTORS)
        for name in ("tail_offset", "keep_prefix", "share_basis", "attn_recon"):
            flag(name, getattr(self, name))
        for name in ("query_tile", "query_pool", "tail"):
            value = getattr(self, name)
            if value is not None or name != "tail":
                object.__setattr__(self, name, _pair(name, value))
        if self.tail_offset and self.tail is None:
            raise SparsifinerError(
                "tail_offset needs a tail; set tail to the rows and columns of a block, such as (4, 4)"
            )
        choose("reduction", self.reduction, get_args(Reduction))
        for name in ("reduce_n_factor", "reduce_c_factor", "n_down", "coef_topk"):
            number(name, getattr(self, name), least=1, whole=True, optional=name in ("n_down", "coef_topk"))
        if self.coef_topk is not None and self.coef_threshold is not None:
            raise SparsifinerError("coef_topk and coef_threshold exclude each other; set one of them to None")
        for name in ("query_refine", "tail_refine", "dense_below", "screen_from"):
            number(name, getattr(self, name), least=0, whole=True, optional=name in ("dense_below", "screen_from"))
        number("seed", self.seed, whole=True)
        for name in ("basis_threshold", "coef_threshold", "score_threshold"):
            number(name, getattr(self, name), least=0, optional=name != "basis_threshold")
        if self.scale not in ("head_dim", "num_heads"):
            number("scale (head_dim, num_heads or a number)", self.scale, above=0)
        if self.score_threshold is not None and self.predictor != "lowrank":
            raise SparsifinerError(
                f"score_threshold needs predictor='lowrank', whose scores have an absolute meaning; "
                f"predictor {self.predictor!r} keeps the top keep_rate"
            )
        if self.attn_recon and self.predictor != "lowrank":
            raise SparsifinerError(f"attn_recon needs predictor='lowrank', got {self.predictor!r}")

    @classmethod
    def paper(cls, keep_rate: float | tuple[float, ...] = 0.25, **changes: Any) -> SparsifinerConfig:
        """The paper's method with the published settings (Wei et al., sections 3.2 to 3.4).

        Per-token connectivity, no tail, the class token an ordinary key, ``n_down = N // 6``,
        head width halved, the 8 largest coefficients, basis threshold 0.02 and the authors' scale. Sparse at
        every size, since per-token connectivity is there to be studied: it is not faster on a CPU.
        """
        settings: dict[str, Any] = dict(
            predictor="lowrank", query_tile=(1, 1), tail=None, keep_prefix=False, scale="num_heads", coef_topk=8,
            reduce_c_factor=2, basis_threshold=0.02, dense_below=0,
        )  # fmt: skip
        return cls(keep_rate=keep_rate, **{**settings, **changes})

    def replace(self, **changes: Any) -> SparsifinerConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def rectangles(self) -> tuple[tuple[int, int], ...]:
        """What the patch grid must have room for: a query tile and a block of the tail."""
        return (self.query_tile,) if self.tail is None else (self.query_tile, self.tail)

    def for_layer(self, layer: int, num_layers: int) -> SparsifinerConfig:
        """The settings of one converted layer: its own keep rate where there is one per layer."""
        if isinstance(self.keep_rate, float):
            return self
        if len(self.keep_rate) != num_layers:
            raise SparsifinerError(
                f"keep_rate has {len(self.keep_rate)} entries but {num_layers} layers are converted; "
                f"give one rate, or exactly {num_layers}"
            )
        return self.replace(keep_rate=self.keep_rate[layer])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SparsifinerConfig:
        """The inverse of :meth:`to_dict`; unknown names are refused with the nearest known one."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        for name in settings:
            choose("setting", name, known)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> SparsifinerConfig:
        """Read a YAML or JSON file of settings; ``preset: paper`` starts from :meth:`paper`."""
        path = Path(path)
        try:
            text = read_text(path)
            settings = parse_json(text) if path.suffix == ".json" else load_yaml(text)
        except OSError as error:
            raise SparsifinerError(f"cannot read the configuration {path}: {error.strerror}") from error
        except ValueError as error:
            raise SparsifinerError(f"{path} is not valid YAML or JSON: {one_line(error)}") from error
        if not isinstance(settings, dict):
            raise SparsifinerError(f"{path} must hold named settings such as 'keep_rate: 0.1', got {shown(settings)}")
        try:
            return cls.from_settings(settings)
        except ValueError as error:
            raise SparsifinerError(f"{path}: {error}") from error

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SparsifinerConfig:
        """Some settings by name, the others at their defaults; ``preset: paper`` starts from :meth:`paper`."""
        settings = dict(settings)
        preset = settings.pop("preset", "default")
        choose("preset", preset, ("default", "paper"))
        base = cls.paper() if preset == "paper" else cls()
        return cls.from_dict({**base.to_dict(), **settings})


def check_keep_rate(value: object) -> float:
    """``value`` as a float in (0, 1], or a ValueError that says what was expected."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise SparsifinerError(f"keep_rate must lie in (0, 1], got {value!r}; 0.1 keeps a tenth of the keys")
    return float(value)


def num_kept(share: float, total: int) -> int:
    """``ceil(share * total)`` of the decimal number that ``share`` was written as: 3 for 0.1 of 30.

    In binary that product is 3.0000000000000004. A power of a share is off by a few units in its last place, too.
    """
    return math.ceil(share * total * (1 - 1e-12))


def _plain(value: Any) -> Any:
    """Numbers and lists out of NumPy's and torch's; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _pair(name: str, value: object) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) and v >= 1 for v in value):
        return (value[0], value[1])
    raise SparsifinerError(f"{name} must be two whole numbers of at least 1, rows and columns, got {value!r}")
