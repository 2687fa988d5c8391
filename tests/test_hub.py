"""The Hub's conventions, offline, where folders stand for repositories; what other libraries save of sparse models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import lively
from homes import TRANSFORMERS, first_tensor, pixels
from huggingface_hub.errors import RepositoryNotFoundError
from repositories import PackedViT
from test_homes import torchvision_vit
from test_repositories import HalvesAttention, Tokens

import sparsifiner
from sparsifiner import GridSource, SparsifinerConfig
from sparsifiner.errors import SparsifinerError
from sparsifiner.predictors import LowRankConfig

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))
X = pixels(2, 3, 64, 64)


def small():
    return lively(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Uploads copy to a folder per repository and downloads come from there."""
    asked = []

    class Api:
        def __init__(self, token=None): ...

        def create_repo(self, name, private=None, exist_ok=False):
            (tmp_path / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"https://huggingface.co/{repo_id}"

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        if not (tmp_path / name).exists():
            import httpx

            raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path, asked


def test_pushed_and_fetched_by_name(hub):
    folder, asked = hub
    sparse = sparsifiner.sparsify(small(), SPARSE)
    assert sparsifiner.push_to_hub(sparse, "ada/vit-sparse") == "https://huggingface.co/ada/vit-sparse"
    back = sparsifiner.from_pretrained("ada/vit-sparse", revision="v1")
    assert asked == [("ada/vit-sparse", "v1", ["*.json", "*.safetensors"])]
    with torch.no_grad():
        assert torch.equal(back(X), sparse(X))
    files = {path.name for path in (folder / "ada/vit-sparse").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "sparsifiner.json"}
    config = json.loads((folder / "ada/vit-sparse/config.json").read_text())
    assert (config["library_name"], config["architecture"]) == ("sparsifiner", "vit_tiny_patch16_224")


def test_the_card_says_how_to_load_settings_licence_and_figures(hub):
    folder, _ = hub
    sparse = sparsifiner.sparsify(small(), SPARSE)
    sparse.pretrained_cfg.update(license="apache-2.0", hf_hub_id="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    report = Path(__file__).parents[1] / "benchmarks" / "results" / "report-518.json"
    sparsifiner.push_to_hub(sparse, "ada/vit-sparse", report=report)
    card = (folder / "ada/vit-sparse/README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license: apache-2.0" in head
    assert "base_model: timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in head
    assert 'sparsifiner.from_pretrained("ada/vit-sparse")' in body
    assert "| keep_rate | `0.2` |" in body
    assert "| 518x518 | 0.1 | 0.9939 | 0.9865 | 759 ms | 578 ms | 1.31x |" in body
    assert "AMD EPYC" in body
    with pytest.raises(SparsifinerError, match=r"is no report.json of `sparsifiner report`"):
        sparsifiner.push_to_hub(sparse, "ada/vit-sparse", report=folder / "ada/vit-sparse/config.json")


def test_names_that_lead_nowhere_are_one_line(hub):
    folder, _ = hub
    with pytest.raises(SparsifinerError, match="neither a folder ada/none nor such a repository at revision v2 on"):
        sparsifiner.from_pretrained("ada/none", revision="v2")
    with pytest.raises(SparsifinerError, match="revision is for names on the Hugging Face Hub"):
        sparsifiner.from_pretrained(folder, revision="v2")
    with pytest.raises(SparsifinerError, match="is called user/name, got 'vit'"):
        sparsifiner.push_to_hub(small(), "vit")


@pytest.mark.filterwarnings("ignore")
def test_timm_refuses_what_it_would_reload_dense(hub, tmp_path):
    sparse = sparsifiner.sparsify(small(), SPARSE.replace(keep_rate=(0.2, 0.4)))
    timm.models.save_for_hf(sparse, tmp_path / "timm", safe_serialization=True)
    sparsifiner.push_to_hub(sparse, "ada/vit")
    for folder in (tmp_path / "timm", tmp_path / "ada/vit"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'sparsifiner.from_pretrained'"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)
        with torch.no_grad():
            assert torch.equal(sparsifiner.from_pretrained(folder)(X), sparse(X))
    dense = sparsifiner.densify(sparse)
    timm.models.save_for_hf(dense, tmp_path / "dense", safe_serialization=True)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()(X), dense(X))
    (tmp_path / "timm" / "model.safetensors").unlink()
    with pytest.raises(SparsifinerError, match="pickles are not read; save with timm's safe_serialization=True"):
        sparsifiner.from_pretrained(tmp_path / "timm")


@pytest.mark.filterwarnings("ignore")
def test_timm_models_inside_transformers_come_back_sparse(tmp_path):
    transformers = pytest.importorskip("transformers")
    timm.models.save_for_hf(small(), tmp_path / "timm", safe_serialization=True)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    del config["model_args"]["num_classes"]  # which transformers gives as well
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "timm").eval()
    sparse = sparsifiner.sparsify(wrapper, SPARSE)
    sparse.save_pretrained(tmp_path / "sparse")
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "sparse").eval()
    assert len(sparsifiner.sparse_layers(again)) == 2
    with torch.no_grad():
        assert torch.equal(again(X).logits, sparse(X).logits)
        assert not torch.equal(again(X).logits, wrapper(X).logits)


GIVEN = {
    "torchvision": (torchvision_vit, {}),
    "one qkv": (PackedViT, {}),
    "named grid": (
        lambda: Tokens(HalvesAttention(32, 2)),
        dict(grid=GridSource.from_conv("conv_proj"), num_prefix_tokens=5),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("learned", [False, True])
def test_models_that_nobody_can_build_from_a_name(name, learned, tmp_path):
    build, source = GIVEN[name]
    config = SPARSE.replace(predictor=LowRankConfig(n_down=4)) if learned else SPARSE
    dense = lively(build())
    sparse = sparsifiner.sparsify(dense, config, **source)
    with pytest.raises(SparsifinerError, match="or with rebuild=False and load with"):
        sparsifiner.save_pretrained(sparse, tmp_path)
    sparsifiner.save_pretrained(sparse, tmp_path, rebuild=False)
    fresh = build()
    back = sparsifiner.from_pretrained(tmp_path, model=fresh)
    with torch.no_grad():
        assert torch.equal(back(X), sparse(X))
    assert not sparsifiner.convert.is_sparse(fresh)
    with pytest.raises(SparsifinerError, match=r"is not built from a name; build the dense model and pass it"):
        sparsifiner.from_pretrained(tmp_path)
    with pytest.raises(SparsifinerError, match="does not fit the|nothing to convert|must name the convolution"):
        sparsifiner.from_pretrained(tmp_path, model=small())


def test_a_model_that_is_built_from_a_name_is_not_given(tmp_path):
    sparsifiner.save_pretrained(sparsifiner.sparsify(small(), SPARSE), tmp_path)
    with pytest.raises(SparsifinerError, match="tells how to build its model; leave model out"):
        sparsifiner.from_pretrained(tmp_path, model=small())
    with pytest.raises(SparsifinerError, match="rebuild=False is for models with sparse layers"):
        sparsifiner.save_pretrained(small(), tmp_path, rebuild=False)


@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_are_pushed_with_their_own_config(hub):
    pytest.importorskip("transformers")
    folder, _ = hub
    sparse = sparsifiner.sparsify(lively(TRANSFORMERS["DINOv2"].build()), SPARSE)
    sparsifiner.push_to_hub(sparse, "ada/dinov2")
    assert json.loads((folder / "ada/dinov2/config.json").read_text())["architectures"] == ["Dinov2Model"]
    with torch.no_grad():
        want, got = (first_tensor(model(X)) for model in (sparse, sparsifiner.from_pretrained("ada/dinov2")))
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                                    image_size=64, patch_size=8, num_labels=3)  # fmt: skip
    sparse = sparsifiner.sparsify(lively(transformers.ViTForImageClassification(config)), SPARSE)
    before = {name: parameter.clone() for name, parameter in sparse.named_parameters()}
    data = [{"pixel_values": pixels(3, 64, 64), "labels": 1}] * 2
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="steps",
        save_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(sparse, arguments, train_dataset=data).train()
    changed = [name for name, parameter in sparse.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("q_proj" in name or "query" in name for name in changed)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-1").eval()
    with torch.no_grad():
        assert torch.equal(again(X).logits, sparse.eval()(X).logits)
