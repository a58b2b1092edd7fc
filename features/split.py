"""Which users a round trains on, stops its stages with, and is judged by.

A user's role is a hash of the id: the same in every round and in every process, and disjoint by construction.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

import pyarrow as pa

Role = Literal["gate", "stop", "train"]

BUCKETS = 1000


def bucket_of(user_id: str) -> int:
    """The user's bucket, 0 .. 999, by BLAKE2b."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "big") % BUCKETS


def role_of(user_id: str, gate_share: float, stop_share: float) -> Role:
    """``gate`` for the first ``gate_share`` of the buckets, ``stop`` for the next share, else ``train``."""
    gate, stop = _bounds(gate_share, stop_share)
    bucket = bucket_of(user_id)
    return "gate" if bucket < gate else "stop" if bucket < stop else "train"


def roles_table(user_ids: Iterable[str], gate_share: float, stop_share: float) -> pa.Table:
    """Columns ``user_id, role`` for joins in SQL, one row for each distinct user."""
    users = sorted(set(user_ids))
    roles = [role_of(user, gate_share, stop_share) for user in users]
    return pa.table({"user_id": pa.array(users, pa.string()), "role": pa.array(roles, pa.string())})


def _bounds(gate_share: float, stop_share: float) -> tuple[int, int]:
    if gate_share < 0 or stop_share < 0 or gate_share + stop_share >= 1:
        raise ValueError("gate_share and stop_share must be 0 or more and leave users to train on")
    gate = round(gate_share * BUCKETS)
    return gate, gate + round(stop_share * BUCKETS)
