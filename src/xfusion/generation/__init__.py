"""Sampling: lists of segments in, generated segments out; drawing, captioning, scoring, conversations.

`segments.generate` combines the others: media generation (`drawing`) and text generation (`words` after media, `text_only` by the
base itself, both optionally constrained to a `schema`).
"""

from xfusion.generation.base import (
    BATCH,
    Listener,
    MediaInput,
    Progress,
    Segment,
    TooLong,
    Viewer,
    draw_size,
    media_segment,
    refuse_to_draw,
    refuse_to_read,
)
from xfusion.generation.conversations import (
    DrawMode,
    Message,
    answer,
    answer_with_pictures,
    conversation,
    ends_at_line,
    openings,
    opens,
)
from xfusion.generation.drawing import draw, draw_tokens, inpaint, inpaint_batch
from xfusion.generation.pairs import embed, fill, fill_tokens, match, score
from xfusion.generation.schema import schema_answers
from xfusion.generation.segments import generate, kinds_of, log_likelihoods, prompt_length
from xfusion.generation.text_only import PLAIN, PLAIN_SAMPLING, rows_together, text_only_tokens
from xfusion.generation.words import TextStream, answer_tokens, caption, score_names

__all__ = [
    "BATCH",
    "PLAIN",
    "PLAIN_SAMPLING",
    "DrawMode",
    "Listener",
    "MediaInput",
    "Message",
    "Progress",
    "Segment",
    "TextStream",
    "TooLong",
    "Viewer",
    "answer",
    "answer_tokens",
    "answer_with_pictures",
    "caption",
    "conversation",
    "draw",
    "draw_size",
    "draw_tokens",
    "embed",
    "ends_at_line",
    "fill",
    "fill_tokens",
    "generate",
    "inpaint",
    "inpaint_batch",
    "kinds_of",
    "log_likelihoods",
    "match",
    "media_segment",
    "openings",
    "opens",
    "prompt_length",
    "refuse_to_draw",
    "refuse_to_read",
    "rows_together",
    "schema_answers",
    "score",
    "score_names",
    "text_only_tokens",
]
