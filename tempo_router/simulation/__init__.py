"""The production scheduling code in virtual time, against engines whose step times come from a profile."""
