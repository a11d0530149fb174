"""Calls of functions in an answer: the formats that checkpoints write them in, and how they are read."""
