"""The search of ``tune``: what it proposes, that it obeys its bound and its clock, and what it says and keeps."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import timm
import torch
from conftest import lively
from typer.testing import CliRunner

import sparsifiner
from sparsifiner._utils.yaml12 import load_yaml
from sparsifiner.cli.app import build_app
from sparsifiner.config import SparsifinerConfig
from sparsifiner.errors import SparsifinerError
from sparsifiner.measure.fidelity import ImageFidelity
from sparsifiner.runtime import ReadyModel, Runtime
from sparsifiner.runtime import ready as ready_module
from sparsifiner.tuning import Bound, tune
from sparsifiner.tuning import models as models_module
from sparsifiner.tuning.bound import Error
from sparsifiner.tuning.images import split_images
from sparsifiner.tuning.probes import Probe
from sparsifiner.tuning.search import Search
from sparsifiner.tuning.space import CHOICES, PRECISIONS, Candidate, structure, usable
from sparsifiner.tuning.trials import JOURNAL, Trial, Trials

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {**usable(CHOICES, (32, 32)), "layers": ("same",), "precision": ("int8", "float32")}


class Compiled:
    """Stands for a process that compiles: hands back the module it was given, uncompiled."""

    took = 0.0

    def __init__(self, module: Any, x: Any, options: Any) -> None:
        self.module, self.until, self.stopped = module, time.monotonic() + self.took, False

    def done(self) -> bool:
        return time.monotonic() >= self.until

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            raise TimeoutError("compilation was not done")
        return self.module

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def quick(monkeypatch, one_thread):
    monkeypatch.setattr(ready_module, "CompilingProcess", Compiled)
    monkeypatch.setattr(ready_module, "compile_ahead", lambda module, x, options: module)
    monkeypatch.setattr("sparsifiner.tuning.run.openvino_model", lambda dense, x: None)


def vit(**changes):
    settings = dict(img_size=96, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return lively(timm.create_model("vit_tiny_patch16_224", **{**settings, **changes}))


def pictures(count=6, side=96):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


class LayersTakeTime:
    """Attention of known cost: linear in the keep rate, cheaper in larger tiles."""

    num_layers, num_tokens = 4, 1025

    def known(self, config, dtype):
        return True

    def sparse(self, config, dtype):
        return 4 * (0.002 + 0.05 * config.keep_rate) * 16 / (config.query_tile[0] * config.query_tile[1])


class FidelityIsKnown:
    """An error that falls with the keep rate and is larger with larger tiles, so that the best settings are known."""

    features = [None, None]

    def __init__(self):
        self.calls = 0

    def compare(self, sparse, until=None):
        self.calls += 1
        config = next(iter(sparsifiner.sparse_layers(sparse).values())).config
        tile = config.query_tile[0] * config.query_tile[1]
        error = 0.001 * tile**0.5 / 4 / config.keep_rate
        return [ImageFidelity(str(n), (2 * error) ** 0.5, 1 - error) for n in range(2)]


def search_over(bound, *, trials=None):
    from sparsifiner.tuning.clock import Clock

    class Same:
        def of(self, rate):
            return rate

    probes = {
        "int8": Probe(PRECISIONS["int8"], 0.1, Error(0.0005, 0.03)),
        "float32": Probe(PRECISIONS["float32"], 0.2, Error(0.0, 0.0)),
    }
    trials = trials or Trials(bound, OPTIONS, journal=None, fingerprint="", resume=False, seed=0)
    sparse = sparsifiner.sparsify(vit(img_size=256), SparsifinerConfig(mode="sparse"))
    search = Search(
        sparse, FidelityIsKnown(), LayersTakeTime(), probes, Same(), trials, bound, Clock(1000), OPTIONS, lambda t: None
    )
    return search


def test_the_search_comes_close_to_the_best_there_is():
    bound = Bound(0.99)
    search = search_over(bound)
    for _ in range(30):
        if not search.step():
            break
    best = search.best_within()

    def seconds(tile, precision):  # at the keep rate that is exactly within the bound
        left = 0.01 - search.probes[precision].error.cosine
        rate = max(0.01, 0.001 * tile**0.5 / 4 / left)
        return search.probes[precision].rest + 4 * (0.002 + 0.05 * rate) * 16 / tile

    least = min(seconds(tile, p) for tile in (16, 32, 64, 256) for p in search.probes)
    assert best is not None
    assert search.share(best) <= 1
    assert best.values["precision"] == "int8"
    assert search.seconds(best) < 1.05 * least
    pruned = [trial for trial in search.trials.finished if trial.pruned]
    assert pruned  # slower than what is within the bound already: never run
    assert search.images.calls < len(search.trials.finished)


def test_what_whole_models_showed_corrects_what_is_proposed():
    search = search_over(Bound(0.99))
    for _ in range(12):
        search.step()
    before = search.best_within()
    search.error_factor = 3.0
    after = search.best_within()
    assert before is not None
    assert search.share(before) > 1
    assert after is None or search.seconds(after) > search.seconds(before)


def test_bounds():
    bound = Bound(0.99, 0.2)
    assert bound.share(Error(0.005, 0.1)) == pytest.approx(0.5)
    assert bound.share(Error(0.001, 0.3)) == pytest.approx(1.5)
    assert Error(0.01, 0.3).plus(Error(0.02, 0.4)) == Error(0.03, pytest.approx(0.5))
    with pytest.raises(SparsifinerError, match="min_cosine must be a number above 0 and at most 1, got 1.5"):
        Bound(1.5)


def test_every_choice_of_the_space_makes_settings():
    options = usable(CHOICES, (37, 37))
    for choice in CHOICES:
        for value in options[choice.name]:
            config = structure(CHOICES, {**{n: v[0] for n, v in options.items()}, choice.name: value})
            candidate = Candidate(config, PRECISIONS["int8"])
            assert Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))) == candidate
    assert "16x16" not in usable(CHOICES, (20, 20))["query_tile"]


def test_a_journal_goes_on_and_is_refused_for_another_search(tmp_path):
    path = tmp_path / JOURNAL
    bound = Bound(0.99)
    trials = Trials(bound, OPTIONS, journal=path, fingerprint="a", resume=False, seed=0)
    trials.narrow(OPTIONS)
    search = search_over(bound, trials=trials)
    for _ in range(4):
        search.step()
    again = Trials(bound, OPTIONS, journal=path, fingerprint="a", resume=True, seed=0)
    assert again.finished == trials.finished
    with pytest.raises(SparsifinerError, match="on another model, other images or another machine"):
        Trials(bound, OPTIONS, journal=path, fingerprint="b", resume=True, seed=0)
    assert not Trials(bound, OPTIONS, journal=path, fingerprint="b", resume=False, seed=0).finished
    path.write_bytes(b"no journal\n" * 3)
    with pytest.raises(SparsifinerError, match="no readable search"):
        Trials(bound, OPTIONS, journal=path, fingerprint="b", resume=True, seed=0)


def test_a_full_disk_keeps_the_trials_in_memory(tmp_path, monkeypatch):
    bound = Bound(0.99)
    trials = Trials(bound, OPTIONS, journal=tmp_path / JOURNAL, fingerprint="", resume=False, seed=0)
    search = search_over(bound, trials=trials)
    search.step()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trials._kept, "add_trial", full)
    search.step()
    search.step()
    assert len(trials.finished) == 3
    assert "No space left on device" in trials.lost
    monkeypatch.undo()
    assert len(Trials(bound, OPTIONS, journal=tmp_path / JOURNAL, fingerprint="", resume=True, seed=0).finished) == 1


def test_images_are_split_and_bad_ones_refused():
    tuning, judging = split_images(pictures(5), list("abcde"))
    assert (tuning.names, judging.names) == (["a", "c", "e"], ["b", "d"])
    assert torch.equal(judging.batch(0, 3), judging.x[[0, 1, 0]])
    for bad, words in (
        (pictures(1), "at least 2 images"),
        (pictures(2) * float("nan"), "not finite"),
        (torch.zeros(3, 4), "normalised float tensor"),
        ([1, 2], "normalised float tensor"),
    ):
        with pytest.raises(SparsifinerError, match=words):
            split_images(bad)


def test_it_refuses_what_it_cannot_tune():
    with pytest.raises(SparsifinerError, match="takes a dense model"):
        tune(sparsifiner.sparsify(vit()), pictures())
    with pytest.raises(SparsifinerError, match="nothing to convert"):
        tune(timm.create_model("resnet18", num_classes=0), pictures(2, 32))
    with pytest.raises(SparsifinerError, match="float32 model on the CPU, got torch.bfloat16"):
        tune(vit().bfloat16(), pictures())
    with pytest.raises(SparsifinerError, match="does not take images of"):
        tune(vit(), pictures(2, 40))
    with pytest.raises(SparsifinerError, match="resume needs the storage"):
        tune(vit(), pictures(), resume=True)


def test_a_whole_search(quick, tmp_path, monkeypatch):
    """Dense float32 is made slow, so that something beats it; settings, weights and figures come back."""
    model, x = vit(), pictures()
    real = models_module.seconds_of

    def seconds_of(models, x, **settings):
        times = real(models, x, **settings)
        return {name: [10 * t for t in v] if name == "dense" else v for name, v in times.items()}

    for module in ("models", "run"):
        monkeypatch.setattr(f"sparsifiner.tuning.{module}.seconds_of", seconds_of)
    said: list[str] = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = tune(model, x, min_cosine=0.9, max_seconds=8, say=said.append, storage=tmp_path)
    report = tuned.report
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(tuned.model, ReadyModel)
    assert report.seconds < 9
    assert report.result.within
    assert report.result.fidelity.mean("patch_cosine") >= 0.9
    assert not set(report.tuned_on) & set(report.judged_on)
    assert said
    assert any(item.candidate.config is None and item.candidate.runtime != Runtime() for item in report.models)
    json.loads(report.to_json())
    assert tuned.trials
    if tuned.settings.config is not None:
        assert "sparse attention gives the other" in " ".join(report.verdict)
    tuned.save(tmp_path)
    again = sparsifiner.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again.forward_features(x[:1]), tuned.model.forward_features(x[:1]), atol=1e-5)
    for side in (96, 40):  # smaller than it was tuned for: dense, whatever the tiles
        dense = vit(dynamic_img_size=True)
        dense.load_state_dict(model.state_dict())
        config = tuned.settings.config or SparsifinerConfig(mode="auto", dense_below=145, query_tile=(4, 4))
        sparse = sparsifiner.sparsify(dense, config)
        with torch.no_grad():
            same = torch.equal(sparse(pictures(1, side)), dense(pictures(1, side)))
        assert same == (side == 40)
    settings = load_yaml((tmp_path / "tuned.yaml").read_text())
    assert Candidate.from_dict(settings) == tuned.settings


def test_the_clock_is_obeyed_where_compilation_takes_too_long(quick, monkeypatch):
    monkeypatch.setattr(Compiled, "took", 60.0)
    start = time.monotonic()
    tuned = tune(vit(), pictures(), min_cosine=0.9, max_seconds=5)
    assert time.monotonic() - start < 6
    assert any("not done" in note or "takes" in note for note in tuned.report.notes)
    assert "nothing that was measured is faster" in tuned.report.verdict[0]
    assert "No sparse model was compiled whole" in tuned.report.verdict[1]
    with pytest.raises(SparsifinerError, match="nothing to save"):
        tuned.save("unused")


def test_an_interruption_keeps_what_was_found(quick, monkeypatch, tmp_path):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsifiner.tuning.run.Run._next_whole", interrupted)
    tuned = tune(vit(), pictures(), min_cosine=0.9, max_seconds=5, storage=tmp_path)
    assert "interrupted" in tuned.report.notes[-1]
    monkeypatch.setattr("sparsifiner.tuning.run.Run._probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(vit(), pictures(), min_cosine=0.9, max_seconds=5, storage=tmp_path, resume=True)


def test_what_cannot_be_quantised_or_compiled_is_named_and_left_out(quick, monkeypatch):
    def refuse(model):
        raise SparsifinerError("it cannot be held in int8: for a test")

    monkeypatch.setattr(ready_module, "quantize_linears", refuse)
    tuned = tune(vit(), pictures(), min_cosine=0.9, max_seconds=5)
    assert any("for a test" in note for note in tuned.report.notes)
    assert all(trial.candidate.runtime.linears == "model" for trial in tuned.trials)
    assert tuned.trials


def test_the_command_writes_page_and_model(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsifiner.models.load_model", lambda *args, **settings: vit())
    output = tmp_path / "tuned"
    done = CliRunner().invoke(
        build_app(), ["tune", "--max-seconds", "5", "--min-cosine", "0.5", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    page = (output / "tuning.html").read_text()
    assert "Whole models" in page
    assert "data:image/png" in page
    facts = json.loads((output / "tuning.json").read_text())
    assert facts["images"]["judged_on"]
    assert "dense, float32, eager, as given" in done.output


def test_trials_are_plain_values():
    trial = Trial({"keep_rate": 0.1}, Candidate(None, Runtime()), 0.5, Error(0.25, 0.5))
    assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial
