"""`python -m isomerge.cli`."""

from isomerge.cli.app import main

main()
