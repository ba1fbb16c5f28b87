"""Bytes behind tokens, and how far back the same tokens stood."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.perplexity.scoring import Cut, Window, WindowScores
from longmem.evaluation.perplexity.summary import summarize_texts
from longmem.evaluation.perplexity.texts import (
    DISTANCES,
    TextScores,
    bits_per_byte,
    byte_ends,
    distance_groups,
    last_distances,
    scored_bytes,
)


def naive_distances(ids: list[int], ngram: int) -> list[int]:
    found = []
    for end in range(len(ids)):
        own = ids[end - ngram + 1 : end + 1]
        places = [
            before
            for before in range(ngram - 1, end)
            if end >= ngram - 1 and ids[before - ngram + 1 : before + 1] == own
        ]
        found.append(end - places[-1] if places else 0)
    return found


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("num_kinds", [1, 3, 40])
def test_distances_are_those_of_a_search_through_all_before(ngram, num_kinds):
    ids = torch.randint(49_000, 49_000 + num_kinds, (120,), generator=torch.Generator().manual_seed(ngram))
    for count in (1, 2, 120):
        assert last_distances(ids[:count], ngram).tolist() == naive_distances(ids[:count].tolist(), ngram)


def test_groups_of_distances():
    """Four tokens at 100,000, in a window from 99,000 on; three tokens are the same."""
    distances = torch.tensor([0, 5, 998, 999, 2_048, 2_049, 8_192, 32_768, 65_536, 65_537])
    groups = distance_groups(distances, torch.full((10,), 100_000), torch.full((10,), 99_000), ngram=3)
    assert [DISTANCES[group] for group in groups] == [
        "never before",
        "in the window",
        "in the window",  # tokens 99,000 to 99,002
        "up to 2k",  # begins before the window
        "up to 2k",
        "2k to 8k",
        "2k to 8k",
        "8k to 32k",
        "32k to 65k",
        "beyond",
    ]


def tokenizer_of(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(merge) for merge in merges)]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_two_tokenizers_have_the_same_bits_per_byte_where_bytes_are_as_likely():
    text = "abab cabab"
    found = []
    for tokenizer in (tokenizer_of([]), tokenizer_of([("a", "b")])):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        windows = Cut(64, 32).cover(len(ids))
        lengths = [len(tokenizer.decode([token])) for token in ids.tolist()]
        nats = sum(length * math.log(5) for length in lengths[1:])  # each byte has the probability 1/5
        found.append(bits_per_byte(torch.tensor([nats]), scored_bytes(tokenizer, ids, windows).sum()[None]).item())
    assert found == pytest.approx([math.log2(5)] * 2)


def test_a_character_of_several_tokens_is_counted_once():
    tokenizer = tokenizer_of([])
    text = "aé€ 🙂b"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert len(ids) == len(text.encode())
    ends = byte_ends(tokenizer, ids)
    assert ends is not None
    assert ends.tolist() == [1, 3, 3, 6, 6, 6, 7, 11, 11, 11, 11, 12]
    cuts = [Window(0, 1, 3), Window(0, 3, 8), Window(0, 8, 12)]  # in the middle of the smile
    found = scored_bytes(tokenizer, ids, cuts)
    assert found.tolist() == [2, 8, 1]
    assert int(found.sum()) == len(text.encode()) - 1  # all but the first token


def test_tokens_that_are_no_tokenization_are_decoded_where_they_are_scored():
    tokenizer = tokenizer_of([("a", "b")])
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    ids = torch.tensor([a, b, a, b])  # the tokenizer would make two tokens
    assert byte_ends(tokenizer, ids) is None
    assert scored_bytes(tokenizer, ids, [Window(0, 1, 3), Window(0, 3, 4)]).tolist() == [2, 1]


CUT = Cut(1024, 512)
SETTINGS = PerplexitySettings(data="none", output="none", systems=("off", "on"))


def scores_of(
    name: str, distances: list[list[int]], off: list[list[float]], on: list[list[float]]
) -> dict[Cut, TextScores]:
    """Return the scores of windows whose tokens stand about 10,000, in windows from about 9,000 on."""
    sizes = [len(own) for own in distances]
    starts = [10_000 + sum(sizes[:number]) for number in range(len(sizes))]
    losses = {
        system: WindowScores(tuple(torch.tensor(own) for own in values), seconds=1.0)
        for system, values in (("off", off), ("on", on))
    }
    windows = tuple(Window(first - 1_000, first, first + size) for first, size in zip(starts, sizes, strict=True))
    return {CUT: TextScores(name, 20_000, windows, tuple(map(torch.tensor, distances)), torch.tensor(sizes), losses)}


def test_gains_by_distance_are_means_over_tokens():
    """By hand: two tokens of the first document and one of the second lie 2k to 8k back."""
    first = scores_of("a", [[5_000, 6_000, 0]], [[3.0, 2.0, 1.0]], [[1.0, 1.0, 1.5]])
    second = scores_of("b", [[7_000, 10]], [[4.0, 4.0]], [[4.0, 3.0]])
    groups = summarize_texts([first, second], SETTINGS)["distances"]["groups"]
    assert {name: group["tokens"] for name, group in groups.items() if group["tokens"]} == {
        "in the window": 1,
        "2k to 8k": 3,
        "never before": 1,
    }
    gains = {name: group["systems"]["on"] for name, group in groups.items() if group["systems"]}
    assert gains["2k to 8k"]["value"] == pytest.approx((2 + 1 + 0) / 3)
    assert gains["2k to 8k"]["interval"] == pytest.approx([0, 1.5])  # of one of two documents
    assert gains["in the window"]["value"] == pytest.approx(1)
    assert groups["in the window"]["units"] == 1
    assert gains["never before"]["value"] == pytest.approx(-0.5)


def test_what_one_document_has_is_resampled_by_window():
    one = scores_of("a", [[5_000, 6_000], [7_000, 0]], [[3.0, 2.0], [2.0, 1.0]], [[1.0, 1.0], [2.0, 1.0]])
    other = scores_of("b", [[0, 0]], [[4.0, 4.0]], [[4.0, 3.0]])
    group = summarize_texts([one, other], SETTINGS)["distances"]["groups"]["2k to 8k"]
    assert (group["tokens"], group["units"]) == (3, 2)
    assert group["systems"]["on"] == {"value": pytest.approx(1), "interval": pytest.approx([0, 1.5])}
