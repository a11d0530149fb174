"""Fuzzing: inputs of every kind that strangers send, mutated, each run in a child process with limits.

A family makes recipes, plain JSON values that say what an input is, so a finding is a file that can be run again:

    make fuzz                            # the long run; make fuzz INPUTS=20000 FAMILIES="images templates"
    make fuzz-replay CASE=build/fuzz/…   # one finding

`tests/fuzz/test_fuzz.py` is the short run.
"""
