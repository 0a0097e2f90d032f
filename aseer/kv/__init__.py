"""Where the KV of a request is, and how it gets from one engine to another."""
