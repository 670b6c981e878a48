"""isomerge: merge fine-tuned models by the spectra of their updates.

`ops` is the linear algebra on stacks of matrices, `methods` the merge methods as pure functions on stacks of deltas.
Importing the package needs torch alone.
"""

from __future__ import annotations

__version__ = "0.1.0"

from isomerge import methods, ops
from isomerge.errors import InputError

__all__ = ["InputError", "__version__", "methods", "ops"]
