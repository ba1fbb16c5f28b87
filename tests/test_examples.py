"""The examples of docs/ run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_memory
import torch
from tiny_models import some_text
from tiny_trained import save_tiny_trained

from longmem import MemoryBank

DOCS = Path(__file__).parent.parent / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = tiny_memory.model


@pytest.fixture
def bank(model):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, some_text(30), "notes")
    return bank


def test_a_bank_is_a_langchain_retriever(model, bank):
    pytest.importorskip("langchain_core")
    retriever = load("langchain_retriever").BankRetriever(bank=bank, model=model, k=2)
    expected = bank.find("the dog", model, 2)
    assert [document.page_content for document in retriever.invoke("the dog")] == [each.text for each in expected]
    by_words = load("langchain_retriever").BankRetriever(bank=bank, k=1).invoke("house")
    assert by_words[0].metadata["source"] == "notes"


def test_a_bank_is_a_llamaindex_retriever(model, bank):
    pytest.importorskip("llama_index.core")
    nodes = load("llamaindex_retriever").BankRetriever(bank, model, k=2).retrieve("the dog")
    expected = bank.find("the dog", model, 2)
    assert [(node.text, node.score) for node in nodes] == [(each.text, each.score) for each in expected]


def test_the_tour_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """With a tiny model under the packaged name: what it writes is no text, but every call is made."""
    save_tiny_trained(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {"display": lambda *_: None}
    torch.manual_seed(0)
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), names)
    assert (tmp_path / "explain.html").exists()
