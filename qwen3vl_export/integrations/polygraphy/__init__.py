"""NVIDIA Polygraphy's ways: loaders, a runner and inputs for its comparator, and options of `polygraphy run`."""
