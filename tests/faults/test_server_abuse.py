"""Rows 27 and 28, and the memory of a full queue: what strangers send to a server that really runs."""

import contextlib
import json
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import openai
import pytest
from bad_corpus import encode
from PIL import Image
from serve_process import (
    BAD,
    CHAT,
    KEY,
    Running,
    ask,
    assert_ends,
    client_of,
    data_url,
    get,
    make_image,
    models,
    png,
    post,
    served,
    started,
    user,
)

from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--max-new-tokens", "400") as running:
        yield running


@pytest.fixture(scope="module")
def chat(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu", dtype="float32")


def port_of(server: Running) -> int:
    return int(server.address.rpartition(":")[2])


def test_row_27_it_survives_whatever_is_sent(server: Running) -> None:
    """Every bad input gets its 4xx, little memory is taken, and the next question is answered as before."""
    before, answer = server.peak_mb(), ask(server.client(), user("Hello")).choices[0].message.content
    for name, (body, word) in BAD.items():
        response = post(server.address, body)
        assert response.status_code == 400, name
        assert word in response.json()["error"]["message"], name
    assert post(server.address, b"[" + b" " * 65 * 2**20).status_code == 413
    with socket.create_connection(("127.0.0.1", port_of(server))) as raw:
        raw.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert ask(server.client(), user("Hello")).choices[0].message.content == answer
    assert server.process.poll() is None
    assert server.peak_mb() - before < 500
    assert "Traceback" not in server.output()


def test_row_27_no_address_and_no_file_is_opened(server: Running) -> None:
    """A listener of this machine, named in every way, hears nothing; a path is no image."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        hosts = ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0177.0.0.1", "2130706433")
        addresses = [f"http://{host}:{port}/x.png" for host in hosts]
        for url in (*addresses, "file:///etc/passwd", "/etc/passwd", "../../../etc/passwd"):
            response = post(server.address, CHAT | {"messages": [user(make_image(url))]})
            assert (response.status_code, "no address" in response.text) == (400, True), url
        with pytest.raises(TimeoutError):
            listener.accept()


def costly() -> list[str]:
    """Images near the limit of pixels that are a few hundred kilobytes: of 16 bits, with alpha, progressive."""
    side = int(Limits().image_pixels ** 0.5) - 1
    urls = []
    for mode, kind, options in (
        ("I;16", "PNG", {"compress_level": 1}),
        ("RGBA", "PNG", {"compress_level": 1}),
        ("RGB", "JPEG", {"progressive": True}),
    ):
        urls.append(data_url(encode(Image.new(mode, (side, side)), kind, **options), f"image/{kind.lower()}"))
    return urls


def test_row_27_a_full_queue_of_costly_images_takes_less_than_a_gibibyte(place: Path) -> None:
    """More clients than places, each with 20 of them, until the first answer is there; the others get 429."""
    urls = costly()
    body = json.dumps(CHAT | {"messages": [user("What?", *(make_image(urls[i % 3]) for i in range(20)))]}).encode()
    seen: list[tuple[int, int]] = []
    refused: list[int] = []
    with started(place) as server, ThreadPoolExecutor(24) as pool:
        ask(server.client(), user("Hello", make_image(data_url(png()))))
        before = server.peak_mb()

        def one(number: int) -> None:
            with contextlib.suppress(httpx2.TransportError):
                response = post(server.address, body)
                if response.status_code == 429:
                    refused.append(number)
                elif not seen:  # else the server has been ended below
                    seen.append((response.status_code, server.peak_mb()))
                    server.process.kill()

        list(pool.map(one, range(24)))
    [(status, peak)] = seen
    assert status == 200
    assert len(refused) == 24 - 1 - Limits().waiting
    print(f"{peak - before} MiB above the loaded model")
    assert peak - before < 1024


def test_a_burst_of_sixty_connections_is_queued_or_told_why(place: Path) -> None:
    """All are open before the first one asks, and each that finds no place gets 429 with a reason."""
    body = json.dumps(CHAT | {"messages": [user("Hello")], "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    for waiting, least in ((64, 60), (16, 17)):
        with started(place, "--max-waiting", str(waiting)) as server, contextlib.ExitStack() as stack:
            address = ("127.0.0.1", port_of(server))
            clients = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(60)]
            for client in clients:
                client.sendall(head.encode() + body)
            answers = [b"".join(iter(partial(client.recv, 65536), b"")) for client in clients]
        statuses = Counter(answer.split()[1] for answer in answers)
        assert statuses[b"200"] >= least, statuses
        assert statuses[b"200"] + statuses[b"429"] == 60, statuses
        assert all(b"try again later" in answer for answer in answers if answer.split()[1] == b"429")


def test_row_28_this_machine_alone_reaches_it(server: Running) -> None:
    """Bound to 127.0.0.1; no other address of the loopback is answered."""
    own = f"0100007F:{port_of(server):04X}"
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()
        if line.split()[3] == "0A"
    ]
    assert own in listening
    assert f"00000000:{port_of(server):04X}" not in listening
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(server)), timeout=5)


def test_row_28_the_key_and_the_name(chat: ChatModel) -> None:
    """Without the key nothing but /health; a browser that was led here by another name is not answered."""
    with served(chat, Limits(), api_key="s3cret") as address:
        assert get(f"{address}/v1/models").status_code == 401
        assert get(f"{address}/health").status_code == 200
        for key in ("", "Bearer", "Bearer s3cre", "Bearer s3cret ü", "Basic s3cret"):
            response = post(address, CHAT, Authorization=key.encode())
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "s3cre" not in response.text
        assert post(address, CHAT, Authorization="Bearer s3cret").status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example"):
            assert get(f"{address}/health", Host=host).status_code == 400


def test_row_28_a_defect_shows_the_client_no_trace(chat, monkeypatch, capfd):
    """Before the first token and in the middle of a stream; the log has the text of the error."""

    def broken(self: ChatSession, *_: object) -> Iterator[str]:
        yield "Well"
        raise RuntimeError("secret")

    with served(chat, Limits()) as address:
        monkeypatch.setattr(ChatSession, "answer", broken)
        response = post(address, CHAT)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert response.json()["error"]["message"] == "the server failed; see its log"
        with pytest.raises(openai.APIError, match="the server failed") as caught:
            list(ask(client_of(address), user("Hello"), stream=True))
        for hidden in ("secret", "Traceback", ".py", "RuntimeError"):
            assert hidden not in response.text + str(caught.value.body)
        monkeypatch.undo()
        assert post(address, CHAT).status_code == 200
    assert capfd.readouterr().err.count("RuntimeError: secret") >= 2


def test_a_signal_ends_it_also_while_it_answers(server: Running) -> None:
    """The last test of this server."""
    assert "llava (runs/llava/model): 16 tokens for each image" in server.output()
    assert_ends(server, signal.SIGTERM, -signal.SIGTERM)
