"""Trials of a search in memory and in optuna's journal, from which an interrupted search goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.messages import one_line
from ..errors import SparsifinerError
from .bound import Bound, Error
from .space import KEEP_RATES, Candidate

if TYPE_CHECKING:
    import optuna

JOURNAL = "tuning.journal"
STUDY = "sparsifiner"


@dataclass(frozen=True)
class Trial:
    """A candidate whose time was predicted and whose error was measured on a few images, uncompiled.

    Args:
        values: its settings in the words of the search space, ``keep_rate`` among them.
        candidate: the model they describe.
        seconds: predicted time of a batch.
        error: on the tuning images, None where the trial was given up.
        pruned: why it was given up, or None.
    """

    values: dict[str, Any]
    candidate: Candidate
    seconds: float
    error: Error | None
    pruned: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, seconds."""
        return {
            "values": self.values,
            **self.candidate.to_dict(),
            "predicted_s": self.seconds,
            "cosine_distance": None if self.error is None else self.error.cosine,
            "relative_l2": None if self.error is None else self.error.l2,
            "pruned": self.pruned,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Trial:
        """The inverse of :meth:`to_dict`."""
        distance = saved["cosine_distance"]
        error = None if distance is None else Error(distance, saved["relative_l2"])
        return cls(saved["values"], Candidate.from_dict(saved), saved["predicted_s"], error, saved["pruned"])


def import_optuna() -> Any:
    """optuna, quiet.

    Raises:
        SparsifinerError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SparsifinerError("tune needs optuna; pip install 'sparsifiner[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Trials:
    """All trials of a search. optuna's sampler proposes; every finished trial goes to the journal at once.

    Args:
        bound: of the fidelity, the sampler's constraint.
        options: values of each choice, those of the space and ``layers`` and ``precision``.
        journal: file to keep the trials in; None keeps them in memory alone.
        fingerprint: of the model, the images and the machine; a journal of another is refused.
        resume: go on with the trials in the journal; otherwise they are dropped.
        seed: of the sampler.

    Raises:
        SparsifinerError: if the journal cannot be read, or belongs to another search.
    """

    def __init__(
        self,
        bound: Bound,
        options: Mapping[str, tuple[str, ...]],
        *,
        journal: Path | None,
        fingerprint: str,
        resume: bool,
        seed: int,
    ) -> None:
        self.optuna = import_optuna()
        self.bound = bound
        self.finished: list[Trial] = []
        self.lost: str | None = None
        """Why trials are no longer written to the journal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = self.optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=8, multivariate=True, constraints_func=self._constraint
            )
        self._study = self.optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._space = self._everything = self._distributions(options)
        self._kept: Any = None
        if journal is not None:
            self._open(journal, fingerprint, resume)

    def _distributions(self, options: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        kinds = self.optuna.distributions
        named = {name: kinds.CategoricalDistribution(values) for name, values in options.items()}
        return {**named, "keep_rate": kinds.FloatDistribution(*KEEP_RATES, log=True)}

    def narrow(self, options: Mapping[str, tuple[str, ...]]) -> None:
        """Propose nothing but ``options`` from now on; before the first trial is added here."""
        self._space = self._distributions(options)
        for trial in self.finished:
            self._study.add_trial(self._frozen(trial, self._space))

    def _constraint(self, trial: optuna.trial.FrozenTrial) -> tuple[float]:
        return (trial.user_attrs.get("share", 10.0) - 1.0,)

    def _open(self, journal: Path, fingerprint: str, resume: bool) -> None:
        backend = self.optuna.storages.journal.JournalFileBackend
        if not resume:
            journal.unlink(missing_ok=True)
            Path(f"{journal}.lock").unlink(missing_ok=True)
        try:
            storage = self.optuna.storages.JournalStorage(backend(str(journal)))
            self._kept = self.optuna.create_study(
                directions=["minimize", "minimize"], storage=storage, study_name=STUDY, load_if_exists=True
            )
            known = self._kept.user_attrs.get("fingerprint")
            found = self._kept.trials
        except OSError as error:
            self._lose(error)
            return
        except Exception as error:  # whatever optuna makes of a damaged file
            raise SparsifinerError(
                f"{journal} is no readable search ({one_line(error)[:120]}); leave --resume out to begin anew"
            ) from error
        if known not in (None, fingerprint):
            raise SparsifinerError(
                f"{journal} holds a search on another model, other images or another machine; leave --resume out to "
                f"begin anew, or name another folder"
            )
        if known is None:
            self._kept.set_user_attr("fingerprint", fingerprint)
        self.finished = [Trial.from_dict(json.loads(frozen.user_attrs["trial"])) for frozen in found]

    def propose(self) -> dict[str, Any]:
        """The settings that the sampler would try next."""
        trial = self._study.ask(self._space)
        self._study.tell(trial, state=self.optuna.trial.TrialState.FAIL)  # its result comes by add()
        return dict(trial.params)

    def add(self, trial: Trial) -> None:
        """Take in a finished trial, and write it to the journal."""
        self.finished.append(trial)
        self._study.add_trial(self._frozen(trial, self._space))
        if self._kept is None:
            return
        try:
            self._kept.add_trial(self._frozen(trial, self._everything))
        except OSError as error:
            self._lose(error)

    def _frozen(self, trial: Trial, space: Mapping[str, Any]) -> Any:
        """The trial as optuna has them; without settings where they are none of ``space``, as in an older journal."""
        known = trial.values.keys() == space.keys() and all(
            name == "keep_rate" or trial.values[name] in kind.choices for name, kind in space.items()
        )
        share = 10.0 if trial.error is None else self.bound.share(trial.error)
        state = self.optuna.trial.TrialState
        return self.optuna.trial.create_trial(
            params=dict(trial.values) if known else {},
            distributions=dict(space) if known else {},
            values=None if trial.error is None else [trial.seconds, share],
            state=state.PRUNED if trial.error is None else state.COMPLETE,
            user_attrs={"share": share, "trial": json.dumps(trial.to_dict())},
            system_attrs={"constraints": [share - 1.0]},
        )

    def _lose(self, error: OSError) -> None:
        self._kept = None
        self.lost = f"trials are no longer written down: {error.strerror or error}; those before are kept"
