"""Who meets a canary: users are put by a hash of version and id.

So every server and every look agrees, a larger share keeps the users of a smaller one, and each canary meets
other users first. Independent of ``features.split``: the gate's users do not always go first.
"""

from hashlib import blake2b

from .ledger import Canary

_PLACES = 1 << 32


def place_of(user_id: str, version: str) -> float:
    """Where ``user_id`` stands in the queue to meet ``version``: uniform in 0 .. 1, by BLAKE2b."""
    named = f"canary/{len(version)}/{version}/{user_id}"
    return int.from_bytes(blake2b(named.encode(), digest_size=4).digest(), "big") / _PLACES


def takes_part(user_id: str, canary: Canary) -> bool:
    """Whether ``user_id`` is served by the canary."""
    return place_of(user_id, canary.version) < canary.share
