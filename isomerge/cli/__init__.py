"""The command line: `isomerge merge`, `plan`, `capture`, `inspect`, `verify`, `methods`, `doctor`. The only package
that prints.

Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted. Errors are one line on stderr.
"""

from isomerge.cli.app import main, script

__all__ = ["main", "script"]
