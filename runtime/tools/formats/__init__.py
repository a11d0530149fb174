"""Formats of calls, one file each; `runtime.tools.registry` finds them by the names of the files."""
