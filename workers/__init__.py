"""One process per GPU group: an engine and the streams that feed it."""
