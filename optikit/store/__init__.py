"""The content-addressed store: sealed artifacts, locks, and the sources that models and texts come from."""
