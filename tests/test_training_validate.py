"""``sparsifiner train`` and ``sparsifiner validate``, and the numbers they print."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsifiner import SparsifinerConfig, count_flops, sparse_layers, sparsify
from sparsifiner.cli import main
from sparsifiner.convert import always_sparse
from sparsifiner.evaluation import validate
from sparsifiner.measure.accuracy import Batch, count_correct, paired_drop, wilson_interval
from sparsifiner.methods import convert_with
from sparsifiner.training import DataConfig
from sparsifiner.training.student import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
BUILTIN = ("--model", "builtin")
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_wilson_interval_against_published_values():
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, table I.
    for hits, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(hits, trials) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_the_paired_interval_against_published_values():
    # Agresti, "Categorical Data Analysis", section 10.1: of 1600 voters 944 approved and later 880; 794 both times, 150
    # only at first, 86 only later; the change is 0.04, 95 % interval 0.021 to 0.059.
    lost, won, total = 150, 86, 1600
    before = torch.zeros(total, dtype=torch.bool)
    after = before.clone()
    before[:lost] = True
    after[lost : lost + won] = True
    drop, (low, high) = paired_drop(before, after)
    assert drop == pytest.approx(64 / 1600)
    assert (low, high) == (pytest.approx(0.0211, abs=3e-4), pytest.approx(0.0588, abs=3e-4))
    assert paired_drop(after, before)[0] == -drop
    same = paired_drop(before, before)
    assert same[0] == 0
    assert same[1][0] < 0 < same[1][1]
    with pytest.raises(ValueError, match="same images"):
        paired_drop(before, before[1:])


@given(trials=st.integers(1, 10**6), share=st.floats(0, 1))
def test_the_interval_holds_the_share_and_narrows(trials, share):
    hits = round(trials * share)
    low, high = wilson_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1
    more = wilson_interval(4 * hits, 4 * trials)
    assert more[1] - more[0] < high - low
    assert wilson_interval(trials - hits, trials)[0] == pytest.approx(1 - high, abs=1e-9)


def test_counting_correct_answers():
    logits = torch.tensor([[0, 1, 2, 3, 4, 5.0], [5, 4, 3, 2, 1, 0], [0, 0, 9, 0, 0, 0], [6, 5, 4, 3, 2, 1]])
    batches = [
        Batch(logits[:3], torch.tensor([5, 1, 2]), torch.arange(3), {"a": "b"}),
        Batch(logits[3:], torch.tensor([5]), torch.arange(1), {}),
    ]
    found = count_correct(torch.nn.Identity(), batches, torch.device("cpu"))
    assert (found.images, found.top1, found.top5, found.broken) == (4, 2, 3, {"a": "b"})
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([5, 1, 2, 5]))
    assert found.loss == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="the model's own classes"):
        count_correct(
            torch.nn.Identity(), [Batch(logits, torch.tensor([0, 1, 2, 6]), torch.arange(4), {})], torch.device("cpu")
        )
    with pytest.raises(ValueError, match="no readable image"):
        count_correct(torch.nn.Identity(), [], torch.device("cpu"))


def test_validation_of_a_model_dense_beside_sparse(tiny_vit, folder_of_images):
    data = DataConfig(path=str(folder_of_images), workers=0)
    result = validate(tiny_vit(num_classes=3), data, keep_rates=(0.2, 1.0), batch_size=8, repeats=1)
    dense, sparse, full = result.rows
    assert (dense.name, sparse.name, full.name) == ("dense", "keep 0.2", "keep 1")
    assert full.accuracy.top1 == dense.accuracy.top1
    assert full.accuracy.loss == pytest.approx(dense.accuracy.loss, rel=1e-4)
    assert sparse.accuracy.loss != pytest.approx(dense.accuracy.loss, rel=1e-4)
    assert dense.mhsa_macs == 2 * 65**2 * 48 * 2
    assert sparse.mhsa_macs < dense.mhsa_macs
    assert all(row.images_per_second > 0 for row in result.rows)
    assert dense.speed_up is None
    assert sparse.speed_up > 0
    few = validate(tiny_vit(num_classes=3), dataclasses.replace(data, val_limit=3), batch_size=8, repeats=0)
    assert few.batch_size == 3
    with pytest.raises(ValueError, match="no classifier"):
        validate(tiny_vit(num_classes=0), data)
    sparse_model = sparsify(tiny_vit(num_classes=3), SparsifinerConfig(0.3))
    rows = validate(sparse_model, data, repeats=0).rows
    assert [(row.name, row.images_per_second) for row in rows] == [("dense", None), ("keep 0.3", None)]
    assert rows[0].accuracy.loss == pytest.approx(dense.accuracy.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "keep_rate", "names"),
    [
        ("linformer", 0.3, ["linformer"]),
        ("tome", 0.4, ["tome"]),
        ("evit", 0.6, ["dense", "pruned 0.6"]),
        ("sparsifiner", 0.2, ["dense", "keep 0.2"]),
        ("sparsifiner-evit", 0.2, ["dense", "pruned 0.7, keep 0.2"]),
    ],
)
def test_a_converted_model_is_measured_as_it_is(
    tiny_vit, folder_of_images, images, cli, tmp_path, method, keep_rate, names
):
    data, x = DataConfig(path=str(folder_of_images), workers=0), images(1, 3, 32, 32)
    plain = tiny_vit(num_classes=3)
    converted, folder = convert_with(method, plain, keep_rate), tmp_path / "model"
    save_model(converted, folder)  # as train and pareto do
    rows = validate(str(folder), data, batch_size=8, repeats=1).rows
    assert [row.name for row in rows] == names
    assert [row.name for row in validate(converted, data, repeats=0).rows] == names
    assert all(row.images_per_second > 0 for row in rows)
    dense = validate(plain, data, batch_size=8, repeats=0).rows[0]
    own = rows[-1]
    with always_sparse(converted):
        assert own.total_macs == count_flops(converted, x).total_macs < dense.total_macs
    assert own.accuracy.loss != pytest.approx(dense.accuracy.loss, rel=1e-4)
    if len(rows) == 2:
        assert (rows[0].total_macs, rows[0].mhsa_macs) == (dense.total_macs, dense.mhsa_macs)
        assert rows[0].accuracy.loss == pytest.approx(dense.accuracy.loss, rel=1e-5)
    with pytest.raises(ValueError, match=rf"model is converted already \({names[-1]}\); leave the configuration out"):
        validate(str(folder), data, config=SparsifinerConfig())
    command = ["validate", "--model", folder, "--data", folder_of_images, "--workers", 0, "--repeats", 0, "--json"]
    code, printed, err = cli(*command, "--keep-rate", "0.5,0.9")
    if "sparsifiner" in method:
        assert code == 0, err
        rated = [names[-1].replace("0.2", "0.5"), names[-1].replace("0.2", "0.9")]
        assert [row["name"] for row in json.loads(printed)["rows"]] == ["dense", *rated]
    else:
        assert (code, printed) == (2, "")
        assert err == f"error: {folder} has no attention with a keep rate ({names[-1]}); leave the keep rates out\n"


def test_a_saved_dense_model_is_readable_by_others(tiny_vit, tmp_path):
    save_model(tiny_vit(), tmp_path)
    (tmp_path / "other").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert set(modes) == {"model.safetensors", "config.json", "other"}
    assert len(set(modes.values())) == 1


def test_rows_are_named_by_the_keep_rates_of_all_layers(tiny_vit, folder_of_images):
    data, plain = DataConfig(path=str(folder_of_images), workers=0), tiny_vit(num_classes=3)
    by_layer = sparsify(plain, keep_rate=(0.5, 0.2))
    assert [row.name for row in validate(by_layer, data, repeats=0).rows] == ["dense", "keep 0.2 to 0.5"]
    threshold = SparsifinerConfig.paper(score_threshold=0.01)
    assert [row.name for row in validate(plain, data, config=threshold, repeats=0).rows] == ["dense", "sparse"]
    with pytest.raises(ValueError, match=r"no attention with a keep rate \(sparse\)"):
        validate(plain, data, config=threshold, keep_rates=(0.1,))


@pytest.mark.parametrize("method", ["dense", "sparsifiner", "sparsifiner-evit", "linformer"])
def test_validation_leaves_the_callers_model_alone(tiny_vit, folder_of_images, method):
    model = convert_with(method, tiny_vit(num_classes=3), 0.3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    rates = (0.1, 0.6) if method != "linformer" else ()
    data = DataConfig(path=str(folder_of_images), workers=0)
    validate(model, data, keep_rates=rates, dtype=torch.bfloat16, repeats=0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(module.training for module in model.modules())
    if "sparsifiner" in method:
        assert {layer.config.keep_rate for layer in sparse_layers(model).values()} == {0.3}


def test_train_and_validate_from_the_command_line(cli, folder_of_images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": "vit_tiny_patch16_224", "pretrained": False, "model_args": TINY,
                "sparsity": {"preset": "paper", "keep_rate": 0.3}, "data": {"workers": 0, "img_size": 32},
                "batch_size": 4, "phases": [{"name": "attn_recon", "steps": 1}, {"name": "joint", "steps": 1}],
            }
        )
    )  # fmt: skip
    out = tmp_path / "out"
    arguments = ["train", "--recipe", recipe, "--output", out, "--cpu", f"data.path={folder_of_images}"]
    code, printed, err = cli(*arguments, "log_every=1")
    assert code == 0, err
    assert "attn_recon step 1 of 1: lr" in err
    assert f"written: {out / 'model'}" in printed
    assert "95 % interval" in printed
    code, printed, err = cli(*arguments, "seed=4")
    assert (code, printed) == (2, "")
    assert err.count("\n") == 1
    assert "different recipe (seed)" in err
    common = ["validate", "--data", folder_of_images, "--workers", 0, "--batch-size", 8]
    code, printed, err = cli(*common, "--model", out / "model", "--repeats", 1, "--keep-rate", "0.3,0.9")
    assert code == 0, err
    for words in ("24 images", "top-1", "95 % interval", "GMACs", "images/s", "speed-up", "dense", "keep 0.9"):
        assert words in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100
    file = tmp_path / "v.json"
    code, printed, err = cli(*common, "--model", out / "model", "--repeats", 0, "--json", "--output", file)
    assert code == 0, err
    data = json.loads(printed)
    assert data == json.loads(file.read_text())
    assert [row["name"] for row in data["rows"]] == ["dense", "keep 0.3"]
    low, high = data["rows"][1]["top1_interval"]
    assert low < data["rows"][1]["top1"] < high


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "--recipe"),
        (["train", "--recipe", "missing.yaml"], "cannot read the recipe missing.yaml"),
        (["validate"], "Missing option '--model'"),
        (["pareto", "--data", "DATA"], "Missing option '--model'"),
        (["validate", *BUILTIN], "--data is not set; give the folder of the images (--source is folder)"),
        (["validate", *BUILTIN, "--data", "missing"], "missing/val does not exist; set --data\n"),
        (["validate", *BUILTIN, "--data", "DATA", "--split", "tset"], "no folder tset; name another one with --split"),
        (["pareto", *BUILTIN, "--data", "DATA", "--source", "floppy"], "--source 'floppy' is unknown"),
        (["validate", *BUILTIN, "--keep-rate", "2"], "must be a number in (0, 1]"),
        (["validate", "--data", "DATA", "--model", "no/model"], "there is no model folder no/model; name one"),
        (["validate", "--data", "DATA", "--model", "qqqqqq"], "unknown model 'qqqqqq': it is no folder here, and no"),
        (["validate", *BUILTIN, "--data", "DATA", "--img-size", "100"], "image size 100 is not a multiple of"),
        (["validate", *BUILTIN, "--data", "DATA", "--img-size", "8"], "image size 8 is not a multiple of the model's"),
        (["validate", "--data", "DATA", "--model", "vit_tini_patch16_224"], "did you mean"),
        (["validate", *BUILTIN, "--data", ".", "--source", "floppy"], "--source 'floppy' is unknown"),
    ],
)
def test_a_user_error_is_one_line(cli, folder_of_images, arguments, words):
    code, out, err = cli(*(folder_of_images if word == "DATA" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert words in err
