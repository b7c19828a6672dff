"""What each technique does to a block of the walk."""
