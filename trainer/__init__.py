"""Learning: tokenization, SFT, preference stages, the rounds they make, and when rounds run.

Public: ``trainer.rounds`` (start_round, resume_round), ``trainer.preference.stage`` (run_stage),
``trainer.evaluation``, ``trainer.schedule``. Nothing is imported here: settings must load without torch.
"""
