"""The policy table: what is drawn, what each system does to a bank, and how recovered and cost are computed."""

import dataclasses

import pytest
import torch

from experiments.learned_recall.task import RecallTask
from experiments.staleness.figures import family
from experiments.staleness.library import draw_library, draw_stream
from experiments.staleness.policies import ask, draw_questions_about, run_system, write_library
from experiments.staleness.policy_tables import compare_systems, policy_sections, summarize_policies
from experiments.staleness.readers import kept_model, tune_backbone
from experiments.staleness.settings import LibrarySettings, ReaderSettings, StalenessSettings
from experiments.staleness.systems import SYSTEMS, PolicySystem, weighted

TASK = RecallTask(num_keys=40, num_values=8, num_words=16, distractor_share=0.2)
LIBRARY = LibrarySettings(
    num_documents=3, num_pairs=6, min_tokens=300, max_tokens=520, num_windows=4, num_questions=3, words_before=4
)
READERS = ReaderSettings(
    backbone_steps=2, side_steps=1, practice_distance=64, tune_steps=1, tune_rate=0.01, side_tune_steps=1
)
EXACT = {"rtol": 0, "atol": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models():
    return {name: kept_model(name, TASK, READERS, 0) for name in ("writer", "swap")}


@pytest.fixture(scope="module", params=["shared", "selected"])
def case(request, models):
    library, stream = draw_questions_about(TASK, LIBRARY, request.param, 0)
    written = write_library(models["writer"], library)

    def run(system):
        system = SYSTEMS[system] if isinstance(system, str) else system
        return run_system(system, written, models["swap"], library, stream, request.param)

    return run, written, library, stream, request.param


# What is drawn.


@pytest.mark.parametrize("asking", ["shared", "selected"])
def test_a_document_has_its_pairs_where_it_says_and_its_keys_nowhere_else(asking):
    library = draw_library(TASK, LIBRARY, asking, generator())
    for document in library:
        ids = document.token_ids
        assert LIBRARY.min_tokens <= len(ids) <= LIBRARY.max_tokens
        torch.testing.assert_close(ids[document.starts], document.keys, **EXACT)
        torch.testing.assert_close(ids[document.starts + 1], document.values, **EXACT)
        assert torch.isin(ids, document.keys).sum() == len(document.keys)
        assert (ids < TASK.num_keys).sum() > 2 * len(document.keys)  # there are distractors
    assert len({document.document_id for document in library}) == len(library)


def test_documents_share_their_keys_only_where_questions_name_the_document():
    apart, alike = (
        [
            set(document.token_ids[document.token_ids < TASK.num_keys].tolist())
            for document in draw_library(TASK, LIBRARY, asking, generator())
        ]
        for asking in ("shared", "selected")
    )
    owned = [set(document.keys.tolist()) for document in draw_library(TASK, LIBRARY, "shared", generator())]
    for number, own in enumerate(owned):
        assert all(own.isdisjoint(other) for place, other in enumerate(apart) if place != number)
    assert alike[0] & alike[1]


def test_questions_end_with_a_key_whose_answer_is_at_its_place():
    library = draw_library(TASK, LIBRARY, "shared", generator())
    settings = dataclasses.replace(LIBRARY, num_windows=30, asked_share=0.4)
    stream = draw_stream(TASK, settings, library, generator(1))
    by_name = {document.document_id: document for document in library}
    for window in stream:
        document = by_name[window.document_id]
        assert window.questions.shape == (3, LIBRARY.words_before + 1)
        torch.testing.assert_close(document.token_ids[window.places], window.values, **EXACT)
        torch.testing.assert_close(document.token_ids[window.places - 1], window.questions[:, -1], **EXACT)
        assert len(set(window.places.tolist())) == 3
    assert len({window.document_id for window in stream}) == 1  # 0.4 of three documents
    everything = draw_stream(TASK, dataclasses.replace(settings, asked_share=1.0), library, generator(1))
    assert len({window.document_id for window in everything}) == 3


# What systems do.


def test_never_costs_nothing_and_eager_bounded_and_a_new_bank_are_the_same_to_the_last_bit(case):
    run, written, _, stream, _ = case
    never, eager, bounded, fresh = (run(name) for name in ("never", "eager", "bounded", "fresh"))
    assert never["tokens"] == fresh["tokens"] == [0] * len(stream)
    assert eager["tokens"] == bounded["tokens"] == [written.num_tokens] * len(stream)
    for other in (bounded, fresh):
        assert (other["bank"], other["losses"], other["found"]) == (eager["bank"], eager["losses"], eager["found"])
    assert never["bank"] != eager["bank"]
    assert never["losses"] != eager["losses"]
    assert run("never")["bank"] == never["bank"]  # nothing has changed the bank that was written
    assert len(eager["losses"]) == len(eager["right"]) == len(eager["found"]) == 3 * len(stream)


def test_policies_that_act_over_time_end_where_they_should(case):
    run, written, _, stream, asking = case
    sweep, lazy, swept = (run(name) for name in ("sweep", "lazy", "lazy-sweep"))
    for record in (sweep, lazy, swept):
        assert record["tokens"] == sorted(record["tokens"])
        assert 0 < record["tokens"][-1] <= written.num_tokens
    assert sweep["tokens"][0] < written.num_tokens
    if asking == "selected":  # documents that nobody asks about stay as they are
        assert lazy["tokens"][-1] < swept["tokens"][-1]


def test_a_budget_of_lazy_is_kept_in_every_window(case):
    run, _, _, _, _ = case
    everything, bought = run("lazy"), run(PolicySystem("", "lazy:budget_tokens=260"))
    assert bought["tokens"][0] <= 260 < everything["tokens"][0]


def test_what_is_read_as_it_is_and_swept_ends_up_fresh(case):
    run, written, _, stream, _ = case
    swept, never = run("swept"), run("never")
    assert (
        swept["losses"][: len(swept["losses"]) // len(stream)] == never["losses"][: len(never["losses"]) // len(stream)]
    )
    assert swept["tokens"] == sorted(swept["tokens"])
    assert 0 < swept["tokens"][-1] <= written.num_tokens


def test_a_masked_bank_is_read_as_none(case, models):
    run, _, _, stream, _ = case
    masked = run("mask")
    assert masked["tokens"][-1] == 0
    assert not any(masked["found"])
    with torch.no_grad():
        logits = models["swap"](stream[0].questions, logits_to_keep=1).logits[:, -1]
    losses = torch.nn.functional.cross_entropy(logits, stream[0].values, reduction="none")
    torch.testing.assert_close(torch.tensor(masked["losses"][:3]), losses)


def test_maps_are_used_where_nobody_judges_them_and_recorded_with_what_was_found(case):
    run, written, _, _, _ = case
    unjudged, judged = run("affine-5-unjudged"), run("affine-5")
    assert unjudged["mapped"] > 0
    assert unjudged["tokens"][-1] < written.num_tokens
    assert unjudged["gains"] == judged["gains"]
    assert len(judged["neighbours"]) == 1
    assert run("never")["gains"] == []


def test_a_stale_weight_lowers_attention_to_memory_while_the_system_runs(case, models):
    run, _, _, _, _ = case
    before = [
        layer.memory_bias.clone() for layer in models["swap"].side_network.layers if layer.memory_bias is not None
    ]
    assert run("stale-weight")["losses"] != run("never")["losses"]
    assert run(PolicySystem("never", stale_weight=1.0))["losses"] == run("never")["losses"]
    after = [layer.memory_bias for layer in models["swap"].side_network.layers if layer.memory_bias is not None]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    with weighted(models["swap"], 0.5):
        inside = [layer.memory_bias for layer in models["swap"].side_network.layers if layer.memory_bias is not None]
        torch.testing.assert_close(inside[0], before[0] + torch.tensor(0.5).log())


def test_an_answer_is_found_when_the_last_token_reads_its_chunk(models):
    library, stream = draw_questions_about(TASK, dataclasses.replace(LIBRARY, num_questions=6), "selected", 3)
    model = models["swap"]
    bank = write_library(model, library)
    _, _, found = ask(model, bank, stream[0], "selected")
    moved = dataclasses.replace(stream[0], places=stream[0].places + 100_000)
    assert not ask(model, bank, moved, "selected")[2].any()
    rows = model(stream[0].questions, memory=bank.select(stream[0].document_id), output_memory_reads=True)
    read = [{place.start for place in bank.locate(each)} for each in rows.memory_reads[0].rows[:, 0, -1]]
    assert found.tolist() == [place in places for place, places in zip(stream[0].places.tolist(), read, strict=True)]


def test_a_model_that_was_kept_is_the_one_that_was_trained(tmp_path, models):
    trained = kept_model("fine-tune", TASK, READERS, 0, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"writer.safetensors", "fine-tune.safetensors"}
    again = kept_model("fine-tune", TASK, READERS, 0, tmp_path)
    assert again.encoder_fingerprint() == trained.encoder_fingerprint()
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, trained(ids).logits, **EXACT)
    writer = kept_model("writer", TASK, READERS, 0, tmp_path)
    assert writer.encoder_fingerprint() == models["writer"].encoder_fingerprint() != trained.encoder_fingerprint()


def test_tuning_leaves_the_backbone_as_it_was(models):
    before = models["writer"].encoder_stamp(exact=True).digest
    tuned = tune_backbone(models["writer"].backbone, TASK, 1, 0.01, 0)
    assert models["writer"].encoder_stamp(exact=True).digest == before
    assert not torch.equal(tuned.model.embed_tokens.weight, models["writer"].backbone.model.embed_tokens.weight)


# Tables.


def record(system, seed, losses, tokens, **others):
    values = {
        "right": [True, False],
        "found": [True, True],
        "seconds": 2.0,
        "bank": system,
        "gains": [],
        "neighbours": [],
    }
    place = {"regime": "swap", "asking": "shared", "seed": seed, "system": system}
    return {**place, "losses": losses, "tokens": tokens, "mapped": 0, **values, **others}


def test_recovered_and_cost_are_shares_of_what_eager_does():
    records = [
        record("never", 0, [4.0, 4.0], [0, 0]),
        record("never", 1, [6.0, 6.0], [0, 0]),
        record("eager", 0, [0.0, 0.0], [100, 100]),
        record("eager", 1, [2.0, 2.0], [300, 300]),
        record("lazy", 0, [4.0, 0.0], [10, 50]),
        record("lazy", 1, [4.0, 2.0], [10, 100], bank="eager"),
    ]
    found = compare_systems(records)
    assert found["never"]["recovered"][0] == 0
    assert found["never"]["cost"][0] == 0
    assert found["eager"]["recovered"] == (1, 1, 1)
    assert found["eager"]["cost"] == (1, 1, 1)
    lazy = found["lazy"]
    assert lazy["per_seed"]["recovered"] == [0.5, 0.75]
    assert lazy["per_seed"]["cost"] == [0.5, 1 / 3]
    assert lazy["recovered"][0] == pytest.approx((2 + 3) / (4 + 4))  # the ratio of the means over seeds
    assert lazy["recovered_later"] == (1, 1, 1)
    assert lazy["cost"] == pytest.approx((150 / 400, 1 / 3, 0.5))
    assert lazy["loss"] == (2.5, 2.0, 3.0)
    assert lazy["accuracy"] == (0.5, 0.5, 0.5)
    assert not lazy["same_bank_as_eager"]
    assert found["eager"]["same_answers_as_eager"]
    text = policy_sections(summarize_policies(records))
    assert [row[0] for row in text[0][1]] == ["", "never", "eager", "lazy"]
    assert text[0][1][3][1:6] == [
        "2.500 (2.000 to 3.000)",
        "50.0",
        "0.62 (0.50 to 0.75)",
        "1.00",
        "0.38 (0.33 to 0.50)",
    ]


def test_where_eager_gains_nothing_nothing_can_be_recovered():
    records = [record(name, seed, [1.0, 1.0], [10, 10]) for name in ("never", "eager", "lazy") for seed in (0, 1)]
    found = compare_systems(records)
    assert found["lazy"]["recovered"] is None
    assert policy_sections(summarize_policies(records), intervals=False)[0][1][3][3] == ""
    with pytest.raises(ValueError, match="seeds \\[0, 1\\] of every system, got others of 'lazy'"):
        compare_systems(records[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("never", "lazy")}, "`systems` must name never, eager"),
        ({"systems": ("never", "eager", "eagre")}, "eagre"),
        ({"seeds": ()}, "`seeds` must name at least one"),
        ({"num_keys": 20}, "more than the 32 pairs"),
        ({"num_keys": 160}, "must be more than 160"),
        ({"learning_systems": ("unfrozen",)}, "`learning_systems` must name some of frozen"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StalenessSettings(output="x", **changes)
    StalenessSettings(output="x", num_keys=160, askings=("selected",))


@pytest.mark.parametrize(
    ("changes", "message"), [({"num_questions": 9}, "at most `num_pairs`"), ({"min_tokens": 4000}, "to `max_tokens`")]
)
def test_libraries_that_cannot_be_drawn_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LibrarySettings(**changes)


def test_every_system_has_a_color_in_the_figure():
    assert all(family(name) for name in SYSTEMS)
