"""Retention over a home directory: between rounds, before each upkeep (``align3gr scheduler``)."""

from features.log import FeedbackLog
from features.online.forgetting import remove_online
from features.retention import Aged, age_out
from features.upkeep import held_upkeep
from trainer.lease import Lease
from trainer.live import live_datasets
from trainer.workplace import Workplace

from .settings import Settings


def age_out_home(settings: Settings, workplace: Workplace) -> Aged:
    """What is older than ``features.retention`` leaves log, datasets and online store.

    Raises RoundRunning, ClockBehind, FeaturesError; then nothing was deleted.
    """
    wanted = settings.features.retention
    if wanted.log_days is None and wanted.dataset_days is None:
        return Aged()
    home = settings.home
    with Lease(workplace.rounds.directory).held(), held_upkeep(home / "upkeep.lock"):
        log = FeedbackLog.open(home / "log", create=False)
        aged = age_out(
            log,
            home / "datasets",
            settings.features,
            live=live_datasets(workplace),
            now=workplace.clock(),
        )
        if aged.users:
            remove_online(home / "online", settings.features, aged.users, version=log.snapshot().version)
    return aged
