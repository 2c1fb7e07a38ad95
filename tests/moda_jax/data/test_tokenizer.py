"""Tokenizers: round trips, end-of-text, vocabulary, errors; and the command that trains one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.documents import data_config, random_texts, start_python, write_texts

from moda_jax.config import DataConfig
from moda_jax.data.damage import DamageError
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer, check_vocabulary, load_tokenizer
from moda_jax.data.tokenizer.__main__ import main
from moda_jax.data.tokenizer_file import Losses, settle
from moda_jax.data.train_tokenizer import train_bpe


def write_tokenizer(path, vocabulary, special=()):
    """A tokenizer.json that splits at white space and looks words up."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return DataConfig(tokenizer=str(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A BPE of a small corpus, and the data section that uses it."""
    directory = tmp_path_factory.mktemp("bpe")
    words = ["for", "return", "import", "self", "token"]
    texts = {f"{i}.txt": " ".join(words[(i + j) % 5] for j in range(40)).encode() for i in range(30)}
    config = data_config(write_texts(directory / "texts", texts), directory / "cache")
    tokenizer = train_bpe(config, 300, directory / "bpe.json")
    return tokenizer, config, directory / "bpe.json"


class TestBytes:
    @pytest.mark.parametrize("text", ["", "plain", "naïve 日本\n\t\x00"])
    def test_round_trip(self, text):
        tokenizer = load_tokenizer(DataConfig())
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text

    def test_any_bytes_pass_unchanged(self):
        every_byte = bytes(range(256))
        assert ByteTokenizer().encode(every_byte).tolist() == list(range(256))
        (encoded,), losses = ByteTokenizer().encode_batch([every_byte])
        assert encoded.tolist() == list(range(256)) and losses == Losses()

    def test_end_of_text(self):
        tokenizer = ByteTokenizer()
        assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (257, 256)
        assert tokenizer.decode([256, 104, 105, 256, 256, 33, 256]) == (
            "<|endoftext|>hi<|endoftext|><|endoftext|>!<|endoftext|>"
        )

    def test_a_character_cut_in_half(self):
        assert ByteTokenizer().decode([0xC3]) == "\ufffd"

    @pytest.mark.parametrize("ids", [[257], [-1, 3]])
    def test_ids_outside_of_the_vocabulary(self, ids):
        with pytest.raises(ValueError, match=r"expected 0\.\.256"):
            ByteTokenizer().decode(ids)

    def test_end_of_text_cannot_be_chosen(self):
        with pytest.raises(ValueError, match=r"data\.end_of_text='</s>': expected None with data\.tokenizer=\"bytes\""):
            load_tokenizer(DataConfig(end_of_text="</s>"))


class TestTokenizerJson:
    def test_bpe_round_trip(self, bpe):
        tokenizer = bpe[0]
        for text in ("import self", "  naïve 日本\n\x00", ""):
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32
            assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode("return import")) < len("return import") / 2

    def test_the_name_of_end_of_text_is_ordinary_text(self, bpe):
        tokenizer = bpe[0]
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text_id not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        assert tokenizer.decode([tokenizer.end_of_text_id]) == "<|endoftext|>"

    def test_invalid_utf8_is_replaced_and_counted(self, bpe):
        encoded, losses = bpe[0].encode_batch([b"fine", b"\xff!", b"\xe9\xff"])
        assert losses == Losses(replaced_documents=2)
        assert [bpe[0].decode(ids) for ids in encoded] == ["fine", "\ufffd!", "\ufffd\ufffd"]
        assert bpe[0].decode(bpe[0].encode(b"\xff!")) == "\ufffd!"

    def test_fingerprint_is_of_the_content(self, bpe, tmp_path):
        tokenizer, _, path = bpe
        copy = tmp_path / "another-name.json"
        copy.write_bytes(path.read_bytes())
        assert load_tokenizer(DataConfig(tokenizer=str(copy))).fingerprint == tokenizer.fingerprint
        other = write_tokenizer(tmp_path / "words.json", {"?": 0, "</s>": 1})
        assert load_tokenizer(other).fingerprint != tokenizer.fingerprint

    @pytest.mark.parametrize(("name", "chosen"), [("</s>", None), ("<eos>", None), ("[END]", "[END]")])
    def test_end_of_text_names(self, tmp_path, name, chosen):
        config = write_tokenizer(tmp_path / "t.json", {"?": 0, "a": 1, name: 2})
        tokenizer = load_tokenizer(DataConfig(tokenizer=config.tokenizer, end_of_text=chosen))
        assert tokenizer.end_of_text_id == 2

    def test_vocabulary_with_holes(self, tmp_path):
        assert load_tokenizer(write_tokenizer(tmp_path / "t.json", {"?": 0, "</s>": 7})).vocab_size == 8

    def test_what_the_file_adds_and_cuts_is_not_applied(self, bpe, tmp_path):
        tokenizer, _, path = bpe
        settings = tokenizers.Tokenizer.from_file(str(path))
        settings.enable_truncation(2)
        settings.enable_padding(length=9)
        settings.post_processor = tokenizers.processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.end_of_text_id)]
        )
        settings.save(str(tmp_path / "t.json"))
        changed = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
        np.testing.assert_array_equal(changed.encode("return"), tokenizer.encode("return"))
        np.testing.assert_array_equal(changed.encode_batch([b"self self x"])[0][0], tokenizer.encode("self self x"))

    def test_no_end_of_text(self, tmp_path):
        config = write_tokenizer(tmp_path / "t.json", {"?": 0, "a": 1})
        with pytest.raises(ValueError, match=r"data\.tokenizer: .*t\.json.*'<\|endoftext\|>', '</s>', '<eos>'"):
            load_tokenizer(config)
        with pytest.raises(ValueError, match=r"data\.end_of_text: .*t\.json.*'\[END\]'"):
            load_tokenizer(DataConfig(tokenizer=config.tokenizer, end_of_text="[END]"))

    def test_no_such_file(self, tmp_path):
        with pytest.raises(ValueError, match=rf"data\.tokenizer='{tmp_path}/no\.json': no such file"):
            load_tokenizer(DataConfig(tokenizer=str(tmp_path / "no.json")))
        with pytest.raises(ValueError, match=r"data\.tokenizer=.*: is a directory"):
            load_tokenizer(DataConfig(tokenizer=str(tmp_path)))

    def test_a_git_lfs_pointer(self, tmp_path):
        (tmp_path / "t.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
        with pytest.raises(ValueError, match=r"data\.tokenizer=.*t\.json': a Git LFS pointer, not the file itself"):
            load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))

    @pytest.mark.parametrize(
        "content", ["[" * 10**5, "", "{}", '{"model": ', json.dumps({"version": "1.0", "model": {}})]
    )
    def test_not_a_tokenizer(self, tmp_path, content):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.tokenizer=.*t\.json': not a tokenizer\.json"):
            load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))


def save(tokenizer, path, **settings):
    """Saves a tokenizer with further settings in its file's model, and loads it."""
    content = json.loads(tokenizer.to_str())
    content["model"] |= settings
    path.write_text(json.dumps(content))
    return load_tokenizer(DataConfig(tokenizer=str(path)))


LETTERS = {letter: 10 + i for i, letter in enumerate("ab<>/s ")}
PIECES = [("<unk>", 0.0), ("</s>", -1.0), ("ab", -2.5), *((letter, -3.0) for letter in "ab<>/s ")]


def unigram(unknown=0):
    return tokenizers.Tokenizer(tokenizers.models.Unigram(PIECES, unknown, False))


def words(end_is_unknown=False):
    vocabulary = {"?": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "</s>" if end_is_unknown else "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def letters(merges=(), **options):
    vocabulary = {"</s>": 0, "</": 1, "s>": 2, "ab": 3} | LETTERS
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), **options))


def ordinary(tokenizer):
    """Its end token as an added token that is not special."""
    tokenizer.add_tokens([tokenizers.AddedToken("</s>", special=False, normalized=False)])
    return tokenizer


def lowercase(tokenizer):
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return tokenizer


MERGES = [("a", "b"), ("<", "/"), ("s", ">"), ("</", "s>")]


class TestNoFalseEndOfText:
    """Whatever the file says, text never gives the end-of-text token, and no other token changes."""

    @pytest.mark.parametrize(
        ("make", "settings", "text", "expected"),
        [
            (unigram, {}, "ab</s>b", ["ab", "<", "/", "s", ">", "b"]),
            (lambda: ordinary(unigram()), {}, "a</s>b", ["a", "<", "/", "s", ">", "b"]),
            (lambda: lowercase(unigram()), {}, "a</S>b", ["a", "<", "/", "s", ">", "b"]),
            (words, {}, "a </s> b", ["a", "?", "b"]),
            (lambda: ordinary(words()), {}, "a</s>b b", ["?", "b"]),
            (lambda: letters(MERGES), {}, "ab</s>", ["ab", "</", "s>"]),
            (lambda: letters(MERGES[:1]), {"ignore_merges": True}, "</s>", ["<", "/", "s", ">"]),
            (lambda: ordinary(letters(MERGES[:3])), {}, "ab</s>a", ["ab", "</", "s>", "a"]),
            (lambda: letters(MERGES[:1], unk_token="</s>"), {}, "abza", ["ab", "a"]),
        ],
        ids=[
            "unigram piece", "unigram added", "after a normalizer", "word", "added word", "merged", "BPE's whole word",
            "added to a BPE", "unknown token of a BPE",
        ],
    )  # fmt: skip
    def test_text_is_encoded_by_the_same_rules_without_it(self, tmp_path, make, settings, text, expected):
        tokenizer = save(make(), tmp_path / "t.json", **settings)
        ids = tokenizer.encode(text)
        assert [tokenizer.decode([token]).strip() or " " for token in ids] == expected
        (batched, clean), _ = tokenizer.encode_batch([text.encode(), b"ab"])
        np.testing.assert_array_equal(batched, ids)
        assert tokenizer.end_of_text_id not in [*ids, *clean]
        assert tokenizer.decode([tokenizer.end_of_text_id]) == "</s>"
        assert tokenizer.hides_end_of_text

    def test_where_it_is_the_unknown_token_a_text_that_needs_it_has_no_tokens(self, tmp_path):
        tokenizer = save(words(end_is_unknown=True), tmp_path / "t.json")
        assert tokenizer.encode("a b").tolist() == [2, 3]
        with pytest.raises(DamageError, match=r"data\.tokenizer='.*t\.json': cannot encode a text \(.*unknown token"):
            tokenizer.encode("a c")

    def test_a_tokenizer_that_is_sound_keeps_its_place_in_the_cache(self, bpe):
        assert not bpe[0].hides_end_of_text and not ByteTokenizer.hides_end_of_text

    def test_tokens_made_without_this_care_are_not_taken(self, tmp_path):
        write_texts(tmp_path / "texts", {f"{i}.txt": b"a </s> b " * 9 for i in range(20)})
        save(words(), tmp_path / "t.json")
        config = data_config(tmp_path / "texts", tmp_path / "cache", tokenizer=str(tmp_path / "t.json"))
        tokenizer = load_tokenizer(config)
        dataset = open_dataset(config, "train", tokenizer)
        assert (np.asarray(dataset.tokens) == 1).sum() == dataset.num_documents
        directory = Path(dataset.tokens.filename).parent
        tokenizer.hides_end_of_text = False
        assert Path(open_dataset(config, "train", tokenizer).tokens.filename).parent != directory


class TestEqualTextEqualTokens:
    @pytest.mark.parametrize("dropout", [0.3, 1.0])
    def test_dropout_is_switched_off_aloud(self, tmp_path, caplog, dropout):
        with caplog.at_level("WARNING", "moda_jax"):
            tokenizer = save(letters(MERGES[:1]), tmp_path / "t.json", dropout=dropout)
        assert {tuple(tokenizer.encode("ab" * 20)) for _ in range(20)} == {(3,) * 20}
        assert "t.json': draws its tokens by chance (dropout); switched off" in caplog.text
        (ids,), _ = tokenizer.encode_batch([b"ab" * 20])
        assert ids.tolist() == [3] * 20

    def test_sampling_of_pieces_is_switched_off(self, tmp_path):
        backend = unigram()
        backend.model.alpha, backend.model.nbest_size = 0.1, 8
        assert len({str(backend.encode("ab" * 20).ids) for _ in range(20)}) > 1
        assert settle(backend) == ["alpha", "nbest_size"]
        assert {str(backend.encode("ab" * 20).ids) for _ in range(20)} == {str([2] * 20)}

    def test_dropout_of_nothing_is_no_chance(self, tmp_path, caplog):
        save(letters(MERGES[:1]), tmp_path / "t.json", dropout=None)
        assert not caplog.records


class TestLosses:
    """Characters that stand in no token, and tokens that stand for any text, are counted."""

    def losses(self, tokenizer, tmp_path, *texts):
        return save(tokenizer, tmp_path / "t.json").encode_batch([text.encode() for text in texts])[1]

    def test_letters_that_a_bpe_lacks(self, tmp_path):
        assert self.losses(letters(MERGES[:1]), tmp_path, "abzé\n", "a", "xyz") == Losses(
            dropped_characters=5, dropped_spaces=1
        )

    def test_the_unknown_token(self, tmp_path):
        assert self.losses(letters(MERGES[:1], unk_token="/"), tmp_path, "abzé", "a") == Losses(unknown_tokens=2)
        assert self.losses(unigram(), tmp_path, "abz", "z z") == Losses(unknown_tokens=3)

    def test_letters_for_which_the_file_has_the_end_of_text(self, tmp_path):
        tokenizer = letters(MERGES[:1], unk_token="</s>")
        assert self.losses(tokenizer, tmp_path, "abza", "ab") == Losses(dropped_characters=1)

    def test_white_space_between_words(self, tmp_path):
        assert self.losses(words(), tmp_path, "a b\n", " b") == Losses(dropped_spaces=3)

    @pytest.mark.parametrize(
        ("normalizer", "lost"),
        [
            (tokenizers.normalizers.Replace("b", ""), 2),
            (tokenizers.normalizers.Sequence([tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]), 1),
            (tokenizers.normalizers.BertNormalizer(lowercase=False), 1),
            (tokenizers.normalizers.NFC(), 0),
        ],
    )
    def test_what_a_normalizer_takes_away(self, tmp_path, normalizer, lost):
        tokenizer = unigram()
        tokenizer.normalizer = normalizer
        text = {1: "ab\u0301a" if "Accents" in str(normalizer) else "ab\x00a"}.get(lost, "abab")
        assert self.losses(tokenizer, tmp_path, text) == Losses(dropped_characters=lost)

    def test_a_byte_level_bpe_loses_nothing_and_is_not_watched(self, bpe, tmp_path):
        tokenizer = bpe[0]
        assert not tokenizer._losses.needed
        assert tokenizer.encode_batch(["naïve\x00 日本 </s>".encode()])[1] == Losses()

    def test_a_byte_level_bpe_that_lacks_bytes_is_watched(self, bpe, tmp_path):
        content = json.loads(bpe[2].read_text())
        content["model"]["vocab"].pop("Ł")  # stands for a byte
        content["model"]["merges"] = []
        (tmp_path / "t.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
        assert tokenizer._losses.needed


def test_vocabulary_check():
    config = DataConfig()
    check_vocabulary(ByteTokenizer(), 257, config)
    check_vocabulary(ByteTokenizer(), 50304, config)
    with pytest.raises(ValueError, match=r"model\.vocab_size=256: expected at least 257.*data\.tokenizer='bytes'"):
        check_vocabulary(ByteTokenizer(), 256, config)


class TestTraining:
    def test_vocabulary_and_use(self, bpe, tmp_path):
        tokenizer, config, path = bpe
        assert tokenizer.vocab_size <= 300 and tokenizer.end_of_text_id == 0
        config = DataConfig(source=config.source, cache_dir=config.cache_dir, tokenizer=str(path), sequence_length=8)
        dataset = open_dataset(config, "train", load_tokenizer(config))
        as_bytes = open_dataset(DataConfig(source=config.source, cache_dir=config.cache_dir), "train", ByteTokenizer())
        assert dataset.num_documents == as_bytes.num_documents
        assert dataset.num_tokens < as_bytes.num_tokens / 2
        text = tokenizer.decode(dataset.tokens[: dataset.offsets[1] - 1])
        assert text == ByteTokenizer().decode(as_bytes.tokens[: as_bytes.offsets[1] - 1])

    def test_only_the_train_split_is_read(self, tmp_path):
        texts = {name: b"ab " * 30 for name in random_texts(30)}
        config = data_config(write_texts(tmp_path / "texts", texts), tmp_path / "cache", validation_fraction=0.3)
        before = train_bpe(config, 300, tmp_path / "before.json").fingerprint
        dataset = open_dataset(config, "validation", ByteTokenizer())
        assert dataset.num_documents > 0
        from moda_jax.data import corpus

        split_of, _ = corpus.split_documents(corpus.list_files(config), config)
        for name in texts:
            if split_of(name.encode()) == "validation":
                (tmp_path / "texts" / name).write_bytes(b"xyz " * 30)
        assert train_bpe(config, 300, tmp_path / "after.json").fingerprint == before

    def test_documents_that_are_no_text_are_passed_over_aloud(self, tmp_path, caplog):
        texts = {f"{i}.txt": b"ab " * 30 for i in range(20)}
        config = data_config(write_texts(tmp_path / "texts", texts), tmp_path / "cache", validation_fraction=1e-6)
        clean = train_bpe(config, 300, tmp_path / "clean.json").fingerprint
        (tmp_path / "texts" / "no-text.txt").write_bytes(b"\xff\xfe" * 50)
        with caplog.at_level("WARNING", "moda_jax"):
            assert train_bpe(config, 300, tmp_path / "t.json").fingerprint == clean
        assert "1 documents are not UTF-8 and were passed over" in caplog.text

    def test_the_command(self, tmp_path):
        write_texts(tmp_path / "texts", random_texts(20))
        output = tmp_path / "tokenizer.json"
        process = start_python(
            "from moda_jax import progress; progress.INTERVAL_SECONDS = 0.0\n"  # stderr is a pipe: lines, no bar
            "import runpy; runpy.run_module('moda_jax.data.tokenizer', run_name='__main__')",
            "train", "--vocab-size=270", f"--output={output}", f"--source={tmp_path / 'texts'}",
            f"--cache-dir={tmp_path / 'cache'}",
        )  # fmt: skip
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"--config.data.tokenizer={output}" in out
        assert "Preparing the corpus" in err and "Reading" in err and "\r" not in err
        assert load_tokenizer(DataConfig(tokenizer=str(output))).decode([0]) == "<|endoftext|>"
        assert list(tmp_path.glob("*.incomplete")) == []

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--vocab-size=256", "--output={tmp}/t.json"], r"vocab_size=256: expected at least 257"),
            (["--vocab-size=300", "--output={tmp}/no/t.json"], r"output='.*': there is no directory '.*no'"),
            (
                ["--vocab-size=300", "--output={tmp}/t.json", "--source={tmp}/no"],
                r"data\.source='.*no': no such file or dir",
            ),
        ],
    )
    def test_errors_of_the_command(self, tmp_path, capsys, flags, message):
        with pytest.raises(SystemExit) as exit_status:
            main(["train", f"--cache-dir={tmp_path}/cache", *(flag.format(tmp=tmp_path) for flag in flags)])
        assert exit_status.value.code == 2
        assert re.search(message, capsys.readouterr().err)
