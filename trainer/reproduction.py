"""A past round again, from its manifest: the same dataset, stages and figures, or what differs.

Everything that a round depends on is pinned by its state: version of the log (which a manifest keeps through
compaction and vacuum), revision of the catalogue, parent, settings, seed, threads. So its steps run again in
a folder of their own, and nothing else changes: no dataset, no policy, no ledger entry. On CPU with the same
libraries the figures agree to the last bit; where they do not, ``causes`` names what is not as it was.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from features.errors import BadInput, FeaturesError
from features.forgotten_datasets import notes, successor
from features.manifest import DatasetMissing, read_manifest
from policies.ledger import PromotionLedger
from policies.registry import UnknownPolicy

from .errors import TrainerError
from .made_with import made_with
from .round_state import RoundsTable, RoundState, UnknownRound
from .round_steps import RoundSteps
from .rounds import round_lease, run_threads
from .workplace import Workplace

FOLDER = "reproduced"
"""Folder of the home directory in which rounds are done again; one that came out otherwise stays there."""

_MEASURED = ("latency", "seconds", "_ms")
"""Figures with this in their name are of the machine, not of the policy."""


class NothingToReproduce(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """No round of that name came to its figures."""


class ManifestGone(TrainerError, BadInput):  # noqa: N818
    """The version of the log that the manifest names cannot be read any more."""


@dataclass(frozen=True)
class Difference:
    """One fact that came out otherwise."""

    name: str
    was: Any
    now: Any


@dataclass(frozen=True)
class Reproduced:
    """What came of doing a round again."""

    round_id: str
    dataset_id: str
    """Of the dataset built now."""
    expected: str
    """What it had to be: the round's own, or what became of it when people were forgotten."""
    differences: list[Difference]
    causes: list[str]
    """What is known to be not as it was then, in sentences."""
    kept: Path | None
    """Where its files are; None when all is the same."""

    @property
    def same(self) -> bool:
        """Whether dataset, stages, figures and decision are the round's own."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "same": self.same, "kept": str(self.kept) if self.kept else None}


def reproduce(workplace: Workplace, named: str, *, device: str | None = None) -> Reproduced:
    """Do the round ``named`` (by its id, or that of its dataset) again and compare.

    ``device``: default the round's own where it was the CPU, else the CPU. Raises NothingToReproduce,
    ManifestGone, UnknownPolicy, PolicyRefused, RoundRunning.
    """
    with round_lease(workplace):
        then = round_of(workplace, named)
        elsewhere = _Elsewhere.of(workplace.with_settings(then.settings), then)
        snapshot_or_gone(workplace, then)
        shutil.rmtree(elsewhere.scratch, ignore_errors=True)
        again = replace(
            then, steps={}, status="running", outcome=None, message=None, device=device or "cpu", attempts=1
        )
        directory = elsewhere.rounds.path(then.round_id)
        directory.mkdir(parents=True)
        if then.catalogue_revision is None:
            _copy_lists(workplace.rounds.path(then.round_id), directory)
        run_threads(again)
        steps = RoundSteps(elsewhere, elsewhere.rounds.write(again))
        now = steps.run_again()
        causes = list(_causes(workplace, then, again.device))
        causes += _of_manifests(workplace, then, elsewhere.datasets / _dataset_of(now))
        expected = successor(workplace.datasets, _dataset_of(then)) or _dataset_of(then)
        differences = list(_differences(then, now, expected))
        differences += _weights(workplace, then, steps.candidate())
        differences += _decisions(workplace.rounds.path(then.round_id), directory)
        if not differences:
            shutil.rmtree(elsewhere.scratch)
        return Reproduced(
            round_id=then.round_id,
            dataset_id=_dataset_of(now),
            expected=expected,
            differences=differences,
            causes=causes,
            kept=elsewhere.scratch if differences else None,
        )


def round_of(workplace: Workplace, named: str) -> RoundState:
    """The round with that id, or the newest one whose dataset has it. Raises NothingToReproduce."""
    rounds = workplace.rounds
    try:
        state = rounds.read(named)
    except UnknownRound:
        own = [one for one in rounds.all() if "dataset" in one.steps and _dataset_of(one) == named]
        if not own:
            known = ", ".join(one.round_id for one in rounds.all()[-5:]) or "none yet"
            raise NothingToReproduce(
                f"there is no round {named}, and none learned from a dataset of that id; the last rounds "
                f"are: {known}"
            ) from None
        state = own[-1]
    if "gate" not in state.steps:
        raise NothingToReproduce(
            f"round {state.round_id} never came to its gate ({state.status}): nothing to compare with"
        )
    return state


def snapshot_or_gone(workplace: Workplace, state: RoundState) -> None:
    """Whether every file of the round's version of the log can be read. Raises ManifestGone."""
    cause = None
    try:
        snapshot = workplace.log().snapshot(state.log_version)
        lacking = [file for file in snapshot.files if "://" not in file and not Path(file).exists()]
        if lacking:
            cause = f"{len(lacking)} of its {len(snapshot.files)} files are gone, first {lacking[0]}"
    except FeaturesError as error:
        cause = str(error)
    if cause is not None:
        raise ManifestGone(
            f"round {state.round_id} learned from version {state.log_version} of the feedback log, which "
            f"cannot be read any more ({cause}): restore a backup of that time into another home and "
            "reproduce it there"
        )


@dataclass(frozen=True)
class _Elsewhere(Workplace):
    """The same home directory, but rounds and datasets are made in a folder of their own."""

    scratch: Path = Path()
    anchor: str | None = None

    @classmethod
    def of(cls, workplace: Workplace, then: RoundState) -> "_Elsewhere":
        anchor = then.steps["evaluate"].get("anchor_version")
        scratch = workplace.home / FOLDER / then.round_id
        return cls(**vars(workplace), scratch=scratch, anchor=anchor)

    @property
    def rounds(self) -> RoundsTable:
        return RoundsTable(self.scratch / "rounds")

    @property
    def datasets(self) -> Path:
        return self.scratch / "datasets"

    @property
    def ledger(self) -> PromotionLedger:
        return _LedgerThen(self.home / "ledger", self.anchor)


class _LedgerThen(PromotionLedger):
    """The ledger, with the anchor that the round was judged against."""

    def __init__(self, directory: Path, anchor: str | None) -> None:
        super().__init__(directory)
        self._anchor = anchor

    def anchor(self) -> str | None:
        return self._anchor


def _copy_lists(old: Path, new: Path) -> None:
    """Of a round that did not pin the catalogue: the items of that time, as long as its files are there."""
    if (old / "eligible.json").exists():
        shutil.copy2(old / "eligible.json", new / "eligible.json")
    if (old / "codec").is_dir():
        shutil.copytree(old / "codec", new / "codec")


def _dataset_of(state: RoundState) -> str:
    return str(state.steps["dataset"]["dataset_id"])


def _causes(workplace: Workplace, then: RoundState, device: str) -> Iterator[str]:
    """What is not as it was, as far as it is known."""
    if then.device != device:
        yield f"the round ran on {then.device}, this is {device}"
    now = made_with()
    for name, was in then.made_with.items():
        if now.get(name) != was:
            yield f"{name} was {was}, now it is {now.get(name, 'not there')}"
    if not then.made_with:
        yield "the round did not note its libraries: they may have changed"
    if (
        then.catalogue_revision is None
        and not (workplace.rounds.path(then.round_id) / "eligible.json").exists()
    ):
        yield "the round did not pin the catalogue, and its list of items is tidied away: today's is used"
    if any(one.was == _dataset_of(then) for one in notes(workplace.datasets)):
        yield "people of its dataset were forgotten since: they are in neither dataset nor figures"


def _of_manifests(workplace: Workplace, then: RoundState, built: Path) -> Iterator[str]:
    """What the manifest of then and that of now say of how the rows are made."""
    became = successor(workplace.datasets, _dataset_of(then)) or _dataset_of(then)
    try:
        was = read_manifest(workplace.datasets / became)
    except DatasetMissing:
        yield "its dataset's snapshot is gone: only its id can be compared"
        return
    now = read_manifest(built)
    if was.queries_hash != now.queries_hash:
        yield "the queries that build a dataset have changed"
    if was.rules_hash != now.rules_hash:
        yield "the rules of levels have changed"
    if was.log_version != now.log_version:  # another round built the same rows before it
        yield f"its dataset was first built at version {was.log_version} of the log"


def _differences(then: RoundState, now: RoundState, expected: str) -> Iterator[Difference]:
    if _dataset_of(now) != expected:
        yield Difference("dataset_id", expected, _dataset_of(now))
    skipped = {"dataset", "gate", "register", "ledger"}
    for step, facts in then.steps.items():
        if step not in skipped:
            yield from _unlike(step, facts, now.steps.get(step))
    yield from _unlike("samples", then.steps["dataset"]["samples"], now.steps["dataset"]["samples"])


def _unlike(name: str, was: Any, now: Any) -> Iterator[Difference]:
    if any(part in name for part in _MEASURED) or name.endswith(("policy", "why")):
        return
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _unlike(f"{name}.{key}", was.get(key), now.get(key))
    elif _plain(was) != _plain(now):
        yield Difference(name, was, now)


def _decisions(then: Path, now: Path) -> Iterator[Difference]:
    """The gate's checks, one by one; not those of the machine's speed, nor what follows from them."""
    try:
        was = _checks(then)
    except OSError:
        return  # the record is older than decisions: the figures were compared
    again = _checks(now)
    for name, check in was.items():
        yield from _unlike(f"gate.{name}", check, again.get(name))


def _checks(directory: Path) -> dict[str, Any]:
    decision = json.loads((directory / "decision.json").read_text(encoding="utf-8"))
    kept = ("statistic", "bound", "value", "passed")
    return {
        check["name"]: {key: check.get(key) for key in kept}
        for check in decision.get("checks", [])
        if not any(part in check["name"] for part in _MEASURED)
    }


def _plain(value: Any) -> str:
    """As a state file holds it: tuples are lists, floats to the last bit."""
    return json.dumps(value, sort_keys=True, default=str)


def _weights(workplace: Workplace, then: RoundState, candidate: Path) -> list[Difference]:
    """The weights' hashes against those of the policy that the round registered."""
    version = then.steps.get("register", {}).get("version")
    try:
        was = workplace.registry.show(version)["files"] if version else None
    except UnknownPolicy:
        was = None
    if was is None:
        return []
    now = json.loads((candidate / "policy.json").read_text(encoding="utf-8"))["files"]
    names = [name for name in was if name.endswith(".safetensors") and not name.startswith("codec/")]
    return [Difference(name, was[name], now.get(name)) for name in names if was[name] != now.get(name)]
