"""Saved models come back bit for bit; broken folders are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sparsifiner import SparsifinerConfig, from_pretrained, save_pretrained, sparsify
from sparsifiner.models import load_model
from sparsifiner.saving import CONFIG_NAME, WEIGHTS_NAME

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def small_timm_model(**changes: object) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "depth": 2, "num_classes": 5, **changes}).eval()


@pytest.mark.parametrize(
    "config",
    [
        SparsifinerConfig(dense_below=0),
        SparsifinerConfig.paper(keep_rate=(0.2, 0.4), n_down=4),
        SparsifinerConfig(dense_below=0, tail=None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(config: SparsifinerConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    sparse = sparsify(small_timm_model(), config).to(dtype)
    save_pretrained(sparse, tmp_path / "model")
    back = from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(back(X.to(dtype)), sparse(X.to(dtype)))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME])
    assert torch.equal(load_model(str(tmp_path / "model"))(X.to(dtype)), back(X.to(dtype)))


def test_a_basis_made_for_another_grid_comes_back(tmp_path: Path) -> None:
    sparse = sparsify(small_timm_model(), SparsifinerConfig(dense_below=0, predictor="lowrank", n_down=4))
    sparse.set_input_size(img_size=(64, 96))
    save_pretrained(sparse, tmp_path)
    back = from_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(back(x), sparse(x))
    wider = from_pretrained(tmp_path, img_size=(96, 96))
    assert wider(torch.randn(1, 3, 96, 96)).shape == (1, 5)


def test_only_the_difference_is_saved_where_the_pretrained_weights_are_here(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_saliency", pretrained=True, img_size=112).eval()
    sparse = sparsify(model, SparsifinerConfig(dense_below=0, predictor="lowrank"))
    with torch.no_grad():
        sparse.blocks[3].mlp.fc1.bias.add_(1.0)
    save_pretrained(sparse, tmp_path)
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 2e6
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(x), sparse(x))
    weights = load_file(tmp_path / WEIGHTS_NAME)
    save_file(
        {name: t for name, t in weights.items() if "blocks.5.attn.predictor" not in name}, tmp_path / WEIGHTS_NAME
    )
    with pytest.raises(ValueError, match="0 unexpected and 6 missing tensors, such as blocks.5.attn.predictor"):
        from_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG_NAME).read_text())
    settings["dense_fingerprint"] = "0" * 64
    (tmp_path / CONFIG_NAME).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the pretrained weights here are not the ones it was made from"):
        from_pretrained(tmp_path)


def test_models_that_cannot_be_rebuilt_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sparse = sparsify(small_timm_model(mlp_ratio=2.0), SparsifinerConfig(dense_below=0))
    with pytest.raises(ValueError, match="pass the arguments of timm.create_model as model_args"):
        save_pretrained(sparse, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    arguments = dict(img_size=64, depth=2, num_classes=5, mlp_ratio=2.0)
    save_pretrained(sparse, tmp_path / "model", model_args=arguments)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "model")(X), sparse(X))
    with pytest.raises(ValueError, match="Sequential was not made by timm.create_model"):
        save_pretrained(torch.nn.Sequential(sparse), tmp_path / "other")
    with pytest.raises(ValueError, match="call sparsify"):
        save_pretrained(small_timm_model(), tmp_path / "other")


def test_broken_folders(tmp_path: Path) -> None:
    save_pretrained(sparsify(small_timm_model()), tmp_path)
    good_settings = (tmp_path / CONFIG_NAME).read_text()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as refusal:
            from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)

    (tmp_path / CONFIG_NAME).write_text("{")
    refused("cannot be read")
    (tmp_path / CONFIG_NAME).write_text('{"model_type": "vit"}')
    refused("is not the description of a saved sparse model")
    (tmp_path / CONFIG_NAME).write_text(good_settings.replace('"format": 3', '"format": 4'))
    refused("has format 4, this version reads 1 to 3")
    (tmp_path / CONFIG_NAME).write_text(good_settings.replace("vit_tiny_patch16_224", "vit_unknown"))
    refused("cannot rebuild vit_unknown")
    (tmp_path / CONFIG_NAME).write_text(good_settings.replace('"depth": 2', '"depth": 1'))
    refused("unexpected and 0 missing tensors, such as blocks.1")
    (tmp_path / CONFIG_NAME).write_text(good_settings.replace('"num_classes": 5', '"num_classes": 6'))
    refused("does not fit the model: size mismatch for head")
    (tmp_path / CONFIG_NAME).write_text(good_settings)
    content = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    refused("is not a readable safetensors file")
    (tmp_path / WEIGHTS_NAME).unlink()
    refused("model.safetensors is missing")
    with pytest.raises(ValueError, match=r"holds no saved sparse model: sparsifiner.json is missing"):
        from_pretrained(tmp_path / "nowhere")


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparsify(small_timm_model(), SparsifinerConfig(dense_below=0))
    save_pretrained(sparse, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsifiner.saving.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(sparse, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown model 'vit_small_patch14_dinov': did you mean vit_small_patch14_dinov2"
    ):
        load_model("vit_small_patch14_dinov")
    with pytest.raises(ValueError, match="unknown model 'bultin': did you mean builtin"):
        load_model("bultin")
    with pytest.raises(ValueError, match="holds no saved model: sparsifiner.json is missing"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"resnet18 cannot be built with {'img_size': \(64, 64\)}"):
        load_model("resnet18", img_size=(64, 64))


def test_the_builtin_model_is_in_timm() -> None:
    model = load_model("builtin", img_size=(112, 112))
    assert type(model) is timm.models.VisionTransformer
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22e6, rel=0.05)
    assert model.pretrained_cfg["license"] == "mit"
