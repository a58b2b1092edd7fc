"""Tasks of SFT with text, beside next-item prediction: what each asks, how samples are drawn, how they mix.

Public: ``CatalogueText`` (what the catalogue says), ``TASKS`` (every task by name), ``open_tasks`` and
``Mixture``. A task is a small class with its wordings; ``trainer.settings.TaskSettings`` holds the weights.
"""

from .mixture import TASKS, Mixture, TaskStep, open_tasks
from .words import NO_TEXT, CatalogueText

__all__ = ["NO_TEXT", "TASKS", "CatalogueText", "Mixture", "TaskStep", "open_tasks"]
