"""The opening head: decides from hidden states of the frozen base whether an answer starts with a picture.

It consists of two linear probes. One reads the base's last hidden state at the start of the answer and predicts whether the
answer is a picture. The other reads the hidden states of the user's text and predicts which tokens name what to draw. The
base's own logits are unchanged: without a picture, the base answers as it always does.

Shape legend: ``n`` tokens, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError

TURNS = 3
"""Number of last user turns that are read."""


class Opening(nn.Module):
    """Decides whether an answer starts with a picture, and of what."""

    def __init__(self, width: int):
        """``width`` is the base's ``D``."""
        super().__init__()
        self.opens = nn.Linear(width, 1)
        self.subject = nn.Linear(width, 1)

    @torch.no_grad()
    def probability(self, backbone: Backbone, messages: Seq[dict[str, str]]) -> float:
        """Probability that the last turn of a text conversation asks for a picture."""
        return float(self.opens(answer_state(backbone, messages)).sigmoid())

    @torch.no_grad()
    def what(self, backbone: Backbone, words: str) -> str:
        """The part of a text that says what to draw; empty if there is none.

        It is the contiguous span of tokens whose logits have the largest sum.
        """
        states, spans = word_states(backbone, words)
        best_total, (first, end) = 0.0, (0, 0)
        total, start = 0.0, 0
        for i, value in enumerate(self.subject(states)[:, 0].tolist()):
            if total <= 0:
                total, start = 0.0, i
            total += value
            if total > best_total:
                best_total, (first, end) = total, (start, i + 1)
        return words[spans[first][0] : spans[end - 1][1]].strip() if end else ""


def recent(messages: Seq[dict[str, str]]) -> list[dict[str, str]]:
    """The last user turns of a conversation and the answers between them, without system messages."""
    user_turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not user_turns or user_turns[-1] != len(messages) - 1:
        raise XFusionError("whether to draw is decided behind a turn of the user: the conversation ends otherwise")
    return [m for m in messages[user_turns[-TURNS:][0] :] if m["role"] in ("user", "assistant")]


@torch.no_grad()
def answer_state(backbone: Backbone, messages: Seq[dict[str, str]]) -> Tensor:
    """The base's last hidden state ``[D]``, float32, at the start of the answer to a conversation."""
    ids = torch.tensor([backbone.chat(recent(messages))], device=backbone.device)
    return backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()


@torch.no_grad()
def word_states(backbone: Backbone, words: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Hidden states ``[n, D]``, float32, of the tokens of a text, and the character span of each.

    The text is given twice, and the states of the second copy are used: in the first copy a token sees only what comes
    before it, and "a cat, please draw it" begins with the cat (Springer et al., arXiv 2402.15449).
    """
    ids, spans = backbone.encode_spans(words)
    if not ids:
        return torch.zeros(0, backbone.hidden_size, device=backbone.device), []
    input_ids = torch.tensor([(*backbone.begin_ids, *ids, *backbone.encode("\n"), *ids)], device=backbone.device)
    states = backbone.decoder(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    return states[-len(ids) :].float(), spans
