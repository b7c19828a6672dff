"""Reports: one JSON document, rendered as Markdown, HTML and terminal tables."""
