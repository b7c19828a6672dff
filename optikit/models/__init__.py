"""What a model is, read from `config.json` and file headers: no weight is loaded and torch is not imported."""
