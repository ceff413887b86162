"""The blocks that models are made of, and the model.

Every module of this package is imported, so that a new block needs no line anywhere else: its config class registers
itself. A researcher's own blocks outside the package are named in a recipe's `imports`.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
