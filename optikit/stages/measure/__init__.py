"""Internal steps that measure artifacts."""
