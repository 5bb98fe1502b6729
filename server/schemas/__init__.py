"""The wire formats. Every field is honoured, or refused with 400 and its name."""
