"""`python -m isomerge.cli`."""

from isomerge.cli.app import script

script()
