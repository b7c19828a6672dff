"""AWQ by other libraries."""
