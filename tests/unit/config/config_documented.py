"""Fields documented by the string below them."""

from treadle.config import Config


class Documented(Config):
    times: int = 1
    """How many times."""
