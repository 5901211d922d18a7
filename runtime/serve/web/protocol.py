"""What the server says of jobs: the `/v1/videos` job protocol that the OpenAI SDK speaks, and the whole truth in `motionrt`.

`status` is one of four words, because clients of that protocol return at once on any other; what is finer stands in the object
`motionrt`: stage, step, seconds left, the retrieved clips. Times are whole seconds since 1970.
"""

from __future__ import annotations

from typing import Any

from motionrt.runtime.serve.jobs.dispatch import Dispatcher
from motionrt.runtime.serve.jobs.live import Live
from motionrt.runtime.serve.jobs.store import JobRow
from motionrt.runtime.serve.messages import PRIORITIES
from motionrt.runtime.serve.web.refusal import Refused, told

VARIANTS = ("video", "thumbnail", "spritesheet", "field")


def video(row: JobRow, dispatcher: Dispatcher) -> dict[str, Any]:
    """The JSON of a job."""
    live, asked, result = dispatcher.jobs.get(row.id), row.asked, row.result or {}
    row = row if live is None else live.row
    return {
        "id": row.id, "object": "video", "model": row.model,
        "status": "failed" if row.status == "expired" else row.status,
        "progress": 100 if row.status == "completed" else 0 if live is None else live.percent,
        "created_at": int(row.created), "completed_at": None if row.ended is None else int(row.ended),
        "expires_at": None if row.expires is None else int(row.expires),
        "prompt": asked["fields"].get("prompt"), "seconds": f"{asked['seconds']:g}", "size": asked["size"],
        "error": None if row.error is None else {"code": row.error["code"], "message": told(row.error["message"])},
        "remixed_from_video_id": row.remixed, "metadata": row.metadata,
        "motionrt": _progress(row, live, dispatcher) | {
            "seed": asked["seeds"][0], "seeds": asked["seeds"], "request": asked["fields"], "files": asked.get("files", []),
            "attempt": row.attempt,
            "priority": PRIORITIES[row.priority], **{name: value for name, value in result.items() if name != "seeds"},
        },
    }  # fmt: skip


def _progress(row: JobRow, live: Live | None, dispatcher: Dispatcher) -> dict[str, Any]:
    """Where a job is."""
    steps = row.asked["steps"]
    if live is None:
        stage = "done" if row.status == "completed" else row.status
        step = steps if row.status == "completed" else 0
        return {"stage": stage, "step": step, "steps": steps, "queue_position": None, "eta_seconds": None, "references": []}
    left, progress = dispatcher.left(live), live.progress
    if live.worker is None:
        where = {"stage": "queued", "step": 0, "queue_position": dispatcher.position(live), "references": []}
    elif progress is None:
        where = {"stage": "starting", "step": 0, "queue_position": None, "references": []}
    else:
        where = {
            "stage": progress.stage, "step": progress.step, "queue_position": None, "references": progress.references or [],
            "worker": live.worker.number, "preview": None if live.preview is None else live.preview[0],
        }  # fmt: skip
    return where | {"steps": steps, "eta_seconds": None if left is None else round(left, 3)}


def poll_after(row: JobRow, dispatcher: Dispatcher) -> dict[str, str]:
    """The header that tells a client in how many milliseconds to ask again: a tenth of what is left, 200 to 5,000."""
    live = dispatcher.jobs.get(row.id)
    left = None if live is None else dispatcher.left(live)
    return {"openai-poll-after-ms": str(int(min(5.0, max(0.2, (left or 1.0) / 10)) * 1000))}


def not_found() -> Refused:
    return Refused(404, "not_found", "there is no such job, or it is not yours.")


def expired() -> Refused:
    return Refused(404, "video_expired", "the job expired and its files were removed.")


def no_preview() -> Refused:
    text = "there is nothing to see of the job yet, it is over, or its model has no previews (`motionrt preview calibrate`)."
    return Refused(404, "no_preview", text)


def not_ready(row: JobRow) -> Refused:
    """Content was asked for that is not there, and why."""
    if row.error is not None:
        return Refused(409, row.error["code"], told(row.error["message"]), headers={"x-should-retry": "false"})
    text = f"the video is {row.status.replace('_', ' ')}; ask for its content when its status is completed."
    return Refused(409, "video_not_ready", text, headers={"x-should-retry": "false"})
