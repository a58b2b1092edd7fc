"""Behaviour level: the base policy, trained on next-item prediction over SCIDs.

Public: ``train_sft`` (a codec and histories in, a policy directory out) and ``bootstrap`` (from the store to
a registered policy). Importing this imports torch.
"""

from .base_policy import SftReport, train_sft
from .bootstrap import Bootstrapped, bootstrap

__all__ = ["Bootstrapped", "SftReport", "bootstrap", "train_sft"]
