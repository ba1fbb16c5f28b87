"""Documents of a bank: tags, text and the places of chunks in it."""

import sys

import pytest
import torch

from longmem.memory import MemoryBank
from longmem.memory.rows.documents import Source, SourcePart

WORDS = ["Call", " me", " Ish", "mael", ".", " Some", " y", "ears 🐋", " ago"]


def new_bank(**options) -> MemoryBank:
    return MemoryBank(**{"memory_layers": [1], "chunk_size": 2, "capacity_tokens": 64, **options})


def tokens(count: int):
    keys = torch.eye(count + 20)[None, :count]
    return [keys], [keys]


def source_of(words: list[str]) -> dict:
    ends = torch.tensor([len(word) for word in words]).cumsum(0)
    return {"text": "".join(words), "char_ends": ends.tolist()}


def place(bank: MemoryBank, row: int):
    return bank.locate(torch.tensor([row]))[0]


def test_a_chunk_knows_its_characters_and_its_text():
    bank = new_bank()
    bank.add("moby", *tokens(9), range(9), **source_of(WORDS))
    text = "".join(WORDS)
    for row in range(4):
        found = place(bank, row)
        assert found == ("moby", 2 * row, 2 * row + 2, found.char_start, found.char_stop, found.text)
        assert text[found.char_start : found.char_stop] == found.text == "".join(WORDS[2 * row : 2 * row + 2])
    assert bank.text("moby") == text


def test_places_are_the_same_however_the_document_was_written():
    whole, parts = new_bank(), new_bank()
    whole.add("moby", *tokens(9), range(9), **source_of(WORDS))
    keys = tokens(9)[0][0]
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        write = parts.append if "moby" in parts else parts.add
        piece = [keys[:, start:stop]]
        write("moby", piece, piece, range(start, stop), **source_of(WORDS[start:stop]))
    assert [place(whole, row) for row in range(4)] == [place(parts, row) for row in range(4)]
    assert parts.text("moby") == whole.text("moby")


def test_characters_are_counted_from_the_start_of_the_document_after_eviction():
    bank = new_bank(capacity_tokens=4)
    with pytest.warns(UserWarning, match="dropped"):
        bank.add("moby", *tokens(9), range(9), **source_of(WORDS))
    text = "".join(WORDS)
    places = sorted(bank.locate(torch.arange(2)))
    assert [(each.start, each.stop) for each in places] == [(6, 8), (8, 9)]
    assert all(text[each.char_start : each.char_stop] == each.text for each in places)
    assert bank.text("moby") == "".join(WORDS[6:])


def test_without_text_a_place_has_tokens_only():
    bank = new_bank()
    bank.add("ids", *tokens(4), range(4))
    bank.add("nothing", *tokens(4))
    assert [place(bank, row)[3:] for row in (0, 2)] == [(None, None, None)] * 2
    assert (bank.text("ids"), bank.text("nothing"), bank.token_ids("nothing")) == (None, None, None)


def test_the_last_token_takes_the_text_that_follows_it():
    bank = new_bank()
    bank.add("a", *tokens(2), [1, 2], text="one two \n", char_ends=[3, 7])
    assert (place(bank, 0).text, bank.text("a")) == ("one two \n", "one two \n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(text="ab"), "`text` needs `char_ends`"),
        (dict(char_ends=[1, 2]), "`text` needs `char_ends`"),
        (dict(text="ab", char_ends=[1, 3]), "at most the length of `text`, 2, got 1 to 3"),
        (dict(text="ab", char_ends=[2, 1]), "not in order"),
        (dict(text="ab", char_ends=[1]), "`char_ends` must name each token"),
        (dict(tags="law"), "`tags` must be a list"),
        (dict(tags=[""]), "`tags` must be a list"),
    ],
)
def test_wrong_sources_and_tags_are_refused_and_nothing_is_written(given, message):
    bank = new_bank()
    with pytest.raises(ValueError, match=message):
        bank.add("a", *tokens(2), [1, 2], **given)
    assert bank.documents() == []


def test_all_parts_of_a_document_have_text_or_none():
    bank = new_bank()
    bank.add("a", *tokens(2), [1, 2], text="ab", char_ends=[1, 2])
    with pytest.raises(ValueError, match="`text` must be given for every part.*started with"):
        bank.append("a", *tokens(2), [1, 2])
    assert bank.text("a") == "ab"


def test_tags_select_documents_now_and_later():
    bank = new_bank()
    for name, tags in (("a", ["law"]), ("b", []), ("c", ["law", "old"])):
        bank.add(name, *tokens(2), tags=tags)
    view = bank.select(tags="law")
    assert view.num_chunks == 2
    bank.tag("b", ["law"])
    bank.tag("c", ["old"])
    assert {each.document_id for each in view.locate(view.search(1, torch.ones(1, 1, 22), 4).rows) if each} == {
        "a",
        "b",
    }
    assert bank.select("b", tags=["old"]).num_chunks == 2
    assert [info.tags for info in bank.documents()] == [("law",), ("law",), ("old",)]
    with pytest.raises(ValueError, match="at least one document or tag"):
        bank.select()


def test_a_source_is_the_sum_of_its_parts():
    source = Source(has_text=True)
    for start in (0, 4):
        words = WORDS[start : start + 4]
        part = source_of(words)
        source.push(SourcePart(torch.arange(start, start + 4), part["text"], torch.tensor(part["char_ends"])))
    again = Source(has_text=True)
    for start, stop in ((0, 1), (1, 6), (6, 8)):
        again.push(source.part(start, stop))
    assert again.characters(0, 8) == source.characters(0, 8)
    assert [again.characters(i, i + 1) for i in range(8)] == [source.characters(i, i + 1) for i in range(8)]
    assert (again.characters(0, 5)[2], again.ids_of(0, 5).tolist()) == ("".join(WORDS[:5]), [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("later", "width"), [("plain", 1), ("caf\u00e9", 1), ("\u20ac", 2), ("\U0001f40b", 4), ("\ud800", 4)]
)
def test_a_source_is_as_narrow_as_its_text(later, width):
    source, start, rest = Source(has_text=True), "a long " * 100, "text " * 100 + later
    for part in (start, rest):
        source.push(SourcePart(torch.tensor([5]), part, torch.tensor([len(part)])))
    assert source.characters(0, 2) == (0, len(start + rest), start + rest)
    assert source.characters(1, 2) == (len(start), len(start + rest), rest)
    assert source.ids_of(0, 2).dtype == source.part(0, 2).char_ends.dtype == torch.int64
    assert sum(map(sys.getsizeof, source._parts)) < 200 + len(start) + width * len(rest)
    assert source._ids.values.dtype == source._ends.values.dtype == torch.int32


def test_characters_beyond_four_bytes_are_counted():
    source = Source(has_text=True, first_char=2**31 - 3)
    source.push(SourcePart(torch.tensor([5, 2**40]), "abcd", torch.tensor([2, 4])))
    assert source.characters(1, 2) == (2**31 - 1, 2**31 + 1, "cd")
    ids = source.ids_of(0, 2)
    ids += 1  # the caller's own
    assert source.ids_of(0, 2).tolist() == [5, 2**40]
