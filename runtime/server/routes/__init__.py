"""The server's routes, a file for each group."""
