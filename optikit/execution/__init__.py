"""From plan to artifacts: the loop over steps, the process of each, and what that process runs."""
