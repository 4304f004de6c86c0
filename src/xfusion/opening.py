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
from xfusion.data.sequence import TooLong, XFusionError

TURNS = 3
"""Number of last user turns that are read."""
UNCLEAR = 0.05
"""Distance of a probability from a half below which a batch's rounding could change the decision."""


class Opening(nn.Module):
    """Decides whether an answer starts with a picture, and of what."""

    def __init__(self, width: int):
        """``width`` is the base's ``D``."""
        super().__init__()
        self.opens = nn.Linear(width, 1)
        self.subject = nn.Linear(width, 1)

    @torch.no_grad()
    def probability(self, backbone: Backbone, messages: Seq[dict[str, str]]) -> float:
        """Probability that the last turn of a text conversation asks for a picture; `TooLong` if the base cannot read it."""
        return float(self.opens(answer_state(backbone, messages)).sigmoid())

    @torch.no_grad()
    def probabilities(self, backbone: Backbone, conversations: Seq[Seq[dict[str, str]]]) -> list[float]:
        """`probability` of several conversations in one pass.

        A batch's rounding differs from a single pass's. A probability within `UNCLEAR` of a half is therefore computed again
        alone, so that the decisions are those of `probability`.
        """
        if len(conversations) < 2:
            return [self.probability(backbone, messages) for messages in conversations]
        batched = self.opens(answer_states(backbone, conversations)).sigmoid()[:, 0].tolist()
        return [
            self.probability(backbone, messages) if abs(value - 0.5) < UNCLEAR else value
            for value, messages in zip(batched, conversations, strict=True)
        ]

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


def _refuse_unlearned_positions(backbone: Backbone, count: int) -> None:
    """Refuse more tokens than the base has learned positions for.

    Raises:
        TooLong: there are more.
    """
    if backbone.longest is not None and count > backbone.longest:
        raise TooLong(
            f"whether and what to draw is read from {count} tokens, more than the {backbone.longest} that the base has learned:"
            " shorten the conversation, or say draw='never' or 'always'"
        )


@torch.no_grad()
def answer_state(backbone: Backbone, messages: Seq[dict[str, str]]) -> Tensor:
    """The base's last hidden state ``[D]``, float32, at the start of the answer to a conversation."""
    return answer_states(backbone, [messages])[0]


@torch.no_grad()
def answer_states(backbone: Backbone, conversations: Seq[Seq[dict[str, str]]]) -> Tensor:
    """`answer_state` of several conversations in one pass, ``[N, D]``."""
    prompts = [backbone.chat(recent(messages)) for messages in conversations]
    longest = max(map(len, prompts))
    _refuse_unlearned_positions(backbone, longest)
    # Padded on the right, where no token of a causal model sees it: no mask is needed.
    rows = [(*prompt, *[prompt[-1]] * (longest - len(prompt))) for prompt in prompts]
    states = backbone.decoder(input_ids=torch.tensor(rows, device=backbone.device), use_cache=False).last_hidden_state
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=states.device)
    return states[torch.arange(len(prompts), device=states.device), last].float()


@torch.no_grad()
def word_states(backbone: Backbone, words: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Hidden states ``[n, D]``, float32, of the tokens of a text, and the character span of each.

    The text is given twice, and the states of the second copy are used: in the first copy a token sees only what comes
    before it, and "a cat, please draw it" begins with the cat (Springer et al., arXiv 2402.15449).
    """
    ids, spans = backbone.encode_spans(words)
    if not ids:
        return torch.zeros(0, backbone.hidden_size, device=backbone.device), []
    twice = (*backbone.begin_ids, *ids, *backbone.encode("\n"), *ids)
    _refuse_unlearned_positions(backbone, len(twice))
    input_ids = torch.tensor([twice], device=backbone.device)
    states = backbone.decoder(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    return states[-len(ids) :].float(), spans
