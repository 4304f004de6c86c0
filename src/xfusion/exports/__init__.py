"""Packs in the formats of other libraries: a file or folder per target, each with ``export(model, folder) -> notes``.

What is exported computes as it does in the pack, or it is not made; for peft that is the tower or the prompts alone. What
another library has no class for is refused in one line that says so.
"""
