"""Losses between patches: pruned students beside whole teachers, and token labels from LV-ViT's auxiliary head."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import lively
from torch import nn

from sparsifiner import SparsifinerConfig, kept_patches, prune_tokens, sparsify
from sparsifiner.methods import convert_with
from sparsifiner.models import load_model
from sparsifiner.reduction.blocks import reduces_tokens
from sparsifiner.training import train
from sparsifiner.training.objective import Objective
from sparsifiner.training.phases import enter_phase
from sparsifiner.training.recipe import PhaseConfig
from sparsifiner.training.recipe_file import from_dict

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tiny_lvvit(**changes):
    return lively(timm.create_model("lvvit_s", **{**TINY, "num_classes": 5, **changes}))


def disturbed(model):
    """A model of other weights and the same shapes."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return model


def loss_of(name, student, teacher, x):
    return Objective(student, teacher, {name: 1.0})(x, None)[1][name].item()


def test_a_student_that_keeps_every_patch_is_its_unpruned_twin(tiny_vit, images):
    teacher, x = tiny_vit(), images(2, 3, 32, 32)
    pruned = prune_tokens(teacher, keep_rate=1.0, layers=(0, 1), fuse=True)
    assert loss_of("token_mse", pruned, teacher, x) == pytest.approx(0, abs=1e-10)
    assert loss_of("token_mse", convert_with("tome", teacher, 1.0), teacher, x) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_every_survivor_is_compared_with_its_own_patch(tiny_vit, images, name, fuse):
    # Tokens that leave after the last attention take nothing from the others, so each survivor equals its patch.
    teacher, x = tiny_vit(name, depth=3), images(3, 3, 32, 32)
    late = prune_tokens(teacher, keep_rate=0.4, layers=(2,), fuse=fuse)
    assert loss_of("token_mse", late, teacher, x) == pytest.approx(0, abs=1e-9)
    assert kept_patches(late).shape == (3, 26)
    assert loss_of("token_mse", disturbed(late), teacher, x) > 1e-3


@pytest.mark.parametrize("method", ["token-pruning", "evit", "paper-evit"])
def test_the_loss_of_a_pruned_student_is_the_mean_over_its_survivors(tiny_vit, images, method):
    teacher, x = tiny_vit(depth=4), images(2, 3, 32, 32)
    student = disturbed(convert_with(method, teacher, 0.6))
    got = loss_of("token_mse", student, teacher, x)
    with torch.no_grad():
        mine, whole = student.forward_features(x), teacher.forward_features(x)
    kept = kept_patches(student).tolist()
    first = mine.shape[1] - len(kept[0])  # a class token, and a fused one in EViT
    assert first == (1 if method == "token-pruning" else 2)
    squares = [
        float((mine[image, first + place] - whole[image, 1 + patch]).square().mean())
        for image, patches in enumerate(kept)
        for place, patch in enumerate(patches)
    ]
    assert got == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def test_the_loss_of_a_pruned_student_reaches_its_weights_and_not_the_teacher(tiny_vit, images):
    teacher = tiny_vit(depth=3)
    student = sparsify(prune_tokens(teacher, keep_rate=0.5, layers=(0, 1), fuse=True), SparsifinerConfig(0.3))
    student = disturbed(student)
    enter_phase(student, PhaseConfig("cls_distill", steps=1))
    Objective(student, teacher, {"token_mse": 1.0})(images(2, 3, 32, 32), None)[0].backward()
    learning = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {name for name, _ in student.named_parameters() if ".predictor." not in name}
    assert learning == expected - {"head.weight", "head.bias"}
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_tokens_without_a_counterpart_are_refused_in_one_line(tiny_vit, images):
    dense, x = tiny_vit(depth=4), images(2, 3, 32, 32)
    pruned, merged = prune_tokens(dense, keep_rate=0.5, layers=(1,)), convert_with("tome", dense, 0.5)
    for student, teacher, words in [
        (merged, dense, "the student merges 64 patches into 32 tokens"),
        (pruned, pruned, "the teacher prunes or merges tokens"),
        (dense, merged, "the teacher prunes or merges tokens"),
        (pruned, tiny_vit(patch_size=8), "the teacher has 16 patches and the student 64"),
        (pruned, tiny_vit(embed_dim=96), "patch tokens have shape"),
        (pruned, None, "token_mse learns from a teacher, but there is none"),
    ]:
        with pytest.raises(ValueError, match=words) as refused:
            Objective(student, teacher, {"token_mse": 1.0})(x, None)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prune", [None, False, True])
def test_token_labels_are_the_teachers_classes_of_each_patch(images, prune):
    teacher, x = tiny_lvvit(), images(2, 3, 32, 32)
    student = disturbed(teacher)
    if prune is not None:  # with or without a fused token, which has no label
        student = prune_tokens(student, keep_rate=0.5, layers=(1,), fuse=prune)
    got = loss_of("token_label", student, teacher, x)
    with torch.no_grad():
        mine, whole = student.forward_features(x), teacher.forward_features(x)
    kept = [list(range(64))] * 2 if prune is None else kept_patches(student).tolist()
    total, first = torch.zeros(()), mine.shape[1] - len(kept[0])
    for image, patches in enumerate(kept):
        for place, patch in enumerate(patches):
            label = F.linear(whole[image, 1 + patch], teacher.aux_head.weight, teacher.aux_head.bias).softmax(-1)
            seen = F.linear(mine[image, first + place], student.aux_head.weight, student.aux_head.bias)
            total = total - (label * seen.log_softmax(-1)).sum() / (2 * len(kept[0]))
    assert got == pytest.approx(total.item(), rel=1e-4)


def test_token_labels_train_auxiliary_head_and_backbone(images):
    teacher = tiny_lvvit()
    student = disturbed(teacher)
    enter_phase(student, PhaseConfig("cls", steps=1))
    total, parts = Objective(student, teacher, {"token_label": 0.5})(images(2, 3, 32, 32), None)
    assert total.item() == pytest.approx(0.5 * parts["token_label"].item())
    total.backward()
    learning = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, _ in student.named_parameters()} - {"head.weight", "head.bias"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    low = Objective(student.bfloat16(), teacher.bfloat16(), {"token_label": 1.0})
    assert low(images(2, 3, 32, 32).bfloat16(), None)[0].dtype == torch.float32


def test_token_labels_need_two_auxiliary_heads_and_a_teacher(tiny_vit, images):
    model, plain, x = tiny_lvvit(), tiny_vit(), images(1, 3, 32, 32)
    for student, teacher, words in [
        (plain, model, "token_label needs a student with an auxiliary head .*VisionTransformer has none"),
        (model, plain, "token_label needs a teacher with an auxiliary head"),
        (model, tiny_lvvit(num_classes=0), "num_classes above 0; LvVit has none"),
        (model, tiny_lvvit(num_classes=3), r"patch logits have shape \[1, 64, 3\]"),
        (model, tiny_lvvit(patch_size=8), r"patch logits have shape \[1, 16, 5\]"),
        (model, prune_tokens(model, layers=(1,)), "the teacher prunes or merges tokens"),
        (convert_with("tome", model, 0.5), model, "the student merges"),
        (model, None, "token_label learns from a teacher, but there is none"),
    ]:
        with pytest.raises(ValueError, match=words) as refused:
            Objective(student, teacher, {"token_label": 1.0})(x, None)
        assert "\n" not in str(refused.value)


def test_the_head_phase_trains_both_heads_of_an_lvvit():
    model = tiny_lvvit()
    enter_phase(model, PhaseConfig("cls", steps=1, train="head"))
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"head", "aux_head"}


def test_the_authors_losses_of_lvvit(images):
    """Class token alone for the classes, squared difference of the patches' logits."""
    teacher, x = tiny_lvvit(), images(2, 3, 32, 32)
    student = disturbed(teacher)
    with torch.no_grad():
        mine, whole = student.forward_features(x), teacher.forward_features(x)
        expected = (student.aux_head(mine[:, 1:]) - teacher.aux_head(whole[:, 1:])).square().mean()
        classes = F.cross_entropy(student.head(mine[:, 0]), torch.tensor([1, 2]))
    assert loss_of("aux_mse", student, teacher, x) == pytest.approx(expected.item(), rel=1e-4)
    _, parts = Objective(student, teacher, {"ce": 1.0})(x, torch.tensor([1, 2]))
    assert parts["ce"].item() == pytest.approx(classes.item(), rel=1e-4)
    with pytest.raises(ValueError, match="aux_mse needs a student with an auxiliary head"):
        Objective(torch.nn.Linear(1, 1), teacher, {"aux_mse": 1.0})


@pytest.mark.parametrize("losses", [{"ce": 1.0, "kl": 0.5, "token_mse": 0.5, "token_label": 0.5}, {"token_label": 1.0}])
@pytest.mark.parametrize("sparsity", [{"preset": "paper", "keep_rate": 0.3}, {"method": "evit", "keep_rate": 0.7}])
def test_a_recipe_trains_an_lvvit_with_token_labels(folder_of_images, tmp_path, sparsity, losses):
    recipe = {
        "model": "lvvit_s",
        "pretrained": False,
        "model_args": {**TINY, "depth": 4},
        "sparsity": sparsity,
        "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0, "val_limit": 3},
        "batch_size": 4,
        "log_every": 1,
        "phases": [{"name": "cls_distill", "steps": 2, "lr": 1e-3, "losses": losses}],
    }
    result = train(from_dict(recipe), tmp_path / "out", cpu=True)
    entries = [entry for entry in result.history if "token_label" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["loss"] == pytest.approx(sum(weight * entry[name] for name, weight in losses.items()), rel=1e-4)
    assert isinstance(load_model(str(result.model)).aux_head, nn.Linear)
    with pytest.raises(ValueError, match=r"token_label\), but teacher is none"):
        from_dict({**recipe, "teacher": "none"})


def test_a_saved_pruned_student_goes_on_with_an_unpruned_teacher(folder_of_images, tmp_path):
    recipe = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2},
        "sparsity": {"method": "sparsifiner-evit", "keep_rate": 0.5},
        "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0, "val_limit": 3},
        "batch_size": 4,
        "log_every": 1,
        "phases": [{"name": "cls_distill", "steps": 1, "lr": 1e-3}],
    }
    first = train(from_dict(recipe), tmp_path / "first", cpu=True)
    recipe |= {"model": str(first.model), "model_args": {}, "sparsity": "saved"}
    again = train(from_dict(recipe), tmp_path / "again", cpu=True)
    assert again.history[0]["token_mse"] > 0
    assert reduces_tokens(load_model(str(again.model)))


def test_a_phase_that_asks_the_teacher_about_dropped_tokens_is_refused_before_any_trains(recipe, tmp_path):
    def made(second):
        phases = [{"name": "attn_recon", "steps": 1}, {"name": second, "steps": 1}]
        return recipe(sparsity={"method": "paper-evit", "keep_rate": 0.5}, phases=phases)

    with pytest.raises(ValueError, match="phase joint: attn_recon compares .* use attn_self_distill"):
        train(made("joint"), tmp_path / "refused", cpu=True)
    assert not (tmp_path / "refused").exists()
    result = train(made("attn_self_distill"), tmp_path / "out", cpu=True)  # what the message advises
    assert any("attn_self_distill" in entry for entry in result.history)
