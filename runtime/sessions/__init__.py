"""One file for each kind of engine; a manifest's `session` names the file that opens it."""
