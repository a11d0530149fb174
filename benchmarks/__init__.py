"""Measurements of export and inference, and the synthetic checkpoints that they run on."""
