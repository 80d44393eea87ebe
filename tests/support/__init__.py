"""Shared by the tests: small models, runs, directories and golden values."""
