"""Engines of the demo bundle, built for real: TensorRT-RTX builds ahead of time on a machine with no GPU.

Every graph is built for sm_89 and sm_120 together, in fp16 and bf16, twice, in copies of the bundle at different places.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from motionrt.export.engines import build as engine_build
from motionrt.export.engines import checks as engine_checks
from motionrt.export.engines import from_onnx as engine_from_onnx
from motionrt.export.engines.build import Built, Options, build_engines, locked, recipe_sha256
from motionrt.export.engines.checks import check_request, check_room, load_library, scan_operators
from motionrt.export.engines.graph import OURS
from motionrt.export.engines.process import Event, run_builder
from motionrt.export.engines.profiles import parse_profile, profiles_of
from motionrt.runtime.backends.tensorrt.engine_file import EngineFile, EnginePort, Span, engine_folder
from motionrt.runtime.backends.tensorrt.estimate import estimate
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, EngineError, InputError
from motionrt.runtime.files import sealed, sha256_of

rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: `pip install motionrt[rtx]`", exc_type=ImportError)

pytestmark = pytest.mark.timeout(900)  # the first of those marked slow waits for 36 builds

DEMO = Path(__file__).resolve().parents[3] / "demo/bundle"
TARGETS = ("sm_89", "sm_120")
LOW = ("float16", "bfloat16")
GRAPHS = tuple(Bundle.open(DEMO).graphs)
ATTENTIONS = {"text_query": 6, "text": 2, "motion": 6, "appearance": 5, "cama": 4, "step": 4, "step_plain": 8}
Sets = Mapping[tuple[str, int], Mapping[str, Built]]


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """(dtype, which time) -> graph -> its engine. The two copies of the bundle have paths of different lengths."""
    places = [tmp_path_factory.mktemp("first") / "b", tmp_path_factory.mktemp("second") / "a-longer-name-for-the-same-bundle"]
    for place in places:
        shutil.copytree(DEMO, place, ignore=shutil.ignore_patterns("engines"))

    def build(job: tuple[str, int]) -> dict[str, Built]:
        dtype, time = job
        return {item.file.graph: item for item in build_engines(places[time], Options(TARGETS, dtype=dtype))}

    jobs = [("float16", 0), ("bfloat16", 0), ("bfloat16", 1)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(build, jobs), strict=True))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the demo bundle, for tests that change it; its graph `encode` builds in half a second."""
    shutil.copytree(DEMO, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return tmp_path / "bundle"


def small(bundle: Path, **changes: Any) -> Built:
    """The engine of `encode`, for one target."""
    (built,) = build_engines(bundle, Options(("sm_89",), **{"graphs": ("encode",), **changes}))
    return built


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
def test_every_graph_builds_and_is_in_place(sets: Sets, dtype: str) -> None:
    built = sets[dtype, 0]
    assert tuple(built) == GRAPHS
    for name, item in built.items():
        assert not item.cached
        folder = item.file.folder
        assert folder.name == f"rtx-sm_89+sm_120-{dtype}"
        assert EngineFile.read(folder / f"{name}.json") == item.file
        assert item.file.targets == TARGETS and item.file.dtype == dtype and item.file.library == rtx.__version__
        assert sha256_of(item.file.engine_path) == item.file.engine_sha256
        assert item.file.engine_bytes > 100_000 and item.file.peak_rss_mib > 50 and item.file.build_seconds > 0
    assert {path.name for path in folder.iterdir()} == {".lock"} | {
        n for item in built.values() for n in (item.file.file, f"{item.file.graph}.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_second_build_gives_the_same_bytes(sets: Sets, name: str) -> None:
    builds = sets["bfloat16", 0][name], sets["bfloat16", 1][name]
    first, second = (built.file for built in builds)
    assert first.folder != second.folder
    assert first.built_from_sha256 == second.built_from_sha256
    if not all(built.repeatable for built in builds):
        pytest.skip("this system does not let a process switch address randomisation off, which the builder's tables follow")
    assert first.engine_path.read_bytes() == second.engine_path.read_bytes()


@pytest.mark.slow
def test_precision_reaches_the_engine(sets: Sets) -> None:
    """Of every graph that has weights."""
    for name in set(GRAPHS) - {"step_extrapolated"}:
        assert sets["float16", 0][name].file.engine_sha256 != sets["bfloat16", 0][name].file.engine_sha256


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", GRAPHS)
def test_interface_is_the_declared_one(sets: Sets, name: str, dtype: str) -> None:
    """Names, order, dtypes and sizes as the built network has them, against bundle.json itself."""
    declared = json.loads((DEMO / "bundle.json").read_text())["graphs"][name]
    file = sets[dtype, 0][name].file
    loose = {"tokens", "clips", "references", "steps"}
    for ports, kind in ((file.inputs, "inputs"), (file.outputs, "outputs")):
        assert [(p.name, p.dtype, len(p.dims)) for p in ports] == [
            (p["name"], p["dtype"], len(p["dims"])) for p in declared[kind]
        ]
        for port, record in zip(ports, declared[kind], strict=True):
            for got, dim in zip(port.dims, record["dims"], strict=True):
                if isinstance(dim, int):
                    assert got == dim
                else:  # the batch is static; what follows the request is not
                    assert got == (-1 if dim["name"] in loose else dim["opt"]), (port, dim)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_attention_became_iattention(sets: Sets, name: str, dtype: str) -> None:
    """Counted by the builder process in its network; none may be taken apart, so each has a fused kernel on both targets."""
    built = sets[dtype, 0][name]
    assert built.file.attentions == ATTENTIONS.get(name, 0)
    assert built.decomposed == 0
    assert built.network_layers > 20 and built.figures["layers"] >= 1


def test_build_refuses_attention_that_the_network_lacks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "count_attentions", lambda model: 1)
    with pytest.raises(EngineError, match="has 1 attentions, of which the builder took 0"):
        small(bundle)
    assert not list(bundle.glob("engines/*/*.json"))


def test_float32_attention_is_taken_apart_and_says_so(bundle: Path) -> None:
    built = small(bundle, graphs=("text",), dtype="float32")
    assert (built.file.attentions, built.decomposed) == (2, 2)


@pytest.mark.slow
def test_unchanged_engines_are_not_built_again(sets: Sets) -> None:
    files = [item.file for item in sets["float16", 0].values()]
    times = [file.engine_path.stat().st_mtime_ns for file in files]
    start = time.perf_counter()
    again = list(build_engines(files[0].folder.parent.parent, Options(TARGETS)))
    assert time.perf_counter() - start < 10, "less than any of the large graphs takes to build"
    assert [item.file for item in again] == files and all(item.cached for item in again)
    assert [file.engine_path.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize("what", ["recipe", "profile", "library", "content", "sidecar"])
def test_changed_identity_builds_again(bundle: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, options = small(bundle).file, {}
    compiled = file.folder / f"encode-NVIDIA_L4-580.1-{file.engine_sha256[:12]}.rtxcache"  # see tensorrt/runtime_cache.py
    compiled.write_bytes(b"kernels")
    if what == "recipe":
        monkeypatch.setattr(engine_build, "recipe_sha256", lambda kernel: "0" * 64)
    elif what == "profile":
        options = {"profiles": (parse_profile("batch=1..2"),)}
    elif what == "library":
        text = file.to_json().replace(file.library, "1.0.0.0")
        (file.folder / "encode.json").write_text(text)
    elif what == "content":
        file.engine_path.write_bytes(file.engine_path.read_bytes()[:-1] + b"!")
    else:
        (file.folder / "encode.json").write_text("{")
    again = small(bundle, **options)
    assert not again.cached
    assert small(bundle, **options).cached
    assert len(list(file.folder.glob("*.engine"))) == 1, "the predecessor is removed"
    assert compiled.exists() == (again.file.engine_sha256 == file.engine_sha256), "with what was compiled of it"
    if what == "profile":
        assert again.file.inputs == (EnginePort("image", "float32", (-1, 3, 64, 64)),)
        assert again.file.profile_for({"image": (2, 3, 64, 64)}) == 1
        assert again.file.profile_for({"image": (1, 3, 64, 64)}) == 0


def test_other_weights_beside_the_graph_build_again(bundle: Path) -> None:
    """The graph's own file stays as it is: only the digest of the weights tells the two apart."""
    path, data = bundle / "graphs/encode.onnx", bundle / "graphs/encode.weights"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=data.name, size_threshold=1024)

    def declare() -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        entry = manifest["graphs"]["encode"]
        entry |= {"sha256": sha256_of(path), "data": {"file": f"graphs/{data.name}", "sha256": sha256_of(data)}}
        (bundle / "bundle.json").write_text(json.dumps(sealed(manifest)))

    declare()
    first = small(bundle).file
    assert first.weights_sha256 == sha256_of(data) and small(bundle).cached
    weights = np.fromfile(data, np.float32)
    (weights * 2).tofile(data)
    declare()
    again = small(bundle)
    assert not again.cached and again.file.onnx_sha256 == first.onnx_sha256
    assert again.file.engine_sha256 != first.engine_sha256


def test_recipe_is_the_code_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe_sha256()
    monkeypatch.setattr(engine_build, "RECIPE", engine_build.RECIPE[1:])
    assert recipe_sha256() != whole


def test_builder_is_locked_against_a_second(bundle: Path) -> None:
    folder = engine_folder(bundle, "rtx", ["sm_89"], "float16")
    with locked(folder), pytest.raises(EngineError, match=f"another build \\(process {os.getpid()}\\) is at work"):
        small(bundle)
    assert not small(bundle).cached


def command(bundle: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "motionrt", "build", str(bundle), "--target", "sm_89", *arguments]


def test_killed_build_keeps_the_previous_engine(bundle: Path) -> None:
    """SIGKILL while the builder runs: nothing of the old pair is touched, and the next build cleans up."""
    old = small(bundle)
    before = {path.name: path.read_bytes() for path in old.file.folder.iterdir() if path.name != ".lock"}
    with subprocess.Popen(
        command(bundle, "--graphs", "encode,step", "--profile", "batch=1..2"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "step: building" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    leftovers = list(old.file.folder.glob(".build-*"))
    assert len(leftovers) == 1, "it was killed at work"
    encode = EngineFile.read(old.file.folder / "encode.json")
    encode.check(Bundle.open(bundle).graph("encode"))
    assert len(encode.profiles) == 2, "what was done before the kill counts"
    assert not (old.file.folder / "step.json").exists()
    again = small(bundle)
    assert not list(old.file.folder.glob(".build-*"))
    assert {path.name: path.read_bytes() for path in again.file.folder.glob("*.engine")} == {
        name: content for name, content in before.items() if name.endswith(".engine")
    }


def test_kill_between_engine_and_sidecar_keeps_the_previous_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = small(bundle).file

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_build, "replacing", killed)
    with pytest.raises(KeyboardInterrupt):
        small(bundle, profiles=(parse_profile("batch=1..2"),))
    monkeypatch.undo()
    kept = EngineFile.read(old.folder / "encode.json")
    kept.check(Bundle.open(bundle).graph("encode"))
    assert kept == old and len(list(old.folder.glob("*.engine"))) == 2
    small(bundle, profiles=(parse_profile("batch=1..2"),))
    assert len(list(old.folder.glob("*.engine"))) == 1


@pytest.mark.parametrize(("limit", "words"), [(100_000, "cannot write graph"), (700_000, "the disk is full")])
def test_full_disk_is_a_plain_error_and_keeps_the_previous_engine(bundle: Path, limit: int, words: str) -> None:
    """A limit on file sizes stands for the disk: for the builder's input first, then for the engine itself."""
    old = small(bundle).file
    code = f"""
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from motionrt.runtime.cli.main import main
main(sys.argv[1:])
"""
    arguments = command(bundle, "--graphs", "encode", "--profile", "batch=1..2")[4:]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and words in done.stderr and "ree some" in done.stderr, done.stderr
    assert EngineFile.read(old.folder / "encode.json") == old
    old.check(Bundle.open(bundle).graph("encode"))
    assert {path.suffix for path in old.folder.iterdir()} == {".engine", ".json", ""}
    assert len(list(old.folder.iterdir())) == 3


def test_room_is_checked_before_building(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "available_memory", lambda: 2**20)
    with pytest.raises(EngineError, match=r"takes about .* of engine, .* of memory.*; 1 MiB of memory are free\..*--force"):
        small(bundle)
    assert not small(bundle, force=True).cached
    with pytest.raises(EngineError, match="of disk while building; .* free. Free some"):
        check_room("step", estimate(10**16), bundle)


ATTENTION = (
    helper.make_node("Mul", ["x", "x"], ["k"]),
    helper.make_node("Add", ["x", "x"], ["v"]),
    helper.make_node("Attention", ["x", "k", "v"], ["y"]),
)


def graph_file(
    place: Path, *nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT, shape: Sequence[int] = (1, 2, 8, 16)
) -> Path:
    """A graph x -> y in `place`, as a builder finds it."""
    ports = [helper.make_tensor_value_info("x", dtype, shape)]
    outputs = [helper.make_tensor_value_info("y", dtype, None)]
    graph = helper.make_graph(list(nodes), "g", ports, outputs)
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(domain, 1) for domain in domains)]
    (place / "graph.onnx").write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return place


JOB = {
    "flavor": "rtx", "targets": ["sm_89"], "dtype": "float16", "profiles": [], "operators": [], "onnx": "graph.onnx",
    "once": False, "full": False, "dtypes": {},
}  # fmt: skip


def test_builder_that_crashes_is_a_plain_error(tmp_path: Path) -> None:
    """A node that matches a creator of the library's own: parsing it ends the process (SIGSEGV), not ours."""
    node = helper.make_node(
        "MyelinWeightsTransformPlugin", ["x", "x"], ["y"], domain=OURS, plugin_version="1", plugin_namespace=""
    )
    place = graph_file(tmp_path, node)
    with pytest.raises(EngineError, match=r"(?s)graph 'g' cannot be built: the builder died with SIG\w+: .*still in place"):
        run_builder("g", JOB, place)
    with pytest.raises(EngineError, match=r"motionrt::MyelinWeightsTransformPlugin \(1x\).*model-local function"):
        scan_operators(ir.load(place / "graph.onnx"), "g")


def test_scan_refuses_unknown_operators_of_the_standard_domain(tmp_path: Path) -> None:
    place = graph_file(tmp_path, helper.make_node("ROIAlign_TRT", ["x"], ["y"]))
    with pytest.raises(EngineError, match=r"no engine builder knows: ROIAlign_TRT \(1x\)"):
        scan_operators(ir.load(place / "graph.onnx"), "g")


def test_builder_that_is_killed_says_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(engine_from_onnx, "__file__", str(script))
    with pytest.raises(EngineError, match="died with SIGKILL.*ran out of memory, most likely: it takes about .* of memory"):
        run_builder("g", JOB, tmp_path, estimate(2**20))


def test_builder_failure_carries_the_loggers_text_and_a_hint(tmp_path: Path) -> None:
    """fp32 attention under an fp16 job: no fused kernel, and taking it apart is not allowed there."""
    place = graph_file(tmp_path, *ATTENTION)
    with pytest.raises(EngineError, match="(?s)not supported by a dedicated kernel.*use another --dtype"):
        run_builder("g", JOB, place)
    assert not (place / "engine").exists()


@pytest.mark.parametrize("allowed", ["once", "full"])
def test_an_attention_without_a_kernel_is_taken_apart_where_that_is_allowed(allowed: str, tmp_path: Path) -> None:
    """In a graph that a request runs once, and in one that has float32 attention on purpose: an island."""
    result = run_builder("g", {**JOB, allowed: True}, graph_file(tmp_path, *ATTENTION))
    assert (result["attentions"], result["decomposed"]) == (1, 1)


def test_builder_refuses_operators_that_the_parser_lacks(tmp_path: Path) -> None:
    place = graph_file(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(EngineError, match="no importer for the operators ImageDecoder.*--graphs"):
        run_builder("g", {**JOB, "operators": ["Relu", "ImageDecoder"]}, place)
    assert run_builder("g", {**JOB, "operators": ["Relu"]}, place)["attentions"] == 0


@pytest.mark.parametrize("content", [b"this is no protobuf", b"\x08\x0a\xff\xff\xff\xff"], ids=["text", "truncated"])
def test_file_that_is_no_graph_is_a_plain_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(EngineError, match="graph 'g' cannot be built: (the parser took the file|.*arse)"):
        run_builder("g", JOB, tmp_path)


@pytest.mark.parametrize(("head", "apart"), [(8, 1), (16, 0), (256, 0), (264, 1)])
def test_heads_without_a_fused_kernel_are_taken_apart(tmp_path: Path, head: int, apart: int) -> None:
    """Both sides of both ends of what fused kernels take."""
    place = graph_file(tmp_path, *ATTENTION, dtype=TensorProto.FLOAT16, shape=[1, 2, 8, head])
    result = run_builder("g", JOB, place)
    assert (result["attentions"], result["decomposed"]) == (1, apart)


def test_progress_is_reported(bundle: Path) -> None:
    events: list[Event] = []
    list(build_engines(bundle, Options(TARGETS, graphs=("text",)), events.append))
    assert events[0] == Event("text", "converting")
    assert events[1].phase.startswith("building: about ")
    assert any(event.total >= event.done > 0 for event in events[2:]), "phases of IProgressMonitor"


def test_caller_that_stops_listening_ends_the_builder(bundle: Path) -> None:
    class Stop(Exception):
        pass

    def listen(event: Event) -> None:
        if event.total:
            raise Stop

    with pytest.raises(Stop):
        list(build_engines(bundle, Options(TARGETS, graphs=("text",)), listen))
    assert [path.name for path in (bundle / "engines").glob("*/*")] == [".lock"]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target that the flavor lacks": ({"targets": ("sm_90",)}, EngineError, "no target sm_90; it builds for sm_75, .*tensorrt"),
    "no target": ({"targets": ()}, InputError, "no target was given"),
    "malformed target": ({"targets": ("h100",)}, InputError, "such as sm_89"),
    "bf16 on Turing": ({"targets": ("sm_75", "sm_89"), "dtype": "bfloat16"}, EngineError, "needs sm_80 or newer; sm_75"),
    "unknown dtype": ({"dtype": "int8"}, InputError, "allowed: float32, float16, bfloat16"),
    "unknown flavor": ({"flavor": "onnx"}, InputError, "allowed: rtx, tensorrt"),
    "unknown graph": ({"graphs": ("nope",)}, InputError, "this bundle has .*text_query.*step"),
    "unknown size": ({"profiles": (parse_profile("bach=1..2"),)}, InputError, "names 'bach'; the sizes .* are batch"),
    "size out of range": ({"profiles": (parse_profile("batch=1..9"),)}, InputError, "declares batch 1 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_refused_before_anything_is_built(bundle: Path, case: str) -> None:
    changes, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        list(build_engines(bundle, Options(**{"targets": ("sm_89",), **changes})))
    assert not list(bundle.glob("engines/*/*.engine"))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the other way round: there is a GPU here")
def test_full_tensorrt_builds_only_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="builds on the GPU that will run the engine, and there is none: .*--flavor rtx"):
        check_request(rtx, "tensorrt", ["sm_90"], "float16")
    gpu = engine_checks.find_gpus.__globals__["Gpu"]("H100", "sm_90", 1, "1", "13.0")
    monkeypatch.setattr(engine_checks, "find_gpus", lambda: [gpu])
    assert check_request(rtx, "tensorrt", ["sm_90"], "float16") == ("sm_90",)
    with pytest.raises(EngineError, match="builds for the GPU that it runs on, sm_90, not for sm_89"):
        check_request(rtx, "tensorrt", ["sm_89"], "float16")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"pip install motionrt\[rtx\]"):
        load_library("rtx")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("batch=1..4", {"batch": (1, 4, 4)}),
        ("batch=2", {"batch": (2, 2, 2)}),
        ("batch=1..2..4,tokens=8", {"batch": (1, 2, 4), "tokens": (8, 8, 8)}),
    ],
)
def test_parse_profile(text: str, sizes: dict[str, tuple[int, int, int]]) -> None:
    assert parse_profile(text) == sizes


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=4..1", "batch=0..2", "batch=1..9..4", "=1", "batch=1-4", ""])
def test_parse_profile_refuses(text: str) -> None:
    with pytest.raises(InputError, match="--profile is"):
        parse_profile(text)


def test_profiles_are_static_where_only_the_batch_varies() -> None:
    bundle = Bundle.open(DEMO)
    (static,) = profiles_of(bundle.graph("step"))
    assert all(span.min == span.opt == span.max for span in static.values())
    point, loose = profiles_of(bundle.graph("text_query"))
    assert point["input_ids"] == Span((1, 16), (1, 16), (1, 16))
    assert loose["input_ids"] == Span((1, 1), (1, 16), (1, 256))
    more = profiles_of(bundle.graph("step"), [parse_profile("batch=1..3")])[1]
    doubled = [span for span in more.values() if span.max[:1] == (6,)]
    assert doubled and all((span.min[0], span.opt[0]) == (2, 6) for span in doubled if len(span.max) > 1), "2*batch"


def test_command_builds_and_says_what(bundle: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = run("build", bundle, "--target", "sm_89", "--target", "sm_120", "--graphs", "encode,text")
    assert (status, err) == (0, ""), err
    assert "text: building: about " in out and "2 attentions; " in out and "2 engines, 2 of them built now" in out
    status, out, _ = run("build", bundle, "-t", "sm_120,sm_89", "-g", "encode", "-g", "text")
    assert status == 0 and "2 engines, 0 of them built now" in out and out.count("up to date") == 2


def test_command_refuses_in_one_line(bundle: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = run("build", bundle, "--target", "sm_90")
    assert status == 2 and err.startswith("motionrt: ") and err.count("\n") == 1 and "sm_120" in err


def test_building_imports_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from motionrt.runtime.cli.main import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *command(bundle, "-g", "encode")[4:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_our_domain_is_that_of_the_exporter() -> None:
    from motionrt.export.onnx.functions import DOMAIN

    assert OURS == DOMAIN
