"""Who may see whom, held to a slow and literal statement of the rule; labels, positions and packing of sequences."""

from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xfusion.data.pack import balance, media_length, pack, text_length
from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Media, Rows, Sequence, Text, XFusionError, fingerprint, visible

WIDTH = 2
texts = st.builds(
    lambda ids, loss: Text(ids=tuple(ids), has_loss=loss), st.lists(st.integers(1, 99), max_size=4), st.booleans()
)
media = st.builds(
    lambda rows, columns, noised, later: Media(
        tokens=torch.arange(rows * columns * WIDTH).reshape(-1, WIDTH).float(),
        grid=(rows, columns),
        state="noised" if noised else "clean",
        has_loss=noised,
        visible_to_later=later,
    ),
    st.integers(1, 2),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
sequences = st.lists(texts | media, min_size=1, max_size=5).map(lambda s: Sequence(segments=tuple(s)))
rows_of_sequences = st.lists(st.lists(sequences, min_size=1, max_size=3), min_size=1, max_size=3)


def spell(sequence):
    """The positions of a sequence as the docs say it: (kind, value, segment, the label or None)."""
    out, last = [], len(sequence.segments) - 1
    for number, segment in enumerate(sequence.segments):
        if isinstance(segment, Media):
            out.append(["begin", None, number, None])
            out += [["patch", p, number, None] for p in range(len(segment.tokens))]
            if number < last:
                out.append(["end", None, None, None])
            continue
        for place, token in enumerate(segment.ids):
            if segment.has_loss and out and out[-1][0] in ("word", "end"):
                out[-1][3] = token
            if not (number == last and segment.has_loss and place == len(segment.ids) - 1):
                out.append(["word", token, number, None])
    return out


def tables(batch):
    return [batch.text, *(m.rows for m in batch.media.values())]


@settings(max_examples=150)
@given(rows_of_sequences)
def test_positions_ids_and_labels_are_what_the_sequence_says(rows):
    batch = pack(rows)
    assert batch.num_sequences == sum(map(len, rows))
    image = batch.media.get("image")
    item = 0
    for r, row in enumerate(rows):
        order = 0
        words, patches = [], []
        for s, sequence in enumerate(row):
            for position, (kind, value, number, label) in enumerate(spell(sequence)):
                (words if kind in ("word", "end") else patches).append(
                    (order, s, position, kind, value, number, label, item)
                )
                order += 1
                if kind == "patch" and value == len(sequence.segments[number].tokens) - 1:
                    item += 1
        assert batch.text_ids[r].tolist()[: len(words)] == [END_OF_MEDIA if w[3] == "end" else w[4] for w in words]
        assert batch.labels[r].tolist()[: len(words)] == [IGNORE if w[6] is None else w[6] for w in words]
        assert set(batch.labels[r, len(words) :].tolist()) <= {IGNORE}
        for table, found in ((batch.text, words), (image.rows if image else None, patches)):
            if table is None:
                assert not found
                continue
            assert table.order[r].tolist() == [w[0] for w in found] + [-1] * (table.count - len(found))
            assert table.sample[r].tolist()[: len(found)] == [w[1] for w in found]
            assert table.position[r].tolist()[: len(found)] == [w[2] for w in found]
            assert table.bidirectional[r].tolist() == [w[3] == "patch" for w in found] + [False] * (
                table.count - len(found)
            )
        if image is None:
            continue
        for column, (_, s, _, kind, value, number, _, which) in enumerate(patches):
            assert bool(image.boundary[r, column]) == (kind == "begin")
            assert int(image.item[r, column]) == (-1 if kind == "begin" else which)
            segment = row[s].segments[number]
            assert bool(image.rows.visible_to_later[r, column]) == segment.visible_to_later
            if kind == "patch":
                assert (int(image.grid_row[r, column]), int(image.grid_column[r, column])) == divmod(
                    value, segment.grid[1]
                )
                assert torch.equal(image.tokens[r, column], segment.tokens[value])
                assert bool(image.noised[which]) == bool(image.has_loss[which]) == segment.has_loss
            else:
                assert not image.tokens[r, column].any()


@settings(max_examples=150)
@given(rows_of_sequences)
def test_flags_tell_truly_who_reads_whom(rows):
    batch = pack(rows)
    table, count = Rows.cat(tables(batch)), batch.text.count
    assume(table.count)
    seen = visible(table, table) & (table.order[:, :, None] >= 0)
    text_reads, media_reads = bool(seen[:, :count, count:].any()), bool(seen[:, count:, :count].any())
    # A flag may be raised needlessly (nothing visible behind it), never lowered where somebody does read.
    assert batch.text_reads_media or not text_reads
    assert batch.media_reads_text or not media_reads
    if all(isinstance(q.segments[-1], Media) and len(q.segments) <= 2 for row in rows for q in row) and all(
        isinstance(s, Text) for row in rows for q in row for s in q.segments[:-1]
    ):
        assert not batch.text_reads_media  # drawings: their text states may be looked up


@settings(max_examples=150)
@given(rows_of_sequences, st.none() | st.integers(1, 5))
def test_visible_is_the_rule_word_for_word(rows, window):
    batch = pack(rows, text_width=pack(rows).text.count + 1)  # at least one padded text position
    table = Rows.cat(tables(batch))
    seen = visible(table, table, window)
    for r, row in enumerate(rows):
        places = []
        for s, sequence in enumerate(row):
            for kind, _, number, _ in spell(sequence):
                segment = None if number is None else sequence.segments[number]
                later = segment.visible_to_later if isinstance(segment, Media) else True
                places.append((s, kind, number, later))
        for q in range(table.count):
            order = int(table.order[r, q])
            if order < 0:
                assert seen[r, q].nonzero()[:, 0].tolist() == [0]
                continue
            expected = set()
            for k in range(table.count):
                at = int(table.order[r, k])
                if at < 0:
                    continue
                me, other = places[order], places[at]
                same_picture = me[0] == other[0] and me[2] is not None and me[2] == other[2]
                in_reach = window is None or at > order - window
                inside = me[1] == other[1] == "patch" and same_picture
                before = at <= order and in_reach and (other[3] or same_picture)
                if me[0] == other[0] and (inside or before):
                    expected.add(k)
            assert set(seen[r, q].nonzero()[:, 0].tolist()) == expected


def test_the_first_word_of_an_answer_is_read_from_the_row_behind_the_picture():
    picture = Media(tokens=torch.zeros(2, WIDTH), grid=(1, 2))
    question, answer = Text(ids=(7, 8)), Text(ids=(3, 4, 5), has_loss=True)
    plain = pack([[Sequence(segments=(picture, answer))]])
    assert plain.text_ids.tolist() == [[END_OF_MEDIA, 3, 4]]
    assert plain.labels.tolist() == [[3, 4, 5]]
    asked = pack([[Sequence(segments=(picture, question, answer))]])
    assert asked.text_ids.tolist() == [[END_OF_MEDIA, 7, 8, 3, 4]]
    assert asked.labels.tolist() == [[IGNORE, IGNORE, 3, 4, 5]]
    prompt = pack([[Sequence(segments=(question, picture))]])
    assert prompt.text_ids.tolist() == [[7, 8]] and prompt.labels.tolist() == [[IGNORE, IGNORE]]
    first = pack([[Sequence(segments=(answer, picture))]])  # nothing stands before its first word
    assert first.text_ids.tolist() == [[3, 4, 5]] and first.labels.tolist() == [[4, 5, IGNORE]]


def test_a_row_of_several_sequences_starts_each_at_position_0():
    one = Sequence(segments=(Text(ids=(1, 2)), Media(tokens=torch.zeros(1, WIDTH), grid=(1, 1))))
    batch = pack([[one, one]])
    assert batch.text.order.tolist() == [[0, 1, 4, 5]] and batch.text.position.tolist() == [[0, 1, 0, 1]]
    image = batch.media["image"].rows
    assert image.order.tolist() == [[2, 3, 6, 7]] and image.position.tolist() == [[2, 3, 2, 3]]


# ------------------------------------------------------------------------------------------------------- two budgets


@settings(max_examples=150)
@given(rows_of_sequences, st.integers(0, 4))
def test_text_width_pads_or_refuses_with_both_numbers(rows, more):
    longest = max(sum(map(text_length, row)) for row in rows)
    assert pack(rows).text.count == longest
    wide = pack(rows, text_width=longest + more)
    assert wide.text_ids.shape == wide.labels.shape == (len(rows), longest + more)
    if longest:
        with pytest.raises(XFusionError, match=rf"a row holds {longest} text tokens but the budget is {longest - 1}"):
            pack(rows, text_width=longest - 1)


def test_a_grid_that_is_not_its_tokens_is_refused():
    wrong = Media(tokens=torch.zeros(5, WIDTH), grid=(2, 2))
    with pytest.raises(XFusionError, match=r"5 tokens but its grid is \(2, 2\)"):
        pack([[Sequence(segments=(wrong,))]])


def behind(tokens, words):
    """A picture of so many tokens behind so many words."""
    picture = Media(tokens=torch.zeros(tokens, WIDTH), grid=(1, tokens))
    return Sequence(segments=(Text(ids=(1,) * words), picture))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_balance_of_one_size_loses_nothing_and_evens_out(words, per_row):
    sample = [behind(3, count) for count in words]
    rows = balance(sample, 4 * per_row)
    assert len(rows) == -(-len(sample) // per_row) and max(map(len, rows)) <= per_row
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, sample))
    if len(sample) % per_row == 0:
        assert {len(row) for row in rows} == {per_row}
        lengths = [sum(map(text_length, row)) for row in rows]
        # Giving the longest to the shortest never lets rows drift further apart than two sequences differ.
        assert max(lengths) - min(lengths) <= max(words) - min(words)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([1, 4, 9]), min_size=1, max_size=20), st.integers(10, 40), st.randoms())
def test_balance_of_several_sizes_keeps_the_budget_and_a_shape_of_the_sizes_alone(sizes, budget, chance):
    def shape(rows):
        assert all(sum(map(media_length, row)) <= budget for row in rows)
        return [sorted(map(media_length, row)) for row in rows]

    sample = [behind(size, chance.randrange(9)) for size in sizes]
    rows = balance(sample, budget)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, sample))
    # Few rows: first fit by decreasing size needs at most 11/9 of the best and one more, evening out may open some.
    assert len(rows) <= 1 + 2 * sum(size + 1 for size in sizes) / budget
    others = [behind(size, chance.randrange(9)) for size in chance.sample(sizes, len(sizes))]
    assert sorted(sum(row) for row in shape(rows)) == sorted(sum(row) for row in shape(balance(others, budget)))


def test_the_longest_stands_with_the_shortest():
    rows = balance([behind(3, count) for count in (1, 10, 2, 9)], 8)
    assert sorted(sorted(map(text_length, row)) for row in rows) == [[1, 10], [2, 9]]


def test_what_is_larger_than_a_row_is_refused():
    with pytest.raises(XFusionError, match="10 media positions does not fit into a row of 9"):
        balance([behind(9, 1)], 9)


# ------------------------------------------------------------------------------------------------------------ tables


@given(rows_of_sequences, st.data())
def test_tables_join_and_repeat(rows, data):
    text = pack(rows).text
    double = Rows.cat([text, Rows.empty(len(rows)), text])
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    for f in fields(Rows):
        column = getattr(text, f.name)
        assert torch.equal(getattr(double, f.name), torch.cat([column, column], dim=1))
        assert getattr(double, f.name).dtype == column.dtype
        assert torch.equal(getattr(text.index(torch.tensor(chosen)), f.name), column[chosen])


@given(rows_of_sequences)
def test_a_value_per_item_spreads_over_its_patches_only(rows):
    batch = pack(rows)
    for m in batch.media.values():
        values = 1 + torch.arange(len(m.noised)).float()
        spread = m.at(values, fill=-7.0)
        assert torch.equal(spread, torch.where(m.item >= 0, 1.0 + m.item, torch.tensor(-7.0)))


def test_a_fingerprint_sees_names_shapes_types_and_every_bit():
    tensors = {"a": torch.arange(6).float(), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = fingerprint(dict(reversed(tensors.items())))
    assert fingerprint(tensors) == same and len(same) == 64
    bit = tensors["a"].clone()
    bit.view(torch.int32)[0] ^= 1
    for other in (
        {**tensors, "a": bit},
        {**tensors, "a": tensors["a"].reshape(2, 3)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ):
        assert fingerprint(other) != same
