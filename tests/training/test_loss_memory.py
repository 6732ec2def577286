"""The estimated memory of the loss equals the allocated memory."""

from dataclasses import replace

import pytest

from loop.doctor.memory.estimate import full_loss, loss
from loop.doctor.memory.shape import Shape, read_shape
from tests.doctor.test_estimate import DOCUMENTED, llama, run
from tests.support.helpers import allocated


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return read_shape(llama(tmp_path_factory.mktemp("shapes") / "small"), DOCUMENTED)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_holds_what_the_chunks_allocate(precision: str, small: Shape) -> None:
    """The allocator is the CPU's; a GPU runs the same operations with the same sizes."""
    import torch

    from loop.model.dtypes import torch_dtype
    from loop.training.loss import _FrozenHead

    dtype, supervised, chunk, hidden, words = torch_dtype(precision), 96, 32, 64, 5000
    weight = torch.randn(words, hidden, dtype=dtype)
    targets = torch.randint(words, (supervised,))
    states = torch.randn(supervised, hidden, dtype=dtype, requires_grad=True)
    with allocated() as held:
        _FrozenHead.apply(states, weight, None, targets, chunk)
    values = {"mixed_precision": precision, "loss_chunk_tokens": chunk, "model_max_length": 96}
    shape = replace(small, hidden=hidden, vocabulary=words)
    one = run(shape, "single_gpu", **values)
    assert one.supervised == supervised
    # The hidden states were allocated before. The formula counts them and their gradient.
    expected = loss(one) - states.nbytes
    assert held.most == pytest.approx(expected, rel=0.02)
    assert held.most < full_loss(one, supervised) / 3


def test_logits_are_whole_where_the_loss_makes_them_whole(small: Shape) -> None:
    tokens = 2048
    for values in ({"mixed_precision": "fp16"}, {"loss_chunk_tokens": 10**6}):
        whole = loss(run(replace(small, plain_logits=False), "zero2", **values))
        assert whole == 12 * tokens * small.vocabulary
    assert loss(run(small, "zero2", mixed_precision="fp16")) == whole
    trained = replace(small, head_trained=True)
    assert loss(run(trained, "zero3")) == whole > loss(run(trained, "zero2"))
    assert loss(run(small, "zero2")) < loss(run(trained, "zero2"))
