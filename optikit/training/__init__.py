"""Everything that learns by gradient steps: fine-tuning, Medusa heads, draft models, and the text they learn from."""
