"""Nothing is sent, looked up or written but what was asked for: a whole `generate`, and every import, is watched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from motionrt.runtime.backends.kinds import BACKENDS

# Runs a command and tells of every event of Python's audit hook that names a host, makes a connection or changes a file.
WATCH = """
import json, os, sys
seen = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib", "http", "ftplib", "smtplib")):
        seen.append([event, repr(arguments)])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        flags, mode = arguments[2], arguments[1]
        if flags & (os.O_WRONLY | os.O_RDWR) if flags else set(mode or "r") & set("wax+"):
            seen.append([event, os.path.abspath(os.fsdecode(arguments[0]))])
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        seen.append([event, *(os.path.abspath(os.fsdecode(name)) for name in arguments[:2] if isinstance(name, (str, bytes)))])
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn"):
        seen.append([event, repr(arguments[0])])
sys.addaudithook(watch)
told = sys.argv.pop(1)
try:
    exec(sys.argv.pop(1))
finally:
    found = list(seen)
    with open(told, "w") as file:
        json.dump(found, file)
"""
NAMES = ("ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK")
COMMAND = "from motionrt.runtime.cli.main import main; main()"
# What every library that looks up a host by name goes through, Python's or not.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r) {
  int (*f)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
  fprintf(stderr, "LOOK-UP %s\\n", n ? n : "-");
  return f(n, s, h, r);
}
"""


def homeless(tmp_path: Path, **more: str) -> tuple[Path, dict[str, str]]:
    """An empty folder, and an environment in which it is every home that a program may think of writing to."""
    home = tmp_path / "home"
    home.mkdir()
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "TMPDIR")
    kept = {key: value for key, value in os.environ.items() if key not in NAMES}
    return home, kept | dict.fromkeys(names, str(home)) | {"PYTHONDONTWRITEBYTECODE": "1"} | more


def test_generate_writes_its_video_and_looks_nothing_up(fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    """Watched from inside by an audit hook, and from outside by a home that must stay empty: libraries in C are not heard."""
    home, environment = homeless(tmp_path)
    bundle, still, out = tmp_path / "bundle", tmp_path / "still.png", tmp_path / "out" / "video.mp4"
    shutil.copytree(fake_bundle, bundle)
    Image.new("RGB", (16, 16), "red").save(still)
    out.parent.mkdir()
    events = tmp_path / "events.json"
    asked = ["generate", "-b", bundle, "-m", fake_memory, "-i", still, "-p", "a red ball", "-o", out]
    command = [sys.executable, "-P", "-c", WATCH, events, COMMAND, *asked]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 0 and sorted(home.rglob("*")) == []
    allowed = (out.parent, bundle, fake_memory)  # the video; stamps of files that were read; SQLite's own files
    for event, *names in json.loads(events.read_text()):
        assert event in ("open", "os.mkdir", "os.rename"), (event, names)
        for name in names:
            assert name == os.devnull or any(Path(name).is_relative_to(folder) for folder in allowed), (event, names)


def test_no_import_or_command_writes_anything(fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    """All modules of the run side but those for PyTorch or Ray, and every command that is to write nothing, in a process with
    an empty home."""
    home, environment = homeless(tmp_path)
    code = """
import importlib, pkgutil, motionrt.runtime, sys
for module in pkgutil.walk_packages(motionrt.runtime.__path__, "motionrt.runtime."):
    if not module.name.endswith((".torch_backend", ".torch_precision", ".torch_program", ".replicas.ray")):
        importlib.import_module(module.name)
from motionrt.runtime.cli.main import main
bundle, memory = sys.argv[1:]
for line in (["--help"], ["inspect", bundle], ["doctor", bundle], ["verify", bundle], ["bench", bundle, "-n", "1"],
             ["memory", "stats", memory], ["memory", "verify", memory], ["memory", "search", memory, "red", "-b", bundle]):
    try:
        main(line)
    except SystemExit as stop:
        assert not stop.code, line
"""
    command = [sys.executable, "-P", "-c", code, str(fake_bundle), str(fake_memory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(tmp_path.rglob("*")) == [home]


@pytest.mark.parametrize("setting", [None, "0"], ids=["not set", "set by the user"])
@pytest.mark.parametrize("name", NAMES)
def test_import_switches_telemetry_off_unless_the_user_has_chosen(tmp_path: Path, name: str, setting: str | None) -> None:
    _, environment = homeless(tmp_path, **({} if setting is None else {name: setting}))
    code = f"import motionrt, os; print(os.environ['{name}'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (setting or "1")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_process_that_stays_looks_nothing_up(fake_bundle: Path, tmp_path: Path, backend: str) -> None:
    """ONNX Runtime sends its telemetry 20 seconds after the start, from a thread of its own; OpenVINO when it is imported."""
    if BACKENDS[backend].probe("cpu") is not None:
        pytest.skip(f"needs {backend}: {BACKENDS[backend].install}")
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux's way to put a function before a library's")
    home, environment = homeless(tmp_path)
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    code = (
        "import sys, time, numpy as np; from motionrt import MotionPipeline; "
        "pipeline = MotionPipeline.from_bundle(sys.argv[1], backend=sys.argv[2]); "
        "pipeline(np.zeros((16, 16, 3), np.uint8), 'a', motion_scale=0); time.sleep(25)"
    )
    bundle = shutil.copytree(fake_bundle, tmp_path / "bundle")
    command = [sys.executable, "-P", "-c", code, str(bundle), backend]
    done = subprocess.run(command, env=environment | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True)
    assert done.returncode == 0 and "LOOK-UP" not in done.stderr, done.stderr
    assert sorted(home.rglob("*")) == []
