"""``sparsifiner benchmark`` measures what it names, beside dense attention."""

from __future__ import annotations

import json

import pytest

from sparsifiner import SparsifinerConfig
from sparsifiner.cli import main
from sparsifiner.cli.benchmark import Job, run_within
from sparsifiner.measure.benchmark import Measured, measure_operator

QUICK = ["--img-size", "112", "--tokens", "144", "--keep-rate", "0.25", "--repeats", "1", "--max-tokens", "256"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *arguments])
    return stop.value.code, *capsys.readouterr()


def test_json_holds_the_operator_the_model_and_where_sparse_pays(capsys) -> None:
    code, out, err = run(capsys, "--json", "--dtype", "bfloat16", "--batch", "2", *QUICK)
    assert code == 0, err
    facts = json.loads(out)
    titles = [item["title"] for item in facts["measured"]]
    assert len(titles) == 3
    assert [item["settings"]["dtype"] for item in facts["measured"]] == ["float32", "bfloat16", "bfloat16"]
    assert set(facts["measured"][0]["median_s"]) == {
        "dense",
        "operator",
        "predict and select",
        "pool the tail",
        "layer",
    }
    assert set(facts["measured"][2]["median_s"]) == {"dense", "sparse"}
    assert facts["measured"][2]["settings"]["batch"] == 2
    assert facts["break_even"]["bfloat16, keep 0.25"]["points"]


def test_the_table_names_every_part(capsys) -> None:
    code, out, err = run(capsys, "--dtype", "float32", *QUICK)
    assert code == 0, err
    for words in ("operator", "predict and select", "layer", "sparse", "against dense", "float32, keep 0.25"):
        assert words in out


def test_layers_with_a_bias_have_no_break_even(capsys) -> None:
    model = ["--model", "vit_relpos_small_patch16_224", "--dtype", "float32"]
    code, out, err = run(capsys, *model, *QUICK)
    assert code == 0, err
    assert "float32, keep 0.25: not measured: attention layers that add a bias" in out
    assert "is faster sparse from" not in out
    code, out, err = run(capsys, "--json", *model, *QUICK)
    assert json.loads(out)["break_even"] == {"float32, keep 0.25": None}


def test_the_time_limit_holds_for_all_measurements_together(monkeypatch) -> None:
    """Rounds that take as long as their weight, on a clock of the test's own."""
    now, ran = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def job(name: str, weight: float) -> Job:
        def measure(seconds: float, progress: object) -> None:
            begun, done = now[0], 0
            now[0] += weight  # to warm up
            while done < 7 and (not done or now[0] - begun < seconds):
                now[0] += weight
                done += 1
                progress(done, 7)  # type: ignore[operator]
            ran.append((name, done))

        return Job(name, "model", weight, measure)

    left_out = run_within([job("a", 1), job("b", 4), job("c", 1), job("d", 4)], 50.0, lambda *stage: None)
    assert left_out == []
    assert now[0] <= 55
    assert [done > 1 for _, done in ran] == [True] * 4
    now[0], ran[:] = 0.0, []
    assert run_within([job("a", 1), job("b", 40), job("c", 1)], 10.0, lambda *stage: None) == ["b"]
    assert now[0] <= 11
    assert [name for name, _ in ran] == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "many"], "whole numbers of at least 64"),
        (["--dtype", "int8"], "choose float32"),
        (["--img-size", "100"], "multiple"),
        (["--model", "vit_smal_patch16_224"], "did you mean"),
        (["--keep-rate", "2"], "keep rate"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_ratios_are_medians_of_the_reference_over_medians() -> None:
    measured = Measured("t", {}, {"dense": [2.0, 4.0, 9.0], "sparse": [1.0, 2.0, 2.0]}, "dense")
    assert measured.speedup("sparse") == 2.0
    assert measured.to_dict()["speedup"] == {"dense": 1.0, "sparse": 2.0}


def test_the_parts_of_a_layer_without_a_tail() -> None:
    config = SparsifinerConfig(keep_rate=0.3, query_tile=(2, 2), mode="sparse", tail=None)
    found = measure_operator((8, 10), config, heads=2, head_dim=32, repeats=2)
    assert [item.settings["num_tokens"] for item in found] == [81, 81]
    assert all(len(values) == 2 for item in found for values in item.seconds.values())
    assert "pool the tail" not in found[0].seconds
