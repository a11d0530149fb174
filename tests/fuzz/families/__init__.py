"""Families of inputs, a module each."""
