"""The registered policies that a command works on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from features.errors import BadInput
from policies.ledger import PromotionLedger
from policies.registry import Registry

if TYPE_CHECKING:
    from align3gr.settings import Settings


def directories_of(settings: "Settings", versions: Sequence[str]) -> list[Path]:
    """Directories of the policies named, each once; of the reference where none is.

    Raises BadInput without one, UnknownPolicy.
    """
    registry = Registry(settings.home, settings.policies.registry)
    if versions:
        return [registry.path(version) for version in dict.fromkeys(versions)]
    reference = PromotionLedger(settings.home / "ledger").reference()
    if reference is None:
        raise BadInput("no policy is the reference yet; make one with `align3gr tokenize` and `align3gr sft`")
    return [registry.path(reference)]
