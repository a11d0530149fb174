"""Measure which settings of `runtime.tuning` are faster for an engine on this machine, and keep them."""
