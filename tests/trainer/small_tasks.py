"""Tasks over the small world's catalogue, for the tests of tasks and of their mixture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from policies.codec import ScidCodec
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, rows_of
from trainer.settings import SftSettings, TaskSettings
from trainer.sft.tasks import TASKS, CatalogueText, Mixture, open_tasks
from trainer.sft.tasks.task import Task
from trainer.sft.user_scids import UserScids

CATALOGUE = CatalogueText.of(small_world.items())
EVERY = dict.fromkeys(TASKS, 1.0) | {"share": 0.125}


def opened(
    codec: ScidCodec,
    tokenizer: Any,
    model: Any,
    histories: Sequence[np.ndarray[Any, Any]],
    *,
    names: Sequence[str] = tuple(TASKS),
    catalogue: CatalogueText = CATALOGUE,
    **lengths: int,
) -> dict[str, Task]:
    users = UserScids.of(codec, histories)
    settings = QUICK.model_copy(update={"tasks": TaskSettings(**lengths)})  # type: ignore[arg-type]
    return open_tasks(names, settings, codec, tokenizer, model, histories, users, catalogue)


def mixture_of(codec: ScidCodec, tokenizer: Any, model: Any, settings: SftSettings) -> Mixture:
    histories = rows_of(codec, [5, 8, 3, 12, 30, 7] * 3)
    users = UserScids.of(codec, histories)
    found = Mixture.of(settings, codec, tokenizer, model, histories, users, CATALOGUE)
    assert found is not None
    return found
