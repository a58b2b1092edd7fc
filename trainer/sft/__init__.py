"""Behaviour level: the base policy, trained on next-item prediction over SCIDs."""
