"""What a user does first, on a tiny model: quick to run with any versions of the packages that LongMem stands on.

`make check-latest` runs this file with the newest releases; it needs pytest and what `pip install "longmem-lm[demo]"` installs.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.main import main
from longmem.streaming import MemoryStream

TEXT, PROMPT = some_text(80), "the cat sat on a mat"
SETTINGS = dict(segment_length=64, num_retrieved_tokens=16)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture
def model(backbone_folder):
    return LongMemForCausalLM.from_backbone(backbone_folder, **SETTINGS).eval()


@pytest.fixture
def bank(model):
    bank = MemoryBank.for_model(model)
    model.memorize(bank, TEXT, document_id="a")
    return bank


@torch.no_grad()
def test_generation_equals_recomputing_every_step(model, bank):
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found = model.generate(ids, memory=bank, max_new_tokens=8, do_sample=False)
    expected = ids
    for _ in range(8):
        chosen = model(expected, memory=bank).logits[:, -1].argmax(dim=-1)
        expected = torch.cat([expected, chosen[:, None]], dim=1)
    assert torch.equal(found, expected)
    assert not torch.allclose(model(ids, memory=bank).logits, model(ids).logits, atol=1e-3)
    for options in (dict(num_beams=3), dict(do_sample=True), dict(stop_strings=["q"], tokenizer=model.tokenizer)):
        assert model.generate(ids, memory=bank, max_new_tokens=8, **options).shape[1] > ids.shape[1]


def test_a_stream_goes_on_where_it_was_saved(model, bank, tmp_path):
    stream = model.stream(bank)
    stream.read(TEXT)
    assert stream.num_tokens > SETTINGS["segment_length"]
    assert "stream" in bank
    stream.save(tmp_path)
    expected = list(stream.generate(8))
    assert list(MemoryStream.load(tmp_path, model).generate(8)) == expected
    assert torch.isfinite(stream.score(PROMPT)).all()


@torch.no_grad()
def test_what_was_saved_comes_back_the_same(backbone_folder, tmp_path):
    model = LongMemForCausalLM.from_backbone(backbone_folder, **SETTINGS, lora={"rank": 2})
    optimizer = torch.optim.SGD(model.side_network.parameters(), lr=1.0)
    bank = MemoryBank.for_model(model, folder=tmp_path / "bank")
    model.memorize(bank, TEXT, document_id="a")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    before = model.eval()(ids, memory=bank).logits
    with torch.enable_grad():
        model.train()(ids, memory=bank, labels=ids).loss.backward()
    optimizer.step()
    trained = model.eval()(ids, memory=bank).logits
    assert not torch.allclose(trained, before, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    reopened = LongMemForCausalLM.from_pretrained(tmp_path / "model").eval()
    with MemoryBank.open(tmp_path / "bank", reopened, read_only=True) as reopened_bank:
        assert torch.equal(reopened(ids, memory=reopened_bank).logits, trained)


def test_the_demo_runs_from_end_to_end(backbone_folder, tmp_path, capsys):
    arguments = ["--memory-tokens", "128", "--windows", "2", "--window", "32", "--output", str(tmp_path)]
    assert main(["demo", "--model", backbone_folder, *arguments]) == 0
    assert "largest difference of 31 losses 0.0e+00" in capsys.readouterr().out
    for name in ("demo.png", "table.md", "metrics.json", "bank/catalogue.sqlite", "side-network/config.json"):
        assert (tmp_path / name).stat().st_size > 0
