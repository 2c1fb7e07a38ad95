import pytest

from moda_jax.loss_blocks import num_blocks


@pytest.mark.parametrize(
    ("tokens", "least", "expected"),
    [
        (4096, 1, 1),
        (4096, 3, 4),  # the next number that divides the tokens
        (12, 5, 6),
        (7, 2, 2),  # none from 2 to 3 does: the last block is padded
        (7, 4, 7),
        (7, 9, 7),  # no more blocks than tokens
        (1, 1, 1),
    ],
)
def test_examples(tokens, least, expected):
    assert num_blocks(tokens, least) == expected


def test_never_fewer_than_asked_for_nor_twice_as_many_and_padding_only_where_it_must_be():
    for tokens in range(1, 40):
        for least in range(1, 45):
            count, wanted = num_blocks(tokens, least), min(least, tokens)
            assert wanted <= count < 2 * wanted
            divisors = [n for n in range(wanted, 2 * wanted) if tokens % n == 0]
            assert count == (divisors[0] if divisors else wanted)
