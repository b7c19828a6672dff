"""The command line: one verb per file, every import that costs time inside the verb's body."""
