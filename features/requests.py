"""Signed request ids: feedback that names a slate we really served, to the user we served it to.

``signed = request_id + "." + mac``, mac = keyed BLAKE2b-128 over the lengths and bytes of request and user.
Feedback whose signature does not fit is stored, and by default not learned from.
"""

import hmac
from hashlib import blake2b

_MAC_BYTES = 16


def sign_request(key: bytes, request_id: str, user_id: str) -> str:
    """``request_id`` with the signature that binds it to ``user_id``; ``key`` must not be empty."""
    return f"{request_id}.{_mac(key, request_id, user_id)}"


def verify_request(key: bytes, request_id: str, user_id: str) -> bool:
    """Whether ``request_id`` (as ``sign_request`` returned it) was signed for ``user_id`` with ``key``."""
    plain, dot, mac = request_id.rpartition(".")
    return bool(dot) and hmac.compare_digest(mac.encode(), _mac(key, plain, user_id).encode())


def _mac(key: bytes, request_id: str, user_id: str) -> str:
    if not key:
        raise ValueError("the signing key is empty")
    if len(key) > 64:  # BLAKE2b's own limit for a key
        key = blake2b(key).digest()
    request = request_id.encode()
    message = len(request).to_bytes(4, "big") + request + user_id.encode()
    return blake2b(message, key=key, digest_size=_MAC_BYTES).hexdigest()
