"""The Hugging Face Hub: push a sparse model with a card, and fetch one."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ._utils.messages import one_line
from ._utils.reading import read_json
from .attention.markers import TIMM_KEY, settings_of
from .convert import find_sparse_layers
from .errors import SparsifinerError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors"]


def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    report: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Sparse attention by sparsifiner",
    token: str | None = None,
    **saving: Any,
) -> str:
    """Save ``model`` as :func:`sparsifiner.save_pretrained` does and upload it with a model card and ``config.json``.

    Args:
        model: a sparse model.
        name: of the repository, ``"user/name"``; made if needed.
        report: the ``report.json`` that ``sparsifiner report`` wrote for this model, whose figures the card shows.
        private: visibility of a new repository; the account's default if None.
        revision: branch to upload to; the main one if None.
        commit_message: of the upload.
        token: of the Hub; the one ``hf auth login`` has stored if None.
        saving: further arguments of ``save_pretrained``.

    Returns:
        The address of the upload.

    Raises:
        SparsifinerError: if the name is none, the model cannot be saved, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from .saving import save_pretrained

    if not _NAME.fullmatch(name):
        raise SparsifinerError(f"a repository of the Hub is called user/name, got {name!r}")
    figures = None if report is None else _figures(Path(report))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_pretrained(model, folder, **saving)
        config = folder / "config.json"
        if not config.exists():
            config.write_text(json.dumps(_config(model), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(model, name, figures))
        api = HfApi(token=token)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise SparsifinerError(f"cannot push to {name}: {one_line(error)}; log in with `hf auth login`") from error
    return str(done)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder on this computer with a repository's JSON and safetensors files, downloaded where needed.

    Raises:
        SparsifinerError: if there is no such repository or revision, or no network and no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise SparsifinerError(
            f"there is neither a folder {name} nor such a repository{at} on the Hugging Face Hub that can be reached "
            f"({type(error).__name__})"
        ) from error


def is_hub_name(name: str | Path) -> bool:
    """True for ``user/name`` where no such folder is."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and name[0] != "." and not Path(name).exists()


def _config(model: Any) -> dict[str, Any]:
    """What other programs read: the Hub counts downloads by it, and timm refuses to load the weights dense."""
    settings = settings_of(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return {
        "library_name": "sparsifiner",
        "architecture": cfg.get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "model_args": {TIMM_KEY: None if settings is None else settings.to_dict()},
        "pretrained_cfg": {},
    }


def model_card(model: Any, name: str, figures: list[str] | None = None) -> str:
    """The card of a sparse model: how to load it, its settings, its figures and the licence of its base.

    Args:
        model: a sparse model.
        name: of its repository.
        figures: lines of a Markdown table, or None.
    """
    layers, settings = find_sparse_layers(model), settings_of(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    base = cfg.get("hf_hub_id") or getattr(getattr(model, "config", None), "_name_or_path", None)
    licence = cfg.get("license") or getattr(getattr(model, "config", None), "license", None)
    head = ["---", "library_name: sparsifiner", "tags: [sparse-attention, vision-transformer]"]
    head += [f"license: {licence}"] if licence else []
    head += [f"base_model: {base}"] if base and _NAME.fullmatch(str(base)) else []
    own = cfg.get("architecture") or hasattr(model, "save_pretrained")
    call = f'"{name}"' if own else f'"{name}", model=dense'
    lines = [
        *head, "---", "", f"# {name.rpartition('/')[2]}", "",
        f"{cfg.get('architecture') or type(model).__name__} with sparse, instance-dependent attention in {len(layers)} "
        f"layers ([Wei et al., CVPR 2023](https://arxiv.org/abs/2303.13755)).", "",
        "```python", "import sparsifiner", "", f"model = sparsifiner.from_pretrained({call})", "```", "",
    ]  # fmt: skip
    if settings is not None:
        shown = ((key, value) for key, value in settings.to_dict().items() if value is not None)
        lines += ["## Settings", "", "| setting | value |", "|---|---|"]
        lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in shown] + [""]
    lines += ["## Fidelity and speed", "", *(figures or ["Not measured when this card was made."]), ""]
    lines += [
        "## Licence",
        "",
        f"That of the base model{f': {licence}' if licence else ', which is not recorded here'}.",
    ]
    return "\n".join(lines) + "\n"


def _figures(path: Path) -> list[str]:
    """The cases of a report as a Markdown table."""
    try:
        report = read_json(path)
        machine = report["machine"]
        rows = []
        for case in report["cases"]:
            dense, sparse = (case["latency"][f"{kind}_median_s"] for kind in ("dense", "sparse"))
            mean, worst = (case["fidelity"][kind]["patch_cosine"] for kind in ("mean", "worst"))
            size = "x".join(str(side) for side in case["image_size"])
            rows.append(
                f"| {size} | {case['keep_rate']} | {mean:.4f} | {worst:.4f} | {dense * 1e3:.0f} ms | "
                f"{sparse * 1e3:.0f} ms | {dense / sparse:.2f}x |"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SparsifinerError(f"{path} is no report.json of `sparsifiner report`: {one_line(error)}") from error
    head = ["image", "keep rate", "patch cosine", "worst image", "dense", "sparse", "speed-up"]
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *rows,
        "",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.",
    ]
