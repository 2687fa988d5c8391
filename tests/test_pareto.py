"""The sweep over methods and keep rates: what it measures, what it refuses and what it writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sweep_recipes import PHASES, RECIPE, TINY

from sparsifiner import from_pretrained
from sparsifiner.cli import main
from sparsifiner.evaluation import Cell, Row, Sweep, run_sweep, validate
from sparsifiner.evaluation.cell import DENSE
from sparsifiner.evaluation.figure import draw_pareto
from sparsifiner.evaluation.results import load_rows
from sparsifiner.methods import METHODS, convert_with
from sparsifiner.models import load_model
from sparsifiner.reduction import baseline_settings
from sparsifiner.saving import save_pretrained
from sparsifiner.training import DataConfig, train
from sparsifiner.training.recipe_file import from_dict

pytestmark = pytest.mark.usefixtures("one_thread")
KEEPS_A_QUARTER = from_dict({"phases": [{"name": "cls", "steps": 1, "keep_rate": 0.25}], "sparsity": {}})


def test_a_sweep_measures_every_cell(sweep, tmp_path):
    rows = {row.cell.name: row for row in run_sweep(sweep(repeats=1), tmp_path)}
    assert list(rows) == [
        "dense-1-training-free", "sparsifiner-0.25-training-free", "sparsifiner-1-training-free",
        "evit-0.25-training-free", "evit-1-training-free",
    ]  # fmt: skip
    dense = rows["dense-1-training-free"]
    assert dense.images == 24
    assert dense.top1 > 0.5
    assert dense.mhsa_macs == 4 * 2 * 65**2 * 24
    for name in ("sparsifiner-1-training-free", "evit-1-training-free"):
        assert rows[name].hits == dense.hits
        assert rows[name].drop_from(dense)[0] == 0
    assert rows["evit-0.25-training-free"].mhsa_macs < dense.mhsa_macs
    assert all(row.ms > 0 and row.dense_ms > 0 for row in rows.values())


def test_all_methods_train_and_are_read_back(sweep, tmp_path):
    """Every method learns by the same recipe, is saved, and gives the same answers when loaded again."""
    everything = sweep(methods=tuple(METHODS), keep_rates=(0.5,), stages=("fine-tuned",), recipe=RECIPE, num_images=8)
    rows = run_sweep(everything, tmp_path)
    assert {row.cell.method for row in rows} == set(METHODS)
    assert sum(row.cell.method == "dense" for row in rows) == 2
    for row in rows[1:]:
        assert row.seconds > 0
        weights = load_file(tmp_path / "cells" / row.cell.name / "model" / "model.safetensors")
        assert any("blocks" in name for name in weights)
        has_predictor = row.cell.learns_predictor
        assert ("no predictor" in row.note) != has_predictor
        assert ("starts from its calibrated predictor" in row.note) == has_predictor
        started = json.loads((tmp_path / "cells" / row.cell.name / "result.json").read_text())["recipe"]
        calibrated = tmp_path / "cells" / f"{row.cell.method}-0.5-calibrated" / "model"
        assert (started["model"] == str(calibrated)) == has_predictor
        assert calibrated.is_dir() == has_predictor
        assert any("predictor" in name for name in weights) == has_predictor
    (tmp_path / "pareto.json").unlink()
    assert [row.hits for row in run_sweep(everything, tmp_path)] == [row.hits for row in rows]


def test_only_methods_with_something_to_fit_are_calibrated(sweep, tmp_path):
    settings = dict(methods=("local-no-tail", "local", "tome", "lowrank"), keep_rates=(0.5,), num_images=4)
    rows = run_sweep(sweep(**settings, stages=("training-free", "calibrated")), tmp_path)
    assert [row.cell.method for row in rows if row.cell.stage == "calibrated"] == ["local", "lowrank"]
    every = sweep(methods=tuple(METHODS), stages=("calibrated",)).cells()
    for cell in every[1:]:
        assert METHODS[cell.method].config(0.5).tail is not None or cell.learns_predictor


def test_what_cannot_be_made_is_told_before_anything_is_measured(sweep, tmp_path):
    only_predictor = dataclasses.replace(RECIPE, phases=RECIPE.phases[:1])
    for changes, words in (
        ({"stages": ("training-free", "fine-tuned"), "recipe": only_predictor}, "no phase that sparsifiner could"),
        ({"keep_rates": (0.5, 2.0)}, "keep_rate"),
    ):
        with pytest.raises(ValueError, match=words):
            run_sweep(sweep(**changes), tmp_path)
        assert not list(tmp_path.iterdir())


def test_broken_images_count_nowhere(classifier, folder_of_images, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(folder_of_images, pictures)
    (pictures / "val" / "class1" / "3.png").write_bytes(b"no picture")
    data = DataConfig(path=str(pictures), img_size=32, workers=0)
    said = []
    sweep = Sweep(str(classifier), data, ("local",), (1.0,), batch_size=4, repeats=0)
    dense, local = run_sweep(sweep, tmp_path / "out", say=said.append)
    assert (dense.images, len(dense.hits), len(dense.missing)) == (23, 24, 1)
    assert any("class1/3.png" in line for line in said)
    assert local.drop_from(dense)[0] == 0
    assert load_rows(tmp_path / "out")[dense.cell].to_dict() == dense.to_dict()


def test_the_command_writes_table_and_figures(classifier, folder_of_images, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"phases": PHASES, "batch_size": 4, "sparsity": {"predictor": "lowrank"}}))
    out = tmp_path / "out"
    arguments = [
        "pareto", "--model", classifier, "--data", folder_of_images, "--img-size", 32, "--workers", 0, "--batch-size",
        8, "--methods", "dense,sparsifiner,tome", "--keep-rate", "0.5,0.2", "--stages", "training-free,fine-tuned",
        "--recipe", recipe, "--num-images", 12, "--repeats", 1, "--output", out, "phases.1.steps=1",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        word in printed for word in ("tome", "fine-tuned", "in full", "12 images", "written:", "pareto-macs.png")
    )
    rows = list(csv.DictReader((out / "pareto.csv").read_text().splitlines()))
    assert len(rows) == 10
    dense = [row for row in rows if row["method"] == "dense"]
    assert [(row["stage"], row["keep_rate"]) for row in dense] == [("training-free", "1.0"), ("fine-tuned", "1.0")]
    assert [float(row["mhsa_saved"]) > 0 for row in rows] == [row["method"] != "dense" for row in rows]
    assert all(float(row["mhsa_full_saved"]) <= float(row["mhsa_saved"]) for row in rows)
    assert float(rows[0]["drop"]) == 0
    assert rows[-1]["note"].startswith("no predictor to train; merged tokens")
    for name in ("pareto-macs.png", "pareto-ms.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in [*arguments[:-1], "phases.1.steps=1", "--dtype", "bfloat16"]])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "another dtype" in error
    assert error.count("\n") == 1


def test_the_dense_model_stands_where_the_axis_says_it_does(monkeypatch, tmp_path):
    """It is timed against its own copy, and that is noise."""
    places = []

    def draw(rows, label, value):
        places.extend(value(row) for row in rows)
        return label.encode()

    monkeypatch.setattr("sparsifiner.evaluation.figure._draw", draw)
    dense = Row(DENSE, [True] * 4, ms=54.0, dense_ms=60.0)
    local = Row(Cell("local", 0.5), [True] * 4, ms=30.0, dense_ms=60.0)
    (written,) = draw_pareto([dense, local], tmp_path)
    assert written.read_text() == "milliseconds per image, where dense takes 60"
    assert places == [60.0, 30.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("magic",)}, "method 'magic' is unknown"),
        ({"methods": ()}, "at least one method"),
        ({"stages": ("tuned",)}, "stage 'tuned' is unknown"),
        ({"stages": ("fine-tuned",)}, "need a recipe"),
        ({"stages": ("fine-tuned",), "recipe": KEEPS_A_QUARTER}, "phase cls of the recipe sets keep_rate"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep, changes, words):
    with pytest.raises(ValueError, match=words):
        sweep(**changes)


def test_every_backbone_learns_for_the_same_number_of_steps(sweep, tmp_path):
    """Whether a method has a predictor that some phases train, too, or not."""
    phases = [
        {"name": "attn_recon", "steps": 1},
        {"name": "joint", "steps": 2},
        {"name": "joint", "steps": 1, "losses": {"attn_recon": 1.0}},
        {"name": "cls_distill", "steps": 1},
    ]
    recipe = from_dict({"phases": phases, "batch_size": 4, "sparsity": {"predictor": "lowrank"}})
    methods = ("paper", "local", "tome", "dense")
    settings = dict(methods=methods, keep_rates=(0.5,), stages=("fine-tuned",), num_images=4)
    for row in run_sweep(sweep(**settings, recipe=recipe), tmp_path / "out")[1:]:
        made_by = json.loads((tmp_path / "out" / "cells" / row.cell.name / "result.json").read_text())["recipe"]
        trained = [phase for phase in made_by["phases"] if phase["losses"].keys() - {"attn_recon"}]
        assert [(phase["name"], phase["steps"]) for phase in trained] == [("joint", 2), ("cls_distill", 1)]
        has_predictor = row.cell.method == "paper"
        assert len(made_by["phases"]) == (4 if has_predictor else 2)
        assert ("attn_recon" in trained[0]["losses"]) == has_predictor
        assert ("no predictor to train" in row.note) != has_predictor
    tokens = from_dict({"phases": [{"name": "cls_distill", "steps": 1, "losses": {"token_mse": 1.0}}, *phases[3:]]})
    with pytest.raises(ValueError, match="losses are all on patches; tome") as refused:
        run_sweep(sweep(**settings, recipe=tokens), tmp_path / "refused")
    assert "\n" not in str(refused.value)
    dropping = dataclasses.replace(RECIPE, model_args={"drop_path_rate": 0.1})
    with pytest.raises(ValueError, match="paper starts from its calibrated model.*drop_path_rate"):
        run_sweep(sweep(**settings, recipe=dropping), tmp_path / "refused")
    pruned = {**settings, "methods": ("local", "paper-evit")}
    with pytest.raises(ValueError, match="phase joint: attn_recon compares with the teacher's attention"):
        run_sweep(sweep(**pruned, recipe=recipe), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()  # before anything is measured


@given(st.lists(st.booleans(), max_size=40), st.lists(st.integers(0, 39), unique=True))
def test_rows_survive_the_file(hits, missing):
    missing = [place for place in missing if place < len(hits)]
    row = Row(Cell("local", 0.1, "calibrated"), hits, missing, 1, 2, 3, 4.5, None, 6.0, "seven")
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_labels_are_numbered_by_the_classes_of_training(classifier, folder_of_images, tmp_path):
    """Also where validation lacks a class; without the training part beside it that cannot be known, and is said."""
    model = load_model(str(classifier))
    parts = shutil.copytree(folder_of_images, tmp_path / "data")
    shutil.rmtree(parts / "val" / "class0")
    (parts / "train" / ".ipynb_checkpoints").mkdir()
    data = DataConfig(path=str(parts), img_size=32, workers=0)
    whole = validate(model, dataclasses.replace(data, path=str(folder_of_images)), repeats=0).rows[0].accuracy
    some = validate(model, data, repeats=0).rows[0].accuracy
    assert (whole.images, some.images) == (24, 16)
    assert whole.top1 > 18
    assert some.top1 > 12
    with pytest.warns(UserWarning, match="the images have 2 classes and the model 3"):
        validate(model, dataclasses.replace(data, train_split="nothing"), repeats=0)
    (parts / "val" / "class9").mkdir()
    shutil.copy(parts / "val" / "class1" / "0.png", parts / "val" / "class9")
    with pytest.raises(ValueError, match="validation has classes that training does not have: class9"):
        validate(model, data, repeats=0)


@pytest.mark.parametrize("method", ["linformer", "tome"])
def test_baselines_are_saved_and_loaded(method, images, folder_of_images, tmp_path):
    torch.manual_seed(0)
    model = convert_with(method, timm.create_model("vit_tiny_patch16_224", **TINY, num_classes=3).eval(), 0.4)
    save_pretrained(model, tmp_path, model_args={**TINY, "num_classes": 3})
    loaded = from_pretrained(tmp_path)
    assert baseline_settings(loaded) == baseline_settings(model) is not None
    x = images(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(load_model(str(tmp_path))(x), model(x))
    again = {"model": str(tmp_path), "sparsity": None, "phases": PHASES[1:], "batch_size": 4}
    recipe = from_dict({**again, "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0}})
    with pytest.raises(ValueError, match="pruned or a baseline"):
        train(recipe, tmp_path / "trained", cpu=True)
