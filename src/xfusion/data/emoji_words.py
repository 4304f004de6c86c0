"""Wordings of emoji, from the short names of the Unicode locale data in the package ``emoji``.

``:red_apple:`` becomes "red apple". The package drops punctuation of the locale data ("woman: red hair",
"flag: Norway"), so a few families of names need a rule to become readable again.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

_PUNCTUATION = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "_": " "})

_UNWANTED_ALIAS = re.compile(
    r"u[0-9a-f]{4}|clock\d+|[^a-z]*|.*[a-z ]\d|.*\blower left\b.*|.*\bblack (left|right) pointing\b.*|.*\bheavy\b.*"
    r"|(black|negative) (square|circle)d? .*|couplekiss.*|bullettrain .*|ideograph.*|fist .+|medal .+|earth .+|ng .+"
    r"|no good.*|accept|bangbang|back|beginner|calling|chart|congratulations|cool|dart|date|end|facepunch|flags|flipper"
    r"|free|fu|gun|hankey|harambe|hash|hocho|jigsaw|koko|mega|mens|metal|moyai|new|rook|satisfied|secret|shit|soon"
    r"|stars|symbols|tada|top|triumph|womens|zap",
    re.IGNORECASE,
)
"""Chat shortcuts that do not describe the picture: code points, clock numbers, other drawings, slang."""
_SHORT_WORDS = frozenset({"tv", "cd", "wc"})

_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"(man|woman|person) (red|curly|white|blond) hair", r"\1 with \2 hair"),
    (r"keycap #", "keycap hash"),
    (r"keycap \*", "keycap asterisk"),
    (r"(man|woman|person) beard", r"\1 with a beard"),
    (r"(man|woman|person) bald", r"bald \1"),
    (r"kiss (man|woman) (man|woman)", r"kiss between \1 and \2"),
    (r"couple with heart (man|woman) (man|woman)", r"couple with heart: \1 and \2"),
)

_COUNTRIES_WITH_ARTICLE = re.compile(
    r"(?!South Georgia|Heard)"
    r".*\b(Islands|Lands|Territory|Territories|Republic|States|Kingdom|Emirates|Union|Nations|Netherlands)"
    r"|Maldives|Philippines|Gambia|Bahamas|Comoros|Seychelles|Isle of Man"
)
"""Countries that take an article."""


def key(wording: str) -> str:
    """Comparison key of a wording: letters and digits only, without accents and case."""
    normalized = unicodedata.normalize("NFKD", wording.casefold())
    return "".join(c for c in normalized if c.isalnum()) or wording


def captions(
    short_names: Mapping[str, tuple[str, Sequence[str]]], groups: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Name and other wordings of every emoji.

    Args:
        short_names: emoji -> (short name, aliases), both as ``:red_apple:``.
        groups: emoji -> group of pictures that look alike.

    Returns:
        emoji -> wordings. The first is the name, and no two emoji share a name. A wording never points to two groups: a
        name wins over an alias ("cat" is the cat, not the cat face), and an alias of several groups is dropped.
    """
    wordings = {symbol: _wordings(symbol, name, aliases) for symbol, (name, aliases) in short_names.items()}
    owner_of_name = {key(symbol_wordings[0]): symbol for symbol, symbol_wordings in wordings.items()}
    if len(owner_of_name) != len(wordings):
        name_key, count = Counter(key(symbol_wordings[0]) for symbol_wordings in wordings.values()).most_common(1)[0]
        raise ValueError(f"the emoji name {name_key!r} stands for {count} pictures: give one of them a rule of its own")
    groups_by_key: dict[str, set[str]] = {}
    for symbol, symbol_wordings in wordings.items():
        for symbol_wording in symbol_wordings:
            groups_by_key.setdefault(key(symbol_wording), set()).add(groups[symbol])
    return {
        symbol: (
            symbol_wordings[0],
            *(
                wording
                for wording in symbol_wordings[1:]
                if key(wording) not in owner_of_name and len(groups_by_key[key(wording)]) == 1
            ),
        )
        for symbol, symbol_wordings in wordings.items()
    }


def _wordings(symbol: str, short_name: str, aliases: Sequence[str]) -> list[str]:
    """Distinct wordings of one emoji, its name first."""
    name = _to_text(short_name)
    alias_words = [_to_text(alias) for alias in aliases]
    if _is_flag(symbol):
        country = re.sub(r" \(.*?\)| SAR China$", "", name).replace("&", "and")
        flag_names = [
            alias_text.removeprefix("flag for ").replace("&", "and")
            for alias_text in alias_words
            if "flag for " in alias_text
        ]
        countries = [country, *(alias_text for alias_text in flag_names if key(alias_text) != key(country))]
        wordings = [f"flag of {'the ' if _COUNTRIES_WITH_ARTICLE.fullmatch(name) else ''}{name}" for name in countries]
        wordings += [f"{name} flag" for name in countries] + countries
    else:
        wordings = [_family(name), *(alias_text for alias_text in alias_words if _is_wording(alias_text))]
    unique = {key(wording): wording for wording in reversed(wordings)}
    return [wording for wording in dict.fromkeys(wordings) if unique[key(wording)] == wording]


def _to_text(short_name: str) -> str:
    text = unicodedata.normalize("NFC", short_name).strip(":").translate(_PUNCTUATION)
    return re.sub(r"\s+", " ", text).strip()


def _family(name: str) -> str:
    for pattern, replacement in _FAMILIES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    if name.startswith("family "):
        return "family of " + ", ".join(name.split()[1:])
    return name


def _is_wording(alias: str) -> bool:
    return (len(alias) > 2 or alias in _SHORT_WORDS) and not _UNWANTED_ALIAS.fullmatch(alias)


def _is_flag(symbol: str) -> bool:
    """Two regional letters, or the black flag with a region's tag letters."""
    return 0x1F1E6 <= ord(symbol[0]) <= 0x1F1FF or (symbol[0] == "\U0001f3f4" and symbol[1:2] >= "\U000e0000")
