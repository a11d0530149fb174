"""The kernels themselves, in Triton; imported by processes that compile them and by tests that interpret them."""
