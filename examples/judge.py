"""A reward of your own: a vision model behind an OpenAI-compatible server judges pictures by their prompts.

    rewards:
      examples.judge:Judge: {url: "http://judge.internal:8000/v1", model: my-vision-model}

with this folder's parent on PYTHONPATH wherever a reward worker runs. Score: the judge's 1 to 5, over 5 (0.2 to 1).
An answer that is late, broken or without exactly one score raises: a failure is retried, and is never a number.
"""

import asyncio
import base64
import json
import os
import re
from io import BytesIO

import aiohttp  # comes with ray[default]
import torch
from PIL import Image
from torch import Tensor

from opd_ray.rewards.probes import Probe
from opd_ray.rewards.raster import as_pixels

QUESTION = (
    "You see a generated picture. Its prompt was: {prompt}\n"
    "How well does the picture show what the prompt asks for? Judge objects, counts, colours, places and text.\n"
    "Think in a sentence or two, then end with one line of the form\nScore: N\nwhere N is a number from 1 to 5."
)
BUSY = {408, 409, 425, 429}
"""HTTP statuses below 500 after which the same question may be asked again."""


class JudgeError(RuntimeError):
    """There is no score for a picture, and why."""


class RefusedError(JudgeError):
    """Asking again would not help."""


class Judge:
    """Asks about every picture of a batch, several at once.

    Args:
        url: of the API; `/chat/completions` is added.
        model: the name that the server knows.
        key_variable: the environment variable that holds the key; none is sent where it is not set.
        timeout_s: for one whole answer, from the connection to its last byte.
        attempts: how often a question is asked before the picture counts as failed.
        pause_s: before the second attempt; doubled before each further one.
        at_once: questions under way.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        attempts: int = 3,
        pause_s: float = 1.0,
        at_once: int = 8,
    ) -> None:
        self._url, self._model = url.rstrip("/") + "/chat/completions", model
        self._timeout, self._attempts, self._pause = aiohttp.ClientTimeout(total=timeout_s), attempts, pause_s
        self._at_once = at_once
        key = os.environ.get(key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1].

        Raises:
            JudgeError: a picture has no score; it is the worker's caller that decides what becomes of the batch.
        """
        questions = [self._question(*pair) for pair in zip(as_pixels(images), prompts, strict=True)]
        return torch.tensor(asyncio.run(self._ask_all(questions)))

    def probes(self) -> list[Probe]:
        """A red picture and a blue one, each asked for in turn."""
        red, blue = (torch.tensor(c).view(3, 1, 1).expand(3, 256, 256) for c in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9)))
        said = {"red": "nothing but plain red", "blue": "nothing but plain blue"}
        return [Probe((red, said["red"]), (blue, said["red"])), Probe((blue, said["blue"]), (red, said["blue"]))]

    def _question(self, pixels, prompt: str) -> dict:
        file = BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": QUESTION.format(prompt=prompt)},
        ]
        return {"model": self._model, "temperature": 0, "messages": [{"role": "user", "content": content}]}

    async def _ask_all(self, questions: list[dict]) -> list[float]:
        places = asyncio.Semaphore(self._at_once)
        async with aiohttp.ClientSession(timeout=self._timeout, headers=self._headers) as session:

            async def ask(question: dict) -> float:
                async with places:
                    return await self._ask(session, question)

            return await asyncio.gather(*map(ask, questions))  # the first failure ends them all

    async def _ask(self, session: aiohttp.ClientSession, question: dict) -> float:
        """The score of one picture, after as many attempts as it takes."""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._pause * 2 ** (attempt - 1))
            try:
                async with session.post(self._url, json=question) as response:
                    text = await response.text()
                    if 400 <= response.status < 500 and response.status not in BUSY:
                        raise RefusedError(f"{self._url} refuses the question: HTTP {response.status}: {text[:200]}")
                    response.raise_for_status()
                return score_in(content_of(text))
            except RefusedError:
                raise
            except (aiohttp.ClientError, TimeoutError, JudgeError) as error:
                last = f"{type(error).__name__}: {error}"
        raise JudgeError(f"{self._url} gave no score in {self._attempts} attempts; the last one: {last}")


def content_of(text: str) -> str:
    """What the model says in a chat completion."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise JudgeError(f"no chat completion: {text[:200]!r}") from None
    if not isinstance(content, str):
        raise JudgeError(f"a chat completion without text: {text[:200]!r}")
    return content


def score_in(answer: str) -> float:
    """The one score of an answer, over 5.

    Raises:
        JudgeError: it has none, several, or one that is not from 1 to 5.
    """
    found = re.findall(r"^[\s*]*score:[\s*]*(-?\d+(?:\.\d+)?)(?:\s*/\s*5)?[\s*.]*$", answer, re.I | re.M)
    if len(found) != 1:
        raise JudgeError(f"{len(found)} scores in {answer[-200:]!r}, expected one line `Score: N`")
    if not 1 <= float(found[0]) <= 5:
        raise JudgeError(f"score {found[0]} is not from 1 to 5")
    return float(found[0]) / 5
