"""Tokenizers: round trips, end-of-text, vocabulary, errors; and the command that trains one."""

import json
import re

import numpy as np
import pytest
import tokenizers
from support.documents import data_config, random_texts, start_python, write_texts

from moda_jax.config import DataConfig
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer, check_vocabulary, load_tokenizer
from moda_jax.data.train_tokenizer import main, train_bpe


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
        (encoded,), replaced = ByteTokenizer().encode_batch([every_byte])
        assert encoded.tolist() == list(range(256)) and replaced == 0

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
        encoded, replaced = bpe[0].encode_batch([b"fine", b"\xff!", b"\xe9\xff"])
        assert replaced == 2
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

    @pytest.mark.parametrize("content", ["", "{}", '{"model": ', json.dumps({"version": "1.0", "model": {}})])
    def test_not_a_tokenizer(self, tmp_path, content):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.tokenizer=.*t\.json': not a tokenizer\.json"):
            load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))


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

    def test_the_command(self, tmp_path):
        write_texts(tmp_path / "texts", random_texts(20))
        output = tmp_path / "tokenizer.json"
        process = start_python(
            "import runpy; runpy.run_module('moda_jax.data.tokenizer', run_name='__main__')",
            "train", "--vocab-size=270", f"--output={output}", f"--source={tmp_path / 'texts'}",
            f"--cache-dir={tmp_path / 'cache'}",
        )  # fmt: skip
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"--config.data.tokenizer={output}" in out
        assert "Preparing the corpus" in err and "Reading" in err
        assert load_tokenizer(DataConfig(tokenizer=str(output))).decode([0]) == "<|endoftext|>"
        assert list(tmp_path.glob("*.incomplete")) == []

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--vocab-size=256", "--output={tmp}/t.json"], r"vocab_size=256: expected at least 257"),
            (["--vocab-size=300", "--output={tmp}/no/t.json"], r"output='.*': there is no directory '.*no'"),
            (["--vocab-size=300", "--output={tmp}/t.json", "--source={tmp}/no"], r"data\.source='.*no': no such dir"),
        ],
    )
    def test_errors_of_the_command(self, tmp_path, capsys, flags, message):
        with pytest.raises(SystemExit) as exit_status:
            main(["train", f"--cache-dir={tmp_path}/cache", *(flag.format(tmp=tmp_path) for flag in flags)])
        assert exit_status.value.code == 2
        assert re.search(message, capsys.readouterr().err)
