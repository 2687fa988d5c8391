"""Save and load sparse models: safetensors and JSON, never pickles."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor, nn

from ._utils.description import check_description
from ._utils.digest import state_digest
from ._utils.files import make_folder, write_together
from ._utils.messages import one_line
from ._utils.reading import read_json
from ._utils.trust import check_architecture, check_model_args, create_model
from .attention.layer import SparseAttention
from .attention.markers import TIMM_KEY
from .config import SparsifinerConfig
from .convert import conversion, find_sparse_layers, sparse_layers, sparsify, sparsify_as_saved
from .errors import SparsifinerError
from .geometry.conv_grid import GridSource
from .geometry.patch_grid import check_image_size
from .hub import fetch, is_hub_name
from .reduction import apply_baseline, baseline_parameters, baseline_settings
from .reduction.pruning import TokenPruning, is_pruned, prune_tokens, token_pruning
from .runtime import ReadyModel, Runtime, prepare
from .saved_by_others import is_of_transformers, load_from_others

CONFIG_NAME = "sparsifiner.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = 5
"""Written; 1, which knew no token pruning, 2, which knew no baselines, 3, whose tails pooled whole blocks, and 4, whose
settings were flat, are read as well."""
_SWITCHES = (
    "training", "grad_checkpointing", "fused_attn", "aug_active", "distilled_training", "token_labels", "mix_token",
)  # fmt: skip
"""Attributes that say how a model trains and which kernels it runs on, not what it computes."""
_DATA = (
    "input_size", "test_input_size", "interpolation", "mean", "std", "crop_pct", "test_crop_pct", "crop_mode",
)  # fmt: skip
"""Parts of timm's ``pretrained_cfg`` that say how images are prepared for the model."""

_DROPOUT = ("drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate")
"""Rates that timm leaves out of what it records; without them a saved model would learn on unregularised."""


def save_pretrained(
    model: nn.Module, folder: str | Path, *, model_args: dict[str, Any] | None = None, rebuild: bool = True
) -> None:
    """Write a converted model to ``folder``: its settings as JSON, its weights as safetensors.

    A model of transformers is written as its own ``save_pretrained`` does, with the settings in ``config.json``.

    Where the pretrained weights the model started from are on this computer (in the package or in the
    Hugging Face cache), only the tensors that differ from them are written, the predictors above all, with
    a fingerprint of the others. Both files are written beside those there are and take their places together; where a
    save was interrupted in between, :func:`from_pretrained` refuses the pair. Of a model that ``prepare`` or ``tune``
    made, the weights are written as they were before rounding, and the runtime as settings.

    Args:
        model: the result of ``sparsify``, ``prune_tokens``, both, or a baseline on a model made by
            ``timm.create_model``; or the result of ``prepare`` on such a model or on a dense one.
        folder: made if needed.
        model_args: arguments of ``timm.create_model`` besides those timm has recorded in the model, or in their
            place: names of layers given as classes, which JSON cannot hold.
        rebuild: False for sparse models that neither timm nor transformers made: the folder holds all weights and the
            settings of the sparse layers, and ``from_pretrained(folder, model=...)`` is given the dense model.

    Raises:
        ValueError: if the model is not converted, not a timm model, of several dtypes, or the arguments do not
            rebuild it.
        OSError: if the folder cannot be written, or the disk is full; an earlier save in it is as it was.
    """
    runtime = model.runtime if isinstance(model, ReadyModel) else None
    model = model.source if isinstance(model, ReadyModel) else model
    layers, pruning, baseline = converted = _conversions(model)
    if not rebuild:
        if not layers or runtime is not None or pruning is not None or baseline is not None:
            raise SparsifinerError("rebuild=False is for models with sparse layers, not pruned and without a runtime")
        _write(folder, _description_of_any(model, layers), _cpu_state(model))
        return
    if runtime is None and any(converted) and is_of_transformers(model):
        if model_args:
            raise SparsifinerError("model_args are for timm's models; this one has a configuration of its own")
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    if runtime is None and not any(converted):
        raise SparsifinerError(
            f"{type(model).__name__} is neither sparse nor pruned; call sparsify or prune_tokens first"
        )
    architecture = _architecture(model)
    arguments = _model_args(model, model_args)
    dtype = _dtype(model)
    state = _cpu_state(model)
    _check_rebuilds(model, architecture, arguments)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "architecture": architecture,
        "model_args": arguments,
        "dtype": str(dtype).removeprefix("torch."),
        "data": {name: value for name, value in vars(model)["pretrained_cfg"].items() if name in _DATA},
        "config": _common_config([layer.config for layer in layers]).to_dict() if layers else None,
        "token_pruning": None if pruning is None else pruning.to_dict(),
        "baseline": baseline,
        "runtime": None if runtime is None else runtime.to_dict(),
        "basis_grid": _basis_grid(layers[0]) if layers else None,
        "dense_fingerprint": None,
        "weights_fingerprint": None,
    }
    base = _local_pretrained(architecture, arguments, dtype)
    if base is not None:
        settings["dense_fingerprint"] = state_digest(base)
        state = {
            name: tensor for name, tensor in state.items() if name not in base or not torch.equal(tensor, base[name])
        }
    _write(folder, settings, state)


def _write(folder: str | Path, settings: dict[str, Any], state: dict[str, Tensor]) -> None:
    settings["weights_fingerprint"] = state_digest(state)
    folder = Path(folder)
    make_folder(folder)
    write_together(
        {
            folder / CONFIG_NAME: json.dumps(settings, indent=2) + "\n",
            folder / WEIGHTS_NAME: partial(save_file, _without_aliases(state)),
        }
    )


def _cpu_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _description_of_any(model: nn.Module, layers: list[SparseAttention]) -> dict[str, Any]:
    """Settings of a model that has to be built by its user again."""
    given = conversion(model).grid
    return {
        "format": FORMAT,
        "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_args": {},
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "config": _common_config([layer.config for layer in layers]).to_dict(),
        "given": {
            "grid": None if given is None else given[0],
            "num_prefix_tokens": None if given is None else given[1],
        },
        "basis_grid": _basis_grid(layers[0]),
        "dense_fingerprint": None,
        "weights_fingerprint": None,
    }


def is_converted(model: nn.Module) -> bool:
    """True for a model that is sparse, pruned, or converted by a baseline."""
    return any(_conversions(model))


def from_pretrained(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    img_size: tuple[int, int] | None = None,
    trust_remote: bool = False,
    ready: bool = True,
) -> nn.Module:
    """Load what :func:`save_pretrained` wrote, or what transformers or timm saved of a sparse model.

    A folder may come from anybody: its JSON can name an architecture of timm and settings, nothing else. Weights are
    read from its safetensors file alone, besides those timm itself has for the architecture where the folder holds
    only what differs from them.

    Args:
        folder: the folder, or ``"user/name"`` of the Hugging Face Hub.
        model: the dense model that a save with ``rebuild=False`` started from, with any weights; it is copied.
        revision: branch, tag or commit on the Hub.
        img_size: height and width in pixels to build the model for, if not the saved size.
        trust_remote: let the folder's JSON name other sources: ``hf-hub:`` models, ``checkpoint_path``,
            ``pretrained_cfg`` and whatever else ``timm.create_model`` follows. Pickles that hold more than tensors
            are refused all the same.
        ready: bring a model that was saved with a runtime into its precision again, to be compiled at the first
            batch; False leaves it as it was before, so that it can be trained, calibrated or converted.

    Raises:
        ValueError: if files are missing, corrupt, foreign or of two different saves, if one leads out of the folder,
            or the pretrained weights a delta refers to are not the ones it was made from.
    """
    if is_hub_name(folder):
        folder = fetch(str(folder), revision)
    elif revision is not None:
        raise SparsifinerError(f"revision is for names on the Hugging Face Hub, and {folder} is a folder")
    folder = Path(folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).exists():
        return load_from_others(folder, img_size, trust_remote)
    settings = _read_settings(folder)
    given = settings.get("given")
    if (given is None) != (model is None):
        raise SparsifinerError(
            f"{folder} tells how to build its model; leave model out"
            if given is None
            else f"{folder} holds a {settings['architecture']}, which is not built from a name; build the dense model "
            f"and pass it: from_pretrained(folder, model=...)"
        )
    if model is not None:
        return _load_given(copy.deepcopy(model), settings, _read_weights(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    if not trust_remote:
        check_architecture(settings["architecture"], folder / CONFIG_NAME)
        check_model_args(settings["model_args"], folder / CONFIG_NAME)
    weights = _read_weights(folder / WEIGHTS_NAME)
    _check_fingerprint(settings, weights, folder / WEIGHTS_NAME)
    delta = settings["dense_fingerprint"] is not None
    dtype = getattr(torch, settings["dtype"])
    try:
        model = _create(settings["architecture"], settings["model_args"], pretrained=delta).to(dtype)
    except Exception as error:
        raise SparsifinerError(f"cannot rebuild {settings['architecture']} for {folder}: {one_line(error)}") from error
    # Versions that did not save it leave what timm knows of the architecture.
    for name, value in settings.get("data", {}).items():
        if name in _DATA:
            vars(model)["pretrained_cfg"][name] = tuple(value) if isinstance(value, list) else value
    if delta and state_digest(model.state_dict()) != settings["dense_fingerprint"]:
        raise SparsifinerError(
            f"{folder} holds only what differs from the pretrained {settings['architecture']}, but the pretrained "
            f"weights here are not the ones it was made from; save the model again where it was made"
        )
    try:
        sparse = _convert(model, settings, dtype)
    except SparsifinerError as error:
        raise SparsifinerError(f"{folder / CONFIG_NAME}: {error}") from error
    except Exception as error:  # sizes that fit a dense model but no layer of a converted one
        raise SparsifinerError(f"cannot convert {settings['architecture']} for {folder}: {one_line(error)}") from error
    result = _load_state_dict(sparse, weights, folder / WEIGHTS_NAME)
    # A delta may lack what the pretrained weights hold, never a predictor.
    held = _dense_state(sparse) if delta else {}
    missing = [name for name in result.missing_keys if name not in held]
    if result.unexpected_keys or missing:
        name = (result.unexpected_keys or missing)[0]
        raise SparsifinerError(
            f"{folder / WEIGHTS_NAME} does not fit {settings['architecture']}: "
            f"{len(result.unexpected_keys)} unexpected and {len(missing)} missing tensors, such as {name}"
        )
    if img_size is not None:
        _set_input_size(sparse, img_size)
    sparse.eval()
    if not ready or settings.get("runtime") is None:
        return sparse
    return prepare(sparse, Runtime.from_dict(settings["runtime"]))


def _convert(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The dense ``model`` as the settings of :data:`CONFIG_NAME` say, with new predictors."""
    if settings.get("token_pruning") is not None:
        prune_tokens(model, **TokenPruning.from_dict(settings["token_pruning"]).to_dict(), inplace=True)
    if settings.get("baseline") is not None:
        apply_baseline(model, settings["baseline"]).to(dtype)
    if settings["config"] is not None:
        sparsify_as_saved(model, SparsifinerConfig.from_dict(settings["config"])).to(dtype)
    if settings["basis_grid"] is not None:
        for layer in sparse_layers(model).values():
            layer.reset_predictor(tuple(settings["basis_grid"]))
    return model


def _check_fingerprint(settings: dict[str, Any], weights: dict[str, Tensor], path: Path) -> None:
    if settings.get("weights_fingerprint") not in (None, state_digest(weights)):
        raise SparsifinerError(
            f"{path} does not belong to the {CONFIG_NAME} beside it: a save was interrupted, or one file was changed "
            f"alone; save the model again"
        )


def _load_given(model: nn.Module, settings: dict[str, Any], weights: dict[str, Tensor], path: Path) -> nn.Module:
    """A dense model made sparse as saved, with the saved weights."""
    _check_fingerprint(settings, weights, path)
    conv, tokens = (settings["given"].get(name) for name in ("grid", "num_prefix_tokens"))
    source = {} if conv is None else dict(grid=GridSource(conv), num_prefix_tokens=tokens)
    dtype, config = getattr(torch, settings["dtype"]), SparsifinerConfig.from_dict(settings["config"])
    sparse = sparsify(model.to(dtype), config, **source, inplace=True).to(dtype)
    if settings["basis_grid"] is not None:
        for layer in sparse_layers(sparse).values():
            layer.reset_predictor(tuple(settings["basis_grid"]))
    result = _load_state_dict(sparse, weights, path)
    differing = [*result.unexpected_keys, *result.missing_keys]
    if differing:
        raise SparsifinerError(
            f"{path} does not fit the given {type(model).__name__}: {len(result.unexpected_keys)} unexpected and "
            f"{len(result.missing_keys)} missing tensors, such as {differing[0]}"
        )
    return sparse.eval()


def _set_input_size(model: Any, img_size: tuple[int, int]) -> None:
    check_image_size(model, img_size)
    if not hasattr(model, "set_input_size"):
        raise SparsifinerError(f"{type(model).__name__} cannot change its image size; leave img_size out")
    model.set_input_size(img_size=img_size)


def _architecture(model: nn.Module) -> str:
    pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
    name = pretrained_cfg.get("architecture")
    if not name:
        raise SparsifinerError(
            f"{type(model).__name__} was not made by timm.create_model, so it cannot be rebuilt from a name; "
            f"save the sparse backbone alone, or with rebuild=False and load with from_pretrained(folder, model=...)"
        )
    tag = pretrained_cfg.get("tag")
    return f"{name}.{tag}" if tag else name


def _model_args(model: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` as JSON holds them: those timm has recorded and those ``given``, with the
    present depth, image size, classes and pooling."""
    check_model_args(given or {}, "the call")
    recorded = getattr(model, "_model_args", {})
    rates = {name: recorded[name] for name in _DROPOUT if name in recorded}
    arguments = get_model_args(model, {**rates, **(given or {})})
    arguments.pop(TIMM_KEY, None)
    blocks = getattr(model, "blocks", None)
    if blocks is not None:
        arguments["depth"] = len(blocks)
    for name, value in arguments.items():
        try:
            arguments[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise SparsifinerError(
                f"JSON cannot hold {name}={value!r}, which timm.create_model was given; pass a value that it can, such "
                f"as a layer's name in timm: model_args={{{name!r}: ...}}"
            ) from error
    return arguments


def _create(architecture: str, arguments: dict[str, Any], *, pretrained: bool) -> nn.Module:
    """The dense model that saved ``arguments`` describe."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    return create_model(architecture, pretrained=pretrained, **values)


def _check_rebuilds(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> None:
    """Make the dense model again without memory, and compare names, shapes and settings."""
    try:
        with torch.device("meta"):
            rebuilt = _create(architecture, arguments, pretrained=False)
    except Exception as error:
        raise SparsifinerError(
            f"timm cannot rebuild {architecture} with {arguments} ({one_line(error)}); pass model_args"
        ) from error
    want: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in _dense_state(model).items()}
    got: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    differing = want.keys() ^ got.keys() or {name for name in want if want[name] != got[name]}
    if not differing:
        want, got = _settings(model), _settings(rebuilt)
        differing = {name for name in want.keys() & got.keys() if want[name] != got[name]}
    if differing:
        name = min(differing)
        raise SparsifinerError(
            f"{architecture} made with {arguments} differs from this model, for instance in {name} "
            f"({got.get(name)} instead of {want.get(name)}); pass the arguments of timm.create_model as model_args, or "
            f"save state_dict()"
        )


def _settings(model: nn.Module) -> dict[str, Any]:
    """Numbers, names and flags that the modules hold, and the classes of the innermost ones, by path; no dropout."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            found[path] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple)) and name not in _SWITCHES and name[0] != "_":
                found[f"{path}.{name}".lstrip(".")] = value
    return {path: value for path, value in found.items() if "drop" not in path}


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what conversion has added: predictors, and a baseline's projections."""
    own = tuple(f"{name}.predictor.".lstrip(".") for name in find_sparse_layers(model))
    added = baseline_parameters(model)
    return {
        name: tensor for name, tensor in model.state_dict().items() if name not in added and not name.startswith(own)
    }


def _conversions(model: nn.Module) -> tuple[list[SparseAttention], TokenPruning | None, dict[str, Any] | None]:
    """Conversions of a dense model: its sparse layers, the settings of pruning, and those of a baseline."""
    pruning = token_pruning(model) if is_pruned(model) else None
    if pruning is not None:  # blocks may have been cut off at the end since
        left = tuple(number for number in pruning.layers if number < len(model.blocks))  # type: ignore[arg-type]
        pruning = replace(pruning, layers=left) if left else None
    return list(find_sparse_layers(model).values()), pruning, baseline_settings(model)


def _dtype(model: nn.Module) -> torch.dtype:
    """The one of all its floating-point tensors; a saved model is made anew in a single one."""
    first: dict[torch.dtype, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            first.setdefault(tensor.dtype, name)
    if len(first) > 1:
        found = " and ".join(f"{str(dtype).removeprefix('torch.')} (such as {name})" for dtype, name in first.items())
        raise SparsifinerError(
            f"the weights of {type(model).__name__} are {found}; bring them to one with model.to(dtype)"
        )
    return next(iter(first))


def _basis_grid(layer: SparseAttention) -> list[int] | None:
    """The patch grid a low-rank basis is made for; other predictors have none."""
    grid = layer.predictor.basis_grid
    return None if grid is None else list(grid)


def _common_config(configs: list[SparsifinerConfig]) -> SparsifinerConfig:
    """One config for all layers; only their keep rates may differ."""
    rates = tuple(config.keep_rate for config in configs)
    first = configs[0]
    for number, config in enumerate(configs):
        if config.replace(keep_rate=first.keep_rate) != first:
            raise SparsifinerError(
                f"layer {number} differs from layer 0 in more than its keep rate; such a model cannot be saved"
            )
    return first if len(set(rates)) == 1 else first.replace(keep_rate=rates)


def _local_pretrained(architecture: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The pretrained state dict if it is on this computer already, else None. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

    pretrained_cfg = timm.get_pretrained_cfg(architecture)
    # A classifier of another width is drawn anew each time, so that no fingerprint could ever match.
    if pretrained_cfg is None or arguments.get("num_classes", pretrained_cfg.num_classes) != pretrained_cfg.num_classes:
        return None
    cached = pretrained_cfg.file is not None and os.path.isfile(pretrained_cfg.file)
    if not cached and pretrained_cfg.hf_hub_id:
        cached = isinstance(try_to_load_from_cache(pretrained_cfg.hf_hub_id, SAFETENSORS_SINGLE_FILE), str)
    if not cached:
        return None
    return _create(architecture, arguments, pretrained=True).to(dtype).state_dict()


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; give each its own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        settings = read_json(path)
    except FileNotFoundError as error:
        raise SparsifinerError(f"{folder} holds no saved sparse model: {CONFIG_NAME} is missing") from error
    except (OSError, ValueError) as error:
        raise SparsifinerError(f"{path} cannot be read: {one_line(error)}") from error
    check_description(settings, path, FORMAT)
    if settings["format"] < 4 and isinstance(settings["config"], dict):
        settings["config"].setdefault("tail_refine", 0)
    return settings


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise SparsifinerError(f"{path} is missing; copy it beside {CONFIG_NAME}") from error
    except (SafetensorError, OSError) as error:
        raise SparsifinerError(f"{path} is not a readable safetensors file ({error}); copy it again") from error


def _load_state_dict(model: nn.Module, weights: dict[str, Tensor], path: Path) -> Any:
    try:
        return model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise SparsifinerError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
