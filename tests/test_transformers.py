"""Models of Hugging Face transformers: sparse in place, equal to dense at keep rate 1, saved, compiled, trained."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import lively
from homes import TRANSFORMERS, cut_patches, first_tensor, packed_patches, pixels

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.errors import SparsifinerError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SPARSE = SparsifinerConfig(keep_rate=0.2, mode="sparse", query_tile=(2, 2), tail=(2, 2))


def run(model, inputs):
    with torch.no_grad():
        return first_tensor(model(**inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equal_to_sdpa_at_keep_rate_1_and_dense_again(name):
    home = TRANSFORMERS[name]
    model, inputs = lively(home.build()), home.inputs()
    dense = run(model, inputs)
    sparse = sparsifiner.sparsify(model, SPARSE)
    assert type(sparse) is type(model)
    assert list(sparse.state_dict()) == list(model.state_dict())
    assert len(sparsifiner.conversion(sparse).swapped) == home.swapped
    with sparsifiner.record(sparse) as seen:
        pruned = run(sparse, inputs)
    assert len(seen) == home.swapped
    assert all(record.connectivity is not None for record in seen.values())
    assert (pruned - dense).norm() > 1e-4 * dense.norm()
    sparsifiner.set_keep_rate(sparse, 1.0)
    assert (run(sparse, inputs) - dense).norm() < 1e-5 * dense.norm()
    if home.flexible is not None:
        other = home.flexible()
        assert (run(sparse, other) - run(model, other)).norm() < 1e-5 * run(model, other).norm()
    back = sparsifiner.densify(sparse)
    assert torch.equal(run(back, inputs), dense)
    assert torch.equal(run(model, inputs), dense)
    assert "sparsifiner" not in back.config.to_json_string()


@pytest.mark.parametrize("name", ["DINOv2", "CLIP", "YOLOS"])
@pytest.mark.parametrize("by", ["transformers", "sparsifiner"])
def test_saved_and_loaded_sparse_again(name, by, tmp_path):
    home = TRANSFORMERS[name]
    sparse, inputs = sparsifiner.sparsify(lively(home.build()), SPARSE.replace(keep_rate=(0.2, 0.4))), home.inputs()
    if by == "transformers":
        sparse.save_pretrained(tmp_path)
        loaded = type(sparse).from_pretrained(tmp_path)
    else:
        sparsifiner.save_pretrained(sparse, tmp_path)
        loaded = sparsifiner.from_pretrained(tmp_path)
    rates = [layer.config.keep_rate for layer in sparsifiner.sparse_layers(loaded).values()]
    assert rates == [0.2, 0.4]
    assert torch.equal(run(loaded, inputs), run(sparse, inputs))
    sparsifiner.set_keep_rate(loaded, 0.5)
    loaded.save_pretrained(tmp_path / "again")
    again = type(sparse).from_pretrained(tmp_path / "again")
    assert {layer.config.keep_rate for layer in sparsifiner.sparse_layers(again).values()} == {0.5}
    sparsifiner.densify(again, inplace=True)
    again.save_pretrained(tmp_path / "dense")
    assert not sparsifiner.convert.is_sparse(type(sparse).from_pretrained(tmp_path / "dense"))


AFTER_BOTH = """
import torch
model = transformers.AutoModel.from_pretrained({dense!r}, attn_implementation="sparsifiner")
print(len(sparsifiner.sparse_layers(model)), type(model).__name__)
model(torch.randn(1, 3, 64, 64))
"""


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_attn_implementation_works_after_sparsifiner_was_imported_first(tmp_path):
    TRANSFORMERS["DINOv2"].build().save_pretrained(tmp_path)
    code = 'import sparsifiner, sys\nassert "transformers" not in sys.modules\nimport transformers\n'
    done = in_a_new_process(code + AFTER_BOTH.format(dense=str(tmp_path)))
    assert done.stdout == "2 Dinov2Model\n", done.stderr


def test_without_sparsifiner_a_saved_sparse_model_is_refused_not_dense_and_a_later_import_is_not_too_late(tmp_path):
    TRANSFORMERS["DINOv2"].build().save_pretrained(tmp_path / "dense")
    sparsifiner.sparsify(TRANSFORMERS["DINOv2"].build(), SPARSE).save_pretrained(tmp_path / "sparse")
    code = f"""
import sys, transformers
try:
    transformers.Dinov2Model.from_pretrained({str(tmp_path / "sparse")!r})
except ValueError as error:
    print(error)
assert "sparsifiner" not in sys.modules
import sparsifiner
"""
    done = in_a_new_process(code + AFTER_BOTH.format(dense=str(tmp_path / "dense")))
    refused, *rest = done.stdout.splitlines()
    assert 'attn_implementation="sparsifiner"` is not supported' in refused, done.stderr
    assert rest[-1] == "2 Dinov2Model", done.stderr


def test_models_that_ignore_the_interface_are_refused():
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    with pytest.raises(SparsifinerError, match="nothing to convert in VitDetModel.*no adapter for VitDetAttention"):
        sparsifiner.sparsify(transformers.VitDetModel(config))
    with pytest.raises((SparsifinerError, ValueError)):
        transformers.AutoModel.from_config(config, attn_implementation="sparsifiner")


REFUSED = {
    "HieraModel": (dict(embed_dim=16, num_heads=[1, 2], depths=[1, 1], image_size=[64, 64], masked_unit_size=[4, 4],
                        query_stride=[2, 2], num_query_pool=1, patch_stride=[4, 4]), "order of its mask units"),
    "ViTMAEModel": (dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                         image_size=64, patch_size=8), "drops patches at random"),
    "SwinModel": (dict(image_size=64, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4),
                  "no adapter for SwinAttention"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_a_sentence(name):
    settings, reason = REFUSED[name]
    config = getattr(transformers, name.replace("Model", "Config"))(**settings)
    with pytest.raises(SparsifinerError, match=f"nothing to convert in {name}.*{reason}"):
        sparsifiner.sparsify(getattr(transformers, name)(config))


def test_padded_images_are_those_without_padding():
    model = lively(TRANSFORMERS["SigLIP 2"].build())
    sparse, shapes = sparsifiner.sparsify(model, SPARSE), [(6, 8), (4, 12), (5, 5)]
    padded = cut_patches(shapes, 64)
    together = run(sparse, padded)
    sparsifiner.set_keep_rate(sparse, 1.0)
    exact, dense = run(sparse, padded), run(model, padded)
    sparsifiner.set_keep_rate(sparse, 0.2)
    for number, (rows, columns) in enumerate(shapes):
        count = rows * columns
        assert (exact - dense)[number, :count].norm() < 1e-5 * dense[number, :count].norm()
        alone = {name: value[number : number + 1] for name, value in padded.items()}
        alone = {name: value if name == "spatial_shapes" else value[:, :count] for name, value in alone.items()}
        assert (run(sparse, alone)[0] - together[number, :count]).abs().max() < 1e-5
    assert together.isfinite().all()


def test_packed_images_that_only_differ_in_their_sides_are_refused():
    sparse = sparsifiner.sparsify(lively(TRANSFORMERS["Qwen2-VL tower"].build()), SPARSE)
    run(sparse, packed_patches((1, 4, 16), (1, 4, 16)))
    with pytest.raises(SparsifinerError, match="images of 4x16, 8x8 patches have 64 each, and the layers cannot tell"):
        run(sparse, packed_patches((1, 8, 8), (1, 4, 16)))


def test_a_module_of_an_unconverted_model_says_so():
    config = TRANSFORMERS["DINOv2"].build().config
    config._attn_implementation = "sparsifiner"
    attention = transformers.models.dinov2.modeling_dinov2.Dinov2Attention(config)
    with pytest.raises(SparsifinerError, match="was not converted; call sparsifiner.sparsify"):
        attention(torch.randn(1, 65, 32))


def test_two_models_of_one_configuration_are_independent():
    config = TRANSFORMERS["DINOv2"].build().config
    one, two = (lively(transformers.Dinov2Model(config)) for _ in range(2))
    inputs = TRANSFORMERS["DINOv2"].inputs()
    dense = run(two, inputs)
    sparsifiner.sparsify(one, SPARSE, inplace=True)
    assert not torch.equal(run(one, inputs), dense)
    assert torch.equal(run(two, inputs), dense)
    assert config._attn_implementation != "sparsifiner"


def test_two_threads_with_images_of_two_sizes():
    sparse = sparsifiner.sparsify(lively(TRANSFORMERS["DINOv2"].build()), SPARSE)
    images = [pixels(1, 3, 64, 64), pixels(1, 3, 32, 128), pixels(1, 3, 128, 32)]  # 64 patches each
    want = [run(sparse, {"pixel_values": x}) for x in images]
    wrong = []

    def work(number: int) -> None:
        for _ in range(10):
            if not torch.equal(run(sparse, {"pixel_values": images[number]}), want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_training_step_with_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing: bool):
        sparse = sparsifiner.sparsify(lively(TRANSFORMERS["DINOv2"].build()), SPARSE).train()
        if checkpointing:
            sparse.gradient_checkpointing_enable()
        sparse(pixels(2, 3, 48, 80)).last_hidden_state.square().mean().backward()
        return [p.grad for p in sparse.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 20
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, recomputed, strict=True))


def test_peft_adapts_a_sparse_model():
    peft = pytest.importorskip("peft")
    sparse = sparsifiner.sparsify(lively(TRANSFORMERS["DINOv2"].build()), SPARSE)
    want = run(sparse, TRANSFORMERS["DINOv2"].inputs())
    adapted = peft.get_peft_model(sparse, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert torch.equal(run(adapted.eval(), TRANSFORMERS["DINOv2"].inputs()), want)
    adapted.train()
    first_tensor(adapted(**TRANSFORMERS["DINOv2"].inputs())).square().mean().backward()
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_compiled():
    sparse, inputs = (
        sparsifiner.sparsify(lively(TRANSFORMERS["DINOv2"].build()), SPARSE),
        TRANSFORMERS["DINOv2"].inputs(),
    )
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager")
    assert (run(compiled, inputs) - run(sparse, inputs)).abs().max() < 1e-4


def test_equal_to_the_timm_twin_with_the_same_weights():
    import timm

    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=1.5,
        num_classes=0, global_pool="",
    )  # fmt: skip
    twin = lively(twin)
    model = lively(TRANSFORMERS["ViT"].build())
    state, own = {}, model.state_dict()
    for name in own:
        layer = name.split(".")[2] if ".layer." in name else name.split(".")[1] if name.startswith("layers.") else None
        state[name] = _timm_tensor(name, layer, twin.state_dict(), own[name])
    model.load_state_dict(state)
    x = pixels(2, 3, 64, 64)
    with torch.no_grad():
        assert (twin.forward_features(x) - model(x).last_hidden_state).abs().max() < 1e-4
        config = SPARSE.replace(backend="reference")
        ours = sparsifiner.sparsify(model, config)(x).last_hidden_state
        theirs = sparsifiner.sparsify(twin, config).forward_features(x)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def _timm_tensor(name, layer, state, own):
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias",
    }  # fmt: skip
    if name in names:
        return state[names[name]]
    if layer is None:
        return own  # the pooler
    kind = name.rpartition(".")[2]
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if part in name:
            return state[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3)[number]
    for part, theirs in (("o_proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
                         ("layernorm_before", "norm1"), ("layernorm_after", "norm2")):  # fmt: skip
        if part in name:
            return state[f"blocks.{layer}.{theirs}.{kind}"]
    raise AssertionError(name)


def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "howto" / "other-models.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", page.read_text(), re.DOTALL | re.MULTILINE
    )
    names: dict[str, object] = {}
    for code, printed in blocks:
        exec(code, names)
        shown = capsys.readouterr().out
        assert not printed or shown == printed
    assert len(blocks) > 4
