"""The extension's pool with engines written in Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow import core_rs
from helixflow.engine.base import Candidates, Capacity, EngineError
from helixflow.engine.scripted import Gate, ScriptedEngine, repeat
from tests.pool.conftest import Start
from tests.pool.support import EOS, VOCAB, NextByte, complete, finish, request, until


def test_logits_of_a_python_engine_become_text(start: Start) -> None:
    engine = NextByte()
    running = start(engine)
    assert complete(running.client, request("abc", 5)) == "defgh"
    assert engine.batches[0] == {
        "token_ids": [97, 98, 99],
        "slots": [0],
        "past": [0],
        "counts": [3],
        "wanted": [1],
    }
    assert engine.batches[1]["past"] == [3]
    stats = running.pool.stats()
    assert (stats.slots, stats.requests_accepted, stats.requests_failed) == (4, 1, 0)
    until(lambda: running.pool.stats().requests_finished == 1, "the request is counted")
    assert running.pool.idle()


def test_logprobs_and_echo(start: Start) -> None:
    running = start(NextByte())
    call = running.client.complete(request("ab", 2, echo=True, logprobs=1), completion_id="c", created=0, stream=False)
    choice = json.loads(finish(running.client, call))["choices"][0]
    assert choice["text"] == "abcd"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    # One logit of 9 among 256 of 0.
    assert rest == pytest.approx([9 - np.log(np.exp(9) + VOCAB - 1)] * 3, abs=1e-5)


def test_tokens_of_a_scripted_engine(start: Start) -> None:
    engine = ScriptedEngine(Capacity(4, 64, VOCAB), repeat([104, 105], end_after=5, eos=EOS))
    running = start(engine)
    assert complete(running.client, request("?", 60)) == "hihih"
    call = running.client.complete(request("?", 60), completion_id="c", created=0, stream=True)
    assert finish(running.client, call).endswith(b"data: [DONE]\n\n")
    assert call.finish_reason == "stop"
    assert call.usage is not None
    assert call.usage.completion_tokens == 6


def test_an_exception_of_the_engine_ends_the_loop_and_is_raised(start: Start) -> None:
    gate = Gate()
    engine = ScriptedEngine(Capacity(1, 64, VOCAB), repeat([120]), gate=gate, fail_at_step=2)
    running = start(engine)
    first = running.client.complete(request("a", 9), completion_id="c", created=0, stream=True)
    assert gate.arrived(10)
    second = running.client.complete(request("b", 9), completion_id="c", created=0, stream=True)
    until(lambda: running.pool.stats().requests_accepted == 2, "both are there")
    gate.open()
    finish(running.client, first)
    assert first.error_code == "engine_failed"
    with pytest.raises(core_rs.Unavailable):
        finish(running.client, second)
    [error] = running.ended()
    assert isinstance(error, EngineError)
    assert str(error) == "step 2 fails, as the script says"
    until(running.pool.idle, "nothing is left")
    assert running.pool.stats().requests_failed == 2


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda logits: Candidates(logits=logits.astype(np.float64)), "float32 [R, V], not float64 (1, 257)"),
        (lambda logits: Candidates(logits=logits[0]), "float32 [R, V], not float32 (257,)"),
        (lambda logits: Candidates(logits=np.concatenate([logits, logits])), "2 rows of logits for 1"),
        (lambda logits: Candidates(logits=logits[:, :-1].copy()), "256 logits for 1 rows of 257"),
        (lambda logits: Candidates(logits=np.zeros((1, 514), np.float32)[:, ::2]), "C-contiguous"),
        (lambda logits: Candidates(), "int32 [R], not <class 'NoneType'>"),
        (lambda logits: Candidates(token_ids=np.zeros(1, np.int64)), "int32 [R], not int64 (1,)"),
        (lambda logits: Candidates(token_ids=np.zeros(2, np.int32)), "2 token ids for 1 rows"),
        (lambda logits: Candidates(token_ids=np.full(1, VOCAB, np.int32)), f"token {VOCAB}"),
        (lambda logits: None, "has no attribute 'logits'"),
    ],
)
def test_a_wrong_result_of_a_step_is_refused(start: Start, result: Any, words: str) -> None:
    running = start(NextByte(result))
    call = running.client.complete(request("a"), completion_id="c", created=0, stream=True)
    with pytest.raises(core_rs.CoreError):
        finish(running.client, call)
    [error] = running.ended()
    assert words in str(error)


def test_the_error_table_and_the_classes_agree() -> None:
    rows = core_rs.error_table()
    assert len(rows) == len({row.code for row in rows}) == 29
    for row in rows:
        assert issubclass(row.exception, core_rs.CoreError)
        assert row.exception.__module__ == "helixflow.core_rs"
        assert getattr(core_rs, row.exception.__name__) is row.exception
        assert (row.exception.code, row.exception.retryable, row.exception.http_status) == (
            row.code,
            row.retryable,
            row.http_status,
        )
    assert core_rs.CoreError.param is None


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(core_rs.ModelFileError, match=r"tokenizer\.json"):
        core_rs.Pool(str(tmp_path / "absent"), core_rs.PoolOptions(model_id="x"))
    (model / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(core_rs.ModelFileError, match=r"tokenizer\.json"):
        core_rs.Pool(str(model), core_rs.PoolOptions(model_id="x"))


def test_wrong_addresses_and_files_are_refused(model: Path, tmp_path: Path) -> None:
    pool = core_rs.Pool(str(model), core_rs.PoolOptions(model_id="x"))
    with pytest.raises(core_rs.TlsError, match="loopback"):
        pool.serve("0.0.0.0:0", None)
    with pytest.raises(core_rs.InvalidRequest, match="is not an address"):
        pool.serve("nowhere", None)
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(core_rs.TlsError, match=r"missing\.pem"):
        pool.serve("127.0.0.1:0", core_rs.TlsFiles(missing, missing, missing))
    address = pool.serve("127.0.0.1:0", None)
    with pytest.raises(core_rs.Internal, match="already"):
        pool.serve("127.0.0.1:0", None)
    other = core_rs.Pool(str(model), core_rs.PoolOptions(model_id="x"))
    with pytest.raises(core_rs.Unavailable, match="cannot listen"):
        other.serve(address, None)
    pool.reload_tls()
    pool.stop()


def test_stopping_ends_the_loop_without_an_error(start: Start) -> None:
    gate = Gate()
    running = start(ScriptedEngine(Capacity(1, 64, VOCAB), repeat([120]), gate=gate))
    call = running.client.complete(request("a", 60), completion_id="c", created=0, stream=True)
    assert gate.arrived(10)
    gate.allow(3)
    assert gate.arrived(10)
    gate.open()
    running.pool.stop()
    assert running.ended() == []
    finish(running.client, call)
    assert call.error_code in {"draining", None}
    assert call.done
