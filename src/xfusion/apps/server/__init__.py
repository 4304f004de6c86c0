"""The server: packs behind routes that OpenAI's clients know."""
