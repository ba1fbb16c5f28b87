"""Text in pieces: the tokens of all of them decode to the whole, and what is shown piece by piece is what all ids decode to."""

import random

import pytest
import torch
from tiny_models import save_tiny_backbone
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory.memorize import encodable
from longmem.streaming.stream import decoded

WORDS = ["19", "84", "1984", "was", "written", "it", "Hello", "world", "日", "本", ".", ",", "a", "n", "the"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a space before a text as Llama 2 and Mistral do, and falls back to bytes."""
    letters = [chr(code) for code in range(33, 127) if chr(code) not in WORDS]
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", *letters, *WORDS, *(f"▁{word}" for word in WORDS)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    # Merges that make the words: from the left, letter by letter.
    merges = []
    for piece in list(vocab)[259:]:
        for cut in range(1, len(piece)):
            if piece[:cut] not in vocab:
                vocab[piece[:cut]] = len(vocab)
            merges.append((piece[:cut], piece[cut])) if piece[cut] in vocab and piece[: cut + 1] in vocab else None
    backend = Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, as GPT-2 and (with a space before a text) RoBERTa have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class SlowTokenizer:
    """A tokenizer that says nothing of places, such as those of sentencepiece itself."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __call__(self, text, **options):
        return {"input_ids": self.fast(text, add_special_tokens=False)["input_ids"]}

    def decode(self, ids):
        return self.fast.decode(ids)


TOKENIZERS = {
    "prepend": sentencepiece_like("Prepend"),
    "first": sentencepiece_like("first"),
    "always": sentencepiece_like("always"),
    "bytes": byte_level(False),
    "bytes and a space": byte_level(True),
}
TOKENIZERS["slow"] = SlowTokenizer(TOKENIZERS["prepend"])
TEXTS = {
    "a number": ["19", "84."],
    "words": ["it was", " written", " the", " world"],
    "inside words": ["Hel", "lo wor", "ld, a", "nn"],
    "spaces": ["a ", " b", "  ", "c", " "],
    "lines": "1984 was\n\nwritten.\n \n\tit\r\n".splitlines(keepends=True),
    "characters in bytes": ["日本é", "ñ日", "語 ", "😀"],
}


class Model:
    """What tokenising needs of a model."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.config = type("Config", (), {"get_text_config": lambda self: self, "vocab_size": 100_000})()


@pytest.mark.parametrize("pieces", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_pieces_decode_to_the_whole(name, pieces):
    model, text = Model(TOKENIZERS[name]), "".join(pieces)
    parts = [encodable(model, piece, is_piece=True, continues=number > 0) for number, piece in enumerate(pieces)]
    ids = torch.cat([part.token_ids for part in parts]).tolist()
    assert model.tokenizer.decode(ids).removeprefix(" " * (name == "bytes and a space")) == text
    if name != "slow":
        assert all(
            part.text == piece and part.char_ends[-1] == len(piece) for part, piece in zip(parts, pieces, strict=True)
        )
    wrong = [id for piece in pieces for id in encodable(model, piece, is_piece=True).token_ids.tolist()]
    if pieces != TEXTS["words"]:  # which have their spaces
        assert (name == "bytes") == (wrong == ids), "a space is put before each where nobody says that it continues"


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "slow"])
def test_text_that_is_shown_as_it_comes_is_what_all_ids_decode_to(name):
    tokenizer, draw = TOKENIZERS[name], random.Random(0)
    for text in [*map("".join, TEXTS.values()), "日" * 40, "é" * 9 + " end"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = list(decoded(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(pieces), "nothing empty is shown"
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
        assert "".join(decoded(tokenizer, ids)) == tokenizer.decode(ids)
    words = tokenizer("it was written, the world", add_special_tokens=False)["input_ids"]
    assert len(list(decoded(tokenizer, words))) >= 5, "not all at the end"
    assert "".join(decoded(tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"][0]] * 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer puts a space before a text."""
    tokenizer = TOKENIZERS["prepend"]
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"), vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return LongMemForCausalLM.from_backbone(str(folder), segment_length=16, num_retrieved_tokens=16).eval()


def test_a_stream_read_in_pieces_is_the_text_and_goes_on_as_shown(model):
    lines = "1984 was written.\n\n \r\nthe world, 日本\n\n".splitlines(keepends=True)
    bank = MemoryBank.for_model(model)
    stream = model.stream(bank)
    assert stream.read("") == 0
    assert len(stream.score("")) == 0
    counts = [
        stream.read(line) if number % 2 else len(stream.score(line)) for number, line in enumerate(["\n", *lines, ""])
    ]
    assert sum(counts) == stream.num_tokens
    read = [*bank.token_ids("stream"), *stream.local_ids]
    assert model.tokenizer.decode(read) == "".join(["\n", *lines])
    again = model.stream(bank.empty_like())
    again.read(torch.tensor(read))
    ids = list(again.generate(40, do_sample=True, temperature=3.0))
    twin = model.stream(bank.empty_like())
    twin.read(torch.tensor(read))
    shown = list(twin.generate_text(40, do_sample=True, temperature=3.0))
    assert "".join(shown) == model.tokenizer.decode(ids)
    assert twin.num_tokens == len(read) + 40
    with pytest.raises(ValueError, match="has no meaning for a stream"):
        twin.generate_text(3, num_beams=2)
    with pytest.raises(ValueError, match="at least one"):
        twin.read([])


def test_documents_in_pieces_hold_the_text(model):
    bank = MemoryBank.for_model(model)
    pieces = ["19", "84. it was wri", "tten", "\n", " the"]
    for piece in pieces:
        model.memorize(bank, piece, "a", append="a" in bank)
    assert bank.text("a") == model.tokenizer.decode(bank.token_ids("a")) == "".join(pieces)
    (rows,) = bank.search(bank.memory_layers[0], torch.ones(2, 1, 8), 99).rows[0]
    texts = sorted((place.start, place.text) for place in bank.locate(rows) if place)
    assert "".join(text for _, text in texts) == "".join(pieces)
