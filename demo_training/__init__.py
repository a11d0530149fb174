"""Train and measure the demo, the checkpoints that `qwen3vl_export.demo` ships; no part of the package."""
