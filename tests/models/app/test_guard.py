"""Requests that the server refuses, by their headers alone."""

import asyncio

import pytest

from models.app.guard import AllowedHosts, Guard, name_of, why_refused, why_too_large

HOST = "127.0.0.1:7860"
LOCAL = AllowedHosts()
NETWORK = AllowedHosts(addresses=True)


def headers(**given):
    """Headers with dashes for underlines; the host is ours unless it is given."""
    given = {"host": HOST} | given
    return {name.replace("_", "-"): [value] for name, value in given.items() if value}


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:7860", "localhost"),
        ("LOCALHOST", "localhost"),
        ("localhost.", "localhost"),
        ("[::1]:80", "::1"),
        ("192.168.0.7", "192.168.0.7"),
        ("", None),
        ("a b", None),
        ("localhost:7860@evil.example", None),
        ("localhost:7860, evil.example", None),
        ("localhost:", None),
        ("::1", None),
        ("[::1", None),
        ("[::1]evil.example", None),
        ("[evil.example]", None),
        ("localhost:123456", None),
        ("127.0.0.1:7860\r\nX: y", None),
    ],
)
def test_name_in_a_host_header(host, name):
    assert name_of(host) == name


@pytest.mark.parametrize(
    ("hosts", "host", "allowed"),
    [
        (LOCAL, HOST, True),
        (LOCAL, "localhost:1", True),
        (LOCAL, "[::1]:7860", True),
        (LOCAL, "evil.example:7860", False),  # DNS rebinding
        (LOCAL, "127.0.0.1.evil.example", False),
        (LOCAL, "192.168.0.7:7860", False),
        (LOCAL, "[::ffff:127.0.0.1]:7860", False),
        (LOCAL, "2130706433:7860", False),  # 127.0.0.1 as one number
        (NETWORK, "192.168.0.7:7860", True),
        (NETWORK, "[fe80::1]:7860", True),
        (NETWORK, "evil.example", False),
        (AllowedHosts(frozenset({"My.Machine"})), "my.machine:7860", True),
    ],
)
def test_names_of_the_server(hosts, host, allowed):
    assert (why_refused("POST", headers(host=host), hosts) is None) == allowed


def test_a_request_names_one_host():
    assert why_refused("GET", {}, LOCAL) is not None
    assert why_refused("GET", {"host": [HOST, HOST]}, LOCAL) is not None


@pytest.mark.parametrize(
    ("method", "given", "allowed"),
    [
        ("POST", {}, True),  # no browser sends that
        ("POST", {"origin": f"http://{HOST}", "sec_fetch_site": "same-origin"}, True),
        ("POST", {"origin": f"https://{HOST}"}, True),
        ("POST", {"origin": "http://evil.example"}, False),
        ("POST", {"origin": "null"}, False),
        ("POST", {"origin": f"http://{HOST}/"}, False),  # no browser sends a path
        ("POST", {"origin": "http://127.0.0.1"}, False),  # of port 80
        ("POST", {"host": "127.0.0.1", "origin": "http://127.0.0.1"}, True),
        ("POST", {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, True),
        ("POST", {"host": "[::1]:7860", "origin": "http://[::1]:7861"}, False),
        ("POST", {"host": "[::1]:7860", "origin": f"http://{HOST}"}, False),
        ("POST", {"host": "localhost:7860", "origin": f"http://{HOST}"}, False),
        ("POST", {"origin": f"file://{HOST}"}, False),
        ("POST", {"origin": "http://127.0.0.1:8080"}, False),
        ("POST", {"origin": f"http://{HOST}.evil.example"}, False),
        ("POST", {"sec_fetch_site": "cross-site"}, False),
        ("GET", {"origin": "http://evil.example"}, False),
        ("GET", {"sec_fetch_site": "none", "sec_fetch_mode": "navigate"}, True),
        # A picture on another page, and a page of another port.
        ("GET", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, False),
        ("GET", {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"}, False),
    ],
)
def test_pages_that_a_request_comes_from(method, given, allowed):
    assert (why_refused(method, headers(**given), LOCAL) is None) == allowed


@pytest.mark.parametrize(
    ("method", "dest", "allowed"),
    [("GET", "document", True), ("GET", "iframe", False), ("POST", "document", False)],
)
def test_a_link_leads_to_the_page_but_no_form_or_frame_does(method, dest, allowed):
    given = headers(
        sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest=dest
    )
    assert (why_refused(method, given, LOCAL) is None) == allowed


@pytest.mark.parametrize(
    ("method", "path", "length", "most", "status"),
    [
        ("GET", "/", None, 0, None),
        ("POST", "/gradio_api/queue/join", "1000", 0, None),
        ("POST", "/gradio_api/queue/join", str(2**20), 0, None),
        ("POST", "/gradio_api/queue/join", str(2**20 + 1), 10**9, 413),
        ("POST", "/gradio_api/upload", "5000", 5000, None),
        ("POST", "/gradio_api/upload", "5001", 5000, 413),
        ("POST", "/gradio_api/upload/", "5001", 5000, 413),
        ("POST", "/gradio_api/upload", "1", 0, 403),
        ("POST", "/gradio_api/upload", None, 5000, 411),
        ("PUT", "/x", "-1", 5000, 411),
        ("PUT", "/x", "many", 5000, 411),
    ],
)
def test_size_of_a_body(method, path, length, most, status):
    found = why_too_large(method, path, headers(content_length=length), most)
    assert (found and found[0]) == status


def ask(path="/", kind="http", method="POST", **given):
    """Status and headers of an answer, and whether the application was reached."""
    reached, sent = [], []

    async def application(scope, receive, send):
        reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [
            (name.encode(), values[0].encode())
            for name, values in headers(**given).items()
        ],
    }
    guard = Guard(application, hosts=LOCAL, upload_bytes=0)
    asyncio.run(guard(scope, None, send))
    return sent, bool(reached)


def test_a_refused_request_does_not_reach_the_page():
    sent, reached = ask(content_length="0", origin="http://evil.example")
    assert not reached
    assert sent[0]["status"] == 403
    assert b"http://evil.example" in sent[1]["body"]
    sent, reached = ask("/gradio_api/upload", content_length="9")
    assert (sent[0]["status"], reached) == (403, False)
    sent, reached = ask(kind="websocket", host="evil.example")
    assert (sent[0]["type"], reached) == ("websocket.close", False)


def test_answers_cannot_be_framed_by_others():
    sent, reached = ask(content_length="0")
    assert reached
    assert (b"x-frame-options", b"SAMEORIGIN") in sent[0]["headers"]
    assert (b"content-security-policy", b"frame-ancestors 'self'") in sent[0]["headers"]
