"""The compiled modules of the package, for the backends that are their doors."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from isomerge.backends import BackendUnavailable


def load(name: str, variable: str) -> ModuleType:
    """The module `name`, which the environment variable `variable` demands when the package is built.

    Raises BackendUnavailable with the reason why it cannot be imported.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BackendUnavailable(
            f"the extension {name} is not built; install isomerge with {variable}=1, which says what it lacks"
        ) from None
    except ImportError as error:
        raise BackendUnavailable(f"the extension {name} does not load: {error}") from error
