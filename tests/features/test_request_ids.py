"""Signed request ids bind a slate to the user it was served to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.requests import sign_request, verify_request

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@given(st.binary(min_size=1, max_size=100), words, words)
def test_a_signed_request_verifies_for_its_user_and_key_only(key: bytes, request: str, user: str) -> None:
    signed = sign_request(key, request, user)
    assert verify_request(key, signed, user)
    assert not verify_request(key, signed, user + "x")
    assert not verify_request(key + b"x", signed, user)
    assert not verify_request(key, "x" + signed, user)


@given(words, words)
def test_what_was_never_signed_does_not_verify(request: str, user: str) -> None:
    assert not verify_request(b"key", request, user)


def test_a_character_cannot_wander_from_request_to_user() -> None:
    mac = sign_request(b"key", "ab", "c").rpartition(".")[2]
    assert not verify_request(b"key", f"a.{mac}", "bc")


def test_an_empty_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        sign_request(b"", "r", "u")
