"""One search from its first measurement to its result."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._utils.digest import digest, state_digest
from .._utils.progress import Progress
from ..config import SparsifinerConfig
from ..convert import sparsify
from ..errors import SparsifinerError
from ..measure.crossover import break_even
from ..measure.fidelity import Fidelity
from ..report.machine import this_machine
from ..runtime import Runtime, prepare
from ..runtime.ready import use_threads
from .bound import Bound, Error
from .clock import Clock
from .images import Images
from .layers import AttentionTimes
from .models import NoTime, WholeModel, compiled, converted, measured
from .openvino import openvino_model
from .probes import Probe, first_blocks, precision_of, seconds_of, time_rest
from .rates import LayerRates
from .result import Tuned, TuningReport
from .search import Search
from .space import CHOICES, PRECISIONS, Candidate, usable
from .trials import JOURNAL, Trial, Trials
from .verdict import verdict

DENSE = Candidate(None, Runtime())
MOST_IMAGES = 8
"""Images of each kind whose features are compared."""
SHARE_PROBES, SHARE_SEARCH, SHARE_END = 0.2, 0.4, 0.12
"""Of all time: until when precisions are probed and cheap trials come first, and what the last comparison gets."""
SHARE_TIMING = 0.03
"""Of all time, for the first timing of a whole model."""
FASTER = 1.02
"""Speed-up below which the model as it was given is the result."""
MOST_LATE_TRIALS = 40
"""Cheap trials after the first whole model; when they find nothing faster, the search is over."""
KEPT = 2
"""Compiled models that are kept in memory besides the dense ones."""


class Run:
    """A search under way; arguments are those of :func:`~sparsifiner.tune`."""

    def __init__(
        self, model: nn.Module, tuning: Images, judging: Images, bound: Bound, *, max_seconds: float, batch: int,
        folder: Path | None, resume: bool, seed: int, name: str, skipped: dict[str, str], notify: Progress,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.clock = Clock(max_seconds)
        self.dense: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.tuning, self.judging, self.bound, self.batch = tuning, judging, bound, batch
        self.name, self.skipped, self.notify, self.say = name, skipped, notify, say
        self.notes: list[str] = []
        self.models: list[WholeModel] = []
        self.probes: dict[str, Probe] = {}
        self.threads = torch.get_num_threads()
        self.interrupted = False
        self.sparse = sparsify(self.dense, SparsifinerConfig(mode="sparse"))
        self.times = AttentionTimes(self.dense, judging.batch(0, batch))
        options = usable(CHOICES, self.times.grid)
        self.options = {**options, "layers": ("by sensitivity", "same"), "precision": tuple(PRECISIONS)}
        fingerprint = digest([state_digest(self.dense.state_dict()), tuning.x, judging.x, str(batch)])
        journal = None if folder is None else folder / JOURNAL
        self.trials = Trials(
            bound, self.options, journal=journal, fingerprint=fingerprint, resume=resume, seed=seed
        )  # fmt: skip
        self.resumed = len(self.trials.finished)
        self.search: Search | None = None
        self._failed: list[Trial] = []
        self._late_trials = 0

    def all(self) -> Tuned:
        """Everything, and the result."""
        try:
            self._prepare()
            self._compile_the_best()
        except KeyboardInterrupt:
            if len(self.models) < 2:
                raise
            self.interrupted = True
            self.notes.append("The search was interrupted; the result is the best model found until then.")
        return self._finish()

    # What does not depend on the settings of sparsity

    def _prepare(self) -> None:
        """Dense features, time and error of each precision, keep rates by layer, cheap trials."""
        x = self.judging.batch(0, self.batch)
        for images in (self.tuning, self.judging):
            with self.clock.timing("dense image"):
                images.add_features(self.dense, 0)
        times = seconds_of({"dense": self.dense}, x, rounds=3, limit=4.0)["dense"]
        self.models.append(WholeModel(DENSE, None, times, times, label="dense, float32, eager, as given"))
        # The time of layers is measured before anything else runs beside.
        for dtype in (torch.float32, torch.bfloat16):
            self.times.dense(dtype)
        self.rates = LayerRates(self.sparse)
        self._queue = self._quiet_work()
        self._probe()
        for _ in self._queue:
            if self.clock.share_left(SHARE_SEARCH) < 0:
                break
        if not self.probes:
            return
        options = {**self.options, "precision": tuple(self.probes)}
        self.trials.narrow(options)
        self.search = Search(
            self.sparse, self.tuning, self.times, self.probes, self.rates, self.trials, self.bound, self.clock,
            options, self._tell_trial,
        )  # fmt: skip
        while self.clock.share_left(SHARE_SEARCH) > self.clock.estimate("trial", 0.0) and self.search.step():
            pass

    def _quiet_work(self) -> Any:
        """Work that is not timed, piece by piece, so that it can go on beside a compilation."""
        for images, most in ((self.tuning, MOST_IMAGES // 2), (self.judging, MOST_IMAGES)):
            while len(images.features) < min(len(images.x), most):
                slow = self.clock.estimate("dense image", 1.0) * most > 0.08 * self.clock.max_seconds
                if slow and len(images.features) >= max(2, most // 2):
                    break
                with self.clock.timing("dense image"):
                    images.add_features(self.dense, len(images.features))
                yield
        for number in range(min(2, len(self.tuning.x))):
            spent = self.clock.estimate("layer errors", 18 * self.clock.estimate("dense image", 1.0))
            if spent > (0.1 if number else 0.2) * self.clock.max_seconds:
                break
            with self.clock.timing("layer errors"):
                self.rates.measure(self.tuning.x[number : number + 1])
            yield

    def _beside(self) -> bool:
        """One piece of quiet work while another process compiles."""
        with use_threads(max(1, self.threads - 1)):
            return next(self._queue, self) is not self

    def _probe(self) -> None:
        """Time and error of each precision that works here, until the share of probes is spent."""
        x = self.judging.batch(0, self.batch)
        blocks, factor = first_blocks(self.dense)
        total = len(PRECISIONS)
        for number, (name, runtime) in enumerate(PRECISIONS.items()):
            self.notify("probing precisions", number, total)
            until = SHARE_PROBES * self.clock.max_seconds if self.probes else 0.5 * self.clock.max_seconds
            if self.probes and self.clock.elapsed + self.clock.estimate("probe", 0.0) > until:
                self.notes.append(f"No time to try {name}: fewer precisions were searched.")
                continue
            attention = self.times.num_layers * self.times.dense(precision_of(runtime))
            ready = None
            for how in (runtime, runtime.replace(compilation="torch.compile"), runtime.replace(compilation="none")):
                if how.linears == "int8" and how.compilation == "none":
                    continue  # torchao's int8 is slower than float32 unless it is compiled
                try:
                    ready = compiled(
                        blocks, Candidate(None, how), x, self.clock, "probe", until=until, meanwhile=self._beside
                    )  # fmt: skip
                    break
                except SparsifinerError as error:
                    self.notes.append(f"Not tried: {how}: {error}.")
                except NoTime as error:
                    self.notes.append(f"Not tried: {how}: {error}.")
                    break
            if ready is None:
                continue
            rest = time_rest(ready, x, factor, attention)
            self.probes[name] = Probe(ready.runtime, rest)
        self.notify("probing precisions", total, total)
        for name, probe in self.probes.items():
            self._measure_precision(name, probe)

    def _measure_precision(self, name: str, probe: Probe) -> None:
        """Error of the dense model in that precision, uncompiled, on one image."""
        if name == "float32":
            probe.error = Error(0.0, 0.0)
            return
        ready = prepare(self.dense, probe.runtime.replace(compilation="none"))
        first = Images(self.tuning.x, self.tuning.names, self.tuning.features[:1])
        probe.error = Error.of(first.compare(ready))

    def _tell_trial(self, trial: Trial) -> None:
        done = len(self.trials.finished) - self.resumed
        self.notify("cheap trials", done, max(done, 60))

    # Whole models

    @property
    def _end(self) -> float:
        """Seconds of the clock at which the last comparison begins."""
        rounds = 4 * statistics.median(self.models[0].seconds) * 3.5
        return self.clock.max_seconds - max(SHARE_END * self.clock.max_seconds, rounds)

    @property
    def _judging(self) -> float:
        """Seconds that timing and judging a whole model take at most."""
        images = len(self.tuning.features) + len(self.judging.features)
        return images * statistics.median(self.models[0].seconds) / self.batch + SHARE_TIMING * self.clock.max_seconds

    def _compile_the_best(self) -> None:
        """Compile, measure and judge, fastest first, until nothing faster is left or the time is."""
        self._dense_like(self._favourite())
        while self.search is not None and self.clock.elapsed < self._end:
            trial = self._next_whole()
            if trial is None:
                if not self._more_trials():
                    break
                continue
            try:
                self._try_whole(trial.candidate, trial)
            except NoTime as error:
                self.notes.append(f"Not compiled, the time was over: {trial.candidate} ({error}).")
                break
            except SparsifinerError as error:
                self.notes.append(f"Not tried: {trial.candidate}: {error}.")
                self._failed.append(trial)

    def _favourite(self) -> Runtime | None:
        """The precision that the result will most likely have."""
        best = None if self.search is None else self.search.best_within()
        if best is not None:
            return best.candidate.runtime
        fits = [probe for probe in self.probes.values() if probe.error and self.bound.share(probe.error) <= 1]
        return min(fits, key=lambda probe: probe.rest).runtime if fits else None

    def _dense_like(self, runtime: Runtime | None) -> None:
        """The dense model in that precision and compilation, for the attribution; once."""
        candidate = Candidate(None, runtime or Runtime())
        if runtime is None or any(model.candidate == candidate for model in self.models):
            return
        try:
            self._try_whole(candidate, None)
        except (NoTime, SparsifinerError) as error:
            self.notes.append(f"Not measured: {candidate}: {error}.")

    def _try_whole(self, candidate: Candidate, trial: Trial | None) -> None:
        self.notify(f"compiling {candidate}", 0, 1)
        kind = "compile dense" if candidate.config is None else "compile sparse"
        if candidate.config is not None:
            self.clock.note(kind, 1.4 * self.clock.estimate("compile dense", 0.0) if not self._sparse_seen else 0.0)
        model = converted(self.dense, candidate)
        ready = compiled(
            model, candidate, self.judging.batch(0, self.batch), self.clock, kind,
            until=self._end - self._judging, meanwhile=self._trial_beside,
        )  # fmt: skip
        found = measured(
            ready, candidate, self.dense, self.tuning, self.judging, self.batch, self.bound,
            limit=SHARE_TIMING * self.clock.max_seconds,
        )  # fmt: skip
        self.models.append(found)
        self.notify(f"compiling {candidate}", 1, 1)
        assert found.fidelity is not None
        mean, worst = found.fidelity.mean("patch_cosine"), found.fidelity.worst("patch_cosine")
        verdict = "" if found.within else ", out of the bound"
        self.say(f"{candidate}: {found.speedup:.2f}x, cosine {mean:.4f} (worst {worst:.4f}){verdict}")
        if trial is not None and self.search is not None and found.error is not None and trial.error is not None:
            self._learn(trial, found)
        self._let_go()

    @property
    def _sparse_seen(self) -> bool:
        return any(model.candidate.config is not None for model in self.models)

    def _learn(self, trial: Trial, found: WholeModel) -> None:
        """Correct what was predicted by what was measured, on the images of the search alone."""
        assert self.search is not None
        assert trial.error is not None
        assert found.error is not None
        search, precision = self.search, trial.values["precision"]
        predicted = search.seconds(trial) / search.time_factor.get(precision, 1.0)
        search.time_factor[precision] = statistics.median(found.seconds) / predicted
        for other in self.probes:  # which have no factor of their own yet share the first one measured
            search.time_factor.setdefault(other, search.time_factor[precision])
        share = self.bound.share(trial.error)
        if share > 0:
            search.error_factor = min(3.0, max(0.3, self.bound.share(found.error) / share))

    def _next_whole(self) -> Trial | None:
        """The trial to compile: the fastest within the bound that promises more than what was measured."""
        assert self.search is not None
        search = self.search
        tried = [model.candidate for model in self.models] + [trial.candidate for trial in self._failed]
        limit = min(
            (self._prediction_of(model) for model in self.models if not model.within and model.candidate.config),
            default=1.0,
        )
        good = [model for model in self.models if model.within]
        least = min(statistics.median(m.seconds) / statistics.median(m.dense) for m in good)
        dense = statistics.median(self.models[0].seconds)
        promising = [
            trial
            for trial in self.trials.finished
            if trial.error is not None
            and trial.values.get("precision") in self.probes
            and trial.candidate not in tried
            and search.share(trial) <= min(1.0, 0.9 * limit)
            and search.seconds(trial) < 0.98 * least * dense
        ]
        return min(promising, key=search.seconds, default=None)

    def _prediction_of(self, model: WholeModel) -> float:
        """Share of the allowed error on the images of the search, of a whole model that those that judge refused."""
        return 1.0 if model.error is None else min(1.0, self.bound.share(model.error))

    def _more_trials(self) -> bool:
        """A few more cheap trials; False if there is no time to compile what they might find."""
        assert self.search is not None
        need = self.clock.estimate("compile sparse", 30.0) + self.clock.estimate("trial", 5.0)
        if self.clock.elapsed + need > self._end:
            return False
        self._late_trials += 1
        return self._late_trials <= MOST_LATE_TRIALS and self.search.step()

    def _trial_beside(self) -> bool:
        """A trial while another process compiles, of settings whose time is known."""
        if self.search is None or self.clock.elapsed + 2 * self.clock.estimate("trial", 5.0) > self._end:
            return False
        with use_threads(max(1, self.threads - 1)):
            return self.search.step(only_known=True)

    def _let_go(self) -> None:
        """Drop compiled sparse models that are not among the best, for the memory."""
        sparse = [model for model in self.models if model.model is not None and model.candidate.config is not None]
        sparse.sort(key=lambda model: (not model.within, -model.speedup))
        for model in sparse[KEPT:]:
            model.model = None

    # The result

    def _finish(self) -> Tuned:
        best = self._best()
        if not self.interrupted:
            if self._like(best) is None and best.candidate.config is not None:
                self._dense_like(best.candidate.runtime)
            self._compare(best)
            best = self._best()
        report = TuningReport(
            model=self.name,
            machine=this_machine(torch.device("cpu")),
            image_size=(self.judging.x.shape[2], self.judging.x.shape[3]),
            batch_size=self.batch,
            num_tokens=self.times.num_tokens,
            bound=self.bound,
            tuned_on=self.tuning.names[: len(self.tuning.features)],
            judged_on=self.judging.names[: len(self.judging.features)],
            skipped=self.skipped,
            models=self.models,
            best=self.models.index(best),
            trials=self.trials.finished,
            notes=self.notes + ([self.trials.lost] if self.trials.lost else []),
            verdict=self._verdict(best),
            seconds=self.clock.elapsed,
        )
        model = best.model if best.model is not None else self.dense
        return Tuned(model, best.candidate, self.trials.finished, report)

    def _best(self) -> WholeModel:
        given = self.models[0]
        usable = [model for model in self.models[1:] if model.within and model.model is not None and not model.rival]
        best = max(usable, key=lambda model: model.speedup, default=given)
        return best if best.speedup > FASTER else given

    def _like(self, best: WholeModel) -> WholeModel | None:
        """The dense model in the precision and compilation of ``best``."""
        wanted = Candidate(None, best.candidate.runtime)
        return next((model for model in self.models if model.candidate == wanted and model.fidelity), None)

    def _compare(self, best: WholeModel) -> None:
        """The last comparison: the given model, its like, OpenVINO's and the best ones, in turn in one process."""
        x = self.judging.batch(0, self.batch)
        dense = statistics.median(self.models[0].seconds)
        if self.clock.remaining > 0.5 * SHARE_END * self.clock.max_seconds + 20 + 20 * dense:
            self._openvino(x)
        running = [model for model in self.models if model.model is not None]
        work: dict[str, Any] = {"dense": self.dense}
        work |= {str(number): model.model for number, model in enumerate(running)}
        self.notify("comparing", 0, 1)
        each = sum(statistics.median(model.seconds) for model in running) + dense
        limit = self.clock.remaining - 2.0 - each
        if limit < 2 * each:
            self.notes.append("No time was left to compare the best models once more; figures are of their first runs.")
            return
        times = seconds_of(work, x, rounds=9, limit=min(limit, 60.0))
        for number, model in enumerate(running):
            model.seconds, model.dense = times[str(number)], times["dense"]
        self.models[0].seconds = self.models[0].dense = times["dense"]
        self.notify("comparing", 1, 1)

    def _openvino(self, x: torch.Tensor) -> None:
        self.notify("OpenVINO", 0, 1)
        try:
            model = openvino_model(self.dense, x)
        except SparsifinerError as error:
            self.notes.append(f"OpenVINO's dense model was not measured: {error}.")
            return
        finally:
            self.notify("OpenVINO", 1, 1)
        if model is None:
            return
        images = self.judging.compare(model, self.batch)
        times = seconds_of({"dense": self.dense, "rival": model}, x, rounds=2, limit=5.0)
        found = WholeModel(
            DENSE, model, times["rival"], times["dense"], Fidelity(images, {}), None,
            self.bound.share(Error.of(images)), label=f"dense, OpenVINO, {model.precision}", rival=True,
        )  # fmt: skip
        self.models.append(found)

    def _verdict(self, best: WholeModel) -> list[str]:
        size = f"{self.judging.x.shape[2]}x{self.judging.x.shape[3]} px, batch {self.batch}"
        sentences = verdict(f"At {size}, within {self.bound},", best, self._like(best), self.models)
        return sentences if best.candidate.config is not None else sentences + self._pays_from()

    def _pays_from(self) -> list[str]:
        if self.clock.remaining < 5 or self.interrupted:
            return []
        found = break_even(self.sparse, max_tokens=8192, max_seconds=min(20.0, self.clock.remaining - 3))
        return [] if found is None else [f"Without compilation, {found}."]
