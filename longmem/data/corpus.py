"""Corpora: documents as token ids in an Arrow file that is written once and memory-mapped from then on."""

import itertools
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from longmem.backbone.loading import digest, tokenizer_fingerprint
from longmem.backbone.packaged import cache_folder, convert_once, is_complete
from longmem.data.recall import FORMAT as RECALL_FORMAT
from longmem.data.recall import Turns, hide_and_ask
from longmem.data.sources import Document, Source, find_source
from longmem.files import make_folder

# Part of the fingerprint. Raise it when other tokens come out of the same text, so that no old result is used.
FORMAT = 1
FILE = "corpus.arrow"
FEATURES = Features({"document_id": Value("string"), "input_ids": List(Value("int32"))})
# Documents are tokenised together, so that a fast tokenizer can use several cores. Books are a million times longer
# than messages, and each token takes about a hundred bytes while it is made, so characters set the limit.
BATCH_CHARACTERS = 1_000_000
BATCH_DOCUMENTS = 1_000


def load_corpus(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    split: str = "train",
    max_tokens: int | None = None,
    num_documents: int | None = None,
    recall_share: float = 0.0,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Return a dataset with columns `document_id` (unique) and `input_ids` (int32), a row for each document.

    Texts are tokenised once, without special tokens, as `memorize` does. The result is kept on disk under a fingerprint
    of the files' contents, the tokenizer and the options, and memory-mapped: a second call reads and tokenises nothing.
    A dataset of the Hub is known by its name, so that it opens without a network; to read it anew, delete its folder.

    Documents without text are left out, with a warning that counts them. Where two documents have the same id, the
    second gets `#2` at its end.

    Args:
        source: one of

            - a .txt file, or a folder of them, searched with its subfolders: a document a file, whose id is the path in
              the folder without suffix;
            - a .jsonl file, or a folder of them: a document a line, whose id is the column `id`, else the line number;
            - a .json file, a list of objects with `file` (.txt or .jsonl, beside it) and `split`;
            - a folder that `Dataset.save_to_disk` has written, or one with other files that `datasets.load_dataset` reads;
            - the name of a dataset on Hugging Face's Hub, or `name:configuration`, which is streamed;
            - `"python-manual"`: the reference manual that every Python carries, as one document of about 370 kB.
        tokenizer: what makes the tokens.
        text_column: the column that holds the text; for sources with columns.
        split: the split to read; for sources with splits.
        max_tokens, num_documents: stop after so many; the last document is cut.
        recall_share: hide facts in the texts, and let about this share of the result be questions about them, further on
            (`longmem/data/recall.py`), partly in the chat format of a tokenizer that has one.
        cache_dir: where to keep the result; default `corpora` in `$LONGMEM_CACHE`, else `~/.cache/longmem`.

    Raises ValueError if there is no such source, or it cannot be read as text; a Hub dataset is neither bounded by
    `max_tokens` nor by `num_documents`.
    """
    for name, value in (("max_tokens", max_tokens), ("num_documents", num_documents)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}; leave it out to read everything.")
    if not 0 <= recall_share < 1:
        raise ValueError(f"`recall_share` must be from 0 to below 1, got {recall_share}; 0.25 is usual.")
    is_bounded = max_tokens is not None or num_documents is not None
    found = find_source(source, text_column=text_column, split=split, is_bounded=is_bounded)
    if recall_share:
        found = with_recall(found, recall_share, tokenizer)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", found.name)[:40].strip(".-") or "corpus"
    identity = [FORMAT, found.identity, tokenizer_fingerprint(tokenizer), [max_tokens, num_documents]]
    folder = cache_folder() / "corpora" if cache_dir is None else Path(cache_dir).expanduser()
    try:
        make_folder(folder)
    except OSError as error:
        raise ValueError(
            f"`cache_dir` must be a folder that can be written, got {str(folder)!r} ({error}); name another one, or set "
            "LONGMEM_CACHE."
        ) from error
    folder /= f"{readable}-{digest(identity)}"

    def write(_: Path, target: Path) -> None:
        schema = FEATURES.arrow_schema
        with pa.ipc.new_stream(str(target / FILE), schema) as writer:
            for batch in _batches(found, tokenizer, max_tokens, num_documents):
                writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))

    if not is_complete(folder):
        convert_once(Path(found.name), folder, write)
    return Dataset.from_file(str(folder / FILE))


def corpus_fingerprint(corpus: Dataset) -> str:
    """Return the fingerprint under which `load_corpus` keeps a corpus; of one that is nowhere on disk, that of `datasets`."""
    if files := corpus.cache_files:
        return Path(files[0]["filename"]).parent.name.rpartition("-")[2]
    return str(corpus._fingerprint)


def with_recall(source: Source, share: float, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Return the same texts with facts hidden in them and asked for; which ones depends on a text's id alone."""
    template = getattr(tokenizer, "chat_template", None)

    def chat(turns: Turns) -> str:
        messages = [
            {"role": role, "content": said}
            for turn in turns
            for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def documents() -> Iterator[Document]:
        for document_id, text in source.documents():
            generator = random.Random(document_id)
            yield Document(document_id, hide_and_ask(text, share, generator, chat if template else None))

    return Source(source.name, [source.identity, RECALL_FORMAT, share, template], documents)


def _batches(
    source: Source, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, num_documents: int | None
) -> Iterator[dict[str, list[Any]]]:
    """Yield columns of some rows at a time; warn of what was left out, and raise ValueError if that is everything."""
    seen: Counter[str] = Counter()
    left_out: list[str] = []
    num_tokens = 0
    # A small corpus shall not fetch a large batch; few texts have more than eight characters per token.
    max_characters = BATCH_CHARACTERS if max_tokens is None else min(BATCH_CHARACTERS, 8 * max_tokens)

    def with_text() -> Iterator[Document]:
        for document in source.documents():
            if document.text.strip():
                yield document
            else:
                left_out.append(document.document_id)

    for batch in _in_batches(itertools.islice(with_text(), num_documents), max_characters):
        names, ids = [], []
        texts = [document.text for document in batch]
        tokenised = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, tokens in zip(batch, tokenised, strict=True):
            name = document.document_id
            while name in seen:  # from the second time on it has a number behind it
                seen[document.document_id] += 1
                name = f"{document.document_id}#{seen[document.document_id]}"
            seen[name] = 1
            names.append(name)
            ids.append(tokens if max_tokens is None else tokens[: max_tokens - num_tokens])
            num_tokens += len(ids[-1])
            if num_tokens == max_tokens:
                break
        yield {"document_id": names, "input_ids": ids}
        if num_tokens == max_tokens:
            break
    if not seen:
        raise ValueError(
            f"`source` must hold text, got {source.name!r} with {len(left_out)} documents, none of which has any; "
            "look whether `text_column` and `split` are the right ones."
        )
    if left_out:
        warnings.warn(
            f"documents of {source.name!r} without text were left out: {len(left_out)}, the first is {left_out[0]!r}.",
            stacklevel=2,
        )


def _in_batches(documents: Iterable[Document], max_characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= max_characters or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
