"""Rewards asked for over real sockets: what is sent, what comes back, what goes wrong, where it may go."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ppo_engine.__main__ import main
from ppo_engine.events import read_complete
from ppo_engine.issues import SpecError
from ppo_engine.rewards import NamedReward, RewardBatch, RewardError, Scorer
from ppo_engine.rewards import http as http_rewards
from ppo_engine.rewards.http import HttpReward, key_of, signature
from ppo_engine.rewards.scorer import LONGEST_WISH
from ppo_engine.run_dir import RunDir
from tests.engine.reward_server import Answering, Asked, Exchange, lengths, raw, scores, serving, status
from tests.engine.test_rewards import batch, built
from tests.engine.training import make_run

ROWS = batch("one", "one two", "one two three", "one two three four", "five")


def reward(asked: Asked, **options: Any) -> HttpReward:
    return HttpReward(asked.url(), **{"allow_private": True, "timeout": 30.0, **options})


def ask(*answers: Answering, rows: RewardBatch = ROWS, **options: Any) -> list[Any]:
    with serving(*answers) as asked:
        return list(reward(asked, **options)(rows))


def refusal(*answers: Answering, **options: Any) -> RewardError:
    """Of all rows, which share it."""
    errors = ask(*answers, batch_size=len(ROWS), **options)
    assert all(error is errors[0] for error in errors)
    assert isinstance(errors[0], RewardError)
    return errors[0]


# What is sent, and what comes back -----------------------------------------------------------------------


def test_rows_go_as_they_are_and_scores_come_back_in_order() -> None:
    rows = batch("one", "one two", columns=[{"answer": 1, "messages": []}, {"answer": "Straße"}])
    with serving(lengths) as asked:
        assert reward(asked)(rows) == [3, 7]
        [exchange] = asked.exchanges
    assert exchange.rows == {
        "prompts": rows.prompts,
        "responses": rows.responses,
        "response_ids": rows.response_ids,
        "columns": rows.columns,
    }
    assert exchange.headers["Content-Type"] == "application/json"
    assert exchange.headers["Host"] == f"127.0.0.1:{asked.port}"
    assert exchange.headers["webhook-signature"] is None


def test_rows_are_cut_into_requests() -> None:
    with serving(lengths) as asked:
        assert reward(asked, batch_size=2)(ROWS) == [3, 7, 13, 18, 4]
    assert sorted(len(exchange.rows["prompts"]) for exchange in asked.exchanges) == [1, 2, 2]


def test_a_number_for_each_token() -> None:
    def per_token(exchange: Exchange) -> None:
        given = [[float(len(ids))] * len(ids) for ids in exchange.rows["response_ids"]]
        exchange.answer(json.dumps({"scores": given}).encode())

    with serving(per_token) as asked:
        found = Scorer([NamedReward("r", reward(asked, batch_size=2))])(batch("one", "one two", "three"))
    assert found.dense == [[1], [2, 2], [1]]
    assert found.by_name == {"r": [1, 4, 1]}


def test_as_many_requests_at_once_as_allowed_and_not_one_more() -> None:
    together, under_way, most = threading.Barrier(2, timeout=60), [0], [0]

    def answer(exchange: Exchange) -> None:
        with exchange.asked.lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait()  # for a second one: alone, it would never go on
        with exchange.asked.lock:
            under_way[0] -= 1
        lengths(exchange)

    assert ask(answer, rows=batch(*"abcd"), batch_size=1, concurrency=2) == [1, 1, 1, 1]
    assert most == [2]


def test_the_time_of_a_request_starts_with_its_turn() -> None:
    late, scored = ask(hangs, lengths, rows=batch("one", "two"), batch_size=1, concurrency=1, timeout=1.0)
    assert isinstance(late, RewardError)
    assert scored == 3


def test_requests_are_signed() -> None:
    # The numbers of the specification's own example.
    key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == expected

    with serving(lengths) as asked:
        reward(asked, key=key, batch_size=3)(ROWS)
    for exchange in asked.exchanges:
        message_id, sent_at = exchange.headers["webhook-id"], int(exchange.headers["webhook-timestamp"])
        given = exchange.headers["webhook-signature"]
        assert given == signature(key, message_id, sent_at, exchange.body)
    assert len({exchange.headers["webhook-id"] for exchange in asked.exchanges}) == 2


@pytest.mark.parametrize("secret", ["", "hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "?" * 40])
def test_secrets_that_are_no_key(secret: str) -> None:
    with pytest.raises(RewardError, match="base64 of 24 random bytes") as caught:
        key_of(secret)
    assert "hunter2" not in str(caught.value)


def test_the_key_is_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXIMA_HTTP_ALLOW_PRIVATE", "1")
    monkeypatch.setenv("PROXIMA_SECRET_JUDGE", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    monkeypatch.setenv("PROXIMA_SECRET_SHORT", "hunter2")
    with serving(lengths) as asked:
        spec: dict[str, Any] = {"type": "http", "url": asked.url(), "signing_key": {"secret": "JUDGE"}}
        assert built(spec)(ROWS).scores == [3, 7, 13, 18, 4]
        for name, why in (("SHORT", "is no key"), ("NONE", "PROXIMA_SECRET_NONE")):
            with pytest.raises(SpecError, match=why) as caught:
                built(spec | {"signing_key": {"secret": name}})
            assert caught.value.issues[0].loc == ("rewards", 0, "signing_key")
    [exchange] = asked.exchanges
    assert exchange.headers["webhook-signature"].startswith("v1,")


# What goes wrong -----------------------------------------------------------------------------------------


def hangs(exchange: Exchange) -> None:
    exchange.asked.over.wait()


def drips(exchange: Exchange) -> None:
    """One byte after another, so that no single read ever waits long."""
    exchange.send_response(200)
    exchange.send_header("Content-Length", "1000000")
    exchange.end_headers()
    while not exchange.asked.over.wait(0.01):
        exchange.wfile.write(b" ")


def cut(exchange: Exchange) -> None:
    exchange.send_response(200)
    exchange.send_header("Content-Length", "100")
    exchange.end_headers()
    exchange.wfile.write(b'{"scores": [')
    exchange.close_connection = True


def closed(exchange: Exchange) -> None:
    exchange.connection.shutdown(socket.SHUT_RDWR)
    exchange.close_connection = True


def huge(exchange: Exchange) -> None:
    exchange.send_response(200)
    exchange.send_header("Transfer-Encoding", "chunked")
    exchange.end_headers()
    piece = b" " * 2**20
    while not exchange.asked.over.is_set():
        exchange.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))


@pytest.mark.parametrize(
    ("answer", "message", "lasting"),
    [
        (hangs, "has not answered within 0.3 s", False),
        (drips, "has not answered within 0.3 s", False),
        (cut, "could not be asked: peer closed connection", False),
        (closed, "could not be asked: Server disconnected", False),
        (status(500), "answered 500; it should answer 200", False),
        (status(503), "answered 503", False),
        (status(429), "answered 429", False),
        (status(401), "answered 401", True),
        (status(404), "answered 404", True),
        (raw(b"<html>"), "answered with what is no JSON", False),
        (raw(b""), "answered with what is no JSON", False),
        (raw(b"[" * 100_000), "answered with what is no JSON", False),
        (raw(b"[1, 2]"), "answered without scores", False),
        (raw(b'{"scores": 1}'), "answered without scores", False),
        (raw(b'{"scores": [1]}'), "answered with 1 scores for 5 rows", False),
    ],
)
def test_answers_that_are_none(answer: Answering, message: str, lasting: bool) -> None:
    timeout = 0.3 if answer in (hangs, drips) else 30.0
    error = refusal(answer, timeout=timeout)
    assert message in str(error)
    assert "http://127.0.0.1:" in str(error)
    assert error.lasting is lasting


def test_an_answer_that_does_not_end_is_cut_off() -> None:
    error = refusal(huge)
    assert f"more than {http_rewards.MAX_ANSWER_BYTES} bytes" in str(error)
    assert error.lasting


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    [error] = HttpReward(f"http://127.0.0.1:{port}/", allow_private=True)(batch("one"))
    assert isinstance(error, RewardError)
    assert "could not be asked" in str(error)
    assert not error.lasting


def test_whoever_interrupts_does_not_wait_for_the_server() -> None:
    def interrupts(exchange: Exchange) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        hangs(exchange)

    with serving(interrupts) as asked, pytest.raises(KeyboardInterrupt):
        Scorer([NamedReward("r", reward(asked), retries=9, fallback=0.0)])(ROWS)
    assert len(asked.exchanges) == 1


def test_rows_that_json_cannot_hold() -> None:
    error = refusal(lengths, rows=batch(*"abcde", columns=[{"at": datetime.date(2026, 1, 1)}] * 5))
    assert "cannot be sent as JSON" in str(error)
    assert error.lasting


def test_what_a_query_says_is_not_told() -> None:
    with serving(status(404)) as asked:
        [error] = HttpReward(asked.url() + "?team=hunter2", allow_private=True)(batch("one"))
    assert "hunter2" not in str(error)


# Asked again ---------------------------------------------------------------------------------------------


def scored(asked: Asked, waits: list[float], rows: RewardBatch = ROWS, **options: Any) -> Any:
    named = NamedReward("r", reward(asked, **options), retries=2)
    return Scorer([named], wait=waits.append)(rows)


@pytest.mark.parametrize("failing", [status(500), cut, closed, raw(b"{"), raw(b'{"scores": []}')])
def test_what_failed_is_asked_again(failing: Answering) -> None:
    waits: list[float] = []
    with serving(failing, failing, lengths) as asked:
        found = scored(asked, waits)
    assert found.scores == [3, 7, 13, 18, 4]
    assert found.retried == {"r": 5}
    assert len(waits) == 2


def test_only_rows_of_failed_requests_are_asked_again() -> None:
    def fails_once(exchange: Exchange) -> None:
        texts = exchange.rows["responses"]
        is_first = sum("five" in other.rows["responses"] for other in exchange.asked.exchanges) == 1
        status(500)(exchange) if "five" in texts and is_first else lengths(exchange)

    with serving(fails_once) as asked:
        found = scored(asked, [], batch_size=2)
    assert found.scores == [3, 7, 13, 18, 4]
    assert found.retried == {"r": 1}
    assert [exchange.rows["responses"] for exchange in asked.exchanges[3:]] == [["five"]]


def test_a_row_without_a_score_is_asked_again_alone() -> None:
    with serving(raw(b'{"scores": [1, null, 3, NaN, 5]}'), scores(2)) as asked:
        found = scored(asked, [])
    assert found.scores == [1, 2, 3, 2, 5]
    assert asked.exchanges[1].rows["responses"] == ["one two", "one two three four"]


def in_a_while(seconds: float) -> str:
    return format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("86400", LONGEST_WISH, LONGEST_WISH),
        (in_a_while(86_400), LONGEST_WISH, LONGEST_WISH),
        (in_a_while(-5), 0.25, 0.5),
        ("soon", 0.25, 0.5),
        ("-3", 0.25, 0.5),
    ],
    ids=["seconds", "too many seconds", "a day", "a time gone by", "no number", "a negative number"],
)
def test_a_server_says_when_to_come_back(header: str, least: float, most: float) -> None:
    waits: list[float] = []
    with serving(status(429, Retry_After=header), lengths) as asked:
        scored(asked, waits)
    assert len(waits) == 1
    assert least <= waits[0] <= most


def test_what_will_not_change_is_not_asked_again() -> None:
    waits: list[float] = []
    with (
        serving(status(401)) as asked,
        pytest.raises(RewardError, match=r'Reward "r" .* and 4 more failed: .* 401'),
    ):
        scored(asked, waits)
    assert len(asked.exchanges) == 1
    assert waits == []


# Where it may go -----------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets names stand for addresses, one list at each look-up; returns the names looked up so far."""
    lookups: list[str] = []
    known: dict[str, list[list[str]]] = {}
    genuine = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            return genuine(host, port, *args, **kwargs)
        lookups.append(name)
        answers = known[name]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in genuine(address, port, type=socket.SOCK_STREAM)]

    def name(host: str, *answers: list[str]) -> list[str]:
        known[host] = list(answers)
        return lookups

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return name


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
    ],
)
def test_a_name_that_leads_to_a_private_address_is_not_asked(
    names: Callable[..., list[str]], found: list[str]
) -> None:
    names("rewards.test", found)
    with serving(lengths) as asked:
        [error] = HttpReward(asked.url("rewards.test"))(batch("one"))
    assert isinstance(error, RewardError)
    assert "rewards.test" in str(error)
    assert "PROXIMA_HTTP_ALLOW_PRIVATE=1" in str(error)
    assert error.lasting
    assert asked.exchanges == []


@pytest.mark.parametrize(
    "found", [["169.254.169.254"], ["fd00:ec2::254"], ["0.0.0.0"], ["127.0.0.1", "224.0.0.1"]]
)
def test_a_cloud_is_not_asked_for_credentials_whatever_is_allowed(
    names: Callable[..., list[str]], found: list[str]
) -> None:
    names("rewards.test", found)
    with serving(lengths) as asked:
        [error] = HttpReward(asked.url("rewards.test"), allow_private=True)(batch("one"))
    assert isinstance(error, RewardError)
    assert "an address without servers" in str(error)
    assert error.lasting
    assert asked.exchanges == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(names: Callable[..., list[str]]) -> None:
    # A second look-up would lead elsewhere.
    lookups = names("rewards.test", ["127.0.0.1"], ["127.0.0.2"])
    with serving(lengths) as asked:
        assert HttpReward(asked.url("rewards.test"), allow_private=True)(batch("one")) == [3]
    assert lookups == ["rewards.test"]
    assert asked.exchanges[0].headers["Host"] == f"rewards.test:{asked.port}"


@pytest.mark.parametrize("found", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]])
def test_the_addresses_of_a_name_are_tried_in_turn(names: Callable[..., list[str]], found: list[str]) -> None:
    names("rewards.test", found)  # nobody listens at 127.0.0.2
    with serving(lengths) as asked:
        assert HttpReward(asked.url("rewards.test"), allow_private=True)(batch("one")) == [3]


def test_a_private_address_is_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROXIMA_HTTP_ALLOW_PRIVATE", raising=False)
    for url in ("http://127.0.0.1/", "http://[::1]:8000/", "http://10.0.0.7/score"):
        with pytest.raises(SpecError, match="private address") as caught:
            built({"type": "http", "url": url})
        assert caught.value.issues[0].loc == ("rewards", 0, "url")


def test_redirects_are_not_followed() -> None:
    with serving(lengths) as other, serving(status(307, Location=other.url())) as asked:
        [error] = reward(asked)(batch("one"))
    assert "redirects are not followed" in str(error)
    assert error.lasting
    assert other.exchanges == []


def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(scores(5)) as proxy, serving(lengths) as asked:
        monkeypatch.setenv("HTTP_PROXY", proxy.url())
        monkeypatch.setenv("http_proxy", proxy.url())
        assert reward(asked)(batch("one")) == [3]
    assert proxy.exchanges == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of rewards.test, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rewards.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("rewards.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "rewards.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("host", "trusted", "message"),
    [
        ("rewards.test", True, None),
        ("other.test", True, "Hostname mismatch"),
        ("rewards.test", False, "self-signed certificate"),
    ],
)
def test_a_server_proves_that_it_has_the_name(
    names: Callable[..., list[str]],
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    trusted: bool,
    message: str | None,
) -> None:
    names(host, ["127.0.0.1"])
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serving(lengths, tls=tls) as asked:
        [found] = HttpReward(asked.url(host, "https"), allow_private=True)(batch("one"))
    if message is None:
        assert found == 3
    else:
        assert isinstance(found, RewardError)
        assert message in str(found)
        assert asked.exchanges == []


# A run of it ---------------------------------------------------------------------------------------------


def run_with(reward: dict[str, Any], directory: Path, policy_dir: Path) -> RunDir:
    """One update, to its end, in this process."""
    run_dir = make_run(directory, policy_dir, rewards=[reward], ppo={"total_episodes": 16})
    main([str(run_dir.path)])
    return run_dir


def test_a_run_goes_on_with_fallbacks_or_stops_with_the_name_of_the_row(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(exchange: Exchange) -> None:
        rows = len(exchange.rows["responses"])
        exchange.answer(json.dumps({"scores": [1.0] * (rows // 2) + [None] * (rows - rows // 2)}).encode())

    monkeypatch.setenv("PROXIMA_HTTP_ALLOW_PRIVATE", "1")
    with serving(half) as asked:
        judge = {"type": "http", "name": "judge", "url": asked.url(), "retries": 0}
        whole = run_with(judge | {"fallback": -1.0}, tmp_path / "whole", policy_dir)
        stopped = run_with(judge, tmp_path / "stopped", policy_dir)

    [metrics] = [event.data for event in read_complete(whole.events)[0] if event.type == "metrics"]
    assert (metrics["reward/judge"], metrics["reward/judge/failed"]) == (0, 8)
    assert "reward/judge/retried" not in metrics
    result = stopped.read_result()
    assert result is not None
    assert (result.outcome, result.reason) == ("failed", "reward")
    assert result.message.startswith('Reward "judge" for row 8 (prompt "')
    assert "and 7 more gave null" in result.message


def test_a_run_with_a_private_address_ends_before_it_begins(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROXIMA_HTTP_ALLOW_PRIVATE", raising=False)
    with serving(lengths) as asked:
        run_dir = run_with(
            {"type": "http", "name": "judge", "url": asked.url()}, tmp_path / "run", policy_dir
        )
    result = run_dir.read_result()
    assert result is not None
    assert (result.outcome, result.reason) == ("failed", "spec")
    assert [tuple(issue.loc) for issue in result.issues] == [("rewards", 0, "url")]
    assert asked.exchanges == []
