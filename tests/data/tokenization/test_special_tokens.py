"""Names of special tokens in a text are text, for every kind of tokenizer, and nothing else changes."""

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer, special_ids
from flexolmo_jax.errors import UserError
from tests.support import kinds

EOS = "</s>"


def around(name):
    return [name, f"a {name} b", f"the{name}end{name}", f"{name}{name} {name.lower()} {name.upper()}"]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_no_text_becomes_a_special_token(kind, tmp_path):
    tokenizer = kinds.load(kind, tmp_path)
    special = special_ids(tokenizer.backend) | {"EOS": tokenizer.eos_id}
    unknown = {name for name in special if name.lower() in ("<unk>", "[unk]")}
    forbidden = {id for name, id in special.items() if name not in unknown}
    for name in special.keys() - unknown | {tokenizer.backend.id_to_token(tokenizer.eos_id)}:
        for text in around(name):
            assert forbidden.isdisjoint(kinds.ids(tokenizer, text))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_ids_of_other_texts_are_those_of_the_file(kind, tmp_path):
    tokenizer = kinds.load(kind, tmp_path)
    file = tokenizers.Tokenizer.from_str(kinds.make(kind))
    file.no_truncation()
    file.no_padding()
    texts = kinds.TEXTS if kind == "wordpiece_without_unknown" else (*kinds.TEXTS, *kinds.HARD)
    for text in texts:
        assert tokenizer.encode(text).tolist() == file.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == max(file.get_vocab().values()) + 1


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_decoding_skips_eos_and_the_file_is_kept(kind, tmp_path):
    tokenizer = kinds.load(kind, tmp_path)
    ids = kinds.ids(tokenizer, kinds.TEXTS[0])
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == tokenizer.decode(ids)
    tokenizer.save(tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_text() == kinds.make(kind)
    assert load_tokenizer(tmp_path / "saved.json").digest == tokenizer.digest


def bpe(**settings):
    vocabulary = {name: id for id, name in enumerate(["<", "/", "s", ">", "</", "s>", EOS, "a", EOS + "a"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), (EOS, "a")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **settings))
    backend.decoder = decoders.Fuse()
    return backend


@pytest.mark.parametrize("settings", [{}, {"ignore_merges": True}, {"dropout": 0.9}])
@pytest.mark.parametrize("marked", [True, False])
def test_merges_do_not_make_eos(settings, marked, tmp_path):
    backend = bpe(**settings)
    backend.add_special_tokens([EOS] if marked else [])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode(EOS).tolist() == [4, 5]
    assert tokenizer.encode(f"a{EOS}a").tolist() == [7, 4, 5, 7]
    assert tokenizer.decode([7, 6, 4, 5]) == "a</s>"


@pytest.mark.parametrize("inside", [True, False])
def test_eos_that_is_added_but_not_marked_special(inside, tmp_path):
    backend = bpe() if inside else kinds.KINDS["bpe_with_suffix"]()
    eos = EOS if inside else "[EOS]"
    backend.add_tokens([AddedToken(eos, special=False, normalized=True)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", *([] if inside else ["[EOS]"]))
    for text in around(eos):
        assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_what_an_error_says_to_do_is_enough(tmp_path):
    """A word is refused as EOS until the file marks it as special."""
    file = tmp_path / "tokenizer.json"
    for kind in ("word_level", "wordpiece", "unigram", "bpe_without_unknown"):
        backend = kinds.KINDS[kind]()
        word = next(name for name in ("dog.", "the", "▁the") if backend.token_to_id(name) is not None)
        file.write_text(backend.to_str())
        with pytest.raises(UserError, match=f"encodes the plain text '{word}' as its EOS; mark that token special in"):
            load_tokenizer(file, word)
        backend.add_special_tokens([word])
        file.write_text(backend.to_str())
        tokenizer = load_tokenizer(file, word)
        assert tokenizer.eos_id not in tokenizer.encode(f"x {word.strip('▁')} y the dog. the")


@pytest.mark.parametrize("kind", ["word_level", "unigram"])
def test_eos_that_stands_for_unknown_text_is_refused(kind, tmp_path):
    unknown = "[UNK]" if kind == "word_level" else "<unk>"
    backend = kinds.KINDS[kind]()
    backend.add_special_tokens([unknown])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(UserError, match="is EOS and stands for unknown text too; choose another with eos_token"):
        load_tokenizer(tmp_path / "tokenizer.json", unknown)


def test_eos_that_shares_its_id_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([EOS])  # takes the next id after as many tokens, which is that of "b"
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(UserError, match="has the id 2 for '</s>', its EOS, and for 'b'; fix its ids"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("content", [" ", "e", "\\", "🙂"])
def test_strip_is_what_it_is_where_it_does_not_fail(start, stop, content, tmp_path):
    words = ["", content, 2 * content, f"a{content}b", f"{content}a{2 * content}", f"{3 * content}a{4 * content}"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate([*words, EOS])}))
    backend.add_special_tokens([EOS])
    backend.decoder = decoders.Strip(content, start, stop)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert [tokenizer.decode([id]) for id in (0, 1)] == ["", ""]
    for id in range(3, len(words)):
        assert tokenizer.decode([id]) == backend.decoder.decode([words[id]])
