"""The server: packs behind an OpenAI-compatible API."""
