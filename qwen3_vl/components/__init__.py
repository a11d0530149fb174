"""Parts of the model and of its runtime: attention, routing, memory, hardware."""
