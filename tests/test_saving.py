"""Saved models come back bit for bit; broken folders are refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import vit_tiny_patch16_224

from sparsifiner import SparsifinerConfig, from_pretrained, save_pretrained, sparsify
from sparsifiner._utils.digest import digest
from sparsifiner.models import load_model
from sparsifiner.ops import cpu
from sparsifiner.predictors import LowRankConfig
from sparsifiner.saving import CONFIG_NAME, WEIGHTS_NAME

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def small_timm_model(**changes: object) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "depth": 2, "num_classes": 5, **changes}).eval()


@pytest.mark.parametrize(
    "config",
    [
        SparsifinerConfig(mode="sparse"),
        SparsifinerConfig.paper(keep_rate=(0.2, 0.4), n_down=4),
        SparsifinerConfig(mode="sparse", tail=None),
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
    sparse = sparsify(small_timm_model(), SparsifinerConfig(mode="sparse", predictor=LowRankConfig(n_down=4)))
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
    sparse = sparsify(model, SparsifinerConfig(mode="sparse", predictor="lowrank"))
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
    with pytest.raises(ValueError, match="does not belong to the sparsifiner.json beside it"):
        from_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG_NAME).read_text())
    del settings["weights_fingerprint"]  # as older versions wrote it
    (tmp_path / CONFIG_NAME).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="0 unexpected and 6 missing tensors, such as blocks.5.attn.predictor"):
        from_pretrained(tmp_path)
    settings["dense_fingerprint"] = "0" * 64
    (tmp_path / CONFIG_NAME).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the pretrained weights here are not the ones it was made from"):
        from_pretrained(tmp_path)


def test_models_that_cannot_be_rebuilt_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    # By timm's own function, not create_model, which records its arguments.
    model = vit_tiny_patch16_224(img_size=64, depth=2, num_classes=5, num_heads=6, mlp_ratio=2.0).eval()
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"))
    for known, differing in (({}, "mlp.fc1.bias"), ({"mlp_ratio": 2.0}, r"attn.head_dim \(64 instead of 32\)")):
        with pytest.raises(ValueError, match=f"{differing}.*pass the arguments of timm.create_model as model_args"):
            save_pretrained(sparse, tmp_path / "model", model_args=known)
    assert not (tmp_path / "model").exists()
    save_pretrained(sparse, tmp_path / "model", model_args={"mlp_ratio": 2.0, "num_heads": 6})
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "model")(X), sparse(X))
    with pytest.raises(ValueError, match="Sequential was not made by timm.create_model"):
        save_pretrained(torch.nn.Sequential(sparse), tmp_path / "other")
    with pytest.raises(ValueError, match="call sparsify"):
        save_pretrained(small_timm_model(), tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"num_heads": 6}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 2.0}),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}),
        ("vit_tiny_patch16_224", {"features_only": True, "out_indices": (0, 1)}),
        ("vit_tiny_patch16_224", {"drop_path_rate": 0.1}),
        ("lvvit_s", {"skip_lam": 1.0}),
    ],
)
def test_what_timm_was_given_is_saved(name: str, arguments: dict[str, object], tmp_path: Path) -> None:
    model = timm.create_model(name, img_size=64, depth=2, num_classes=5, **arguments).eval()
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"))
    save_pretrained(sparse, tmp_path)
    back = from_pretrained(tmp_path)
    x = torch.randn(1, 3, 72, 60) if "dynamic_img_pad" in arguments else X
    with torch.no_grad():
        for got, want in zip(back(x), sparse(x), strict=True):
            assert torch.equal(got, want)


def test_how_images_are_prepared_is_saved(tmp_path: Path) -> None:
    """A model may differ in that from the weights timm has of its name, such as one of a folder or a hub repository."""
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.7}
    model = small_timm_model(pretrained_cfg_overlay={**own, "crop_mode": "squash", "input_size": (3, 64, 64)})
    dense = small_timm_model()
    save_pretrained(sparsify(model), tmp_path)
    back = from_pretrained(tmp_path)
    want = resolve_model_data_config(model)
    assert resolve_model_data_config(back) == want
    assert {name: want[name] for name in own} == own
    assert resolve_model_data_config(small_timm_model()) == resolve_model_data_config(dense) != want
    settings = json.loads((tmp_path / CONFIG_NAME).read_text())
    del settings["data"]  # as older versions wrote it
    (tmp_path / CONFIG_NAME).write_text(json.dumps(settings))
    assert resolve_model_data_config(from_pretrained(tmp_path)) == resolve_model_data_config(dense)


def test_weights_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    sparse = sparsify(small_timm_model()).to(torch.bfloat16)
    sparse.norm.float()
    with pytest.raises(ValueError, match=r"bfloat16 \(such as cls_token\) and float32 \(such as norm.weight\); bring"):
        save_pretrained(sparse, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "lvvit_s"])
def test_a_saved_model_learns_on_with_its_dropout(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, img_size=64, depth=2, num_classes=5, drop_path_rate=0.3)
    save_pretrained(sparsify(model, SparsifinerConfig(mode="sparse")), tmp_path)
    rates = [path.drop_prob for path in from_pretrained(tmp_path).modules() if type(path).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_layers_given_as_classes_are_saved_by_name_or_refused(tmp_path: Path) -> None:
    model = small_timm_model(act_layer=torch.nn.ReLU, norm_layer=partial(torch.nn.LayerNorm, eps=1e-3))
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"))
    with pytest.raises(ValueError, match="JSON cannot hold act_layer=<class .*model_args={'act_layer'"):
        save_pretrained(sparse, tmp_path)
    with pytest.raises(ValueError, match="JSON cannot hold norm_layer"):
        save_pretrained(sparse, tmp_path, model_args={"act_layer": "relu"})
    for names, differing in (
        ({"act_layer": "gelu", "norm_layer": "layernorm"}, "blocks.0.mlp.act"),
        ({"act_layer": "relu", "norm_layer": "layernorm"}, r"blocks.0.norm1.eps \(1e-06 instead of 0.001\)"),
    ):
        with pytest.raises(ValueError, match=f"differs from this model, for instance in {differing}"):
            save_pretrained(sparse, tmp_path, model_args=names)
    sparse = sparsify(small_timm_model(act_layer=torch.nn.ReLU), SparsifinerConfig(mode="sparse"))
    save_pretrained(sparse, tmp_path, model_args={"act_layer": "relu"})
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(X), sparse(X))


def test_changes_made_after_creation_are_saved_or_refused(tmp_path: Path) -> None:
    model = small_timm_model()
    model.blocks = model.blocks[:1]
    model.reset_classifier(3, "avg")
    model.set_input_size(img_size=(64, 96))
    sparse, x = sparsify(model, SparsifinerConfig(mode="sparse")), torch.randn(1, 3, 64, 96)
    sparse.set_grad_checkpointing()
    save_pretrained(sparse, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(x), sparse(x))
    sparse.blocks[0].attn.scale = 0.5
    with pytest.raises(
        ValueError, match=r"in blocks.0.attn.scale \(0.125 instead of 0.5\); pass .* or save state_dict"
    ):
        save_pretrained(sparse, tmp_path)


def test_the_difference_of_a_model_with_batch_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("lvvit_s", depth=2, img_size=64).eval()  # its count of batches has no dimension
    save_file(model.state_dict(), tmp_path / "pretrained.safetensors")
    configurations = timm.models._registry._model_pretrained_cfgs
    local = dataclasses.replace(configurations["lvvit_s"], file=str(tmp_path / "pretrained.safetensors"))
    monkeypatch.setitem(configurations, "lvvit_s", local)
    sparse = sparsify(model, SparsifinerConfig(mode="sparse"))
    save_pretrained(sparse, tmp_path)
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 1000
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(X), sparse(X))


def test_digests_stay_what_they_are_in_saved_folders() -> None:
    tensors = torch.arange(6.0).view(2, 3), torch.tensor(7), torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16)
    parts = b"a", b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())
    assert digest(["a", *tensors]) == hashlib.sha256(b"".join(parts)).hexdigest()


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
    (tmp_path / CONFIG_NAME).write_text(good_settings.replace('"format": 5', '"format": 6'))
    refused("has format 6, this version reads 1 to 5")
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
    sparse = sparsify(small_timm_model(), SparsifinerConfig(mode="sparse"))
    save_pretrained(sparse, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsifiner.saving.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(sparse, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_two_saves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(sparsify(small_timm_model()), tmp_path)

    def stop_before_the_second(source: Path, target: Path, move=os.replace) -> None:
        if target.name == CONFIG_NAME:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("sparsifiner._utils.files.os.replace", stop_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(sparsify(small_timm_model()), tmp_path)
    with pytest.raises(ValueError, match="a save was interrupted, or one file was changed alone; save the model again"):
        from_pretrained(tmp_path)


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown model 'vit_small_patch14_dinov': did you mean vit_small_patch14_dinov2"
    ):
        load_model("vit_small_patch14_dinov")
    with pytest.raises(ValueError, match="unknown model 'bultin': did you mean builtin"):
        load_model("bultin")
    with pytest.raises(ValueError, match="there is no model folder run/model; name one"):
        load_model("run/model")
    with pytest.raises(ValueError, match="holds no saved model: sparsifiner.json is missing"):
        load_model(str(tmp_path))
    save_pretrained(sparsify(small_timm_model()), tmp_path)
    for name in ("builtin", str(tmp_path), "vit_tiny_patch16_224"):
        for side in (8, 100):
            with pytest.raises(ValueError, match=f"image size {side} is not a multiple of the model's"):
                load_model(name, img_size=(side, side), pretrained=name == "builtin")
    with pytest.raises(ValueError, match=r"resnet18 cannot be built with {'img_size': \(64, 64\)}"):
        load_model("resnet18", img_size=(64, 64))


def test_the_builtin_model_is_in_timm() -> None:
    model = load_model("builtin", img_size=(112, 112))
    assert type(model) is timm.models.VisionTransformer
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22e6, rel=0.05)
    assert model.pretrained_cfg["license"] == "mit"


SAVED = Path(__file__).parent / "data" / "saved-0.1.0"


@pytest.mark.parametrize("name", sorted(path.name for path in SAVED.iterdir()))
def test_folders_of_version_0_1_0_load_and_compute_what_they_did(name: str) -> None:
    """Saved flat settings (format 4), with what the models returned then, at a level that rounds no score."""
    outputs = load_file(SAVED / name / "outputs.safetensors")
    exact = nullcontext() if cpu.why_missing() is not None else cpu.force_level("portable")
    with torch.no_grad(), exact:
        model = from_pretrained(SAVED / name)
        torch.testing.assert_close(model.forward_features(outputs["x"]), outputs["features"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(outputs["x"]), outputs["logits"], rtol=1e-4, atol=1e-4)
