"""A decoder behind OpenAI's API: requests in a queue, answers in pieces."""
