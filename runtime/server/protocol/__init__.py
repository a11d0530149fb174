"""Bodies of requests, and what they ask of an engine."""
