"""What `tempo-router` ends with when it does not end well."""

EXIT_USAGE = 2
"""What was asked for cannot be done; stderr says why."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, as a shell would say it."""
