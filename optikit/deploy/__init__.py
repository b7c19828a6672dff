"""What each server wants beside the weights."""
