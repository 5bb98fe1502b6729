"""One folder per cache codec; verbs store and attend."""
