"""Cheap search: predicted time against measured error of models that are never compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import SparsifinerConfig
from ..convert import sparse_layers
from ..measure.fidelity import ImageFidelity
from .bound import Bound, Error
from .clock import Clock
from .images import Images
from .layers import AttentionTimes
from .probes import Probe, precision_of
from .rates import LayerRates
from .space import CHOICES, KEEP_RATES, Candidate, structure
from .trials import Trial, Trials

AIM = 0.95
"""Share of the allowed error that a proposal at the bound aims at."""
STEEPNESS = 0.9
"""Power of the keep rate by which the error falls, where only one rate of some settings was tried."""
SEEDS = (
    {"query_tile": "8x8", "query_pool": "2x4"},
    {"query_tile": "4x4", "query_pool": "2x2"},
    {"query_tile": "8x8", "query_pool": "4x4"},
    {"query_tile": "8x8", "query_pool": "2x4", "query_refine": "1", "tail": "4x4, refined 1"},
    {"query_tile": "8x8", "query_pool": "2x4", "query_refine": "1", "tail": "3x3"},
    {"query_tile": "16x16", "query_pool": "4x4"},
    {"query_tile": "8x8", "query_pool": "2x4", "tail": "2x2"},
)
"""Settings tried first, at ``SEED_RATE``; others are the space's defaults."""
SEED_RATE = 0.1


class Search:
    """Trials over the settings of a sparse model, each costing a few uncompiled forward passes.

    Args:
        sparse: the model with sparse layers, which are given one setting after the other.
        images: to tune on.
        times: of attention.
        probes: the precisions that work here, by name.
        rates: keep rates by layer.
        trials: finished ones, and the sampler.
        bound: of the fidelity.
        clock: of the whole search.
        options: values of each choice.
        on_trial: called after each trial.
    """

    def __init__(
        self,
        sparse: nn.Module,
        images: Images,
        times: AttentionTimes,
        probes: Mapping[str, Probe],
        rates: LayerRates,
        trials: Trials,
        bound: Bound,
        clock: Clock,
        options: Mapping[str, tuple[str, ...]],
        on_trial: Callable[[Trial], None],
    ) -> None:
        self.sparse, self.images, self.times, self.probes = sparse, images, times, probes
        self.rates, self.trials, self.bound, self.clock, self.options = rates, trials, bound, clock, options
        self.on_trial = on_trial
        self.error_factor = 1.0
        """Squared error of compiled whole models by the predicted one."""
        self.time_factor: dict[str, float] = {}
        """Measured time of whole models by the predicted one, by precision."""
        self._errors: dict[SparsifinerConfig, tuple[Error, bool]] = {}
        self._count = 0
        self._seeds = [seed for seed in SEEDS if all(value in options[name] for name, value in seed.items())]

    def candidate(self, values: Mapping[str, Any]) -> Candidate:
        """The model that ``values`` describe."""
        rate = float(values["keep_rate"])
        spread = self.rates.of(rate) if values["layers"] == "by sensitivity" else rate
        # Smaller images than those it is tuned for run dense: there tiles may not fit, and sparsity gains little.
        config = structure(CHOICES, values).replace(keep_rate=spread, mode="auto", dense_below=self.times.num_tokens)
        runtime = self.probes[values["precision"]].runtime
        if runtime.activations == "bfloat16":  # q, k and v are already
            config = config.replace(attention_dtype="model")
        return Candidate(config, runtime)

    def predict(self, values: Mapping[str, Any], candidate: Candidate) -> float:
        """Seconds of a batch."""
        probe = self.probes[values["precision"]]
        assert candidate.config is not None
        attention = self.times.sparse(candidate.config, precision_of(probe.runtime))
        return (probe.rest + attention) * self.time_factor.get(values["precision"], 1.0)

    def share(self, trial: Trial) -> float:
        """Error of a trial as a share of what is allowed, in the light of the whole models measured so far."""
        return math.inf if trial.error is None else self.bound.share(trial.error.scaled(self.error_factor))

    def seconds(self, trial: Trial) -> float:
        """Predicted time of a trial, likewise."""
        return self.predict(trial.values, trial.candidate)

    def step(self, *, only_known: bool = False) -> bool:
        """One more trial; False if none is left to try.

        Args:
            only_known: time no layer, as while something else runs on this machine.
        """
        values = self._next(only_known)
        if values is None:
            return False
        candidate = self.candidate(values)
        with self.clock.timing("trial"):
            seconds = self.predict(values, candidate)
            best = self.best_within()
            if best is not None and seconds >= self.seconds(best):
                trial = Trial(values, candidate, seconds, None, "slower than one within the bound")
            else:
                error, whole = self._error(values, candidate)
                reason = None if whole else "far out of the bound on the first image"
                trial = Trial(values, candidate, seconds, error, reason)
        self.trials.add(trial)
        self.on_trial(trial)
        return True

    def best_within(self) -> Trial | None:
        """The fastest trial within the bound as predicted."""
        within = [trial for trial in self.trials.finished if self.share(trial) <= 1]
        return min(within, key=self.seconds, default=None)

    def _error(self, values: Mapping[str, Any], candidate: Candidate) -> tuple[Error, bool]:
        """Error on the tuning images, and whether it is of all of them."""
        assert candidate.config is not None
        of_precision = self.probes[values["precision"]].error or Error(0.0, 0.0)
        if candidate.config not in self._errors:
            configure(self.sparse, candidate.config)

            def hopeless(found: list[ImageFidelity]) -> bool:
                return self.bound.share(Error.of(found)) > 3

            found = self.images.compare(self.sparse, until=hopeless)
            self._errors[candidate.config] = Error.of(found), len(found) == len(self.images.features)
        error, whole = self._errors[candidate.config]
        return error.plus(of_precision), whole

    def _next(self, only_known: bool) -> dict[str, Any] | None:
        self._count += 1
        if self._seeds and not only_known:
            return self._full(self._seeds.pop(0), SEED_RATE)
        if only_known or self._count % 3:
            values = self._at_the_bound(only_known)
            if values is not None or only_known:
                return values
        return self.trials.propose()

    def _full(self, seed: Mapping[str, str], rate: float) -> dict[str, Any]:
        return {name: values[0] for name, values in self.options.items()} | dict(seed) | {"keep_rate": rate}

    def _at_the_bound(self, only_known: bool) -> dict[str, Any] | None:
        """Settings that were tried, at the keep rate that should just be within the bound: those that promise most.

        Every precision is considered for them, since its error is known.
        """
        groups: dict[tuple[tuple[str, Any], ...], list[Trial]] = {}
        for trial in self.trials.finished:
            if trial.error is not None and trial.values.get("precision") in self.probes:
                key = tuple((k, v) for k, v in trial.values.items() if k not in ("keep_rate", "precision"))
                groups.setdefault(key, []).append(trial)
        best = self.best_within()
        least = math.inf if best is None else self.seconds(best)
        found: dict[str, Any] | None = None
        for key, tried in groups.items():
            for precision in self.probes:
                rate = self._rate_at_the_bound(tried, precision)
                if rate is None:
                    continue
                values = {**dict(key), "precision": precision, "keep_rate": rate}
                if any(_same(values, trial.values) for trial in self.trials.finished):
                    continue
                candidate = self.candidate(values)
                assert candidate.config is not None
                if only_known and not self.times.known(candidate.config, precision_of(candidate.runtime)):
                    continue
                seconds = self.predict(values, candidate)
                if seconds < 0.995 * least:
                    least, found = seconds, values
        return found

    def _rate_at_the_bound(self, tried: list[Trial], precision: str) -> float | None:
        """Keep rate at which the error of sparsity and of a precision together should be as large as aimed at."""
        of_precision = self.probes[precision].error or Error(0.0, 0.0)
        points: dict[float, float] = {}
        for trial in tried:
            assert trial.error is not None
            own = self.probes[trial.values["precision"]].error or Error(0.0, 0.0)
            sparsity = Error(
                max(trial.error.cosine - own.cosine, 1e-9), max(trial.error.l2**2 - own.l2**2, 1e-12) ** 0.5
            )
            points[float(trial.values["keep_rate"])] = self.bound.share(
                sparsity.plus(of_precision).scaled(self.error_factor)
            )
        fixed = self.bound.share(of_precision.scaled(self.error_factor))
        if fixed >= AIM:
            return None
        logs = sorted((math.log(rate), math.log(max(share - fixed, 1e-6))) for rate, share in points.items())
        aim = math.log(AIM - fixed)
        near = min(logs, key=lambda point: abs(point[1] - aim))
        slope = -STEEPNESS
        others = [point for point in logs if abs(point[0] - near[0]) > 0.05]
        if others:
            other = min(others, key=lambda point: abs(point[1] - aim))
            slope = min(-0.2, (near[1] - other[1]) / (near[0] - other[0]))
        rate = math.exp(near[0] + (aim - near[1]) / slope)
        low, high = KEEP_RATES
        return None if rate > 1.5 * high else round(min(max(rate, low), high), 4)


def configure(sparse: nn.Module, config: SparsifinerConfig) -> None:
    """Give the layers of ``sparse`` other settings of the same predictor."""
    layers = list(sparse_layers(sparse).values())
    for number, layer in enumerate(layers):
        layer.configure(config.for_layer(number, len(layers)))


def _same(values: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True where settings agree and keep rates differ by less than a twentieth."""
    rest = [{k: v for k, v in item.items() if k != "keep_rate"} for item in (values, other)]
    close = abs(math.log(values["keep_rate"] / other["keep_rate"])) < 0.05
    return rest[0] == rest[1] and close
