"""Tensors as messages, and what is made of the silence of a rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piecework.ranks import messages, roll_call

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def test_packs_of_a_dtype_share_one_buffer_as_large_as_the_largest():
    packs, device = messages.Packs(), torch.device("cpu")
    small, large = [torch.ones(3), torch.ones(2, 2).t()], [torch.full((5, 3), 2.0)]
    packs.fill(small, device)
    flat = packs.fill(large, device)
    assert flat.data_ptr() == packs.fill(small, device).data_ptr() == packs.fill(large, device).data_ptr()
    flat += 1
    packs.empty(flat, large)
    assert (large[0] == 3).all()


@given(shape=st.sampled_from([(), (0,), (3,), (5, 3)]), dtype=st.sampled_from(DTYPES))
def test_bytes_come_back_as_they_went(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    for view in (tensor, tensor.mT if tensor.dim() > 1 else tensor, tensor.conj() if dtype.is_complex else tensor):
        carrier = messages.as_bytes(view, torch.device("cpu"))
        assert carrier.dtype == torch.uint8
        assert carrier.shape == (messages.num_bytes(tensor),)
        back = torch.zeros_like(view)
        target = messages.as_bytes(back, torch.device("cpu"))
        target.copy_(carrier)
        messages.write_back(target, back)
        assert torch.equal(back, view)


@pytest.mark.parametrize(
    ("roll", "suspect", "peer", "words"),
    [
        (roll_call.Roll([1], {2: None}, answered=True), None, 1, ""),
        (roll_call.Roll([1, 2], answered=True), None, None, "no word from ranks 1, 2"),
        (roll_call.Roll([1, 2], answered=True), 2, 2, ""),
        (roll_call.Roll([3], {1: 2, 2: 3}, answered=True), 1, 3, ""),  # each waits for the next, and the last is gone
        (roll_call.Roll([1], {2: 0}, answered=True), 2, 2, "alive"),  # 0 and 2 wait for each other; 1 is elsewhere
        (roll_call.Roll([1], {2: 3, 3: 2}, answered=True), 2, 2, "alive"),
        (roll_call.Roll([], {1: None, 2: None}, answered=True), None, None, "every rank is alive"),
        (roll_call.Roll([], {1: None, 2: None}, late=True, answered=True), None, None, "had given up"),
        (roll_call.Roll([1, 2]), 2, 2, "did not answer"),
        (roll_call.Roll([1, 2]), None, None, "did not answer"),
    ],
)
def test_the_roll_call_blames_whom_the_evidence_allows(roll, suspect, peer, words):
    blamed, sentence = roll_call.blame(roll, 0, suspect)
    assert blamed == peer
    assert words in sentence


def test_a_backend_error_is_a_loss_only_where_it_speaks_of_a_connection():
    closed = RuntimeError("[/a/pair.cc:553] Connection closed by peer [127.0.0.1]:2012. This is typically a crash. Bye")
    assert roll_call.tells_of_a_loss(closed)
    assert roll_call.first_sentence(closed) == "Connection closed by peer [127.0.0.1]:2012"
    assert roll_call.tells_of_a_loss(RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    assert not roll_call.tells_of_a_loss(RuntimeError("Invalid scalar type"))
