"""The knowledge index: what is found, what is refused, and how fast."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from finetune.applications.support.index import RERANKED, KnowledgeIndex
from finetune.applications.support.links import Links
from finetune.applications.support.relevance import Relevance
from finetune.data.knowledge import Entry, load_knowledge
from finetune.errors import ResourceError, UsageError


def find(index, reader, text, context=""):
    return index.find(text, context, reader.read(text, context), reader)


def test_the_model_has_the_last_word(reader, entries):
    found = find(KnowledgeIndex.build(entries, reader), reader, "Do you wrap gifts in paper?")
    assert found[0].entry.id == "gifts-01"
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1.0, abs=1e-5)  # all of wrap, gifts, paper


def test_a_second_look_without_weight_is_not_taken(reader, entries):
    index = KnowledgeIndex.build(entries, reader)
    text = "Do you wrap gifts in paper?"
    reading = reader.read(text, "")
    reader.reranked.clear()
    without = index.find(text, "", reading, reader, Relevance(cosine=1.0, reread=0.0))
    assert reader.reranked == []
    with_look = index.find(text, "", reading, reader, Relevance(cosine=1.0, reread=1e-9))
    assert reader.reranked == [len(entries)]
    assert [each.entry for each in without] == [each.entry for each in with_look]


def test_entries_without_a_shared_word_follow_by_meaning_and_not_by_their_place(reader):
    """Else the first lines of a file would be candidates for every question."""
    words = [f"word{i}" for i in range(40)]
    entries = [Entry(str(i), "", word) for i, word in enumerate(words)]
    index = KnowledgeIndex.build(entries, reader)
    reading = reader.read("word37 word38 word39", "")
    found = index.find("unheard", "", reading, reader)
    assert {"37", "38", "39"} <= {each.entry.id for each in found}
    assert len(found) == RERANKED


def test_a_follow_up_is_also_looked_for_by_the_turn_before(reader):
    entries = [Entry(str(i), "", f"and other matter {i}") for i in range(20)] + [Entry("wrap", "", "we wrap in paper")]
    index = KnowledgeIndex.build(entries, reader)
    context = "Customer: do you wrap it\nAgent: yes"
    assert "wrap" in {each.entry.id for each in find(index, reader, "and for the other", context)}


def test_what_is_saved_loads_as_the_same(reader, entries, tmp_path):
    index = KnowledgeIndex.build(entries, reader)
    index.save(tmp_path)
    loaded = KnowledgeIndex.load(tmp_path, reader)
    assert loaded.entries == entries
    assert np.array_equal(loaded.features, index.features)
    assert find(loaded, reader, "returns") == find(index, reader, "returns")


def test_new_entries_answer_at_once_and_only_they_are_read(reader, entries):
    index = KnowledgeIndex.build(entries, reader)
    reader.embedded.clear()
    new = Entry("vouchers-01", "Do vouchers expire?", "Vouchers never expire.")
    rebuilt = KnowledgeIndex.build([new, *entries[1:]], reader, known=index)
    assert reader.embedded == [new.passage]
    assert np.array_equal(rebuilt.features, KnowledgeIndex.build([new, *entries[1:]], reader).features)
    assert find(rebuilt, reader, "vouchers expire")[0].entry.id == "vouchers-01"


def test_features_of_another_model_are_not_kept(reader, entries):
    index = KnowledgeIndex.build(entries, reader)
    reader.embedded.clear()
    reader.fingerprint = "b" * 64
    KnowledgeIndex.build(entries, reader, known=index)
    assert len(reader.embedded) == len(entries)


def test_an_index_of_another_model_is_refused(reader, entries, tmp_path):
    KnowledgeIndex.build(entries, reader).save(tmp_path)
    reader.fingerprint = "b" * 64
    with pytest.raises(
        UsageError, match=r"must be built by this model, bbbbbbbbbbbb, got one of aaaaaaaaaaaa. Build it in"
    ):
        KnowledgeIndex.load(tmp_path, reader)


def test_an_index_of_other_entries_is_refused(reader, entries, tmp_path):
    KnowledgeIndex.build(entries, reader).save(tmp_path)
    path = tmp_path / "knowledge.jsonl"
    kept = path.read_text()
    path.write_text(kept.replace("thirty", "ninety"))
    with pytest.raises(UsageError, match=r"must be what the index was built from, got other text. Build it in"):
        KnowledgeIndex.load(tmp_path, reader)
    path.write_text("".join(kept.splitlines(keepends=True)[:2]))
    with pytest.raises(UsageError, match="as many features as entries, got 3 features, 2 entries, and 3 when it was"):
        KnowledgeIndex.load(tmp_path, reader)


def test_a_damaged_index_is_refused(reader, entries, tmp_path):
    with pytest.raises(
        ResourceError, match=r"must hold an index, got no index.json, knowledge.jsonl, features.safetensors, links.json"
    ):
        KnowledgeIndex.load(tmp_path, reader)
    KnowledgeIndex.build(entries, reader).save(tmp_path)
    (tmp_path / "features.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ResourceError, match=r"features.safetensors: must hold features, got a damaged file"):
        KnowledgeIndex.load(tmp_path, reader)


def test_ten_thousand_entries_are_searched_without_reading_them_all(reader):
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in words) for words in generator.integers(0, 3000, (10_000, 30))]
    entries = [Entry(str(i), "", text) for i, text in enumerate(texts)]
    features = generator.standard_normal((10_000, 384), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = KnowledgeIndex(entries, features, reader.fingerprint, Links.count(reader.intents, []))
    readings = [replace(reader.read(entries[attempt].text, ""), features=features[attempt]) for attempt in range(5)]
    start = time.perf_counter()
    for attempt in range(5):
        found = index.find(entries[attempt].text, "", readings[attempt], reader)
        assert found[0].entry.id == str(attempt)
    assert time.perf_counter() - start < 1.0  # some 0.02 s on a quiet core
    assert reader.reranked == [RERANKED] * 5


def test_the_nearest_by_meaning_are_read_whatever_their_words(reader):
    """Their place in the fused ranking may be low: two middling ranks outweigh a first and a last."""
    entries = [Entry(str(i), "", f"gifts wrap {i}") for i in range(30)] + [Entry("near", "", "paper")]
    index = KnowledgeIndex.build(entries, reader)
    reading = reader.read("paper", "")
    assert "near" in {each.entry.id for each in index.find("gifts wrap", "", reading, reader)}


def test_links_stay_with_the_questions_that_stay(reader, entries, tmp_path):
    """A new answer to the same question is asked for alike; a new question under an old id is not."""
    links = Links.count(reader.intents, [("returns", ["returns-01"]), ("delivery", ["delivery-01"])])
    index = KnowledgeIndex.build(entries, reader, links=links)
    index.save(tmp_path)
    loaded = KnowledgeIndex.load(tmp_path, reader)
    assert loaded.links.to_json() == links.to_json()
    answered = [replace(entry, text="Now all is new.") if entry.id == "returns-01" else entry for entry in entries]
    assert KnowledgeIndex.build(answered, reader, known=loaded).links.entries == ["delivery-01", "returns-01"]
    asked = [replace(entry, title="Do we sing?") if entry.id == "returns-01" else entry for entry in entries]
    assert KnowledgeIndex.build(asked, reader, known=loaded).links.entries == ["delivery-01"]
    assert KnowledgeIndex.build(entries, reader).links.entries == []


def test_a_new_entry_is_weighed_without_what_only_training_knows(reader, entries):
    """No message asked for it yet: what that says of the others must not count against it."""
    links = Links.count(reader.intents, [("returns", [entry.id]) for entry in entries])
    relevance = Relevance(words=5.0, asked=5.0, reread=0.0, unlinked=Relevance(words=2.0, reread=0.0))
    known = KnowledgeIndex.build(entries, reader, links=links)
    new = Entry("vouchers-01", "Do vouchers expire?", "Vouchers never expire.")
    index = KnowledgeIndex.build([*entries, new], reader, known=known)
    text = "do vouchers expire"
    found = index.find(text, "", reader.read(text, ""), reader, relevance)
    assert found[0].entry == new
    assert found[0].score == pytest.approx(1 / (1 + np.exp(-2.0)))
    alike = index.find(text, "", reader.read(text, ""), reader, replace(relevance, unlinked=None))
    others, unchanged = (
        {each.entry.id: each.score for each in scores if each.entry != new} for scores in (found, alike)
    )
    assert others == unchanged


def test_a_knowledge_file_is_what_it_was(reader, entries, tmp_path):
    KnowledgeIndex.build(entries, reader).save(tmp_path)
    assert load_knowledge(str(tmp_path / "knowledge.jsonl")) == entries
