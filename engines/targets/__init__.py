"""One file a target family; `TARGETS` in it lists one `Target` for each precision."""
