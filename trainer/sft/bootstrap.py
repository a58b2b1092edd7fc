"""From the store to a policy in service: train the base policy, register it, promote the very first."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from policies.ledger import PromotionLedger
from policies.registry import Registry
from trainer.errors import CannotTrain
from trainer.ranks import Ranks
from trainer.settings import SftSettings
from trainer.tokenization.text import item_texts
from trainer.training_input import TrainingInput

from .base_policy import SftReport, train_sft
from .tasks import CatalogueText
from .teacher import Progress as Preparing
from .training import ALONE, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bootstrapped:
    """The base policy as registered."""

    version: str
    promoted: bool
    """Whether it became the reference; only where there was none."""
    report: SftReport


def bootstrap(
    home: Path,
    given: TrainingInput,
    settings: SftSettings,
    registry: Registry,
    ledger: PromotionLedger,
    *,
    who: str,
    clock: Callable[[], datetime],
    codec: Path | None = None,
    device: str = "cpu",
    leave_out: int = 0,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
    preparing: Preparing | None = None,
) -> Bootstrapped | None:
    """Train on ``given`` with the codec ``home/codec`` (or ``codec``), register, promote if nothing is yet.

    Killed and called again with the same input, it continues from its last checkpoint (``home/sft``). With a
    reference in force the new policy is only registered: whether it replaces the other, a person decides.
    ``leave_out``: the last items of every history that it is not trained on, to be measured on them.
    ``ranks``: processes that train it together; only the leading one registers and returns something.

    Raises CannotTrain without a codec, and what ``train_sft`` raises.
    """
    codec = codec_of(home, codec)
    staging = registry.staging()
    report = train_sft(
        codec,
        [history[: max(len(history) - leave_out, 0)] for history in given.histories],
        settings,
        staging,
        texts=item_texts(given.items),
        catalogue=CatalogueText.of(given.items),
        popularity=None if leave_out else given.popularity,
        lineage={
            "parent": None,
            "created_at": clock().isoformat(),
            "log_version": given.log_version,
            "leave_out": leave_out,
            "watermark": None if given.watermark is None else given.watermark.isoformat(),
        },
        device=device,
        checkpoint=home / "sft",
        ranks=ranks,
        progress=progress,
        preparing=preparing,
    )
    if not ranks.leads:
        return None
    version = registry.register(staging)
    promoted = ledger.reference() is None
    if promoted:
        ledger.promote(version, expects=None, who=who, why="the first base policy")
    log.info("base policy registered version=%s promoted=%s", version, promoted)
    registry.mirror(ledger)
    return Bootstrapped(version, promoted, report)


def codec_of(home: Path, named: Path | None = None) -> Path:
    """The codec directory ``named``, or that of ``home``. Raises CannotTrain when it is not there."""
    codec = home / "codec" if named is None else named
    if not codec.is_dir():
        raise CannotTrain(f"there is no codec at {codec}; fit one with `align3gr tokenize`")
    return codec
