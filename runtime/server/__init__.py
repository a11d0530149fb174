"""`qwen3vl serve`: an HTTP server that speaks OpenAI's API. Needs the extra `serve`."""
