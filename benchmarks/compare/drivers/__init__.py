"""One file for each kind of side; each is imported in the environment of that side only."""
