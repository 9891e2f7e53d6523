"""The engine's promises, each tried out on small real runs: `moiety selfcheck`, and the campaigns of the tests."""
