"""Hugging Face's ways: the sub-command `optimum-cli export qwen3vl`, and an engine as a model that generates."""
