"""Answers that follow a JSON schema, a regex, a list of choices or a grammar (`response_format`)."""
