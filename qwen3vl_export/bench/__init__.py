"""What `qwen3vl bench` measures of engines: points of a sweep, repetitions in turns, and comparisons of them."""
