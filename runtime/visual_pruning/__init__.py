"""Fewer visual tokens before the decoder: how many of a segment stay in the prompt, and which."""
