import pytest

from moda_jax import other_names
from moda_jax.commands import evaluate, generate, train
from moda_jax.config import Config
from moda_jax.interop import __main__ as interop
from moda_jax.training.console import check_config_arguments, config_fields

KEYS = config_fields(Config)[1]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.LR", "optimizer.learning_rate"),
        ("steps", "train.num_steps"),
        ("train.max_steps", "train.num_steps"),
        ("eval.steps", "eval.interval_steps"),
        ("model.hidden_size", "model.width"),
        ("model.n_layer", "model.num_layers"),
        ("seq_len", "data.sequence_length"),
        ("model.seq_len", "model.max_sequence_length"),
        ("model.learning_rate", "optimizer.learning_rate"),  # the right name in the wrong section
        ("batch_size", "train.batch_size"),
        ("model.num_layer", "model.num_layers"),  # nearest by its letters
        ("zzzzz", None),
    ],
)
def test_a_wrong_name_is_answered_with_ours(name, field):
    assert other_names.did_you_mean(name, KEYS, other_names.FIELDS) == field


def test_every_answer_is_a_field_or_a_flag():
    assert sorted(set(other_names.FIELDS) - set(KEYS)) == []
    flags = {name for command in (train, generate, evaluate, interop) for name in command.FLAGS}
    assert sorted(set(other_names.FLAGS) - flags) == []


def test_a_name_has_one_answer_and_is_no_field_itself():
    names = [name for text in other_names.FIELDS.values() for name in text.split()]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert sorted(set(names) & set(KEYS)) == []


def test_the_command_line_says_it():
    with pytest.raises(
        ValueError, match=r"^--config\.lr: unknown config key; did you mean --config\.optimizer\.learning_"
    ):
        check_config_arguments(["--config.lr=1e-3"])
