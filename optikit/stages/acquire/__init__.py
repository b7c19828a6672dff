"""Internal steps that turn a source into a model directory."""
