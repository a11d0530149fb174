"""Graph passes: one file each, `<Verb><Noun>Pass`."""
