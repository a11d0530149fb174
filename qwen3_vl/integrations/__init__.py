"""What fits engines into other libraries, a module for each."""
