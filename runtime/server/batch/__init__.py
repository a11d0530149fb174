"""Batches: a file of requests in OpenAI's format is answered into a file of results."""
