"""Treadle: a research framework for language models, one YAML architecture, trained, measured and sampled from.

model = treadle.build("recipes/models/llama-1.5b.yaml")
folder = treadle.run("recipes/quickstart.yaml", ["training.steps=100"])
print(treadle.generate(*treadle.load(folder), "def "))
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build", "find_run", "generate", "load", "run", "stream"]

if TYPE_CHECKING:
    from treadle.api import build, find_run, generate, load, run, stream


def __getattr__(name: str) -> Any:
    """Import PyTorch only when something of the API is asked for: `treadle --help` starts at once."""
    if name in __all__:
        from treadle import api

        return getattr(api, name)
    raise AttributeError(f"module 'treadle' has no attribute '{name}'")
