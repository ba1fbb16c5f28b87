"""The comparison: systems that must agree do, what they keep is counted, and a cell goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_backbone

FOLDER = Path(__file__).parents[1] / "benchmarks" / "compare"


@pytest.fixture(scope="module", autouse=True)
def compare() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone"), max_position_embeddings=512))


@pytest.fixture(scope="module")
def model(backbone: str) -> Any:
    from longmem import LongMemForCausalLM

    return LongMemForCausalLM.from_backbone(backbone, segment_length=64, num_retrieved_tokens=8).eval()


@pytest.fixture
def stream() -> list[int]:
    return torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def answers(system: Any, stream: list[int], prefix: tuple[int, ...] = ()) -> torch.Tensor:
    from longmem.evaluation.systems import Question

    system.read([stream])
    found = system.score([Question([5, 6, 7], [[1, 2], [3]]), Question([8], [[4], [9, 9]])], list(prefix))
    return torch.tensor([each for answer in found for one in answer.candidates for each in one.logprobs])


@pytest.mark.parametrize("prefix", [(), (11, 12)])
def test_a_kept_cache_answers_as_the_whole_text_run_anew(model, stream, prefix):
    from systems import FullWindow, KeptCache, Recomputed

    kept = KeptCache("kept", model, window=64)
    expected = answers(Recomputed("all", model, window=64), stream, prefix)
    torch.testing.assert_close(answers(kept, stream, prefix), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(kept, stream, prefix), expected, rtol=1e-4, atol=1e-4)  # it was not changed
    assert kept.kept_bytes == 199 * 4 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, dim, bytes
    assert (answers(FullWindow("window", model, window=64), stream, prefix) - expected).abs().max() > 1e-3


def test_a_cache_of_a_text_that_is_too_long_holds_its_end(model):
    from systems import KeptCache, Recomputed

    long = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = answers(Recomputed("all", model, window=64), long)
    torch.testing.assert_close(answers(KeptCache("kept", model, window=64), long), expected, rtol=1e-3, atol=1e-3)


def test_a_kept_cache_begins_with_the_start_tokens_and_is_what_is_computed_anew(backbone, stream):
    from systems import KeptCache, Recomputed

    from longmem import LongMemForCausalLM

    model = LongMemForCausalLM.from_backbone(backbone, segment_length=64, start_token_ids=[7, 8]).eval()
    expected = answers(Recomputed("all", model, window=64), stream)
    torch.testing.assert_close(answers(KeptCache("kept", model, window=64), stream), expected, rtol=1e-3, atol=1e-3)


def test_sinks_stand_before_the_end_of_the_text(model, stream):
    from systems import SinksAndWindow

    system = SinksAndWindow("sinks", model, window=64)
    system.read([stream])
    _, ids = system.context([1, 2], 10, [])
    assert ids == [*stream[:4], *stream[-48:], 1, 2]


def test_nearest_states_change_predictions_by_their_share(model, stream):
    import dataclasses

    from systems import FullWindow, KnnLm

    system = KnnLm("knn", model, window=64)
    plain = answers(FullWindow("window", model, window=64), stream)
    assert (answers(system, stream) - plain).abs().max() > 1e-3
    assert system.kept_bytes == 199 * (32 * 4 + 8)
    mixture, ids = system.context([], 10, [])
    output = dataclasses.replace(mixture, share=0.0)(torch.tensor([ids]), use_cache=False, logits_to_keep=3)
    expected = model.backbone(torch.tensor([ids])).logits[:, -3:].log_softmax(dim=-1)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    # A state that is in the store finds itself, and what came next.
    system.read([stream[:64]])
    own, _ = system.context([], 10, [])
    sharp = dataclasses.replace(own, share=1.0, temperature=1e-6)
    logits = sharp(torch.tensor([stream[:64]]), use_cache=False, logits_to_keep=64).logits
    assert logits[0, :63].argmax(dim=-1).tolist() == stream[1:64]


@pytest.mark.parametrize("name", ["Pressed", "ExpectedAttention"])
def test_pressed_caches_have_the_size_of_the_window(model, stream, name):
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress does not install beside the newest transformers; from a folder of its own it runs")
    import systems

    system = getattr(systems, name)(name, model, window=128)
    found = answers(system, stream)
    assert found.isfinite().all()
    assert system._encoded[1].get_seq_length() == 128
    assert (found - answers(systems.KeptCache("kept", model, window=128), stream)).abs().max() > 1e-3


def test_dense_passages_are_those_nearest_to_the_question(model, monkeypatch):
    import systems

    calls = []

    class Words:
        """An embedding model of letters: one state for each, its own direction."""

        def __call__(self, **inputs: Any) -> Any:
            calls.append(len(inputs["input_ids"]))
            states = torch.nn.functional.one_hot(inputs["input_ids"], 256).float()
            return type("Output", (), {"last_hidden_state": states})

    def letters(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        ids = [[min(255, ord(letter)) for letter in text] for text in texts]
        size = max(map(len, ids))
        rows = torch.tensor([[*each, *[0] * (size - len(each))] for each in ids])
        return {"input_ids": rows, "attention_mask": (rows > 0).long()}

    monkeypatch.setattr(systems, "embedding_model", lambda: (letters, Words()))
    passages = [model.tokenizer(text)["input_ids"] for text in ("aaaa", "zzz", "azaz", "zzz")]
    ranker = systems.DenseRanker(model)
    ranker.index(passages)
    assert ranker.scores(passages[1]).argsort(descending=True).tolist()[-1] == 0
    vectors = ranker.vectors
    ranker.index(passages[:2])
    assert calls == [3, 1]  # equal passages once, the question, and nothing that was known
    torch.testing.assert_close(ranker.vectors, vectors[:2])


def systems_of(model: Any) -> dict[str, Any]:
    import systems

    from longmem.evaluation.systems import Banks, MemorySystem, RetrievalSystem

    kinds = (systems.FullWindow, systems.Recomputed, systems.KeptCache, systems.SinksAndWindow, systems.KnnLm)
    made = {kind.__name__: kind(kind.__name__, model, window=64) for kind in kinds}
    made |= {name: MemorySystem(name, model, banks=Banks(model), window=64) for name in ("on", "off")}
    made["bm25"] = RetrievalSystem("bm25", model, window=64, passage_tokens=16, query_tokens=None)
    return made


def case_of(stream: list[int], prefix: tuple[int, ...], local_tokens: int) -> Any:
    from longmem.evaluation.task import Case, Item

    items = [
        Item(name="one", token_ids=[5, 6, 7], candidates=[[1, 2], [3]]),
        Item(name="two", token_ids=stream[20:24], candidates=[[4], [9, 9]]),
    ]
    return Case(name="case", group="g", items=items, memory=[stream], prefix=prefix, local_tokens=local_tokens)


class Asks:
    """As much of a task as asking needs."""

    def prefix(self, system: Any, case: Any, item: Any) -> Any:
        return case.prefix

    def answered(self, model: Any, answer: Any) -> dict[str, Any]:
        return {"logprobs": [each.total for each in answer.candidates]}


@pytest.mark.parametrize("prefix", [(), (11, 12)])
@pytest.mark.parametrize("local_tokens", [0, 20])
def test_what_is_shared_changes_no_answer(model, stream, prefix, local_tokens):
    from run_compare import ask_case

    from longmem.evaluation.systems import Question

    for name, system in systems_of(model).items():
        case = case_of(stream, prefix, local_tokens)
        found = [record["logprobs"] for _, record in ask_case(Asks(), system, case, case.items)]
        system.read([stream], (), local_tokens)
        whole = system.score([Question(item.token_ids, item.candidates) for item in case.items], prefix)
        expected = [[each.total for each in answer.candidates] for answer in whole]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4, msg=name)


def test_costs_are_those_of_each_system(model, stream):
    from run_compare import ask_case

    costs = {}
    for name, system in systems_of(model).items():
        case = case_of(stream, (), 0)
        costs[name] = [record for _, record in ask_case(Asks(), system, case, case.items)]
        assert {record["fed_tokens"] for record in costs[name]} == {200}
    kept = {name: own[0]["kept_bytes"] for name, own in costs.items()}
    assert (kept["FullWindow"], kept["bm25"], kept["KeptCache"], kept["off"]) == (64 * 4, 200 * 4, 199 * 512, 64 * 4)
    assert kept["on"] > 200 * 32
    fed = {name: own[0]["fed_run"] for name, own in costs.items()}
    assert (fed["FullWindow"], fed["bm25"], fed["off"]) == (0, 0, 0)
    assert (fed["KeptCache"], fed["KnnLm"]) == (199, 200)
    assert fed["on"] >= 200
    run = {name: [record["tokens_run"] for record in own] for name, own in costs.items()}
    # The last question's candidates: two rows of one token and of two, behind four of the question; off has nothing before.
    assert run["off"] == [2 + 2 * 2, 3 + 2 * 2]
    assert run["FullWindow"][0] == 58 + run["off"][0]  # the window is a part of each question's costs
    assert run["KeptCache"][0] == 1 + run["off"][0]


def test_texts_that_are_the_same_are_read_once(stream):
    import dataclasses

    from run_compare import in_turn, merged

    one = case_of(stream, (), 0)
    two = dataclasses.replace(one, name="two", group="other")
    three = dataclasses.replace(one, name="three", memory=[stream[:9]])
    both, alone = merged([one, two, three])
    assert [item.name for item in both.items] == ["case/one", "case/two", "two/one", "two/two"]
    assert [item.about["group"] for item in both.items] == ["g", "g", "other", "other"]
    assert len(alone.items) == 2
    names = [[item.name for item in case.items] for case in in_turn([both, alone], 3, 4, 0)]
    more = [[item.name for item in case.items] for case in in_turn([both, alone], 3, 5, 0)]
    assert sum(map(len, names)) == 4
    assert [name for own in more for name in own][:4] == [name for own in names for name in own]


def test_facts_share_a_text_and_each_stands_in_it(model):
    from work import WORK

    small = type(
        "Model", (), {"tokenizer": model.tokenizer, "config": type("C", (), {"segment_length": 256, "chunk_size": 4})}
    )
    (case,) = WORK["recall"].make("", 1024, 128).cases(small)
    text = model.tokenizer.decode([token for passage in case.memory for token in passage])
    assert len(case.items) == 12
    assert sum(map(len, case.memory)) == 4096
    for item in case.items:
        assert item.about["values"][item.about["right"]] in text
        assert len(item.candidates) == 5
    wrong = [value for item in case.items for value in item.about["values"]]
    assert sum(value in text for value in wrong) > len(wrong) // 2  # they are values of other facts


def test_stories_are_asked_what_all_of_them_answers():
    from work import stories_of

    text = """1 Mary went to the garden.
2 John went to the hall.
3 Where is Mary? \tgarden\t1
4 Where is John? \thall\t2
5 Mary went to the office.
6 Where is Mary? \toffice\t5
1 Daniel went to the hall.
2 Where is Daniel? \thall\t1
"""
    (lines, asked), (_, last) = stories_of(text)
    assert lines == ["Mary went to the garden.", "John went to the hall.", "Mary went to the office."]
    assert dict(asked) == {"Where is John?": "hall", "Where is Mary?": "office"}
    assert last == [("Where is Daniel?", "hall")]


WORK_OF_TEXTS = ("books", "technical")


def test_texts_of_other_splits_are_not_read(model, tmp_path):
    from work import WORK

    for name in ("seen", "unseen"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} rain fell on the old house. " * 200)
    manifest = [{"file": "seen.txt", "split": "train"}, {"file": "unseen.txt", "split": "test"}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    read = {
        name: {case.group for case in WORK[name].make(str(tmp_path), 256, 128).cases(model)} for name in WORK_OF_TEXTS
    }
    assert read == {"books": {"unseen"}, "technical": {"seen", "unseen"}}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    import run_compare

    monkeypatch.setattr(sys, "argv", ["run_compare.py", *arguments])
    run_compare.main()


@pytest.fixture
def cells(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the folder of cells of two books, and what asks them with so many trials."""
    book = tmp_path / "books"
    book.mkdir()
    (book / "2026-01-01-one.txt").write_text("The rain fell on the old house. " * 60)
    (book / "two.txt").write_text("A dog sat in the rain. " * 90)
    output = tmp_path / "cells"

    def ask(trials: int) -> None:
        common = [
            "--model",
            backbone,
            "--dtype",
            "float32",
            "--size",
            "256",
            "--window",
            "128",
            "--trials",
            str(trials),
        ]
        names = ["backbone", "kept-cache", "sinks", "knn-lm", "released", "longmem"]
        run(monkeypatch, str(output), *common, "--cells", "books", *names, "--data", f"books={book}")

    return output / "books", ask


def page_of(cells: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import write_comparison

    page = cells.parents[1] / "comparison.md"
    monkeypatch.setattr(sys, "argv", ["write_comparison.py", str(cells.parent), str(page)])
    write_comparison.main()
    return page.read_text()


def test_cells_go_on_and_become_a_page(cells, monkeypatch, capsys):
    folder, ask = cells
    ask(1)
    records = (folder / "longmem" / "predictions.jsonl").read_text()
    assert len(records.splitlines()) == 1
    ask(2)
    more = (folder / "longmem" / "predictions.jsonl").read_text()
    assert more.startswith(records)
    assert len(more.splitlines()) == 2
    record = json.loads(more.splitlines()[1])
    assert record["fed_tokens"] > 100 and record["fed_run"] > 100 and record["kept_bytes"] > 5_000  # noqa: PT018
    assert not {"question", "values", "prediction", "likeliest"} & record.keys()  # texts stay where they are
    assert (folder / "longmem" / "environment.json").exists()
    capsys.readouterr()
    ask(2)
    assert capsys.readouterr().out.count("0 asked") == 6
    (folder.parent / "why.md").write_text("Because of the rain.")
    text = page_of(folder, monkeypatch)
    assert "| LongMem" in text
    assert "Questions: 2" in text
    assert "decide nothing about quality" in text
    assert text.index("LongMem loses") < text.index("Because of the rain.") < text.index("![") < text.index("## ")
    pictures = sorted(each.name for each in (folder.parents[1] / "pictures").iterdir())
    assert pictures == ["comparison-bytes.png", "comparison-time.png", "comparison.png"]


def test_a_cell_depends_on_its_own_system_alone(cells, monkeypatch, capsys):
    folder, ask = cells
    ask(1)
    config = {name: json.loads((folder / name / "config.json").read_text()) for name in ("backbone", "longmem")}
    assert not {"side_network", "encoder", "model"} & config["backbone"].keys()
    changed = {**config["longmem"], "side_network": "of other weights"}
    (folder / "longmem" / "config.json").write_text(json.dumps(changed))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ask(2)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "books, longmem: ValueError: `output` must be a new folder" in said
    assert said.count("1 asked") == 5  # all others went on
    changed = {**config["backbone"], "data": {"dated": "others"}}
    (folder / "backbone" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="must be asked the same, but"):
        page_of(folder, monkeypatch)


def cell(work: str, values: list[float], seconds: float = 1.0, kept: int = 100) -> Any:
    from work import WORK
    from write_comparison import cell_of

    costs = {"seconds": seconds, "feeding_seconds": seconds, "fed_tokens": 1000, "fed_run": 1000, "tokens_run": 10}
    costs |= {"kept_bytes": kept, "peak_bytes": 0, "text": "one"}
    measure = WORK[work].measure
    return cell_of(work, [{measure: value, "group": str(number), **costs} for number, value in enumerate(values)])


def test_what_the_intervals_decide_is_said_first():
    from write_comparison import overview, verdict

    low, high, mixed = [0.0] * 12, [1.0] * 12, [0.0, 1.0] * 6
    won = {"longmem": cell("recall", high), "bm25": cell("recall", low), "off": cell("recall", high)}
    lost = {"longmem": cell("recall", low), "bm25": cell("recall", high, 0.5, 10)}
    open_ = {"longmem": cell("recall", mixed), "bm25": cell("recall", mixed[::-1])}
    few = {"longmem": cell("recall", high[:4]), "bm25": cell("recall", low[:4])}
    assert [verdict(each, "recall") for each in (won, lost, open_, few)] == ["wins", "loses", "undecided", "undecided"]
    text = "\n".join(overview({"recall": lost, "babi": {"longmem": cell("babi", high), "sinks": cell("babi", low)}}))
    assert "loses**, and the interval says so: recall, 4k (passages by BM25)" in text
    assert "wins**, and the interval says so: bAbI, stories in long text (sinks and window)" in text
    assert "cheaper in all** (feeding, answering, bytes): recall, 4k (passages by BM25)" in text
    assert "nowhere" in "\n".join(overview({"recall": few}))


def test_names_that_are_not_known_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, str(tmp_path), "--cells", "recal")
    assert "got ['recal']" in capsys.readouterr().err
