"""What a message may hold beside text: one file a kind, found by its name (`registry`)."""
