"""isomerge: merge fine-tuned models by the spectra of their updates.

`merge` runs a recipe on checkpoints on disk, `merge_state_dicts` the same engine on models in memory; `capture` makes
the statistics that some methods need; `methods` are the merge methods as pure functions on stacks of deltas, `ops` the
linear algebra under them.
Importing the package needs torch alone.
"""

from __future__ import annotations

__version__ = "0.1.0"

from isomerge import methods, ops
from isomerge.capture import capture
from isomerge.errors import InputError
from isomerge.merge import merge, merge_state_dicts

__all__ = ["InputError", "__version__", "capture", "merge", "merge_state_dicts", "methods", "ops"]
