"""Families of published models: Hugging Face checkpoints in and out. One file declares one family.

Every module of this package is imported, so that a new family needs no line anywhere else.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
