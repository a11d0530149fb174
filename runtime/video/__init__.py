"""Videos: choose frames, decode, resize and cut them into segments."""
