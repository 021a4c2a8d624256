"""The example of a user's own reward, against a real small HTTP server."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from examples.judge import Judge, JudgeError, content_of, score_in
from opd_ray.rewards import make_rewards


class Server(ThreadingHTTPServer):
    """Answers each question by what `plan` says next, by default with the red of the picture as its score."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[object] = []
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            step = server.plan.pop(0) if server.plan else None
        try:
            self.answer(step, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was too late for the asker
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, step, body) -> None:
        assert self.path == "/v1/chat/completions"
        status, text = 200, None
        if isinstance(step, int):
            status, text = step, "no"
        elif isinstance(step, str):
            text = step
        elif step == ("cut",):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{")
            return
        elif step == ("drip",):  # a byte now and then: no single read is late
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            return
        else:
            time.sleep(0.05)
            picture = body["messages"][0]["content"][0]["image_url"]["url"].partition("base64,")[2]
            red = Image.open(io.BytesIO(base64.b64decode(picture))).getpixel((0, 0))[0]
            text = completion(f"It is rather red.\nScore: {1 + 4 * red / 255:.2f}")
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def completion(answer: object) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(5)


def reds(*levels: float) -> torch.Tensor:
    return torch.stack([torch.tensor([level, 0.0, 0.0]).view(3, 1, 1).expand(3, 8, 8) for level in levels])


def ask(server: Server, images=None, **changed) -> list[float]:
    settings = {"url": server.url, "model": "m", "pause_s": 0.01, "timeout_s": 5.0, **changed}
    images = reds(1.0) if images is None else images
    judge = make_rewards({"examples.judge:Judge": settings})["examples.judge:Judge"]
    return judge(images, [f"prompt {i}" for i in range(len(images))]).tolist()


def test_every_picture_gets_its_own_score_in_its_place(server, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    levels = [i / 255 for i in (0, 255, 51, 102, 153, 204, 255, 0)]
    scores = ask(server, reds(*levels), at_once=3, key_variable="JUDGE_KEY")
    assert scores == pytest.approx([(1 + 4 * level) / 5 for level in levels], abs=1e-3)
    assert server.most == 3
    texts = sorted(body["messages"][0]["content"][1]["text"] for body in server.asked)
    assert all(f"Its prompt was: prompt {i}\n" in text for i, text in enumerate(texts))
    assert {body["model"] for body in server.asked} == {"m"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_without_a_key_none_is_sent(server, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask(server)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "step",
    [
        500,
        503,
        429,
        ("cut",),
        "not json",
        '{"choices": []}',
        completion(None),
        completion("I like it."),
        completion(""),
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again(server, step) -> None:
    server.plan = [step, step]
    assert ask(server) == [1.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize("step", [500, "not json", completion("Score: 7"), completion("Score: 0"), ("cut",)], ids=str)
def test_what_does_not_pass_is_an_error_and_no_score(server, step) -> None:
    server.plan = [step] * 2
    with pytest.raises(JudgeError, match=r"v1/chat/completions gave no score in 2 attempts; the last one: "):
        ask(server, attempts=2)
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_asked_again(server, status) -> None:
    server.plan = [status]
    with pytest.raises(JudgeError, match=f"refuses the question: HTTP {status}: no"):
        ask(server)
    assert len(server.asked) == 1


def test_one_failed_picture_fails_the_batch(server) -> None:
    server.plan = [None, 404, None]
    with pytest.raises(JudgeError):
        ask(server, reds(0.0, 0.5, 1.0), at_once=1)


def test_a_slow_answer_is_late_as_a_whole(server) -> None:
    server.plan = [("drip",)]
    begun = time.monotonic()
    with pytest.raises(JudgeError, match="the last one: TimeoutError"):
        ask(server, attempts=1, timeout_s=0.3)
    assert time.monotonic() - begun < 3  # dripping takes five seconds
    server.plan = [("drip",)]
    assert ask(server, attempts=2, timeout_s=0.3) == [1.0]


def test_nobody_there_is_an_error() -> None:
    judge = Judge(url="http://127.0.0.1:9/v1", model="m", attempts=2, pause_s=0.01)
    with pytest.raises(JudgeError, match="gave no score in 2 attempts; the last one: ClientConnectorError"):
        judge(reds(1.0), ["p"])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 3", 0.6),
        ("Fine.\n\nScore: 4.5\n", 0.9),
        ("**Score: 5**", 1.0),
        ("score: 2/5.", 0.4),
        ("**Score:** 1", 0.2),
    ],
)
def test_scores_are_found(answer, score) -> None:
    assert score_in(answer) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer",
    ["", "5", "Score:", "Score: five", "Score: 6", "Score: 0.9", "Score: -3", "Score: 3\nScore: 4", "Score: 3 or 4",
     "I would not say Score: 4", "Score: 4 would be too much", "Score: nan", "Score: 10/5"],
)  # fmt: skip
def test_everything_else_is_no_score(answer) -> None:
    with pytest.raises(JudgeError):
        score_in(answer)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": [{}]}', '{"choices": [{"message": {"content": 3}}]}'])
def test_other_answers_are_no_completions(text) -> None:
    with pytest.raises(JudgeError, match="chat completion"):
        content_of(text)


def test_probes_rank_by_a_judge_of_colours(server) -> None:
    judge = Judge(url=server.url, model="m")
    first, second = judge.probes()
    better, worse = judge(torch.stack([first.better[0], first.worse[0]]), ["", ""]).tolist()
    assert better > worse  # this server likes red
    assert second.better[1] == second.worse[1] == "nothing but plain blue"
