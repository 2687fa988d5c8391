"""The authors' implementation, seven settings: logits, scores and coefficients at round-off, masks equal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsifiner import record, sparse_layers
from sparsifiner.models import from_reference

CASES = Path(__file__).parent / "conformance"
SETTINGS = json.loads((CASES / "cases.json").read_text())
# Logits of unit scale, three layers of float32 arithmetic on both sides.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict]:
    settings = SETTINGS[name]
    tensors = load_file(CASES / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model = from_reference(
        state,
        keep_rate=settings["keep_rate"],
        coef_topk=settings["coef_topk"],
        coef_threshold=settings["coef_threshold"],
        basis_threshold=settings["basis_threshold"],
        score_threshold=settings["score_threshold"],
        attn_recon=settings["attn_recon_phase"],
        token_keep_rate=settings["token_keep_rate"],
        token_pruning_layers=settings["token_pruning_layers"],
    )
    return model.train(settings["mode"] == "train"), tensors, settings


@pytest.mark.parametrize("name", SETTINGS)
def test_conformance(name: str) -> None:
    model, expected, settings = build(name)
    layers = sparse_layers(model)
    with torch.no_grad(), record(model, tensors=True) as seen:
        logits = model(expected["input"])
        features = model.forward_features(expected["input"])[:, 1:]
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    torch.testing.assert_close(features, expected["features"], **TOLERANCE)
    for number, (path, layer) in enumerate(layers.items()):
        step, predictor = seen[path], layer.predictor
        tiling = layer.tiling(step.q.shape[2])
        with torch.no_grad():
            coefficients = predictor.coefficients(step.q, step.k, tiling)
            scores = predictor.token_scores(step.q, step.k, tiling)
            # In the reconstruction phase attention is dense; its mask is what the scores would select.
            connectivity = step.connectivity or predictor(layer.inputs(step.q, step.k, step.v))
        mask = connectivity.to_mask()
        assert torch.equal(mask, expected[f"blocks.{number}.mask"])
        torch.testing.assert_close(coefficients, expected[f"blocks.{number}.coef"], **TOLERANCE)
        torch.testing.assert_close(scores, expected[f"blocks.{number}.score"], **TOLERANCE)
        attention = step.q @ step.k.transpose(-1, -2) * layer.scale
        if step.connectivity is not None:
            attention = attention.masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(
            attention.softmax(-1).nan_to_num(0.0), expected[f"blocks.{number}.attn"], **TOLERANCE
        )
        assert mask.float().mean().item() == pytest.approx(settings["mask_density"][number], abs=1e-6)
        assert predictor.w_down.shape[1] == settings["n_down"]


def test_training_checkpoints_are_unwrapped() -> None:
    state = {
        k.removeprefix("state."): v
        for k, v in load_file(CASES / "default.safetensors").items()
        if k.startswith("state.")
    }
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    keep_rate = SETTINGS["default"]["keep_rate"]
    x = load_file(CASES / "default.safetensors")["input"]
    with torch.no_grad():
        assert torch.equal(
            from_reference(wrapped, keep_rate=keep_rate)(x), from_reference(state, keep_rate=keep_rate)(x)
        )


def test_foreign_and_truncated_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="not a checkpoint of the Sparsifiner reference"):
        from_reference({"cls_token": torch.zeros(1, 1, 8)})
    state = {
        k.removeprefix("state."): v
        for k, v in load_file(CASES / "default.safetensors").items()
        if k.startswith("state.")
    }
    del state["norm.weight"]
    with pytest.raises(ValueError, match="does not fit the model it describes.*norm.weight"):
        from_reference(state)
