"""The only place that starts, watches or ends a process, and that says how one died."""
