"""Where feedback rests: the interaction and its level, the feedback log, the catalogue, datasets.

Public here: the event and how it is read and written, its level, and the log. Queries live in ``duck``,
``histories`` and ``datasets``; the catalogue in ``catalogue``.
"""

from .interactions import (
    SCHEMA_VERSION,
    Interaction,
    InvalidInteraction,
    Kind,
    decode_interaction,
    encode_interaction,
    json_schema,
)
from .levels import Level, LevelRules, level_of

__all__ = [
    "SCHEMA_VERSION",
    "Interaction",
    "InvalidInteraction",
    "Kind",
    "Level",
    "LevelRules",
    "decode_interaction",
    "encode_interaction",
    "json_schema",
    "level_of",
]
