"""Settings of a sparse model: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from ._utils.checks import choose, flag, number, pair, plain, text
from ._utils.messages import shown
from ._utils.settings_files import read_configuration
from .errors import SparsifinerError
from .predictors import LowRankConfig, PooledConfig, PredictorConfig, RandomConfig, read_predictor_config

Mode = Literal["auto", "sparse", "dense"]
AttentionDtype = Literal["model", "float32", "bfloat16", "int8", "auto"]
MOST_REFINE_STEPS = 100


@dataclass(frozen=True)
class TailConfig:
    """Settings of the tail: groups of keys whose mean key and value stand in for the keys that were not kept.

    Args:
        block: rows and columns of the patch blocks that the groups start as.
        refine: how often the patches of these blocks are regrouped by their values (Lloyd steps), each joining the
            nearest mean of its own and the neighbouring blocks, at most 100; 0 pools the blocks as they are. It takes
            no effect with an attention bias.
        offset: each head adds an offset of its own to the tail's logits, zero until ``calibrate`` or training fits
            it. A block's mean key draws less attention than its keys together (Jensen's inequality), how much less
            depends on the head.
    """

    block: tuple[int, int] = (4, 4)
    refine: int = 2
    offset: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", pair("tail block", self.block))
        number("tail refine", self.refine, least=0, most=MOST_REFINE_STEPS, integer=True)
        flag("tail offset", self.offset)

    def replace(self, **changes: Any) -> TailConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "block": list(self.block)}


@dataclass(frozen=True)
class SparsifinerConfig:
    """Connectivity, tail and operator settings of a sparse model.

    ``SparsifinerConfig()`` is the training-free default (pooled predictor, 4x4 query tiles, pooled
    tail); :meth:`paper` is the method of Wei et al., CVPR 2023, to the letter.

    Args:
        keep_rate: share of the keys each query tile keeps, in (0, 1]; one for all layers or one per
            converted layer, in a list, an array or a tensor. ``ceil(keep_rate * candidates)`` keys are kept.
        predictor: settings of what estimates the connectivity, or its name for the default ones. ``PooledConfig`` is
            training-free, ``LowRankConfig`` the paper's learned one, ``OracleConfig`` looks at the dense attention (an
            upper bound, not a speed-up), ``LocalConfig``, ``StridedConfig`` and ``RandomConfig`` are fixed patterns.
        query_tile: rows and columns of the patch rectangle whose queries share one list of keys.
            ``(1, 1)`` is the paper's per-token connectivity.
        tail: settings of what stands in for the keys that were not kept, or rows and columns of its blocks; None
            drops those keys as the paper does.
        keep_prefix: prefix tokens (class, registers) are kept as keys by every tile, on top
            of the budget. The paper lets the class token compete as an ordinary candidate.
        mode: in evaluation mode, ``auto`` runs a layer dense, with the same weights, where sparse attention is
            expected to be slower (see ``sparsifiner benchmark``), or where the patch grid has no room for a tile;
            ``sparse`` never does; ``dense`` always, in training as well. Training is sparse otherwise.
        dense_below: with ``auto``, inputs of fewer tokens run dense and all others sparse, whatever is expected.
        use_profile: with ``auto``, expect what this machine's profile says (``sparsifiner benchmark --save-profile``
            measures it); False, or where there is none, what a table says that is the same on every machine.
        backend: which kernels compute: ``auto`` takes the fastest that can serve; a name is never replaced.
        attention_dtype: precision in which queries, keys and values meet: ``model`` is the model's own; ``float32`` and
            ``bfloat16`` convert them, and the result back. ``int8`` is ``float32`` whose queries and keys the CPU
            kernels multiply as bytes, with softmax weights and values in float32; where they gain nothing by it, or do
            not serve, nothing is rounded (``sparse_attention(precision="int8")``). ``auto`` is for float32 models on a
            CPU ``bfloat16`` where the kernels have its products, ``int8`` where they have those of bytes only (Cascade
            Lake, Ice Lake), and the model's own everywhere else. A layer's output moves by 0.3 % with ``bfloat16``
            products and by 0.35 % with ``int8`` (relative L2, mean over the built-in model's layers).

    Raises:
        SparsifinerError: if a setting is out of range; the message says what was expected.
    """

    keep_rate: float | tuple[float, ...] = 0.1
    predictor: PredictorConfig = dataclasses.field(default_factory=PooledConfig)
    query_tile: tuple[int, int] = (4, 4)
    tail: TailConfig | None = dataclasses.field(default_factory=TailConfig)
    keep_prefix: bool = True
    mode: Mode = "auto"
    dense_below: int | None = None
    use_profile: bool = True
    backend: str = "auto"
    attention_dtype: AttentionDtype = "model"

    def __post_init__(self) -> None:
        rates: Any = plain(self.keep_rate)
        if isinstance(rates, Sequence) and not isinstance(rates, str):
            object.__setattr__(self, "keep_rate", tuple(check_keep_rate(rate) for rate in rates))
            if not rates:
                raise SparsifinerError("keep_rate is an empty list; give one rate, or one per layer")
        else:
            object.__setattr__(self, "keep_rate", check_keep_rate(rates))
        object.__setattr__(self, "predictor", read_predictor_config(self.predictor))
        object.__setattr__(self, "query_tile", pair("query_tile", self.query_tile))
        if self.tail is not None and not isinstance(self.tail, TailConfig):
            object.__setattr__(self, "tail", TailConfig(pair("tail", self.tail)))
        flag("keep_prefix", self.keep_prefix)
        choose("mode", self.mode, get_args(Mode))
        number("dense_below", self.dense_below, least=1, integer=True, optional=True)
        flag("use_profile", self.use_profile)
        if self.dense_below is not None and self.mode != "auto":
            raise SparsifinerError(f"dense_below belongs to mode='auto'; mode={self.mode!r} decides for every size")
        text("backend", self.backend)
        choose("attention_dtype", self.attention_dtype, get_args(AttentionDtype))

    @classmethod
    def paper(cls, keep_rate: float | tuple[float, ...] = 0.25, **changes: Any) -> SparsifinerConfig:
        """The paper's method with the published settings (Wei et al., sections 3.2 to 3.4).

        Per-token connectivity, no tail, the class token an ordinary key, ``n_down = N // 6``,
        head width halved, the 8 largest coefficients, basis threshold 0.02 and the authors' scale. Sparse at
        every size, since per-token connectivity is there to be studied: it is not faster on a CPU.

        Args:
            keep_rate: share of the keys each query keeps.
            changes: fields of ``LowRankConfig`` and of this class that differ from the published ones.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"predictor", "keep_rate"}
        known = tuple(field.name for field in dataclasses.fields(LowRankConfig))
        for name in changes:
            choose("setting", name, (*own, *known))
        predictor: dict[str, Any] = dict(scale="num_heads", coef_topk=8, reduce_c_factor=2, basis_threshold=0.02)
        predictor.update({name: value for name, value in changes.items() if name in known})
        settings: dict[str, Any] = dict(query_tile=(1, 1), tail=None, keep_prefix=False, mode="sparse")
        settings.update({name: value for name, value in changes.items() if name in own})
        return cls(keep_rate=keep_rate, predictor=LowRankConfig(**predictor), **settings)

    def replace(self, **changes: Any) -> SparsifinerConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def rectangles(self) -> tuple[tuple[int, int], ...]:
        """Rectangles that the patch grid must have room for: a query tile and a block of the tail."""
        return (self.query_tile,) if self.tail is None else (self.query_tile, self.tail.block)

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
        return {
            "keep_rate": list(self.keep_rate) if isinstance(self.keep_rate, tuple) else self.keep_rate,
            "predictor": self.predictor.to_dict(),
            "query_tile": list(self.query_tile),
            "tail": None if self.tail is None else self.tail.to_dict(),
            "keep_prefix": self.keep_prefix,
            "mode": self.mode,
            "dense_below": self.dense_below,
            "use_profile": self.use_profile,
            "backend": self.backend,
            "attention_dtype": self.attention_dtype,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SparsifinerConfig:
        """The inverse of :meth:`to_dict`; it also reads the flat names of version 0.1.0.

        Raises:
            SparsifinerError: if a name is unknown; the message has the nearest known one.
        """
        values = nested_settings(settings)
        known = tuple(field.name for field in dataclasses.fields(cls))
        for name in values:
            choose("setting", name, (*known, *FLAT_NAMES))
        tail = values.get("tail")
        if isinstance(tail, Mapping):
            for name in tail:
                choose("setting of the tail", name, tuple(field.name for field in dataclasses.fields(TailConfig)))
            values["tail"] = TailConfig(**tail)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> SparsifinerConfig:
        """Read a YAML or JSON file of settings; ``preset: paper`` starts from :meth:`paper`."""
        settings = read_configuration(path)
        try:
            return cls.from_settings(settings)
        except SparsifinerError as error:
            raise SparsifinerError(f"{path}: {error}") from error

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SparsifinerConfig:
        """Some settings by name, the others at their defaults; ``preset: paper`` starts from :meth:`paper`."""
        settings = dict(settings)
        preset = settings.pop("preset", "default")
        choose("preset", preset, ("default", "paper"))
        base = (cls.paper() if preset == "paper" else cls()).to_dict()
        changes = nested_settings(settings, base)
        if "dense_below" in changes and "mode" not in changes:
            changes["mode"] = "auto"
        elif changes.get("mode", "auto") != "auto" and "dense_below" not in changes:
            changes["dense_below"] = None
        return cls.from_dict({**base, **changes})


FLAT_NAMES = (
    "tail_refine", "tail_offset", "query_pool", "query_refine", "reduction", "screen_from", "reduce_n_factor", "n_down",
    "reduce_c_factor", "scale", "coef_topk", "coef_threshold", "basis_threshold", "score_threshold", "share_basis",
    "attn_recon", "seed",
)  # fmt: skip
"""Settings that version 0.1.0 kept beside the others; they belong to the tail or to one predictor now."""


def nested_settings(settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings by name in today's form, whether they were written flat (version 0.1.0) or nested.

    Flat settings of another predictor than the one that is named took no effect, and are left out.

    Args:
        settings: some settings or all.
        base: the settings they change, in today's form; those of the same predictor and of the tail stay.

    Raises:
        SparsifinerError: if a setting was refused in the flat form as well: a threshold or the reconstruction phase
            without the paper's predictor, an offset without a tail.
    """
    if not isinstance(settings, Mapping):
        raise SparsifinerError(f"settings must be named, such as {{keep_rate: 0.1}}, got {shown(settings)}")
    values = dict(settings)
    flat = {name: values.pop(name) for name in FLAT_NAMES if name in values}
    if values.get("dense_below") == 0 and not isinstance(values["dense_below"], bool):
        values["dense_below"] = None
        values.setdefault("mode", "sparse")
    base_predictor = dict((base or {}).get("predictor") or {"name": PooledConfig.name})
    predictor = values.get("predictor", base_predictor["name"])
    if isinstance(predictor, PredictorConfig):
        predictor = predictor.to_dict()
    given = dict(predictor) if isinstance(predictor, Mapping) else {"name": predictor}
    given.setdefault("name", base_predictor["name"])
    if given["name"] == base_predictor["name"]:
        given = {**base_predictor, **given}
    own = {field.name for field in dataclasses.fields(read_predictor_config(given["name"]))}
    for name, needed in (("score_threshold", None), ("attn_recon", False)):
        if name in flat and name not in own and flat[name] != needed:
            raise SparsifinerError(f"{name} needs predictor={LowRankConfig.name!r}, got {given['name']!r}")
    given.update({name: value for name, value in flat.items() if name in own})
    for other in (PooledConfig, LowRankConfig, RandomConfig):
        theirs = {field.name for field in dataclasses.fields(other)}
        other(**{name: value for name, value in flat.items() if name in theirs - own})
    if "predictor" in values or own & flat.keys():
        values["predictor"] = given
    tail_changes = {name.removeprefix("tail_"): value for name, value in flat.items() if name.startswith("tail_")}
    if "tail" in values or tail_changes:
        tail = values.get("tail", (base or {}).get("tail", TailConfig().to_dict()))
        old = (base or {}).get("tail") or TailConfig().to_dict()
        if tail is None:
            if tail_changes.get("offset") is True:
                raise SparsifinerError(
                    "tail_offset needs a tail; set tail to the rows and columns of a block, such as (4, 4)"
                )
        elif not isinstance(tail, TailConfig):
            block = tail if isinstance(tail, Mapping) else {"block": pair("tail", tail)}
            tail = {**old, **block, **tail_changes}
        values["tail"] = tail
    if isinstance(values.get("keep_rate"), list):
        values["keep_rate"] = tuple(values["keep_rate"])
    return values


def check_keep_rate(value: object) -> float:
    """``value`` as a float in (0, 1], or an error that says what was expected."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:  # type: ignore[operator]
        raise SparsifinerError(f"keep_rate must lie in (0, 1], got {shown(value)}; 0.1 keeps a tenth of the keys")
    return float(value)
