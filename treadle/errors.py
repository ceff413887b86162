"""The errors a user can act on.

Each message is one statement: which key, path or request, what value it had, what was expected, and the fix. The
command line prints them without a traceback; everything else that escapes is a bug of ours and keeps its traceback.
"""


class TreadleError(Exception):
    """Base of every error that the user's input, not our code, has caused.

    everywhere: all processes of a run raise it, so that the leading one's message is enough.
    """

    everywhere = False


class ConfigError(TreadleError):
    """A configuration value is unknown, impossible or contradicts another."""


class DataError(TreadleError):
    """A corpus, tokenizer or token shard is missing, damaged, foreign or empty."""


class CheckpointError(TreadleError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class RunError(TreadleError):
    """A run folder is in use, unreadable or missing."""


class TrainingError(TreadleError):
    """Training cannot go on: a non-finite loss or gradient."""
