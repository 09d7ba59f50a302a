"""What the judging page asks of the server.

Always holds: nothing that is sent says which model drew a picture; a picture is served by its id in the study and by
nothing else. Called by `cluster.pages.app`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Response
from pydantic import BaseModel, Field

from cluster.judging.answers import LONGEST_MS, Answers, Choice, Turn
from cluster.judging.study import QUESTIONS, Item, Study


class Begin(BaseModel):
    judge: str
    question: str


class Given(BaseModel):
    """`turn`: what was shown, as the server named it; `ms`: from its first sight to the choice."""

    judge: str
    token: str
    turn: str
    choice: Choice
    ms: Annotated[int, Field(ge=0, le=LONGEST_MS)]


def judging_routes(study: Study) -> APIRouter:
    """Raises UserError where the answers cannot be kept."""
    routes, answers, ids = APIRouter(), Answers(study), study.ids()
    pairs = len(study.document.models) * (len(study.document.models) - 1) // 2
    items: dict[str, list[Item]] = {question: study.items(question) for question in study.document.questions}

    @routes.get("/api/judge")
    def questions() -> list[dict[str, Any]]:
        return [
            {"question": question, "text": QUESTIONS[question], "comparisons": pairs * len(items[question])}
            for question in items
        ]

    @routes.post("/api/judge/begin")
    def begin(body: Begin) -> dict[str, Any]:
        return shown(answers.begin(body.judge, body.question))

    @routes.post("/api/judge/answer")
    def answer(body: Given) -> dict[str, Any]:
        return shown(answers.answer(body.judge, body.token, body.turn, body.choice, body.ms))

    @routes.get("/picture/{picture}")
    def picture(picture: str) -> Response:
        if picture not in ids:
            raise HTTPException(404)
        return Response(study.png(picture), media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    def shown(turn: Turn) -> dict[str, Any]:
        """A turn as the page gets it: blind."""
        found: dict[str, Any] = {"token": turn.token, "turn": turn.turn, "text": QUESTIONS[turn.question]}
        found |= {"answered": turn.answered, "comparisons": pairs * len(items[turn.question]), "done": True}
        if turn.shown is None:
            return found
        item = items[turn.question][turn.shown.item]
        sides = {"left": turn.shown.left, "right": turn.shown.right}
        found |= {side: [f"/picture/{own}" for own in study.pictures(item, model)] for side, model in sides.items()}
        return found | {"done": False, "caption": study.document.captions[item.caption].text}

    return routes
