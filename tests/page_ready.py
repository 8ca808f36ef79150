"""How long from `python app.py` until the page can be had: `tests/page_ready.py [times]`, in JSON lines."""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # seconds


def once() -> dict[str, float]:
    """Start the app; seconds until a GET of the page succeeds, and of processor time by then and in all."""
    spent = _children()
    start = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    late = threading.Timer(LIMIT, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"ready: (http\S+)", line):
                break
        else:
            raise SystemExit(f"the app ended with {process.wait()} before it was ready")
        with urllib.request.urlopen(address[1], timeout=LIMIT) as page:
            body = page.read()
        seconds, processor = time.monotonic() - start, _processor(process.pid)
        assert b"gradio" in body, body[:300]
    finally:
        process.terminate()
        process.communicate()
        late.cancel()
    return {"ready_s": seconds, "processor_s": processor, "processor_in_all_s": _children() - spent}


def _children() -> float:
    """Processor seconds of children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _processor(pid: int) -> float:
    """Processor seconds of a running process, where the system tells them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    runs = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        runs.append(once())
        print(json.dumps({name: round(value, 2) for name, value in runs[-1].items()}), flush=True)
    median = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    print(json.dumps({"median": median, "runs": len(runs), "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
