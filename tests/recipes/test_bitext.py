"""Aligned verses, pairs shaped like the hub's, and the tokenizer of both languages."""

from __future__ import annotations

import datasets
import pytest

from hf_layerpar.errors import ConfigurationError
from recipes import bitext, offline
from recipes.bitext import aligned_verses, hub_pairs, joint_tokenizer, load_bitext, offline_pairs, with_tokens
from recipes.language import spread
from recipes.offline import DownloadError

LINES = ["Y dijo Dios: Sea la luz: y fué la luz.", "God said, “Let there be light,” and there was light."] * 20


def chapters_are(monkeypatch, english: dict[str, list[str]], spanish: dict[str, list[str]]) -> None:
    monkeypatch.setattr(bitext, "fetch", lambda package: package)
    monkeypatch.setattr(bitext, "chapters", lambda package: english if package is bitext.ENGLISH else spanish)


def test_chapters_that_verses_moved_out_of_are_left_out(monkeypatch):
    english = {"A.1": ["a1", "a2"], "A.2": ["b1", "", "b3"], "A.3": ["c1", "c2"], "A.4": ["d1", "d2"], "A.5": ["e1"]}
    english["X.1"] = ["a book that the other lacks"]
    spanish = {"A.1": ["a1", "a2"], "A.2": ["b1", "", "b3"], "A.3": ["c1", ""], "A.4": ["c2", "d1"], "A.5": ["e1"]}
    chapters_are(monkeypatch, english, spanish)
    assert aligned_verses() == [(verse, verse) for verse in ("a1", "a2", "b1", "b3", "e1")]


def test_pairs_whose_lengths_do_not_fit_are_left_out(monkeypatch):
    chapters_are(monkeypatch, {"A.1": ["x" * 10, "x" * 10, "x" * 18]}, {"A.1": ["y" * 17, "y" * 18, "y" * 10]})
    assert aligned_verses() == [("x" * 10, "y" * 17)]


def test_real_verses_fit():
    pairs = aligned_verses()
    assert len(pairs) > 29_500
    assert pairs[0][0].startswith("In the beginning")
    assert pairs[0][1].startswith("EN el principio")
    assert pairs[-1][0] == "The grace of the Lord Jesus Christ be with all the saints. Amen."
    assert pairs[-1][1].startswith("La gracia de nuestro Señor Jesucristo")
    assert not set("<>") & set("".join(a + b for a, b in pairs))
    for name in ("David", "Jerusalem", "Israel", "Joab"):  # spelled alike in both
        places = [i for i, pair in enumerate(pairs[:-1]) if name in pair[0]]
        here, next_to_it = (sum(name in pairs[i + shift][1] for i in places) / len(places) for shift in (0, 1))
        assert here > 0.85 > 0.6 > next_to_it, name


def test_validation_is_not_in_the_training_pairs(monkeypatch):
    verses = [f"verse {i}" for i in range(2 * bitext.HELD_OUT_EVERY - 1)]
    verses.append("verse 3")  # one that occurs twice
    chapters_are(monkeypatch, {"A.1": [v.upper() for v in verses]}, {"A.1": verses})
    train, validation = offline_pairs("es", "en")
    assert validation["source"] == ["verse 19", "verse 3"]
    assert validation["target"] == ["VERSE 19", "VERSE 3"]
    assert train["source"] == [v for v in verses if v not in ("verse 19", "verse 3")]
    there, _ = offline_pairs("en", "es")
    assert there[0] == {"source": "VERSE 0", "target": "verse 0"}


def test_other_languages_are_refused():
    with pytest.raises(ConfigurationError, match="source_lang='de', target_lang='en': the offline text has en and es"):
        offline_pairs("de", "en")
    with pytest.raises(ConfigurationError, match="source_lang='en'"):
        offline_pairs("en", "en")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(offline.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_tokenizer_is_trained_once_and_alike(cache, monkeypatch, tmp_path_factory):
    first = joint_tokenizer(LINES, 300)
    assert len(first) == 300
    assert [first.pad_token_id, first.eos_token_id, first.bos_token_id] == [1, 2, 0]
    for line in [*LINES[:2], "Ein anderer Satz: ½ 日本"]:
        ids = first(line)["input_ids"]
        assert ids[-1] == first.eos_token_id
        assert first.decode(ids, skip_special_tokens=True).strip() == line
    monkeypatch.setenv(offline.CACHE_VARIABLE, str(tmp_path_factory.mktemp("other")))
    second = joint_tokenizer(LINES, 300)
    assert second.get_vocab() == first.get_vocab()
    assert len(joint_tokenizer([*LINES, "más"], 301)) == 301
    monkeypatch.setattr("tokenizers.Tokenizer.train_from_iterator", None)  # the cache is whole
    assert joint_tokenizer(LINES, 300).get_vocab() == first.get_vocab()


def test_small_vocabulary_is_named(cache):
    with pytest.raises(ConfigurationError, match="vocab_size=258 must be at least 259"):
        joint_tokenizer(LINES, 258)


def test_rows_are_the_pairs_that_are_not_too_long(cache):
    tokenizer = joint_tokenizer(LINES, 300)
    pairs = datasets.Dataset.from_dict({"source": [*LINES[:2], " ", "a"], "target": ["b", *LINES[:2], "c" * 40]})
    longest = max(len(tokenizer(line)["input_ids"]) for line in LINES[:2])
    found = with_tokens(pairs, tokenizer, longest)
    assert found["source"] == LINES[:2]
    assert found["target"] == ["b", LINES[0]]
    assert found["labels"] == [tokenizer(text)["input_ids"] for text in ("b", LINES[0])]
    assert len(with_tokens(pairs, tokenizer, 3)) == 0


def hub(monkeypatch, column: str = "translation") -> None:
    rows = [{"de": f"Satz {i}", "en": f"sentence {i}"} for i in range(50)]

    def load(name, config, split):
        assert (name, config) == ("some/opus", "de-en")
        return datasets.Dataset.from_dict({column: rows[:40] if split == "train" else rows[40:]})

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_hub_pairs(monkeypatch, cache):
    hub(monkeypatch)
    found = load_bitext("some/opus", "de-en", ("de", "en"), None, 280, 20, 30, 4)
    assert (len(found.train), len(found.validation)) == (30, 4)
    assert found.sources == ["Satz 40", "Satz 43", "Satz 46", "Satz 49"]
    assert found.references == ["sentence 40", "sentence 43", "sentence 46", "sentence 49"]
    assert found.train.column_names == ["input_ids", "labels"]
    assert found.tokenizer.decode(found.train[7]["labels"]) == " sentence 7</s>"
    found.tokenizer.save_pretrained(cache / "named")
    named = load_bitext("some/opus", "de-en", ("en", "de"), str(cache / "named"), 0, 20, None, 99)
    assert (len(named.train), len(named.validation)) == (40, 10)
    assert named.references[0] == "Satz 40"


def test_hub_faults_name_the_remedy(monkeypatch, cache):
    hub(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"the languages \['de', 'en'\]; it needs .* target_lang='fr'"):
        hub_pairs("some/opus", "de-en", "en", "fr")
    with pytest.raises(ConfigurationError, match="max_length=2 and max_train_samples=None leave 0 pairs"):
        load_bitext("some/opus", "de-en", ("de", "en"), None, 280, 2, None, 4)
    with pytest.raises(DownloadError, match="Without it one is trained"):
        load_bitext("some/opus", "de-en", ("de", "en"), str(cache / "absent"), 280, 20, None, 4)
    hub(monkeypatch, column="pair")
    with pytest.raises(ConfigurationError, match=r"'some/opus' has the columns \['pair'\]"):
        hub_pairs("some/opus", "de-en", "de", "en")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DownloadError, match="--dataset_name offline"):
        hub_pairs("some/opus", None, "de", "en")


def test_places_are_evenly_spaced():
    assert list(spread(10, 4)) == [0, 3, 6, 9]
    assert list(spread(3, 9)) == [0, 1, 2]
