"""``align3gr`` with a v2 that misbehaves: ``python -m tests.server.misbehaving fails|sleeps serve ...``.

What is wrong with v2 is put in here, not into its files: a policy counts as loaded when it has made a list.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from align3gr.__main__ import main
from policies.policy import Policy

SLEEPS_S = 1.0


def misbehave(how: str) -> None:
    """From now on every v2 fails, or sleeps before it answers, once it has made its first list."""
    for name in ("recommend", "sample"):
        setattr(Policy, name, _broken(getattr(Policy, name), how))


def _broken(answer: Callable[..., Any], how: str) -> Callable[..., Any]:
    def broken(self: Policy, users: Any, *rest: Any, **more: Any) -> Any:
        if self.version == "v2" and users[0].user_id != "warm-up":
            if how == "fails":
                raise RuntimeError("weights of nan")
            time.sleep(SLEEPS_S)
        return answer(self, users, *rest, **more)

    return broken


if __name__ == "__main__":
    misbehave(sys.argv.pop(1))
    sys.exit(main())
