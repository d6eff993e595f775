"""Measurements. Nothing here runs in the tests."""
