"""Inspection of statistics files: spectra of the moments, and the energy of feature shifts that few directions keep.

`inspect` gives the numbers and `save_picture` a PNG of them.
"""

from isomerge.inspect.files import File, Inspection, inspect
from isomerge.inspect.picture import check_picture, save_picture

__all__ = ["File", "Inspection", "check_picture", "inspect", "save_picture"]
