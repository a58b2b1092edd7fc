"""Imports what commands spend their first seconds on, once for all forks; see ``tests.bad_input.place``."""

# ruff: noqa: F401

import prometheus_client
import transformers.models.llama.modeling_llama

import align3gr.__main__
import align3gr.settings
import features.catalogue
import features.duck
import features.histories
import features.log
import features.online.contexts
import policies.policy
import trainer.rounds
import trainer.sft.bootstrap
import trainer.tokenization
from features.online.repository import _feast

_feast()  # after prometheus_client, as in the server: it decides at import where metrics are kept
