"""Packs in the formats of other libraries: a file or folder per target, each with ``export(model, folder) -> notes``.

An export computes exactly what the pack computes, or it is refused; for peft this covers only the tower or the prompts. If
another library has no class for a pack, a one-line error says so.
"""
