"""Ingest: the way in. Producers, workers that land events exactly once, dead letters, brokers, importers.

Feedback comes in through here and rests in ``features``. Nothing here imports torch, feast or mlflow.
"""
