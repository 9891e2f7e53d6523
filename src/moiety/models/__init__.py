"""The files that travel to the Hub: flat, self-contained, importable without the rest of moiety."""
