"""Fakes, pairs and local chains: product code, used by our tests and by yours. Nothing is imported here."""
