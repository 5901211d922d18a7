"""The process that bench_cold_start measures; it imports next to nothing of its own, which would be taken for MotionRT's.

Arguments: a JSON list [bundle, memory, threads, workers that load graphs or null, image, prompt], and the parent's clock when
it started this process. Prints JSON: seconds, CPU seconds and peak MiB after each phase, and the SHA-256 of both videos.
"""

import json
import resource
import sys
from time import perf_counter, process_time

STARTED = perf_counter(), process_time()


def main(text: str, born: str) -> None:
    """Run the phases; `born`: `perf_counter()` of the parent: one clock for all processes of a machine (Linux, macOS)."""
    seconds, cpu = {"interpreter": STARTED[0] - float(born)}, {"interpreter": STARTED[1]}
    peak: dict[str, float] = {}
    bundle, memory, threads, workers, image, prompt = json.loads(text)
    clock = [perf_counter(), process_time()]

    def mark(phase: str) -> None:
        seconds[phase], cpu[phase] = perf_counter() - clock[0], process_time() - clock[1]
        unit = 1024 if sys.platform != "darwin" else 1024**2  # kilobytes, but on macOS bytes
        peak[phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        clock[:] = perf_counter(), process_time()

    from motionrt import MotionPipeline

    mark("import")
    pipeline = MotionPipeline.from_bundle(bundle, memory, threads=threads)
    mark("open")
    pipeline.load(workers)
    mark("load")
    pipeline.warm()
    mark("warm_up")
    first = pipeline(image, prompt)
    mark("first_request")
    second = pipeline(image, prompt)
    mark("second_request")
    import hashlib

    digests = [hashlib.sha256(result.frames.tobytes()).hexdigest() for result in (first, second)]
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mib": peak, "digests": digests}))


if __name__ == "__main__":
    main(*sys.argv[1:])
