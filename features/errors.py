"""The product's exception families.

Every error a person can act on derives from ``ProductError``; each package adds a family of its own. The
message is one line: the cause, then the way out. The command line turns it into an exit code.
"""


class ProductError(Exception):
    """A failure whose message names the cause and the way out; the command exits with ``exit_code``."""

    exit_code = 1


class BadInput(ProductError):  # noqa: N818 - reads as what it is at the raise site
    """What the caller gave cannot be used: settings, files, names. The command exits with 2."""

    exit_code = 2


class FeaturesError(ProductError):
    """Something the store, the catalogue or a dataset build cannot do."""
