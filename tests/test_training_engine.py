"""Training from end to end at tiny size: exact resume, determinism, precision, what is written."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from conftest import TINY, same, weights

import sparsifiner
from sparsifiner.training import engine, losses, train
from sparsifiner.training.phases import set_training_mode
from sparsifiner.training.recipe_file import from_dict
from sparsifiner.training.student import save_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_seed_decides_and_the_callers_randomness_is_left_alone(recipe, tmp_path):
    phases = [{"name": "cls", "steps": 2, "lr": 1e-3}]
    state = torch.get_rng_state()
    for name, seed, workers in [("a", 0, 0), ("b", 0, 2), ("c", 1, 0)]:
        config = recipe(phases=phases, seed=seed)
        config = from_dict({**config.to_dict(), "data": {**config.to_dict()["data"], "workers": workers}})
        train(config, tmp_path / name, cpu=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))  # workers make no difference
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_training_learns_and_the_result_is_a_model_name(recipe, folder_of_images, tmp_path):
    """Dense first, then sparse from the folder it wrote, then on from the sparse folder."""
    plain = {
        "mixup": 0,
        "cutmix": 0,
        "auto_augment": None,
        "color_jitter": 0,
        "random_erasing": 0,
        "crop_scale": [0.9, 1],
    }
    settings = {"augment": plain, "accumulation": 1, "batch_size": 8, "ema_decay": None, "model_args": TINY}
    dense = recipe(**settings, sparsity=None, phases=[{"name": "cls", "steps": 60, "lr": 3e-3, "warmup": 5}])
    result = train(dense, tmp_path / "dense", cpu=True)
    assert result.accuracy["model"].top1 == 6
    assert result.ema is None
    settings.update(model=str(result.model), model_args={}, pretrained=True)
    sparse = recipe(**settings, phases=[{"name": "attn_recon", "steps": 3}, {"name": "cls_distill", "steps": 3}])
    result = train(sparse, tmp_path / "sparse", cpu=True)
    assert result.accuracy["model"].top1 >= 5
    model = sparsifiner.from_pretrained(result.model)
    layer = next(iter(sparsifiner.sparse_layers(model).values()))
    assert layer.config == sparsifiner.SparsifinerConfig.paper(0.3)  # the reconstruction mode is off again
    trained = [entry for entry in result.history if "kl" in entry]
    assert trained[-1]["kl"] > 0
    settings["model"] = str(result.model)
    more = recipe(**settings, sparsity="saved", phases=[{"name": "joint", "steps": 1, "keep_rate": [0.2, 0.4]}])
    result = train(more, tmp_path / "more", cpu=True)
    layers = sparsifiner.sparse_layers(sparsifiner.from_pretrained(result.model)).values()
    assert [layer.config.keep_rate for layer in layers] == [0.2, 0.4]
    for sparsity, words in [({}, "set sparsity=saved"), (None, "set sparsity=saved")]:
        with pytest.raises(ValueError, match=words):
            train(recipe(**{**settings, "phases": [{"name": "cls", "steps": 1}]}, sparsity=sparsity), tmp_path / "no")


def test_half_precision_and_reduced_learning(recipe, tmp_path):
    phases = [{"name": "cls", "steps": 1, "train": "head"}, {"name": "attn_self_distill", "steps": 1}]
    before = {}

    def note(number, update):
        before[number] = update

    result = train(recipe(precision="bf16", phases=phases), tmp_path / "out", cpu=True, on_update=note)
    assert before == {0: 1, 1: 1}
    train(recipe(phases=phases), tmp_path / "single", cpu=True)
    assert not same(weights(tmp_path / "out"), weights(tmp_path / "single"))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())
    assert {"ce", "kl", "token_mse", "attn_self_distill"} <= result.history[-3].keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_and_a_teacher_saved_in_half_precision_train_in_single(precision, recipe, tiny_vit, tmp_path):
    half = tiny_vit(embed_dim=24, num_heads=2, num_classes=3).to(torch.bfloat16)
    student = sparsifiner.sparsify(half, sparsifiner.SparsifinerConfig.paper(0.3))
    sparsifiner.save_pretrained(student, tmp_path / "student")
    save_model(half, tmp_path / "teacher")
    config = recipe(
        model=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), sparsity="saved", model_args={},
        precision=precision, phases=[{"name": "joint", "steps": 1, "lr": 1e-6}],
    )  # fmt: skip
    train(config, tmp_path / "out", cpu=True)
    weight = weights(tmp_path / "out")["blocks.0.mlp.fc1.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.to(torch.bfloat16).float())  # the small step has not rounded away


def test_only_what_a_phase_trains_changes(recipe, tmp_path):
    started = {}
    for train_what in ("head", "predictor", "backbone"):
        loss = {"predictor": {"attn_recon": 1.0}}.get(train_what, {"ce": 1.0})
        phase = {"name": "joint", "steps": 1, "train": train_what, "losses": loss, "lr": 1e-2}
        train(recipe(phases=[phase], ema_decay=None, weight_decay=0.1, num_classes=3), tmp_path / train_what, cpu=True)
        started[train_what] = weights(tmp_path / train_what)
    names = started["head"].keys()
    head = {name for name in names if not torch.equal(started["head"][name], started["predictor"][name])}
    assert {name.split(".")[0] for name in head if ".predictor." not in name} == {"head"}
    assert any(".predictor." in name for name in head)
    both = {name for name in names if torch.equal(started["head"][name], started["backbone"][name])}
    assert both == {name for name in names if ".predictor." in name}


def one_step(recipe, output, **changes):
    """The weights after one step of ``cls``, and their average."""
    phase = {"name": "cls", "steps": 1, "lr": 1e-2, "warmup": 0}
    data = {**recipe().to_dict()["data"], "val_split": None}
    train(recipe(phases=[phase], data=data, **changes), output, cpu=True)
    return weights(output), weights(output, "ema")


def test_the_moving_average_and_its_warm_up(recipe, tmp_path):
    model, start = one_step(recipe, tmp_path / "start", ema_decay=1.0)  # never moves
    assert not same(model, start)
    assert same(*one_step(recipe, tmp_path / "warm", ema_decay=0.9, ema_warmup=True))
    again, average = one_step(recipe, tmp_path / "cold", ema_decay=0.9)
    assert same(again, model)
    for name, value in average.items():
        assert torch.allclose(value, 0.9 * start[name] + 0.1 * model[name], atol=1e-6), name


def test_the_gradient_is_clipped_to_its_norm(recipe, tmp_path):
    model, start = one_step(recipe, tmp_path, ema_decay=1.0, optimizer="sgd", weight_decay=0, clip_grad=0.1)
    step = sum(float((model[name] - start[name]).square().sum()) for name in model) ** 0.5
    assert step == pytest.approx(1e-2 * 1.9 * 0.1, rel=1e-2)  # timm's sgd has Nesterov's momentum of 0.9


def test_labels_that_are_not_mixed_are_smoothed(recipe, tmp_path, monkeypatch):
    plain, seen = losses.cross_entropy, []

    def noting(logits, target, smoothing):
        seen.append((target.dtype, smoothing))
        return plain(logits, target, smoothing)

    monkeypatch.setattr(losses, "cross_entropy", noting)
    one_step(recipe, tmp_path, augment={"mixup": 0, "cutmix": 0, "label_smoothing": 0.3})
    assert set(seen) == {(torch.int64, 0.3)}


def test_broken_images_are_reported_and_replaced(recipe, folder_of_images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder_of_images, root)
    (root / "train" / "class1" / "3.png").write_bytes(b"no picture")
    (root / "val" / "class0" / "0.png").write_bytes(b"")
    said = []
    data = {"path": str(root), "img_size": 32, "workers": 0}
    phases = [{"name": "cls", "epochs": 1}]
    result = train(recipe(data=data, phases=phases), tmp_path / "a", cpu=True, say=said.append)
    assert list(result.broken) == ["class1/3.png"]
    assert sum("broken image class1/3.png" in line for line in said) == 1
    assert sum("broken validation image class0/0.png (" in line for line in said) == 1
    assert result.accuracy["model"].images == 23
    assert list(result.accuracy["model"].broken) == ["class0/0.png"]
    written = json.loads((tmp_path / "a" / "result.json").read_text())
    assert written["broken"].keys() == {"class1/3.png"}
    assert written["val_broken"].keys() == {"class0/0.png"}
    assert written["accuracy"]["model"]["broken"] == 1
    train(recipe(data=data, phases=phases), tmp_path / "b", cpu=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_what_does_not_fit_is_refused_before_training(recipe, folder_of_images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = recipe(phases=[{"name": "cls", "steps": 1}])
    train(config, out, cpu=True)
    data = config.to_dict()["data"]
    for changes, words in [
        ({"seed": 5}, r"a run of a different recipe \(seed\)"),
        ({"phases": [{"name": "cls", "steps": 2}]}, r"different recipe \(phases.0.steps\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            train(recipe(**{"phases": [{"name": "cls", "steps": 1}], **changes}), out, cpu=True)
    for name, added in (("fewer", None), ("more", "class3")):
        other = shutil.copytree(folder_of_images, tmp_path / name)
        (other / "train" / "class1" / "3.png").unlink()
        if added:
            (other / "train" / added).mkdir()
            shutil.copy(other / "train" / "class1" / "2.png", other / "train" / added)
        (other / "train" / ".ipynb_checkpoints").mkdir()
        with pytest.raises(ValueError, match="holds a run on other images"):
            train(recipe(phases=[{"name": "cls", "steps": 1}], data={**data, "path": str(other)}), out, cpu=True)
    (out / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        train(config, out, cpu=True)
    for changes, words in [
        ({"batch_size": 64}, "24 training images do not fill one step of 64 x 1 processes x 2"),
        ({"data": {**data, "source": "images"}}, "the images have none"),
        ({"data": {**data, "path": "nowhere"}}, "does not exist"),
        ({"data": {**data, "path": None}}, "data.path is not set"),
        ({"num_classes": 2}, "the data has 3 classes"),
        ({"model": "vit_tini_patch16_224"}, "did you mean"),
        ({"trackers": ["wandb"]}, "wandb is not installed"),
        ({"precision": "fp16"}, "fp16 does not work on a CPU; set precision=bf16"),
    ]:
        with pytest.raises(ValueError, match=words):
            train(recipe(**changes), tmp_path / "new", cpu=True)
    assert not (tmp_path / "new" / "model").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        train(config, tmp_path / "file", cpu=True)

    def broken_loss(self, images, target):
        return images.sum() * float("nan") + sum(p.sum() for p in self.student.parameters()), {}

    monkeypatch.setattr(engine.Objective, "forward", broken_loss)
    with pytest.raises(ValueError, match="loss is not finite at step 1 of phase cls"):
        train(config, tmp_path / "nan", cpu=True)


def test_a_teacher_without_a_head_for_the_classes_is_refused(recipe, tmp_path):
    config = recipe(
        model="builtin", model_args={}, pretrained=True, sparsity={}, phases=[{"name": "cls_distill", "steps": 1}],
        data={**recipe().to_dict()["data"], "img_size": 56},
    )  # fmt: skip
    with pytest.raises(ValueError, match="builtin has no trained head for 3 classes"):
        train(config, tmp_path, cpu=True)


def test_validation_classes_are_those_of_training_by_name(recipe, folder_of_images, tmp_path, monkeypatch):
    root = tmp_path / "images"
    shutil.copytree(folder_of_images, root)
    shutil.rmtree(root / "val" / "class1")
    seen = set()

    def counting(model, batches, *arguments, **settings):
        batches = list(batches)
        seen.update(label for batch in batches for label in batch.labels.tolist())
        return plain(model, batches, *arguments, **settings)

    plain = engine.count_correct
    monkeypatch.setattr(engine, "count_correct", counting)
    settings = {"data": {"path": str(root), "img_size": 32, "workers": 0}, "phases": [{"name": "cls", "steps": 1}]}
    result = train(recipe(**settings), tmp_path / "out", cpu=True)
    assert result.accuracy["model"].images == 16
    assert seen == {0, 2}
    (root / "val" / "class2").rename(root / "val" / "klass2")
    (root / "val" / "class1").mkdir()
    with pytest.raises(ValueError, match="classes that training does not have: klass2;"):
        train(recipe(**settings), tmp_path / "refused", cpu=True)


def test_validation_that_the_head_does_not_allow_is_said_to_be_skipped(recipe, tmp_path):
    said = []
    phases = [{"name": "joint", "steps": 1, "losses": {"token_mse": 1.0}}]
    result = train(recipe(phases=phases), tmp_path, cpu=True, say=said.append)
    assert result.accuracy == {}
    assert sum("head is for 1000 classes and the data has 3; " in line for line in said) == 1


@pytest.mark.filterwarnings("ignore:model_args say num_classes=0")
def test_every_phase_is_checked_before_the_first_one_trains(recipe, tmp_path):
    steps = []
    for changes, words in [
        ({"keep_rate": [0.2, 0.3, 0.4]}, "phase joint: keep_rate has 3 entries but 2 layers"),
        ({"train": "head", "losses": {"kl": 1.0}}, "phase joint: train is head, but VisionTransformer has none"),
    ]:
        first = {"name": "attn_recon", "steps": 1}
        config = recipe(phases=[first, {"name": "joint", "steps": 1, **changes}], model_args={**TINY, "num_classes": 0})
        with pytest.raises(ValueError, match=words):
            train(config, tmp_path, cpu=True, on_update=lambda *step: steps.append(step))
    assert not steps


def test_frozen_batchnorm_gathers_no_statistics(recipe, tmp_path):
    for train_what, still in [("head", True), ("predictor", True), ("backbone", False)]:
        loss = {"attn_recon": 1.0} if train_what == "predictor" else {"ce": 1.0}
        phases = [{"name": "joint", "steps": 1, "train": train_what, "losses": loss}]
        config = recipe(model="lvvit_s", model_args=TINY, phases=phases, ema_decay=None)
        train(config, tmp_path / train_what, cpu=True)
        means = [value for name, value in weights(tmp_path / train_what).items() if name.endswith("running_mean")]
        assert len(means) == 3
        assert all(bool((mean == 0).all()) == still for mean in means), train_what


def test_dropout_of_a_frozen_backbone_stays_on_while_the_head_learns(recipe):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.Dropout(), torch.nn.Linear(3, 3))
    frozen = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.Dropout(), torch.nn.Linear(3, 3))
    model.append(frozen.requires_grad_(False))
    set_training_mode(model, recipe(phases=[{"name": "cls", "steps": 1, "train": "head"}]).phases[0])
    assert [part.training for part in model] == [True, True, True, True]
    assert [part.training for part in frozen] == [False, True, True]


def test_the_main_process_opens_the_data_first(recipe, tmp_path, monkeypatch):
    """It alone downloads, then."""
    events = []
    plain = engine.open_source

    @contextmanager
    def first(self):
        events.append("enter")
        yield
        events.append("leave")

    def opening(*arguments, **settings):
        events.append(arguments[2])
        return plain(*arguments, **settings)

    monkeypatch.setattr("accelerate.Accelerator.main_process_first", first)
    monkeypatch.setattr(engine, "open_source", opening)
    train(recipe(phases=[{"name": "cls", "steps": 1}]), tmp_path, cpu=True)
    assert events == ["enter", "train", "val", "leave"]


def test_a_tracker_gets_the_numbers_of_the_history(recipe, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    phases = [{"name": "attn_recon", "steps": 1}, {"name": "cls", "steps": 2, "lr": 1e-3}]
    history = train(recipe(phases=phases, trackers="tensorboard"), tmp_path, cpu=True).history
    events = reader.EventAccumulator(str(tmp_path / "sparsifiner"))
    events.Reload()
    trained = [entry for entry in history if "lr" in entry]
    for name in ("loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(entry[name])) for step, entry in enumerate(trained, start=1)], name
    validated = [entry for entry in history if entry.get("validated") == "model"]
    assert [event.value for event in events.Scalars("model/top1")] == pytest.approx([e["top1"] for e in validated])
