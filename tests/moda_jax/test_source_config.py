"""`data.source` as one source or several with weights."""

import pytest

from moda_jax.config import DataConfig
from moda_jax.source_config import weighted_sources


@pytest.mark.parametrize(
    "text", ["python_stdlib", "/data/a + b", "tfds:wiki/en:1.0.0", "2*a", "~/a*b", "/data/3*x +y", "tokens:/a b"]
)
def test_one_source_is_what_it_says(text):
    assert weighted_sources(text) == ((1, text),)


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("0.7*python_stdlib + 0.3*/data/books", ((7, "python_stdlib"), (3, "/data/books"))),
        ("3*a + 1*b", ((3, "a"), (1, "b"))),
        ("2 * a +  6 * b", ((1, "a"), (3, "b"))),
        (" 1*a + .5*tokens:/x/y", ((2, "a"), (1, "tokens:/x/y"))),
        ("0.333*a + 0.333*b + 0.334*c", ((333, "a"), (333, "b"), (334, "c"))),
        ("1*/data/a + b/c + 2.*tfds:d", ((1, "/data/a + b/c"), (2, "tfds:d"))),
    ],
)
def test_weights_become_the_smallest_whole_rows(text, sources):
    assert weighted_sources(text) == sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a + 0.3*b", r"expected \"WEIGHT\*SOURCE \+ WEIGHT\*SOURCE\", as in"),
        ("0.7*a + b", r"expected \"WEIGHT\*SOURCE \+ WEIGHT\*SOURCE\", as in"),
        ("0*a + 1*b", "expected a weight above 0 of every source"),
        ("0.5*a + 0.5*a", "expected every source once; 'a' is there twice"),
        ("0.1234567*a + 0.8765433*b", "expected weights of fewer digits: these repeat after 10000000 rows only"),
        ("0.5*a + 0.5*gs://b", "is remote, and only local paths are read"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_the_field(text, message):
    with pytest.raises(ValueError, match=r"data\.source='.*': (is remote,|expected) ") as error:
        DataConfig(source=text)
    error.match(message)


def test_a_separator_parts_the_sources_of_files_alone():
    config = DataConfig(source="1*python_stdlib + 1*/data/texts", document_separator="<|end|>")
    assert [config.of_one(source).document_separator for _, source in config.sources] == [None, "<|end|>"]
    assert config.of_one("/data/texts").sources == ((1, "/data/texts"),)
    with pytest.raises(ValueError, match=r"data\.document_separator='<\|end\|>': expected None with data\.source='1\*"):
        DataConfig(source="1*python_stdlib + 1*tfds:a", document_separator="<|end|>")
