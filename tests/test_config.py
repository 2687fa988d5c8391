"""Settings are checked when they are made, and errors say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsifiner import SparsifinerConfig
from sparsifiner.config import TailConfig
from sparsifiner.geometry.counting import num_kept
from sparsifiner.predictors import LowRankConfig, PooledConfig


@pytest.mark.parametrize("rate", [0, -0.1, 1.0001, "0.1", True, float("nan"), None])
def test_keep_rates_outside_the_unit_interval_are_refused(rate: object) -> None:
    with pytest.raises(ValueError, match=r"keep_rate must lie in \(0, 1\]"):
        SparsifinerConfig(keep_rate=rate)
    with pytest.raises(ValueError, match=r"keep_rate must lie in \(0, 1\]"):
        SparsifinerConfig(keep_rate=(0.5, rate))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": "magic"}, "predictor 'magic' is unknown; choose one of pooled, lowrank"),
        ({"query_tile": 4}, "query_tile must be two whole numbers"),
        ({"tail": (0, 4)}, "tail must be two whole numbers of at least 1"),
        ({"keep_rate": ()}, "keep_rate is an empty list"),
        ({"reduce_n_factor": 0}, "reduce_n_factor must be a whole number at least 1"),
        ({"coef_topk": 8, "coef_threshold": 0.05}, "coef_topk and coef_threshold exclude each other"),
        ({"query_refine": -1}, "query_refine must be a whole number at least 0"),
        ({"scale": "width"}, r"num_heads or a number\) must be a number above 0 and at most 1e\+06, got 'width'"),
        ({"score_threshold": 0.1}, "score_threshold needs predictor='lowrank'"),
        ({"attn_recon": True}, "attn_recon needs predictor='lowrank'"),
        (
            {"predictor": "lowrank", "score_threshold": "1e-3"},
            "score_threshold must be a number at least 0 and at most 1e\\+06, got '1e-3'",
        ),
        ({"basis_threshold": None}, "basis_threshold must be a number at least 0 and at most 1e\\+06, got None"),
        ({"scale": None}, "must be a number above 0 and at most 1e\\+06, got None"),
        ({"n_down": True}, "n_down must be a whole number at least 1, got True"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"keep_prefix": "no"}, "keep_prefix must be true or false, got 'no'"),
        ({"attention_dtype": "float16"}, "attention_dtype 'float16' is unknown; did you mean 'bfloat16'"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsifinerConfig.from_dict(changes)


def test_the_number_kept_is_the_ceiling_of_the_decimal_product() -> None:
    for total in (1, 7, 30, 100, 197, 400, 4096, 16385):
        for percent in range(1, 101):
            assert num_kept(percent / 100, total) == -(-percent * total // 100), (percent, total)
        for tenth in range(1, 10):
            for power in (2, 3):
                assert num_kept((tenth / 10) ** power, total) == -(-(tenth**power) * total // 10**power)
    assert num_kept(1e-12, 5) == 1


def test_paper_settings() -> None:
    paper = SparsifinerConfig.paper(keep_rate=0.1)
    assert (paper.keep_rate, paper.predictor.name, paper.query_tile, paper.tail) == (0.1, "lowrank", (1, 1), None)
    learned = paper.predictor
    assert (learned.reduce_n_factor, learned.reduce_c_factor, learned.coef_topk, learned.basis_threshold) == (
        6, 2, 8, 0.02
    )  # fmt: skip
    assert not paper.keep_prefix
    assert learned.scale == "num_heads"
    tiles = SparsifinerConfig(predictor="lowrank").predictor  # a key without a score could only be kept by chance
    assert (tiles.coef_topk, tiles.coef_threshold, tiles.basis_threshold, tiles.reduce_c_factor) == (None, None, 0.0, 1)


def test_round_trips(tmp_path: Path) -> None:
    for config in (SparsifinerConfig(), SparsifinerConfig.paper(), SparsifinerConfig(keep_rate=(0.1, 0.2), tail=None)):
        assert SparsifinerConfig.from_dict(config.to_dict()) == config
    file = tmp_path / "config.yaml"
    file.write_text("preset: paper\nkeep_rate: [5e-1, 0.25]\ncoef_topk: null\ncoef_threshold: 0.05\n")
    want = SparsifinerConfig.paper(keep_rate=(0.5, 0.25), coef_topk=None, coef_threshold=0.05)
    assert SparsifinerConfig.from_file(file) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_rat: 0.1", "setting 'keep_rat' is unknown; did you mean 'keep_rate'"),
        ("- 1", "must hold named settings"),
        ("a: [", "is not valid YAML or JSON"),
        ("preset: best", "preset 'best' is unknown"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        SparsifinerConfig.from_file(file)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="cannot read the configuration"):
        SparsifinerConfig.from_file(tmp_path / "missing.yaml")


def test_flat_settings_of_version_0_1_0_are_read() -> None:
    flat = {
        "keep_rate": 0.2,
        "predictor": "lowrank",
        "n_down": 9,
        "query_pool": [2, 2],
        "tail": [2, 4],
        "tail_refine": 0,
    }
    nested = SparsifinerConfig(keep_rate=0.2, predictor=LowRankConfig(n_down=9), tail=TailConfig((2, 4), refine=0))
    assert SparsifinerConfig.from_dict({**flat, "dense_below": 0, "seed": 0}) == nested.replace(mode="sparse")
    assert SparsifinerConfig.from_dict({**flat, "dense_below": 500}) == nested.replace(dense_below=500)
    assert SparsifinerConfig.from_settings({"query_refine": 5}).predictor == PooledConfig(query_refine=5)
    assert SparsifinerConfig.from_settings({"preset": "paper", "n_down": 5}) == SparsifinerConfig.paper(n_down=5)
    assert SparsifinerConfig.from_settings({"preset": "paper", "dense_below": 300}).mode == "auto"
    assert SparsifinerConfig.from_settings({"tail_offset": True}).tail == TailConfig(offset=True)
    with pytest.raises(ValueError, match="tail_offset needs a tail"):
        SparsifinerConfig.from_dict({"tail": None, "tail_offset": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predictor": {"name": "pooled", "n_down": 3}}, "setting of predictor 'pooled' 'n_down' is unknown"),
        ({"predictor": {"name": "lowrank", "n_dwn": 3}}, "did you mean 'n_down'"),
        ({"tail": {"blok": [2, 2]}}, "did you mean 'block'"),
        ({"tail": {"refine": 10**9}}, "tail refine must be a whole number at least 0 and at most 100"),
        ({"mode": "fast"}, "mode 'fast' is unknown; choose one of auto, sparse, dense"),
        ({"mode": "dense", "dense_below": 300}, "dense_below belongs to mode='auto'"),
        ({"seed": 2**70, "predictor": "random"}, "seed must fit 64 bits"),
    ],
)
def test_bad_nested_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsifinerConfig.from_dict(settings)


def test_one_rate_per_layer() -> None:
    config = SparsifinerConfig(keep_rate=[0.1, 0.2])
    assert [config.for_layer(i, 2).keep_rate for i in range(2)] == [0.1, 0.2]
    with pytest.raises(ValueError, match="keep_rate has 2 entries but 12 layers are converted"):
        config.for_layer(0, 12)


def test_settings_of_a_predictor_are_read_as_they_are() -> None:
    settings = LowRankConfig(coef_topk=3)
    assert SparsifinerConfig.from_dict({"predictor": settings}).predictor == settings
    assert SparsifinerConfig.from_settings({"predictor": settings, "keep_rate": 0.2}).predictor == settings
    changed = SparsifinerConfig.from_settings({"preset": "paper", "predictor": settings})
    assert changed.predictor == settings  # whole settings, not changes of the preset's
