"""What is drawn on a picture over HTTP: tracks as JSON or text, a brush and a field as files, and the field that comes back."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Served, serving

from motionrt.runtime.errors import InputError
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.client import Client
from motionrt.runtime.serve.messages import Ended, FromWorker, Opening, Order, Run
from motionrt.runtime.serve.replay import read_record, replayed
from motionrt.runtime.serve.work.engine import Engine

DRAG = [[[10, 10], [16, 8]], [[24.5, 14]]]  # on a picture of 30 x 20


def test_a_worker_takes_tracks_as_text_or_json_and_writes_the_field(
    drawn_bundle: Path, picture: Path, brush: Path, tmp_path: Path
) -> None:
    said: list[FromWorker] = []
    files = {"image": str(picture), "brush": str(brush)}
    opening = Opening(bundles={"drawn": str(drawn_bundle)}, run_options={"threads": 1}, self_test=False)
    with Engine(opening, said.append) as engine:
        for name, drag in {"json": json.dumps(DRAG), "list": DRAG, "text": ["10,10 16,8", "24.5,14"]}.items():
            (tmp_path / name).mkdir()
            order = Order(model="drawn", fields={"drag": drag, "seed": 3}, files=files)
            running = engine.prepare(Run(job=name, order=order, folder=str(tmp_path / name)))
            assert running is not None and running.calls["step_drawn"] == 2 and "step_free" not in running.calls
            engine.enter(running)
            while engine.busy or engine._running:
                engine.turn()
        alone = Order(model="drawn", fields={"drag": "12,10"}, files={"image": str(picture)})
        assert engine.check(alone)["fields"]["drag"] == ["12,10"]
        with pytest.raises(InputError, match="drag 1 begins at"):
            engine.check(Order(model="drawn", fields={"drag": "29,10"}, files={"image": str(picture)}))
        with pytest.raises(InputError, match="brush is 'x'; upload a file"):
            engine.check(Order(model="drawn", fields={"brush": "x"}, files={"image": str(picture)}))
    ended = [one for one in said if isinstance(one, Ended)]
    assert [one.outcome for one in ended] == ["completed"] * 3, ended
    assert len({one.result["frames_sha256"][0] for one in ended}) == 1
    assert ended[0].result["notes"][0].startswith("drag 2 lies between the cells")
    (shown,) = [file for file in ended[0].files if file.kind == "field-0"]
    assert shown.type == "video/mp4" and (tmp_path / "json" / shown.name).stat().st_size == shown.size


def test_a_worker_takes_a_choice_and_says_what_became_of_it(recalling_bundle: Path, picture: Path, tmp_path: Path) -> None:
    said: list[FromWorker] = []
    opening = Opening(bundles={"drawn": str(recalling_bundle)}, run_options={"threads": 1}, self_test=False)
    with Engine(opening, said.append) as engine:
        told = engine.describe()["drawn"]["inputs"]["retrieval"]
        assert (told["kind"], told["options"], told["default"]) == ("choice", ["none", "direct", "start", "hints"], "none")
        with pytest.raises(InputError, match="retrieval is 'all'; allowed are none, direct, start, hints"):
            engine.check(Order(model="drawn", fields={"retrieval": "all"}, files={"image": str(picture)}))
        order = Order(model="drawn", fields={"retrieval": "direct", "seed": "3"}, files={"image": str(picture)})
        running = engine.prepare(Run(job="one", order=order, folder=str(tmp_path)))
        assert running is not None
        engine.enter(running)
        while engine.busy or engine._running:
            engine.turn()
    (ended,) = [one for one in said if isinstance(one, Ended)]
    assert ended.result["fallback"] == "no motion: there is no motion memory to find clips in; retrieval is none instead"


@pytest.fixture(scope="module")
def drawing(drawn_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("drawn") / "store", drawn_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def brush(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("brush") / "brush.png"
    painted = np.zeros((20, 30), np.uint8)
    painted[:, 6:] = 255
    Image.fromarray(painted).save(path)
    return path


@pytest.mark.slow
def test_what_is_drawn_is_made_as_by_the_pipeline(
    drawing: Served, drawn_bundle: Path, picture: Path, brush: Path, tmp_path: Path
) -> None:
    with MotionPipeline.from_bundle(drawn_bundle, threads=1) as pipeline:
        wanted = pipeline(str(picture), drag=DRAG, brush=str(brush), seed=3)
        assert wanted.field is not None
        files = {"input_reference": picture, "brush": brush}
        form = {"drag": json.dumps(DRAG), "seed": "3"}
        made = drawing.call("POST", "/v1/videos", form=form, files=files)
        assert made.status == 200, made.body
        job = drawing.until(made.json["id"], "completed")
        told = job["motionrt"]
        assert told["frames_sha256"] == [hashlib.sha256(wanted.frames.tobytes()).hexdigest()]
        assert told["request"]["drag"] == DRAG and "brush" not in told["request"]
        assert told["notes"] == list(wanted.notes) and told["notes"][0].startswith("drag 2 lies between the cells")
        # The field comes as a video of its own, and what was painted as it was sent.
        shown = drawing.call("GET", told["links"]["field-0"])
        assert shown.headers["Content-Type"] == "video/mp4" and shown.body[4:8] == b"ftyp"
        assert drawing.call("GET", f"/v1/videos/{job['id']}/input?name=brush").body == brush.read_bytes()
        # The same by JSON through the client, by text, with other words for the same, and from its record.
        client, path = Client(drawing.url), tmp_path / "field.npy"
        np.save(path, wanted.field)
        for fields in ({"drag": DRAG}, {"drag": ["10,10 16,8", "24.5,14"]}, {"field": path}):
            again = client.wait(client.create(None, picture, seed=3, brush=brush, **fields)["id"])
            assert again["motionrt"]["frames_sha256"] == told["frames_sha256"], fields
        assert client.content(job["id"], tmp_path / "field.mp4", "field").read_bytes() == shown.body
        (tmp_path / "record.json").write_text(json.dumps(client.record(again["id"])))
        assert [same for _, same in replayed(read_record(tmp_path / "record.json"), pipeline)] == [True]
        # Again with another drag, and what was painted stays.
        other = client.wait(client.remix(job["id"], drag="20,10 12,10")["id"])["motionrt"]
        remade = pipeline(str(picture), drag=["20,10 12,10"], brush=str(brush), seed=other["seed"])
        assert other["frames_sha256"] == [hashlib.sha256(remade.frames.tobytes()).hexdigest()]


@pytest.mark.slow
def test_a_model_says_what_may_be_drawn_on_what(drawing: Served) -> None:
    inputs = drawing.call("GET", "/v1/models").json["data"][0]["motionrt"]["inputs"]
    drawn = {name: (spec["kind"], spec["image"]) for name, spec in inputs.items() if "image" in spec}
    assert drawn == {"drag": ("tracks", "image"), "brush": ("mask", "image"), "field": ("field", "image")}


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "files", "says", "param"),
    [
        ({"drag": "[[[1, 2]"}, {}, "drag is '[[[1, 2]'; it must be tracks", "drag"),
        ({"drag": "[[[1, 2], [3]]]"}, {}, "drag 1 has the point [3]; allowed are two finite numbers", "drag"),
        ({"drag": "40,2 3,4"}, {}, "drag 1 begins at (40, 2), outside of what is kept of the picture: x from 5 to 25", "drag"),
        ({"drag": "5.2,10 9,9"}, {"brush": None}, "drag 1 begins at (5.2, 10), where the brush lets nothing move", "drag"),
        ({"brush": "x"}, {}, "brush", "brush"),
        ({}, {"brush": b"text"}, "begins with", "brush"),
        ({}, {"brush": npy(np.zeros((3, 2, 8, 8)))}, "brush cannot be read as an image", "brush"),
        ({}, {"field": None}, "field cannot be read as an array", "field"),
        ({}, {"field": npy(np.zeros((9, 2, 8, 8)))}, "field is float64 [9, 2, 8, 8]; allowed are floats", "field"),
        ({}, {"field": npy(np.array([{}]))}, "field cannot be read as an array", "field"),
    ],
    ids=["json", "point", "outside", "still", "no-file", "no-picture", "array", "no-array", "shape", "objects"],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_its_field(
    drawing: Served, picture: Path, brush: Path, tmp_path: Path,
    form: dict[str, Any], files: dict[str, bytes | None], says: str, param: str,
) -> None:  # fmt: skip
    sent = {"input_reference": picture}
    for name, data in files.items():
        sent[name] = tmp_path / name
        sent[name].write_bytes(brush.read_bytes() if data is None else data)
    reply = drawing.call("POST", "/v1/videos", form=form, files=sent)
    error = reply.json["error"]
    assert reply.status == 400 and says in error["message"] and error["param"] == param, error


@pytest.mark.slow
def test_a_form_takes_no_more_parts_for_it(drawing: Served, picture: Path) -> None:
    many = [[[x % 30, 10] for x in range(400)]]
    fine = {"drag": many, "input_reference": "data:;base64," + Client.__module__}
    assert drawing.call("POST", "/v1/videos", body=fine).code == "invalid_file"  # the numbers were taken
    assert drawing.call("POST", "/v1/videos", body={"drag": many * 6}).code == "too_many_fields"
