"""All tests; a package, so that helpers import as `tests.builders`."""
