"""What tests of data start from: a tokenizer of bytes, and a cache folder of their own."""

from __future__ import annotations

import pytest
from byte_tokenizers import CountingTokenizer, byte_tokenizer


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
