"""A machine's profile decides between dense and sparse where there is one, and only there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsifiner
from sparsifiner import SparsifinerConfig, Tiling, record
from sparsifiner.attention import AttentionInputs, build_predictor
from sparsifiner.attention.cost import Work, sparse_pays
from sparsifiner.cli import main
from sparsifiner.measure import profile as measured
from sparsifiner.measure.profile import Case, fit, measure_profiles, safe_margin
from sparsifiner.ops import cpu, registry, serving, triton
from sparsifiner.ops.attend import ATTEND
from sparsifiner.ops.profile import Costs, Profile, find_profile, save_profiles

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")
FREE = Costs(0.0, 0.0, 0.0, 0.0, call=0.0, dense=1.0)
DEAR = replace(FREE, attend=100.0)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cache" / "profile.json"
    monkeypatch.setenv("SPARSIFINER_PROFILE", str(path))
    return path


def a_profile(*costs: Costs) -> Profile:
    return Profile("native", costs, 0.95, [])


def pays(side: int, config: SparsifinerConfig | None = None, batch: int = 1) -> bool:
    config = config or SparsifinerConfig(keep_rate=0.1)
    tiling = Tiling((side, side), config.query_tile, 1)
    predictor = build_predictor(config, num_heads=6, head_dim=64, grid=tiling.grid, num_prefix_tokens=1)
    q = torch.empty(batch, 6, tiling.num_tokens, 64)
    return sparse_pays(config, AttentionInputs(q, q, q, tiling, 0.125), predictor.score_macs(6, 64, tiling))


@needs_kernels
def test_a_profile_decides_and_without_one_the_table_does(place) -> None:
    assert (pays(8), pays(64)) == (False, True)
    save_profiles(CPU, {"float32": a_profile(FREE)})
    assert (pays(8), pays(64)) == (True, True)
    save_profiles(CPU, {"float32": a_profile(DEAR)})
    assert (pays(8), pays(64), pays(64, batch=3)) == (False, False, False)
    save_profiles(CPU, {"float32": a_profile(FREE, DEAR)})  # sparse only where it is for every number of images
    assert not pays(64)
    off = SparsifinerConfig(keep_rate=0.1, use_profile=False)
    assert (pays(8, off), pays(64, off)) == (False, True)
    save_profiles(CPU, {"bfloat16": a_profile(FREE)})
    assert (pays(8), pays(64)) == (False, True)


@needs_kernels
def test_a_saved_model_can_leave_the_profile_alone(place, tmp_path, tiny_vit, images) -> None:
    save_profiles(CPU, {"float32": a_profile(FREE)})
    x = images(1, 3, 32, 32)
    for use_profile in (True, False):
        sparse = sparsifiner.sparsify(tiny_vit().eval(), SparsifinerConfig(keep_rate=0.2, use_profile=use_profile))
        sparsifiner.save_pretrained(sparse, tmp_path / str(use_profile))
        loaded = sparsifiner.from_pretrained(tmp_path / str(use_profile))
        with torch.no_grad(), record(loaded) as seen:
            loaded(x)
        assert all((item.connectivity is not None) == use_profile for item in seen.values())


def test_other_machines_versions_and_damaged_files_are_as_if_they_were_not_there(place, monkeypatch) -> None:
    save_profiles(CPU, {"float32": a_profile(FREE)})
    assert find_profile("cpu", None, torch.float32) == a_profile(FREE)
    values = json.loads(place.read_text())
    key = next(iter(values["devices"]))
    assert torch.__version__ in key
    assert f"{torch.get_num_threads()} threads" in key
    damaged = [
        "",
        "[]",
        "[" * 100_000,
        json.dumps({**values, "format": 99}),
        json.dumps({**values, "devices": {"another machine": values["devices"][key]}}),
        json.dumps({**values, "devices": {key: {"float32": {"backend": "native"}}}}),
        json.dumps({**values, "devices": {key: {"float32": 3}}}),
        json.dumps({**values, "devices": 3}),
    ]
    for text in damaged:
        place.write_text(text)
        sparsifiner.ops.profile._read.cache_clear()
        assert find_profile("cpu", None, torch.float32) is None, text[:80]
    save_profiles(CPU, {"float32": a_profile(FREE)})
    assert find_profile("cpu", None, torch.float32) is not None
    monkeypatch.setenv("SPARSIFINER_PROFILE", "off")
    assert find_profile("cpu", None, torch.float32) is None


def test_profiles_of_other_devices_stay(place) -> None:
    place.parent.mkdir()
    place.write_text(json.dumps({"format": 1, "devices": {"another machine": {}}}))
    save_profiles(CPU, {"float32": a_profile(FREE)})
    assert "another machine" in json.loads(place.read_text())["devices"]


@needs_kernels
def test_a_compiled_model_reads_it_too(place, tiny_vit, images) -> None:
    save_profiles(CPU, {"float32": a_profile(FREE)})
    x, sparse = images(1, 3, 32, 32), sparsifiner.sparsify(tiny_vit().eval(), keep_rate=0.2)
    torch.compiler.reset()
    with torch.no_grad():
        want = sparse(x)
        got = torch.compile(sparse, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    with torch.no_grad(), record(sparse) as seen:
        sparse(x)
    assert all(item.connectivity is not None for item in seen.values())


@given(
    costs=st.builds(
        Costs, *[st.floats(0.1, 10.0)] * 2, st.floats(10, 500), st.floats(1, 10), st.floats(1e4, 1e7),
        st.floats(0.1, 10.0), st.floats(1e3, 1e6),
    ),
    images=st.sampled_from([1, 8]),
)  # fmt: skip
def test_costs_that_made_the_times_are_found_again(costs: Costs, images: int) -> None:
    cases = []
    for side in (12, 24, 48, 96):
        for attend, score in ((0.2, 0.1), (0.5, 0.1), (0.2, 0.0), (0.3, 0.05)):
            dense = 2 * 384 * side**4
            work = Work(int(attend * dense), int(score * dense), 384 * side**2, int(1e3 * score * side**2), dense)
            ratio = work.share(costs)
            dense_s = costs.dense * dense + costs.dense_call
            cases.append(Case(SparsifinerConfig(), images, side**2, work, dense_s * images, ratio * dense_s * images))
    found = fit(cases)
    for case in cases:
        assert case.work.share(found) == pytest.approx(case.sparse_s / case.dense_s, rel=0.05)


def test_no_case_that_was_slower_is_chosen() -> None:
    def case(ratio: float) -> Case:
        return Case(SparsifinerConfig(), 1, 100, Work(1, 1, 1, 1, 1), 1.0, ratio)

    assert safe_margin([(0.5, case(0.6)), (0.9, case(0.96))]) == 0.95
    assert safe_margin([(0.5, case(0.6)), (0.7, case(1.1)), (0.8, case(0.7))]) == 0.7


@needs_kernels
def test_this_machine_can_be_measured(place, capsys) -> None:
    profiles = measure_profiles(CPU, sides=(8, 10), repeats=1)
    assert set(profiles) == {"float32", "bfloat16"}
    for profile in profiles.values():
        assert len(profile.points) == 2 * len(measured.SETTINGS)
        assert all(point["dense_s"] > 0 and point["sparse_s"] > 0 for point in profile.points)
        assert 0 < profile.margin <= 0.95
    save_profiles(CPU, profiles)
    assert find_profile("cpu", None, torch.float32) == profiles["float32"]


@needs_kernels
def test_kernels_that_compute_something_else_are_not_measured(monkeypatch) -> None:
    kernels = {"attend": lambda q, *rest: torch.zeros_like(q)}
    with registry.registered_backend("wrong", kernels=kernels):
        monkeypatch.setitem(measured.BACKENDS, "cpu", "wrong")
        with pytest.raises(sparsifiner.SparsifinerError, match="float32: the kernels are off by 1 here"):
            measure_profiles(CPU, sides=(8,), repeats=1)


def test_kernels_for_gpus_serve_by_themselves_once_they_were_measured(monkeypatch) -> None:
    monkeypatch.setattr(triton, "find_profile", lambda *_: None)
    assert "has not been measured on this device" in str(triton.why_not_automatic(torch.device("cuda", 0)))
    monkeypatch.setattr(triton, "find_profile", lambda *_: a_profile(FREE))
    assert triton.why_not_automatic(torch.device("cuda", 0)) is None
    assert triton.why_not_automatic(CPU) is not None


def test_a_backend_may_say_why_auto_does_not_take_it() -> None:
    arguments = {"q": torch.empty(1, 1, 1, 64)}
    settings = {"device_type": "cpu", "automatic": lambda device: f"not on {device}"}
    with registry.registered_backend("shy", kernels={"attend": print}, **settings):
        chosen, reason = serving(ATTEND, "auto", True, arguments)
        assert chosen != "shy"
        assert "shy cannot run here: it has no backward pass" in reason
        _, reason = serving(ATTEND, "auto", False, {"q": arguments["q"].double()})
        assert "shy cannot run here: not on cpu" in reason


@needs_kernels
def test_the_command_writes_it(place, capsys, monkeypatch) -> None:
    monkeypatch.setitem(measured.SIDES, "cpu", (8, 10))
    printed: tuple[tuple[list[str], str], ...] = (
        ([], "models with mode=auto decide by it from now on"),
        (["--json"], '"pays_from_tokens"'),
    )
    for arguments, words in printed:
        with pytest.raises(SystemExit) as stop:
            main(["benchmark", "--save-profile", *arguments])
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        assert words in " ".join(out.split())
        assert find_profile("cpu", None, torch.float32) is not None
    monkeypatch.setenv("SPARSIFINER_PROFILE", "off")
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--save-profile"])
    assert stop.value.code == 2
    assert "SPARSIFINER_PROFILE=off turns profiles off" in capsys.readouterr().err
