"""The two command lines: `qwen3vl-export` builds engines, `qwen3vl` runs them. Importing them loads typer alone."""
