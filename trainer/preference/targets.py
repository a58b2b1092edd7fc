"""What self-play plays on: targets from training histories, each with the items that stand in front of it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policies.policy import Policy
from trainer.settings import SelfPlaySettings


@dataclass(frozen=True)
class Targets:
    """What is played: N training targets with what stands in front of them."""

    users: list[str]
    places: list[int]
    """Of the target in the user's history."""
    histories: list[tuple[str, ...]]
    """Items in front of it that the codec knows, the last 20, oldest first."""
    chosen: list[str]
    seen: list[frozenset[str]]
    """All training items of the user, the target and later ones too: none of them is rejected."""
    refused: dict[str, int]
    """Targets that were left out, by reason."""

    def __len__(self) -> int:
        return len(self.users)

    def part(self, start: int, count: int) -> "Targets":
        """Those from ``start`` on, ``count`` of them where there are so many."""
        until = slice(start, start + count)
        return Targets(
            self.users[until],
            self.places[until],
            self.histories[until],
            self.chosen[until],
            self.seen[until],
            {},
        )

    def digest(self) -> str:
        """Hash of all that candidates depend on here."""
        seen = [sorted(items) for items in self.seen]
        content = [self.users, self.places, self.histories, self.chosen, seen]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def targets_of(
    policy: Policy, histories: Mapping[str, Sequence[str]], settings: SelfPlaySettings, *, leave_out: int
) -> Targets:
    """The last ``settings.targets`` items of each training history that have something in front of them."""
    refused: Counter[str] = Counter()
    rows: list[tuple[str, int, tuple[str, ...], str, frozenset[str]]] = []
    for user, whole in histories.items():
        history = whole[: max(len(whole) - leave_out, 0)]
        if len(history) < 2:
            refused["fewer than two training items"] += 1
            continue
        seen = frozenset(history)
        for place in range(max(1, len(history) - settings.targets), len(history)):
            chosen, before = history[place], history[:place]
            if chosen not in policy.codec.items:
                refused["the target has no SCID in this codec"] += 1
            elif chosen in before:
                refused["the target was met before, and lists leave out what was met"] += 1
            elif not (known := policy.tokens.known(before)):
                refused["no item in front of the target has an SCID"] += 1
            else:
                rows.append((user, place, tuple(known), chosen, seen))
    return Targets(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
        [row[4] for row in rows],
        dict(refused),
    )
