"""``sparsifiner report`` from end to end on a tiny model, and every user error in one line."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import timm
import torch
from conftest import lively
from PIL import Image
from rich.console import Console

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.cli import main
from sparsifiner.cli.console import say
from sparsifiner.report import pair, run

QUICK = ["--repeats", "1", "--max-tokens", "400", "--no-memory", "--num-pictures", "1"]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """The report's model names stand for tiny random models, so that no weights are needed."""

    def load(name, *, img_size=None):
        if (os.path.isdir(name)) or name not in ("builtin", "no_class"):
            return run_load(name, img_size=img_size)
        kind = "vit_tiny_patch16_224" if name == "builtin" else "vit_base_patch16_siglip_224"
        settings = dict(img_size=img_size or 96, depth=2, num_classes=0, embed_dim=96, num_heads=3)
        return lively(timm.create_model(kind, **settings))

    run_load = pair.load_model
    monkeypatch.setattr(pair, "load_model", load)


@pytest.fixture
def cli(capsys, tmp_path):
    """Run the command; its exit code, stdout and stderr. It writes to ``tmp_path / "out"``."""

    def call(*arguments, output=True, always_sparse=True):
        where = ["--output", str(tmp_path / "out")] if output else []
        if always_sparse and "--config" not in arguments:
            (tmp_path / "sparse.yaml").write_text("dense_below: 0")
            where += ["--config", str(tmp_path / "sparse.yaml")]
        with pytest.raises(SystemExit) as stop:
            main([*arguments[:1], *where, *map(str, arguments[1:])])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_report_is_printed_and_written(cli, tmp_path):
    code, out, err = cli("report", *QUICK, "--num-images", "2")
    assert code == 0, err
    for words in ("patches, relative L2", "class token, cosine", "projections", "predictor", "MLP", "median",
                  "density per layer", "sparse, keep 0.1", "on this machine"):  # fmt: skip
        assert words in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("written: ")) <= 100
    assert "fidelity" in err  # progress goes to stderr
    files = sorted(os.listdir(tmp_path / "out"))
    assert files == ["attention-01-96x96-keep-0.1.png", "report.html", "report.json"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/") == 2  # the attention picture and the break-even chart
    assert "http" not in page.replace("http-equiv", "")


def test_several_keep_rates_fit_a_hundred_columns(cli):
    rates = "0.05,0.1,0.25,0.5"
    code, out, err = cli("report", "--keep-rate", rates, *QUICK, "--num-images", "1", "--num-pictures", "0")
    assert code == 0, err
    assert "…" not in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("written: ")) <= 100
    assert all(f"keep {rate}" in out for rate in rates.split(","))


def test_json_is_all_that_stdout_gets_and_holds_every_case(cli, tmp_path):
    code, out, err = cli("report", "--json", "--img-size", "64,64x96", "--keep-rate", "0.1,1", *QUICK)
    assert code == 0, err
    data = json.loads(out)
    assert data == json.loads((tmp_path / "out" / "report.json").read_text())
    cases = data["cases"]
    assert [(case["image_size"], case["keep_rate"]) for case in cases] == [
        ([64, 64], 0.1), ([64, 64], 1.0), ([64, 96], 0.1), ([64, 96], 1.0)
    ]  # fmt: skip
    assert cases[2]["grid"] == [4, 6]
    assert cases[0]["fidelity"]["density_per_layer"].keys() == {"blocks.0.attn", "blocks.1.attn"}
    assert cases[0]["fidelity"]["mean"]["patch_l2"] > 1e-3 > cases[1]["fidelity"]["mean"]["patch_l2"]
    assert cases[0]["latency"]["dense_median_s"] > 0
    assert cases[0]["flops"]["sparse"]["predictor_macs"] > 0
    assert cases[0]["break_even"]["points"]


def test_where_sparse_does_not_pay_the_report_says_that_attention_ran_dense(cli, tmp_path):
    code, out, err = cli("report", *QUICK, "--num-images", "1", always_sparse=False)
    assert code == 0, err
    assert "ran its attention DENSE" in " ".join(out.split())
    case = json.loads((tmp_path / "out" / "report.json").read_text())["cases"][0]
    assert case["ran_dense"]
    assert case["fidelity"]["mean"]["patch_l2"] == 0
    assert case["break_even"]["points"]  # measured sparse
    assert case["pictures"] == []


def test_a_saved_sparse_model_is_compared_with_its_dense_twin(cli, tmp_path):
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0).eval()
    config = SparsifinerConfig(mode="sparse", keep_rate=(0.2, 0.4), query_tile=(2, 2), tail=None)
    sparsifiner.save_pretrained(sparsifiner.sparsify(dense, config), tmp_path / "saved")
    code, out, err = cli(
        "report", "--json", "--model", tmp_path / "saved", *QUICK, "--repeats", "0", always_sparse=False
    )
    assert code == 0, err
    case = json.loads(out)["cases"][0]
    assert case["keep_rate"] == [0.2, 0.4]
    assert case["config"]["query_tile"] == [2, 2]
    assert case["latency"] is None
    assert case["fidelity"]["mean"]["patch_l2"] > 0
    (tmp_path / "c.yaml").write_text("keep_rate: 0.1")
    code, _, err = cli("report", "--model", tmp_path / "saved", "--config", tmp_path / "c.yaml")
    assert code == 2
    assert "sparse already" in err


def test_layers_with_a_bias_have_no_break_even(cli, tmp_path):
    dense = lively(timm.create_model("beit_base_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=1))
    for mode, verdict in (("auto", "ran its attention DENSE"), ("sparse", "model is")):
        sparse = sparsifiner.sparsify(dense, SparsifinerConfig(keep_rate=0.25, mode=mode))
        sparsifiner.save_pretrained(sparse, tmp_path / "saved")
        code, out, err = cli("report", "--json", "--model", tmp_path / "saved", *QUICK, always_sparse=False)
        assert code == 0, err
        report = json.loads(out)
        assert report["cases"][0]["break_even"] is None
        assert verdict in report["cases"][0]["verdict"]
        assert "pay from" not in report["cases"][0]["verdict"]
        assert any("add a bias to the logits" in note for note in report["notes"])


def test_layers_of_which_some_run_dense_are_reported(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsifiner.attention.policy.sparse_pays", lambda config, *arguments: config.keep_rate < 0.2)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0).eval()
    sparsifiner.save_pretrained(sparsifiner.sparsify(dense, keep_rate=(0.5, 0.1, 0.5)), tmp_path / "saved")
    code, out, err = cli(
        "report", "--json", "--model", tmp_path / "saved", *QUICK, "--repeats", "0", always_sparse=False
    )
    assert code == 0, err
    case = json.loads(out)["cases"][0]
    assert [layer["sparse"] for layer in case["flops"]["sparse"]["layers"]] == [False, True, False]
    assert len(case["pictures"]) == 1


def test_a_config_file_sets_everything_and_an_untrained_predictor_is_owned_up_to(cli, tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper\nkeep_rate: 0.5\nn_down: 4")
    code, out, err = cli("report", "--config", tmp_path / "c.yaml", *QUICK, "--repeats", "0", "--num-pictures", "0")
    assert code == 0, err
    assert "keep 0.5" in out
    assert "predictor was not trained" in out


def test_models_without_class_token_say_so(cli):
    code, out, err = cli("report", "--model", "no_class", *QUICK, "--repeats", "0", "--num-pictures", "0")
    assert code == 0, err
    assert "no class token" in out


def test_an_unreadable_picture_is_named_skipped_and_counted(cli, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (70, 64), (9, 99, 199)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"nonsense")
    code, out, err = cli("report", "--images", folder, *QUICK, "--repeats", "0", "--num-pictures", "0")
    assert code == 0, err
    assert "skipped bad.png: not an image" in err
    words = " ".join(out.split())  # long paths wrap
    assert "1 image from" in words
    assert "1 skipped" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep-rate", "1.5"], "must be a number in (0, 1]"),
        (["--keep-rate", "0.1,,0.2"], "empty entry"),
        (["--img-size", "0"], "must be pixels"),
        (["--img-size", "100"], "use 96 or 112"),
        (["--img-size", "96,32"], "tile does not fit"),
        (["--images", "missing-folder"], "does not exist"),
        (["--model", "vit_tini_patch16_224"], "vit_tiny_patch16_224"),
        (["--dtype", "int4"], "choose float32"),
        (["--device", "warp"], "choose cpu or cuda"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--num-images", "0"], "--num-images"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing_behind(cli, tmp_path, arguments, words):
    code, out, err = cli("report", *arguments)
    assert code == 2
    assert out == ""
    line = [line for line in err.splitlines() if line != "loading the model"]
    assert len(line) == 1
    assert line[0].startswith("error: ")
    assert words in line[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["calibrate", "pareto", "validate"])
def test_commands_that_take_one_image_size_refuse_two_in_one_line(cli, tmp_path, command):
    needed = ["--images", tmp_path] if command == "calibrate" else ["--model", "builtin"]
    code, _, err = cli(command, *needed, "--img-size", "32,64", always_sparse=False)
    assert code == 2
    assert err == f"error: --img-size '32,64' names several sizes; {command} takes one\n"


def test_an_unknown_command_is_one_line_too(cli):
    code, _, err = cli("repport", output=False)
    assert code == 2
    assert err.count("\n") == 1
    assert "repport" in err


def test_an_output_that_cannot_be_written_is_refused_before_any_work(cli, tmp_path, monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError("worked before it knew where to write")

    monkeypatch.setattr(run, "run_report", never)
    (tmp_path / "out").write_text("a file, not a folder")
    code, _, err = cli("report")
    assert code == 2
    assert "cannot be written" in err
    assert err.count("\n") == 1


def test_a_failed_run_leaves_an_earlier_report_alone(cli, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("earlier")

    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_fidelity", interrupt)
    code, _, err = cli("report", *QUICK)
    assert code == 130
    assert "interrupted" in err
    assert os.listdir(tmp_path / "out") == ["report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "earlier"


def test_a_defect_of_ours_is_not_dressed_up_as_a_user_error(monkeypatch, tmp_path):
    def broken(*arguments, **settings):
        raise TypeError("ours")

    monkeypatch.setattr(run, "measure_fidelity", broken)
    with pytest.raises(TypeError, match="ours"), contextlib.redirect_stderr(None):
        main(["report", "--output", str(tmp_path), *QUICK])


def test_lines_are_printed_as_they_are(capsys):
    """Paths keep brackets and colons, and nothing breaks a line that another program reads."""
    text = "skipped runs[old]/:smile:.jpg: " + "x" * 200
    say(Console(), text)
    assert capsys.readouterr().out == text + "\n"
