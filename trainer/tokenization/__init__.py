"""Token level: item text and behaviour become SCIDs (fitting; inference lives in ``policies``).

Public: ``fit_codec`` -> a codec directory and a ``TokenizationReport``.
"""

from .fitting import codes_for, fit_codec
from .report import TokenizationReport

__all__ = ["TokenizationReport", "codes_for", "fit_codec"]
