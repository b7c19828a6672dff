"""Managed virtual environments for libraries that can't share one with optikit."""
