"""Packs in the formats of other libraries: a file per target, each with ``export(model, folder) -> notes``.

An exported model gives the logits that the pack gives, or it is not made: what another library has no class for is refused
in one line that says so.
"""
