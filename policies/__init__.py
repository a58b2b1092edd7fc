"""Policies: what a deployed policy is, how it recommends and scores, and which one is the reference.

Public names are imported on first use, so that ``policies.settings`` and ``policies.ledger`` stay cheap:
torch comes with ``Policy``, not with this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codec import ScidCodec
    from .errors import PoliciesError, PolicyRefused
    from .lists import Recommendation, UserContext
    from .policy import Policy, write_policy
    from .trie import ScidTrie

__all__ = [
    "PoliciesError",
    "Policy",
    "PolicyRefused",
    "Recommendation",
    "ScidCodec",
    "ScidTrie",
    "UserContext",
    "write_policy",
]

_HOME = {
    "PoliciesError": "errors",
    "Policy": "policy",
    "PolicyRefused": "errors",
    "Recommendation": "lists",
    "ScidCodec": "codec",
    "ScidTrie": "trie",
    "UserContext": "lists",
    "write_policy": "policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
