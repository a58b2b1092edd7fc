"""Ingest: the way in. Producers, workers that land events exactly once, dead letters, brokers, importers.

Feedback comes in through here and rests in ``features``. Nothing here imports torch, feast or mlflow.
"""

import logging

# Where nobody has configured logging, Python prints warnings to standard error: there a person expects one
# line of ours, not the client's. With logging configured its records go where all others go.
logging.getLogger("kafka").addHandler(logging.NullHandler())
