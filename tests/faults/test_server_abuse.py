"""Rows 27 and 28, and the memory of a full queue: what strangers send to a server that really runs."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image
from serve_process import KEY, Running, ask, assert_ends, client_of, figure, get, post, served, started
from tiny_serve import BAD, CHAT, data_url, models, picture, png, user

from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--allow-image-urls", "--max-new-tokens", "400") as running:
        yield running


@pytest.fixture(scope="module")
def chat(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu")


def port_of(server: Running) -> int:
    return int(server.address.rpartition(":")[2])


def test_row_27_it_survives_whatever_is_sent(server: Running) -> None:
    """Every bad input gets its 4xx, little memory is taken, and the next question is answered as before."""
    before, answer = server.peak_mb(), ask(server.client(), user("Hello")).choices[0].message.content
    for name, (body, _, _) in BAD.items():
        response = post(server.address, body)
        assert response.status_code == 400, name
        assert "Traceback" not in response.text
    assert post(server.address, b"[" + b" " * 65 * 2**20).status_code == 413
    assert post(server.address, {}, path="/nothing").status_code == 404
    with socket.create_connection(("127.0.0.1", port_of(server))) as raw:
        raw.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert ask(server.client(), user("Hello")).choices[0].message.content == answer
    assert server.process.poll() is None
    assert server.peak_mb() - before < 500
    assert "Traceback" not in server.output()


def test_row_27_a_private_address_is_not_even_connected_to(server: Running) -> None:
    """A listener of this machine, named in every way, hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0177.0.0.1", "2130706433"):
            response = post(server.address, CHAT | {"messages": [user(picture(f"http://{host}:{port}/x.png"))]})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image"), host
        with pytest.raises(TimeoutError):
            listener.accept()


def costly() -> list[str]:
    """Pictures near the limit of pixels that are a few hundred kilobytes: of 16 bits, with alpha, progressive."""
    side = int(Limits().image_pixels ** 0.5) - 1
    urls = []
    for mode, kind, options in (
        ("I;16", "PNG", {"compress_level": 1}),
        ("RGBA", "PNG", {"compress_level": 1}),
        ("RGB", "JPEG", {"progressive": True}),
    ):
        file = io.BytesIO()
        Image.new(mode, (side, side)).save(file, kind, **options)
        urls.append(data_url(file.getvalue(), f"image/{kind.lower()}"))
    return urls


def test_row_27_a_full_queue_of_costly_pictures_takes_less_than_a_gibibyte(place: Path) -> None:
    """33 clients at once, each with 20 of them and of an address of its own, until the first answer is there."""
    urls = costly()
    body = json.dumps(CHAT | {"messages": [user("What?", *(picture(urls[i % 3]) for i in range(20)))]}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    seen: list[tuple[int, float, int]] = []
    with started(place) as server, ThreadPoolExecutor(33) as pool:
        ask(server.client(), user("Hello", picture(data_url(png()))))
        before = server.peak_mb()

        def one(number: int) -> None:
            transport = httpx2.HTTPTransport(local_address=f"127.0.0.{2 + number}")
            with httpx2.Client(transport=transport, timeout=300) as client, contextlib.suppress(httpx2.TransportError):
                response = client.post(f"{server.address}/v1/chat/completions", content=body, headers=headers)
                if not seen:  # else the server has been ended below
                    waiting = figure(server.address, "clips_requests_waiting")
                    seen.append((response.status_code, waiting, server.peak_mb()))
                    server.process.kill()

        list(pool.map(one, range(33)))
    [(status, waiting, peak)] = seen
    assert status == 200
    assert waiting >= 31
    print(f"{peak - before} MiB above the loaded model")
    assert peak - before < 1024


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
    with served(chat, "none", Limits(), api_key="s3cret-ü") as address:
        for path in ("/v1/models", "/metrics", "/v1/unknown"):
            assert get(address + path).status_code == 401
        assert get(f"{address}/health").status_code == 200
        for key in ("", "Bearer", "Bearer s3cret", "Bearer s3cret-ü ü", "Basic s3cret-ü"):
            response = post(address, CHAT, Authorization=key.encode())
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "s3cret" not in response.text
        assert post(address, CHAT, Authorization="Bearer s3cret-ü".encode()).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example"):
            response = get(f"{address}/health", Host=host)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


def test_row_28_a_defect_shows_the_client_no_trace(
    chat: ChatModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the first token and in the middle of a stream; the log has the text of the error."""

    def broken(self: ChatSession, *_: object) -> Iterator[str]:
        yield "Well"
        raise RuntimeError("secret")

    with served(chat, "none", Limits()) as address:
        monkeypatch.setattr(ChatSession, "answer", broken)
        response = post(address, CHAT)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert response.json()["error"]["message"] == "the server failed; its log says how"
        with pytest.raises(openai.APIError, match="the server failed") as caught:
            list(ask(client_of(address), user("Hello"), stream=True))
        for hidden in ("secret", "Traceback", ".py", "RuntimeError"):
            assert hidden not in response.text + str(caught.value.body)
        monkeypatch.undo()
        assert post(address, CHAT).status_code == 200
    assert capfd.readouterr().err.count("RuntimeError: secret") >= 2


def test_sigterm_ends_it_also_while_it_answers(server: Running) -> None:
    """It is the last test of this server."""
    assert_ends(server, signal.SIGTERM, -signal.SIGTERM)
