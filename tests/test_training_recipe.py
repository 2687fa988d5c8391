"""Recipes: what they say, what is refused, and that each of ours runs."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner._utils.settings_files import bundled_recipes
from sparsifiner.config import TailConfig
from sparsifiner.training import phases as phases_module
from sparsifiner.training import student as student_module
from sparsifiner.training import train
from sparsifiner.training.phases import make_scheduler
from sparsifiner.training.recipe import PhaseConfig, TrainConfig
from sparsifiner.training.recipe_file import from_dict, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = list(bundled_recipes().values())
CLS = {"name": "cls", "epochs": 1}


def recipe(**changes):
    return from_dict({"phases": [CLS], "sparsity": None, **changes})


def phase(name, **settings):
    """Changes of a recipe that train the paper's sparse model in one phase."""
    return {"phases": [{"name": name, "epochs": 1, **settings}], "sparsity": {"preset": "paper"}}


@pytest.mark.parametrize("name", ["deit_small_imagenet", "lvvit_s_imagenet", "lvvit_m_imagenet"])
def test_the_papers_runs_are_to_the_letter(name):
    config = load_recipe(name)
    assert config.model.split(".")[0] == {"deit": "deit_small_patch16_224"}.get(name[:4], name[:7])
    assert config.teacher == "same"
    sparse = config.sparse_config()
    assert (sparse.predictor.name, sparse.query_tile, sparse.tail) == ("lowrank", (1, 1), None)
    assert sparse.predictor.scale == "num_heads"
    assert config.batch_size == 168
    assert (config.optimizer, config.weight_decay, config.ema_decay) == ("adamw", 0.05, 0.9999)
    augment = config.augment
    assert (augment.mixup, augment.cutmix, augment.label_smoothing, augment.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert augment.auto_augment.startswith("rand-")
    first, second = config.phases
    assert (first.name, first.epochs, first.lr, first.min_lr, first.warmup) == ("attn_recon", 5, 3e-4, 2e-4, 3)
    assert (first.train, first.losses) == ("predictor", {"attn_recon": pytest.approx(0.01 * 168)})
    assert (second.name, second.epochs, second.lr, second.min_lr, second.warmup) == ("cls_distill", 45, 8e-5, 2e-6, 3)
    patches = "aux_mse" if name.startswith("lvvit") else "token_mse"  # what the authors' code compares there
    assert (second.train, second.losses) == ("backbone", {"ce": 1.0, "kl": 0.5, patches: 0.5})
    assert (first.warmup_lr, second.warmup_lr, config.precision) == (0.0, 0.0, "fp32")


def test_published_weights_come_from_a_file(tmp_path):
    """As the LV-ViT recipes load theirs, for which timm knows no address; under the authors' own names."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    published = timm.create_model("lvvit_s", **small)
    torch.save(published.state_dict(), tmp_path / "lvvit_s.pth.tar")
    recipe = "lvvit_s_imagenet"
    plain = load_recipe(recipe)
    assert plain.model_args["pretrained_cfg_overlay"]["file"].startswith("lvvit_s")
    arguments = {
        **plain.model_args,
        **small,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "lvvit_s.pth.tar"), "num_classes": 3},
    }
    del arguments["img_size"]
    changed = load_recipe(recipe, [f"model_args={json.dumps(arguments)}", "data.img_size=32", "num_classes=3"])
    student, teacher = student_module.build_models(changed, None)
    assert teacher is not None
    for name, value in published.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
        assert torch.equal(teacher.state_dict()[name], value)


@pytest.mark.parametrize(
    ("names", "teacher", "asked"),
    [
        (["attn_recon", "cls_distill", "attn_recon"], "same", [False, True, True]),  # the student has changed by then
        (["attn_recon", "attn_recon"], "same", [False, False]),
        (["cls", "attn_recon"], "same", [False, True]),
        (["attn_recon", "joint"], "other", [True, True]),
        (["attn_recon", "cls"], "none", [False, False]),
        (["attn_self_distill"], "same", [True]),
    ],
)
def test_a_teacher_is_asked_unless_attention_is_its_own(names, teacher, asked):
    phases = [{"name": name, "steps": 1} for name in names]
    config = recipe(phases=phases, teacher=teacher, sparsity={"preset": "paper"})
    assert [student_module.needs_teacher(config, number) for number in range(len(phases))] == asked


def test_a_recipe_survives_the_way_to_json_and_back():
    for path in RECIPES:
        config = load_recipe(path)
        assert from_dict(json.loads(json.dumps(config.to_dict()))) == config, path


def test_numbers_with_an_exponent_are_numbers_at_every_level(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("phases: [{name: attn_recon, steps: 1, losses: {attn_recon: 1e-2}, lr: 1E3}]\nmodel: 1e-2b\n")
    config = load_recipe(
        path,
        [
            "sparsity={preset: paper, keep_rate: 1e-1, basis_threshold: .2e-1}",
            "augment.crop_scale=[5.e-1, 1]",
            "phases.0.keep_rate=[1e-1, 2e-1]",
            "weight_decay=5e-2",
        ],
    )
    phase = config.phases[0]
    assert (phase.losses, phase.lr, phase.keep_rate) == ({"attn_recon": 0.01}, 1000.0, (0.1, 0.2))
    assert (config.sparse_config().keep_rate, config.sparse_config().predictor.basis_threshold) == (0.1, 0.02)
    assert (config.augment.crop_scale, config.weight_decay, config.model) == ((0.5, 1), 0.05, "1e-2b")


def test_overrides_reach_every_level():
    path = RECIPES[0]
    config = load_recipe(
        path, ["data.path=here", "phases.0.lr=1e-4", "sparsity.keep_rate=[0.1, 0.2]", "augment.mixup=0", "seed=3"]
    )
    assert (config.data.path, config.phases[0].lr, config.augment.mixup, config.seed) == ("here", 1e-4, 0, 3)
    assert config.sparsity["keep_rate"] == [0.1, 0.2]
    assert load_recipe(path, ["sparsity=null", "phases=[{name: cls, steps: 2}]"]).phases == (
        PhaseConfig("cls", steps=2),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"data": {"pth": "x"}}, "did you mean 'path'"),
        ({"phases": []}, "needs phases"),
        ({"phases": [{"epochs": 1}]}, "no name"),
        ({"phases": [{"name": "joynt", "epochs": 1}]}, "did you mean 'joint'"),
        ({"phases": [{"name": "cls"}]}, "set epochs or steps"),
        ({"phases": [{**CLS, "steps": 3}]}, "set epochs or steps"),
        ({"phases": [{**CLS, "warmup": 2}]}, "longer than phase cls"),
        ({"phases": [{**CLS, "losses": {"kd": 1}}]}, "loss 'kd' is unknown"),
        ({"phases": [{**CLS, "losses": {"ce": 0}}]}, "no loss of positive weight"),
        ({"phases": [{**CLS, "losses": {"ce": float("nan")}}]}, "must be a number"),
        ({"phases": [{**CLS, "keep_rate": 2}], "sparsity": {}}, "(0, 1]"),
        ({"phases": [{**CLS, "keep_rate": 0.5}]}, "attention is not sparse"),
        ({"phases": [{"name": "attn_recon", "epochs": 1, "losses": {"ce": 1}}]}, "only the losses attn_recon"),
        ({"phases": [{"name": "attn_recon", "epochs": 1}], "sparsity": {}}, "predictor is 'pooled'"),
        ({"phases": [{**CLS, "losses": {"ratio": 1}}], "sparsity": {"preset": "paper"}}, "score_threshold"),
        ({"phases": [{"name": "cls_distill", "epochs": 1}], "teacher": "none"}, "teacher is none"),
        (phase("cls_distill", losses={"l1_basis": 1}), "trains the backbone, which l1_basis cannot; set train to pred"),
        (phase("cls", train="predictor", losses={"ce": 1}), "trains the predictor, which ce cannot; set train to back"),
        (phase("joint", train="head", losses={"token_mse": 1}), "trains the head, which token_mse cannot"),
        (phase("attn_recon", train="backbone"), "trains the backbone, which attn_recon cannot"),
        (phase("attn_recon", train="head"), "trains the head, which attn_recon cannot"),
        (phase("joint", train="backbone"), "trains the backbone, which attn_recon cannot"),
        (phase("joint", losses={"ce": 1, "least_k": 1}, keep_rate=[1, 1]), "least_k of phase joint needs a keep_rate"),
        ({"sparsity": {"keep_rat": 0.1}}, "keep_rate"),
        ({"sparsity": "yes"}, "saved, or null"),
        ({"precision": "fp8"}, "choose one of"),
        ({"batch_size": 7}, "even for mixup"),
        ({"batch_size": True}, "whole number at least 1"),
        ({"ema_decay": 1.5}, "at most 1"),
        ({"augment": {"crop_scale": [0.9, 0.1]}}, "crop_scale"),
        ({"data": {"source": "floppy"}}, "data.source 'floppy' is unknown"),
        ({"trackers": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"trackers": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"trackers": 3}, "trackers must be names such as [tensorboard], got 3"),
        ({"phases": [{**CLS, "losses": ["ce"]}]}, "must be weights, as {ce: 1.0}, got ['ce']"),
        ({"phases": [{**CLS, "losses": None}]}, "must be weights, as {ce: 1.0}, got None"),
        ({"data": {"path": 2024}}, "data.path must be text, got 2024"),
        ({"data": {"source": None}}, "data.source must be text, got None"),
        ({"data": {"download": "maybe"}}, "data.download must be true or false, got 'maybe'"),
        ({"augment": {"crop_scale": ["a", "b"]}}, "augment.crop_scale must be a number"),
        ({"augment": {"auto_augment": "nonsense"}}, "augment.auto_augment 'nonsense' is unknown"),
        ({"sparsity": {"method": ["evit"], "keep_rate": 0.5}}, "method ['evit'] is unknown"),
        ({"model": None}, "model must be text, got None"),
        ({"model_args": ["depth"]}, "model_args must be arguments by name"),
        ({"pretrained": "no"}, "pretrained must be true or false, got 'no'"),
        ({"deterministic": 5}, "deterministic must be true or false, got 5"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=r".") as refused:
        recipe(**changes)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_loss_that_reaches_one_thing_that_learns_is_enough():
    offset = {"predictor": "lowrank", "tail_offset": True}
    for accepted in (
        {**phase("cls", train="predictor", losses={"ce": 1}), "sparsity": offset},  # through the tail's offset
        phase("cls_distill", train="head"),
        phase("joint", train="predictor"),
        phase("joint", losses={"least_k": 1}, keep_rate=[1, 0.5]),
        phase("attn_recon", train="all"),
    ):
        assert recipe(**accepted).phases


def test_overrides_that_lead_nowhere_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("phases: [{name: cls, epochs: 1}]\nmodel: builtin\n")
    for override, words in [
        ("lr", "name=value"),
        ("phases.3.lr=1", "below 1"),
        ("model.size=3", "single value"),
        ("seed=[", "not valid YAML"),
        ("sead=1", "did you mean 'seed'"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_recipe(path, [override])
    with pytest.raises(ValueError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="did you mean 'deit_small_imagenet'"):
        load_recipe("deit_smal_imagenet")
    path.write_text("- 1")
    with pytest.raises(ValueError, match="must hold named settings"):
        load_recipe(path)


def test_the_learning_rate_warms_up_and_follows_a_cosine_down():
    phase = PhaseConfig("cls", epochs=10, lr=1.0, min_lr=0.1, warmup=2, warmup_lr=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=phase.lr)
    scheduler = make_scheduler(optimizer, phase, updates_per_epoch=4)
    rates = []
    for update in range(phase.num_updates(4)):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(rates) == 40
    assert rates[:3] == pytest.approx([0.5, 0.5 + 0.5 / 8, 0.5 + 1 / 8])
    assert rates[8] == 1.0
    assert rates[24] == pytest.approx(0.55)  # half way down
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    scheduler.step_update(20)  # a function of the update alone
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[20])
    only_warmup = make_scheduler(optimizer, PhaseConfig("cls", steps=4, warmup=4, lr=1.0, warmup_lr=0.0), 1)
    only_warmup.step_update(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_at_tiny_size(path, folder_of_images, tmp_path, monkeypatch):
    """A few steps of each phase, with a model of two tiny layers in the place of the named one."""
    loaded = []

    def load(name, *, img_size=None, num_classes=None, pretrained=True, model_args=None):
        loaded.append(name)
        assert pretrained
        model = timm.create_model(
            "lvvit_s" if name.startswith("lvvit") else "vit_tiny_patch16_224", img_size=img_size, patch_size=4,
            embed_dim=48, depth=2, num_heads=3, num_classes=3 if num_classes is None else num_classes,
        )  # fmt: skip
        model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 3}
        return model

    monkeypatch.setattr(student_module, "load_model", load)
    monkeypatch.setattr(student_module, "save_pretrained", lambda *arguments, **settings: None)
    plain = load_recipe(path)
    changes = [
        "batch_size=4",
        "accumulation=1",
        "precision=fp32",
        "data.workers=0",
        "data.img_size=32",
        "data.source=folder",
    ]
    changes += [f"data.path={folder_of_images}", "data.train_split=train", "log_every=1"]
    for number in range(len(plain.phases)):
        changes += [f"phases.{number}.steps=2", f"phases.{number}.epochs=null", f"phases.{number}.warmup=1"]
    config = load_recipe(path, changes)
    result = train(config, tmp_path / "out", cpu=True)
    assert loaded[0] == plain.model
    trained = [entry for entry in result.history if "lr" in entry]
    assert [(entry["phase"], entry["update"]) for entry in trained] == [
        (number, update) for number in range(len(plain.phases)) for update in (1, 2)
    ]
    for entry in trained:
        assert plain.phases[entry["phase"]].losses.keys() <= entry.keys()
    assert (result.ema is not None) == (plain.ema_decay is not None)


def test_only_matrices_decay(tiny_vit):
    sparse = sparsify(tiny_vit(), SparsifinerConfig(predictor="lowrank", tail=TailConfig(offset=True)))
    phase = PhaseConfig("cls", steps=1, train="all")
    phases_module.enter_phase(sparse, phase)
    groups = phases_module.make_optimizer(sparse, TrainConfig((phase,), weight_decay=0.07), phase).param_groups
    names = {id(parameter): name for name, parameter in sparse.named_parameters()}
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == set(names.values())
    assert {decay[name] for name in names.values() if sparse.get_parameter(name).ndim < 2} == {0.0}
    assert decay["cls_token"] == decay["pos_embed"] == 0.0
    for name in ("head.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.predictor.w_down"):
        assert decay[name] == 0.07
    assert decay["blocks.0.attn.predictor.tail_offset"] == 0.0


def test_a_phase_without_anything_to_train_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="set num_classes"):
        phases_module.enter_phase(tiny_vit(num_classes=0), PhaseConfig("cls", steps=1, train="head"))
    with pytest.raises(ValueError, match="optimizer 'adamv' is unknown"):
        phases_module.make_optimizer(
            tiny_vit(), TrainConfig((PhaseConfig("cls", steps=1),), optimizer="adamv"), PhaseConfig("cls", steps=1)
        )
