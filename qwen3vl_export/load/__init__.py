"""Many requests at once, as clients would send them, and what became of them."""
