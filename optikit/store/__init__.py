"""Where results live: content-addressed artifacts, downloads, locks, and the sources of models and texts."""
