"""Everything but compiled extensions is declared in pyproject.toml.

`extensions()` is where an optional module such as `isomerge._C` is added; the package never depends on one.
"""

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    """The compiled modules that this machine can build: none so far, the package is pure Python."""
    return []


setup(ext_modules=extensions())
