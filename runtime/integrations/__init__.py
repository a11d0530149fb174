"""What lets servers and clusters of others run engines, a module or package for each."""
