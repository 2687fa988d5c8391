"""A folder of somebody else's: its JSON leads nowhere else, and no pickle in it runs."""

from __future__ import annotations

import ast
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file

import sparsifiner
from sparsifiner import SparsifinerConfig, from_pretrained, save_pretrained, sparsify
from sparsifiner._utils.trust import create_model, weights_only
from sparsifiner.models import load_model
from sparsifiner.saving import CONFIG_NAME
from sparsifiner.training.checkpoint import CHECKPOINT_NAME, load_checkpoint
from sparsifiner.training.student import save_model

NAME = "vit_tiny_patch16_224"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def no_network(monkeypatch):
    """Any try to reach it, by whatever library, is an error that no handler of ours takes for another."""

    class Reached(BaseException):
        pass

    def refuse(*arguments: object, **settings: object) -> None:
        raise Reached(arguments)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)


@pytest.fixture
def evil(tmp_path):
    """A file of weights that also holds code, and the file that this code would make."""
    marker = tmp_path / "executed"
    torch.save({"state_dict": {}, "x": Evil(marker)}, tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert marker.exists()  # so the rest of this file tests something
    marker.unlink()
    return tmp_path / "evil.pth", marker


@pytest.fixture
def saved(tmp_path):
    """A saved sparse model; called, it changes the description."""
    model = timm.create_model(NAME, num_classes=5, **TINY).eval()
    save_pretrained(sparsify(model, SparsifinerConfig(mode="sparse", query_tile=(2, 2))), tmp_path / "saved")
    path = tmp_path / "saved" / CONFIG_NAME

    def change(**changes: object) -> Path:
        settings = json.loads(path.read_text())
        arguments = {**settings["model_args"], **changes.pop("more_args", {})}
        path.write_text(json.dumps({**settings, "model_args": arguments, **changes}))
        return path.parent

    return change


@pytest.fixture
def timm_folder(tmp_path):
    """The same of a dense model in timm's own format."""
    save_model(timm.create_model(NAME, num_classes=5, **TINY).eval(), tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"

    def change(**changes: object) -> Path:
        settings = json.loads(path.read_text())
        arguments = {**settings["model_args"], **changes.pop("more_args", {})}
        path.write_text(json.dumps({**settings, "model_args": arguments, **changes}))
        return path.parent

    return change


ELSEWHERE = [
    "hf-hub:someone/model",
    "hf_hub:someone/model",
    "HF-HUB:someone/model",
    "local-dir:/tmp",
    "https://example.com/model.safetensors",
    "someone/model",
    "../other",
    "..\\other",
    "",
    "vit tiny",
    "vit_tiny_patch16_224\n",
    7,
    None,
    ["vit_tiny_patch16_224"],
]
FOLLOWED = [
    {"checkpoint_path": "evil.pth"},
    {"pretrained": True},
    {"pretrained_cfg": {"url": "https://example.com/a.pth"}},
    {"pretrained_cfg": "augreg_in21k"},
    {"pretrained_cfg_overlay": {"hf_hub_id": "someone/model"}},
    {"pretrained_cfg_overlay": {"file": "evil.pth"}},
    {"pretrained_model_args": {}},
    {"pretrained_strict": False},
    {"cache_dir": "elsewhere"},
    {"act_layer": "https://example.com/gelu"},
    {"norm_layer": {"name": "../layers/norm"}},
    {"embed_layer": ["a:b"]},
]


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_description_names_an_architecture_and_no_source(name, saved, timm_folder, no_network):
    for folder in (saved(architecture=name), timm_folder(architecture=name)):
        with pytest.raises(ValueError, match=r"names the model .*|architecture in .* must be the name") as refused:
            load_model(str(folder))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arguments", FOLLOWED, ids=repr)
def test_arguments_of_a_description_choose_no_weights(arguments, saved, timm_folder, evil, no_network, monkeypatch):
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("built a model first")

    monkeypatch.chdir(evil[0].parent)
    monkeypatch.setattr(timm, "create_model", never)
    for folder in (saved(more_args=arguments), timm_folder(more_args=arguments)):
        with pytest.raises(ValueError, match=f"model_args in .* hold .*{next(iter(arguments))}"):
            load_model(str(folder))
    assert not evil[1].exists()


def test_data_of_a_description_choose_no_weights(saved):
    model = from_pretrained(saved(data={"file": "/elsewhere", "url": "http://x", "crop_pct": 0.5}))
    assert model.pretrained_cfg.get("file") != "/elsewhere"
    assert model.pretrained_cfg.get("url") != "http://x"
    assert model.pretrained_cfg["crop_pct"] == 0.5


def test_the_caller_may_allow_it_but_no_pickle(saved, evil, tmp_path, no_network):
    kept = timm.create_model(NAME, num_classes=5, **TINY)
    save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    folder = saved(more_args={"checkpoint_path": str(tmp_path / "kept.safetensors")})
    with pytest.raises(ValueError, match="checkpoint_path"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="checkpoint_path"):
        load_model(str(folder))
    assert from_pretrained(folder, trust_remote=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert load_model(str(folder), trust_remote=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match="a pickle that holds more than tensors") as refused:
        from_pretrained(saved(more_args={"checkpoint_path": str(evil[0])}), trust_remote=True)
    assert "weights_only" not in str(refused.value)
    assert not evil[1].exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "pytorch_model.pth", "any.pth.tar"])
def test_pickles_in_a_folder_are_not_read(name, timm_folder, evil, monkeypatch):
    folder = timm_folder()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(evil[0].read_bytes())
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"model.safetensors is missing; copy it .* \(pickles are not read\)"):
        load_model(str(folder))
    assert not evil[1].exists()


def test_pickles_that_a_caller_names_run_no_code_whatever_timm_asks_for(evil, monkeypatch):
    """timm loads with ``weights_only=True`` today; older versions did not."""
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **settings: load(file, **{**settings, "weights_only": False}))
    for arguments in ({"checkpoint_path": str(evil[0])}, {"pretrained_cfg_overlay": {"file": str(evil[0])}}):
        with pytest.raises(ValueError, match="a pickle that holds more than tensors"):
            load_model(NAME, model_args={**TINY, **arguments}, pretrained="checkpoint_path" not in arguments)
    assert not evil[1].exists()


def test_a_checkpoint_of_training_runs_no_code(recipe, tmp_path, evil):
    (tmp_path / CHECKPOINT_NAME).write_bytes(evil[0].read_bytes())
    with pytest.raises(ValueError, match="a pickle that holds more than tensors") as refused:
        load_checkpoint(tmp_path, recipe(), 1, 24, None)
    assert "weights_only" not in str(refused.value)
    assert not evil[1].exists()


def test_what_saving_would_write_is_refused_as_well(tmp_path):
    sparse = sparsify(timm.create_model(NAME, **TINY).eval())
    with pytest.raises(ValueError, match="checkpoint_path"):
        save_pretrained(sparse, tmp_path / "new", model_args={"checkpoint_path": "weights.safetensors"})
    assert not (tmp_path / "new").exists()


def test_the_environment_is_put_back(monkeypatch, evil):
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    for values in ((None, None), ("0", None), (None, "1"), ("1", None)):
        for name, value in zip(names, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with weights_only(), weights_only(), pytest.raises(Exception, match="(?i)weights.?only"):
            torch.load(evil[0], weights_only=False)
        create_model(NAME, **TINY)
        assert tuple(os.environ.get(name) for name in names) == values
    assert not evil[1].exists()


def test_threads_that_load_at_once_are_all_kept_from_it(evil):
    def load(_: int) -> bool:
        with weights_only():
            try:
                torch.load(evil[0], weights_only=False)
            except Exception:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(load, range(200)))
    assert not evil[1].exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_every_reader_in_the_package_reads_plain_data():
    """``torch.load`` with ``weights_only=True``, models through one function, no pickle, no other YAML loader."""
    own_pickles = ("measure/_memory_worker.py", "runtime/_compile_worker.py")  # the parent process wrote them just now
    root = Path(sparsifiner.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, settings = ast.unparse(node.func), {item.arg: ast.unparse(item.value) for item in node.keywords}
            if name == "torch.load":
                assert settings["weights_only"] == ("False" if file in own_pickles else "True"), file
                found.append(name)
            elif name.endswith("create_model"):
                assert name == "create_model" or file == "_utils/trust.py", file
                found.append(name)
            elif name.startswith("yaml."):
                assert file == "_utils/yaml12.py", file
                found.append(name)
            assert name.split(".")[0] not in ("pickle", "joblib", "shelve", "marshal", "eval", "exec"), file
            assert not name.startswith(("numpy.load", "np.load", "torch.hub", "torch.jit.load")), file
    assert {"torch.load", "create_model", "timm.create_model"} <= set(found)
    assert any(name.startswith("yaml.load") for name in found)
