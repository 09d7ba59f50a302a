"""What the sampling page asks of the server.

Always holds: a picture is served by its job and its place in it, never by a path. Called by `cluster.pages.app`.
"""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

from cluster.pages.desk import Desk, Job, Wish
from trainer.config import SamplerName


def sampling_routes(desk: Desk) -> APIRouter:
    routes = APIRouter()

    @routes.get("/api/sample")
    def about() -> dict[str, Any]:
        models = [{"name": name, "side": side} for name, side in desk.sides.items()]
        return {"models": models, "enlarged_side": desk.enlarged_side, "samplers": get_args(SamplerName)}

    @routes.get("/api/sample/jobs")
    def jobs() -> list[dict[str, Any]]:
        return [shown(job) for job in desk.jobs()]

    @routes.post("/api/sample/jobs")
    def ask(wish: Wish) -> dict[str, Any]:
        return shown(desk.ask(wish))

    @routes.get("/api/sample/jobs/{name}")
    def job(name: str) -> dict[str, Any]:
        return shown(found(name))

    @routes.post("/api/sample/jobs/{name}/cancel")
    def cancel(name: str) -> dict[str, Any]:
        desk.cancel(found(name))
        return shown(found(name))

    @routes.get("/drawn/{name}/{number}")
    def picture(name: str, number: int) -> FileResponse:
        pictures = found(name).pictures
        if not 0 <= number < len(pictures):
            raise HTTPException(404)
        return FileResponse(found(name).folder / pictures[number])

    def found(name: str) -> Job:
        job = desk.job(name)
        if job is None:
            raise HTTPException(404)
        return job

    return routes


def shown(job: Job) -> dict[str, Any]:
    """A job as the page gets it: the files that were given stay here."""
    wish = job.wish.model_dump(exclude={"image", "mask"})
    edited = "painted" if job.wish.mask else "varied" if job.wish.image else None
    pictures = [f"/drawn/{job.id}/{number}" for number in range(len(job.pictures))]
    found = {"id": job.id, "state": job.state, "done": job.done, "steps": job.steps, "note": job.note}
    return found | {"error": job.error, "warnings": job.warnings, "wish": wish, "edited": edited, "pictures": pictures}
