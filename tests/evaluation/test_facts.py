"""Recall at a distance: where facts are, what memory holds of them and of what they replace, how answers count."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Any

import pytest
import torch
from tiny_models import some_text

from longmem import MemoryBank
from longmem.evaluation.runner import answers_of, described
from longmem.evaluation.summary import summarize
from longmem.evaluation.systems import Banks, make_systems, tokenize
from longmem.evaluation.tables import tables_of
from longmem.evaluation.task import Case, best, per_token
from longmem.evaluation.tasks.facts import FactMaker, Facts, FactsSettings, is_exact, validate_sizes, value_item
from longmem.evaluation.tasks.haystack import HaystackBanks, cut, plan_parts, read_haystack

LENGTH = 128  # bytes are tokens: facts need room
SETTINGS = FactsSettings(output="unused", sizes=(512, 1024), items=2, num_choices=4, pairs=2, depths=(0.0, 0.5, 1.0))
TASKS = ("passkey", "key-value", "needle")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def model(backbone_folder: str) -> Any:
    from longmem import LongMemForCausalLM

    return LongMemForCausalLM.from_backbone(backbone_folder, segment_length=LENGTH, num_retrieved_tokens=8).eval()


@pytest.fixture
def text(tmp_path: Any) -> str:
    (tmp_path / "text.txt").write_text(some_text(400, 1))
    return str(tmp_path / "text.txt")


@pytest.fixture
def haystack(model: Any, text: str) -> list[int]:
    return read_haystack(model.tokenizer, text, 1024)


def cases_of(model: Any, text: str, task: str, **changes: Any) -> list[Case]:
    return Facts(dataclasses.replace(SETTINGS, tasks=(task,), haystack=text, **changes)).cases(model)


def stream_of(case: Case) -> list[int]:
    return [token for window in case.memory for token in window]


def facts_of(case: Case, settings: FactsSettings = SETTINGS, text: str = "") -> dict[float, Any]:
    """Return the facts that were drawn with that of a case, by depth."""
    task, size, _, item = case.name.split("/")
    places = settings.windows(int(size), LENGTH)
    generator = random.Random(f"{settings.seed}/{task}/{size}/{item}")
    facts = FactMaker(text, settings).draw(task, generator, len(places))
    return dict(zip(places, facts, strict=True))


def search(memory: Any, layer: int, count: int = 6) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the scores of the best chunks for some queries, and the keys and values of these chunks."""
    queries = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = memory.search(layer, queries, count)
    return found.scores, list(memory.gather(layer, found.rows.flatten(1), found.generation))


def assert_same_memory(one: Any, other: Any) -> None:
    assert one.num_tokens == other.num_tokens
    for layer in other.memory_layers:
        (scores, found), (expected_scores, expected) = search(one, layer), search(other, layer)
        torch.testing.assert_close(scores, expected_scores, **CLOSE)
        for own, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-2, atol=1e-2)  # stored in float16


def bank_of(model: Any, ids: list[int]) -> MemoryBank:
    bank = MemoryBank.for_model(model, index="flat")
    model.memorize(bank, torch.tensor(ids), "text")
    return bank


def banks_of(model: Any, haystack: list[int], settings: FactsSettings = SETTINGS, **options: Any) -> Any:
    """Return the banks of a haystack, in a context that gives their folder back."""
    places = {window for size in settings.sizes for window in settings.windows(size, LENGTH).values()}
    options = {"sizes": settings.sizes, "replaceable": places, "index": "flat", **options}
    return HaystackBanks(model, cut(haystack, LENGTH), **options)


# Facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong_values", ["absent", "present"])
def test_facts_are_drawn_from_a_seed_and_hold_the_right_value_alone(task, wrong_values):
    settings = dataclasses.replace(
        SETTINGS,
        wrong_values=wrong_values,
        pairs=6,
        tasks=(task,),
        needles="alone" if task == "passkey" else "together",
    )
    maker = FactMaker("", settings)
    draw = [list(maker.draw(task, random.Random(seed), 5)) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    whole = "".join(fact.text + fact.after for fact in draw[0])
    for fact in draw[0]:
        right = fact.values[fact.right]
        assert len(set(fact.values)) == settings.num_choices
        assert fact.text.rstrip(".").endswith(right) or task == "passkey"
        assert right in fact.text
        present = [value for value in fact.values if value != right and value in whole]
        expected = settings.num_choices - 1 if wrong_values == "present" and task != "passkey" else 0
        assert len(present) == expected
    questions = {fact.question for fact in draw[0]}
    assert len(questions) == (1 if task == "passkey" else 5)  # else it would not be said which is asked for


def test_values_that_the_haystack_holds_are_not_drawn():
    numbers = set(range(10_000, 100_000)) - set(range(50_000, 50_004))
    text = " ".join(map(str, numbers)) + " fly a kite from the western city wall, said he"
    maker = FactMaker(text, SETTINGS)
    assert "fly a kite from the western city wall" not in maker.activities
    assert len(maker.activities) == len(FactMaker("", SETTINGS).activities) - 1
    (fact,) = maker.draw("passkey", random.Random(0), 1)
    assert set(fact.values) == {str(number) for number in range(50_000, 50_004)}
    most = " ".join(maker.activities[:36])
    with pytest.raises(ValueError, match="`haystack` must leave 6 values for the task needle, got 4"):
        FactMaker(most, SETTINGS)


@pytest.mark.parametrize("task", TASKS)
def test_a_fact_is_where_it_is_said_to_be(model, text, haystack, task):
    cases = cases_of(model, text, task)
    assert len(cases) == len({case.name for case in cases}) == 2 * 3 * 2
    assert [case.axes["size"] for case in cases] == 6 * [512] + 6 * [1024]
    windows, places = cut(haystack, LENGTH), {}
    for case in cases:
        ids, size, (item,) = stream_of(case), case.axes["size"], case.items
        assert len(ids) == size
        fact = facts_of(case)[case.axes["depth"]]
        before, after = (tokenize(model.tokenizer, each) for each in (fact.text, fact.after))
        end = size - item.about["distance"]
        assert ids[end - len(before) : end] == before
        assert model.tokenizer.decode(item.token_ids) == fact.question
        assert [model.tokenizer.decode(each) for each in item.candidates] == [f" {each}" for each in fact.values]
        ((number, own),) = (
            (n, own) for n, own in enumerate(case.memory) if own != windows[n]
        )  # others are as they were
        start = end - len(before) - number * LENGTH
        assert own[:start] == windows[number][:start]  # its neighbours
        rest = own[start + len(before) + len(after) :]
        assert rest == windows[number][start:][: len(rest)]
        places.setdefault(case.axes["depth"], set()).add(number)
    assert places[0] == {3, 7}
    assert places[1] == {0}
    assert cases == cases_of(model, text, task)
    assert cases != cases_of(model, text, task, seed=1)


def test_distances_in_tokens_are_kept_to_within_a_window(model, text):
    cases = cases_of(model, text, "needle", distances=(0, 300, 700))
    assert {(case.axes["size"], case.axes["depth"]) for case in cases} == {
        *((512, distance) for distance in (0, 300)),
        *((1024, distance) for distance in (0, 300, 700)),
    }
    for case in cases:
        assert abs(case.items[0].about["distance"] - case.axes["depth"]) < LENGTH


def test_a_limit_is_of_each_task_and_the_smallest_memory_is_asked_first(model, text):
    settings = dataclasses.replace(SETTINGS, tasks=("passkey", "needle"), haystack=text, limit=4)
    cases = Facts(settings).cases(model)
    assert [case.axes["task"] for case in cases] == 2 * (2 * ["passkey"] + 2 * ["needle"])
    assert [case.axes["size"] for case in cases] == 4 * [512] + 4 * [1024]


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needles", ["alone", "together"])
def test_a_memory_is_that_of_the_text_with_its_facts(model, text, haystack, needles):
    cases = {case.name: case for case in cases_of(model, text, "needle", needles=needles)}
    banks = banks_of(model, haystack)
    for size in SETTINGS.sizes:  # the smaller is the start of the larger
        banks.encode(size)
        case = cases[f"needle/{size}/{'0.5' if size == 512 else '1'}/1"]
        replaced = [own for own, plain in zip(case.memory, cut(haystack, LENGTH), strict=False) if own != plain]
        assert len(replaced) == (3 if needles == "together" else 1)
        assert_same_memory(banks.of(stream_of(case)), bank_of(model, stream_of(case)))
        assert_same_memory(banks.of(haystack[:size]), bank_of(model, haystack[:size]))
    assert banks.encode(1024) == 0
    smaller = banks.of(haystack[:512])  # now that the bank holds more
    assert_same_memory(smaller, bank_of(model, haystack[:512]))
    with pytest.raises(AssertionError):
        assert_same_memory(smaller, banks.of([*cases["needle/512/1/0"].memory[0], *haystack[LENGTH:512]]))
    with pytest.raises(AssertionError, match="named before"):
        banks.of([*haystack[:LENGTH], *haystack[:LENGTH]])  # no fact can be in the second window


def test_a_system_answers_from_these_banks_as_from_any_others(model, text, haystack):
    task = Facts(dataclasses.replace(SETTINGS, tasks=("needle",), haystack=text))
    cases = task.cases(model)
    case, shared = cases[1], banks_of(model, haystack)
    scores = {}
    for name in ("off", "on", "wrong"):
        for banks in (shared, Banks(model, index="flat")):
            (system,) = make_systems([name], model, window=256, banks=banks)
            task.prepare(system, case, task.wrong(case, cases))
            (found,) = answers_of(task, system, dataclasses.replace(case, max_new_tokens=0), case.items, ())
            scores.setdefault(name, []).append(torch.tensor(found["logprobs"]))
    for one, other in scores.values():
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    (off, _), (on, _), (wrong, _) = scores.values()
    assert min((on - off).abs().max(), (on - wrong).abs().max()) > 1e-2


def test_the_wrong_memory_is_the_text_alone(model, text, haystack):
    task = Facts(dataclasses.replace(SETTINGS, tasks=("needle",), haystack=text))
    cases = task.cases(model)
    for case in (cases[0], cases[-1]):
        wrong = task.wrong(case, cases)
        assert wrong.memorized == haystack[: case.axes["size"]]
        assert wrong.memorized != case.memorized


def test_nothing_of_the_window_that_a_fact_replaces_is_read(model, haystack):
    banks = banks_of(model, haystack)
    fact = tokenize(model.tokenizer, some_text(60, 5))[:LENGTH]
    layer = banks.bank.memory_layers[0]
    own = bank_of(model, haystack[7 * LENGTH :])
    queries = own.search_keys(layer)  # every chunk of the window asks for itself
    own_best = own.search(layer, queries, 1).scores
    with_fact = [*haystack[: 7 * LENGTH], *fact]
    clean, replaced = (banks.of(each).search(layer, queries, 1).scores for each in (haystack, with_fact))
    assert (clean >= own_best - 1e-4).all()
    read = banks.of(with_fact)
    rows = read.search(layer, queries[:, :1], 1000).rows
    rows = rows[0, 0][rows[0, 0] >= 0]
    assert len(rows.unique()) == 1024 // 4
    texts = [banks.bank, banks._aside, banks._facts[1]]  # the banks that the shards look into
    places = [(int(shard), place) for shard, place in zip(read.shard_of(rows), read.locate(rows), strict=True) if place]
    windows = [texts[shard].token_ids(place[0])[place[1] : place[2]].tolist() for shard, place in places]
    chunks = [with_fact[start : start + 4] for start in range(0, 1024, 4)]
    assert sorted(windows) == sorted(chunks)
    assert not torch.equal(clean, replaced)


def test_parts_cover_what_is_never_replaced_and_end_with_every_size():
    for counts, replaceable in (([4, 40], {0, 3, 20}), ([8], set()), ([2, 100], {1, 50, 99}), ([3], {0, 1, 2})):
        parts = plan_parts(counts, replaceable)
        windows = [number for start, stop in parts for number in range(start, stop)]
        assert windows == [number for number in range(max(counts)) if number not in replaceable]
        for count in counts:
            assert not any(start < count < stop for start, stop in parts)


def test_a_stopped_encoding_goes_on_in_its_folder(model, haystack, tmp_path):
    folder = str(tmp_path / "bank")

    def opened(ids: list[int] = haystack, **options: Any) -> Any:
        banks = banks_of(model, ids, folder=folder, **options)
        return contextlib.closing(banks.bank), banks

    closing, banks = opened()
    with closing:
        done = banks.encode(512)
    closing, banks = opened()
    with closing:
        more = banks.encode(1024)
        assert done + more > 1024 - 1  # the windows that are put aside are encoded anew
        assert_same_memory(banks.of(haystack), bank_of(model, haystack))
        encoded = sum(info.num_tokens for info in banks.bank.documents())
    closing, banks = opened()
    with closing:
        assert banks.encode(1024) == banks.encoded_tokens == 1024 - encoded
    for options in ({"storage_dtype": "int8"}, {"settings": dataclasses.replace(SETTINGS, sizes=(768,))}):
        with pytest.raises(ValueError, match="`bank_folder` must be new or the bank of a run with the same haystack"):
            opened(**options)
    with pytest.raises(ValueError, match="delete this one"):
        opened(haystack[::-1])


# Texts -------------------------------------------------------------------------------------------------------------


def test_a_haystack_is_read_from_texts_in_their_order(model, tmp_path):
    for name, text in (("b", "then this"), ("a", "first this")):
        (tmp_path / f"{name}.txt").write_text(text)
    ids = read_haystack(model.tokenizer, str(tmp_path), 20)
    assert model.tokenizer.decode(ids) == "first this\n\nthen this"[:20]
    assert len(read_haystack(model.tokenizer, "filler", 333)) == 333
    with pytest.raises(ValueError, match="`sizes` must be at most the tokens of `haystack`, 23"):
        read_haystack(model.tokenizer, str(tmp_path), 24)


# Scores ------------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_likeliest_value_per_token(model, text):
    task, values = Facts(SETTINGS), ("sat", "on the mat", "dog")
    (system,) = make_systems(["off"], model, window=64)
    case = Case(name="a", group="a", items=[value_item(model.tokenizer, "the cat", values, 1)], max_new_tokens=5)
    (found,) = answers_of(task, system, case, case.items, ())
    means = per_token(found)
    for value, mean in zip(values, means, strict=True):
        ids = torch.tensor([tokenize(model.tokenizer, f"the cat {value}")])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[7 - 1 :]
        assert mean == pytest.approx(logprobs.mean().item(), abs=1e-4)
    assert means != sorted(means, reverse=True)  # the second or third is the likeliest
    record = {**described(case, case.items[0]), **found}
    for right in range(3):
        scores = task.score({**record, "right": right})
        assert scores == {"accuracy": float(right == best(means)), "exact": 0.0}
    (unwritten,) = answers_of(task, system, dataclasses.replace(case, max_new_tokens=0), case.items, ())
    assert "prediction" not in unwritten


def test_an_exact_answer_begins_with_the_value():
    assert is_exact("Fly a kite!", "fly a kite")
    assert not is_exact("fly kites", "fly a kite")
    assert not is_exact("", "fly a kite")


def records_of(number: int, size: int, depth: float, on: int, off: int, text: str) -> list[dict[str, Any]]:
    """Return the answers of two systems to a question whose second value is right."""
    common = {"case": f"{number}", "item": f"{number}", "group": f"{number}", "task": "passkey", "size": size}
    common |= {"depth": depth, "values": ["11111", "22222"], "right": 1, "tokens": [5, 5]}
    return [
        {
            **common,
            "system": name,
            "logprobs": [-float(choice), choice - 1.0],
            "prediction": written,
            "seconds": seconds,
        }
        for name, choice, written, seconds in (("off", off, "no", 1.0), ("on", on, text, 2.0))
    ]


def test_accuracies_are_those_counted_by_hand():
    records = [
        *records_of(1, 512, 0, on=1, off=0, text="22222."),
        *records_of(2, 512, 1, on=1, off=1, text="2222"),
        *records_of(3, 1024, 0, on=0, off=0, text="11111"),
        *records_of(4, 1024, 0, on=1, off=1, text="22222 it is"),
    ]
    task = Facts(dataclasses.replace(SETTINGS, systems=("off", "on")))
    metrics = summarize(task, records)
    chosen, written = (metrics["measures"][name]["cells"] for name in ("accuracy", "exact"))

    def values(cells: Any, system: str) -> dict[str, float]:
        return {key: cell["systems"][system]["value"] for key, cell in cells.items() if key != "all"}

    assert chosen["passkey"]["chance"] == metrics["summary"]["chance"] == 50
    assert metrics["summary"]["systems"]["on"]["value"] == 75
    assert chosen["all"]["systems"]["off"]["value"] == 50
    assert written["all"]["systems"]["on"]["value"] == 50
    assert written["all"]["systems"]["off"]["value"] == 0
    assert chosen["all"]["systems"]["on"]["above_baseline"] == 25
    by_depth = {"passkey, 512, 0": 100, "passkey, 512, 1": 100, "passkey, 1024, 0": 50}
    assert values(chosen, "on") == {"passkey": 75, "passkey, 512": 100, "passkey, 1024": 50, **by_depth}
    by_depth = {"passkey, 512, 0": 0, "passkey, 512, 1": 100, "passkey, 1024, 0": 50}
    assert values(chosen, "off") == {"passkey": 50, "passkey, 512": 50, "passkey, 1024": 50, **by_depth}
    heading, rows = tables_of(metrics)[0]
    assert heading == "passkey: accuracy, %, by tokens in memory, chance 50.0 %"
    assert rows[0] == ["", "all (4 items)", "512 (2 items)", "1024 (2 items)"]
    assert [cell.split(" ")[0] for cell in rows[2][1:]] == ["75.0", "100.0", "50.0"]
    for each in records:
        del each["prediction"]
    assert list(summarize(task, records)["measures"]) == ["accuracy"]


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "at least one, and none twice"),
        ({"sizes": (512, 512)}, "`sizes` must be at least one, and none twice"),
        ({"distances": (1024,)}, "smaller than the largest of `sizes`"),
        ({"needles": "together"}, "`needles` must be alone for the task passkey"),
        ({"num_choices": 39}, "`num_choices` must leave a value for every depth"),
        ({"pairs": 600}, "`pairs` must be at most 533"),
        ({"index": "ann"}, "`index` must be one of the known kinds"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_sizes_are_whole_windows_with_room_for_the_facts(model, text):
    validate_sizes(SETTINGS, model)
    with pytest.raises(ValueError, match="multiples of the model's `segment_length`, 128, got 500; the next is 512"):
        validate_sizes(dataclasses.replace(SETTINGS, sizes=(500,)), model)
    together = dataclasses.replace(SETTINGS, tasks=("needle",), needles="together", sizes=(256,))
    with pytest.raises(ValueError, match="must have a window of 128 tokens for every depth"):
        validate_sizes(together, model)
    with pytest.raises(ValueError, match="must hold a whole fact"):
        cases_of(model, text, "key-value", pairs=20)
