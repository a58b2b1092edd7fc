"""Which policies are live, and so which datasets and versions of the log must stay."""

from .workplace import Workplace


def live_policies(workplace: Workplace) -> list[str]:
    """The reference, the one a rollback goes back to, the anchor and the canary; those registered here."""
    ledger = workplace.ledger
    canary = ledger.canary()
    on_trial = canary.version if canary is not None else None
    named = (ledger.reference(), ledger.previous(), ledger.anchor(), on_trial)
    known = set(workplace.registry.versions())
    return [version for version in dict.fromkeys(named) if version is not None and version in known]


def live_datasets(workplace: Workplace) -> set[str]:
    """Ids, as they name them, of the datasets that live policies and unfinished rounds learned from."""
    live = set(live_policies(workplace))
    found = {
        policy.dataset_id
        for policy in workplace.registry.list()
        if policy.version in live and policy.dataset_id is not None
    }
    for state in workplace.rounds.all():
        if state.status == "running" and "dataset" in state.steps:
            found.add(str(state.steps["dataset"]["dataset_id"]))
    return found
