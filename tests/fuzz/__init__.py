"""Fuzzing of everything that reads what others wrote: safetensors files, indices of shards, torch files, recipes.

    python -m tests.fuzz --what safetensors --inputs 100000 --seed 0      # from the repository's root

An input either becomes an object whose invariants hold, or an InputError of one line: never another exception, never
more than a second or 100 MB. Equal seeds make equal inputs; a finding prints the command that makes its input again.
What it found is kept as inputs of their own in tests/test_fuzz.py.
"""
