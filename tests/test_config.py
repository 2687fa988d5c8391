"""Settings are checked when they are made, and errors say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsifiner import SparsifinerConfig
from sparsifiner.config import num_kept


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
        ({"scale": "width"}, r"scale \(head_dim, num_heads or a number\) must be a number above 0, got 'width'"),
        ({"score_threshold": 0.1}, "score_threshold needs predictor='lowrank'"),
        ({"attn_recon": True}, "attn_recon needs predictor='lowrank'"),
        (
            {"predictor": "lowrank", "score_threshold": "1e-3"},
            "score_threshold must be a number at least 0, got '1e-3'",
        ),
        ({"basis_threshold": None}, "basis_threshold must be a number at least 0, got None"),
        ({"scale": None}, "must be a number above 0, got None"),
        ({"n_down": True}, "n_down must be a whole number at least 1, got True"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"keep_prefix": "no"}, "keep_prefix must be true or false, got 'no'"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsifinerConfig(**changes)


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
    assert (paper.keep_rate, paper.predictor, paper.query_tile, paper.tail) == (0.1, "lowrank", (1, 1), None)
    assert (paper.reduce_n_factor, paper.reduce_c_factor, paper.coef_topk, paper.basis_threshold) == (6, 2, 8, 0.02)
    assert not paper.keep_prefix
    assert paper.scale == "num_heads"
    tiles = SparsifinerConfig(predictor="lowrank")  # a key without a score could only be kept by chance
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


def test_one_rate_per_layer() -> None:
    config = SparsifinerConfig(keep_rate=[0.1, 0.2])
    assert [config.for_layer(i, 2).keep_rate for i in range(2)] == [0.1, 0.2]
    with pytest.raises(ValueError, match="keep_rate has 2 entries but 12 layers are converted"):
        config.for_layer(0, 12)
